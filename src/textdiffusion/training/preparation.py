"""What a training needs of its text: the corpus, the tokenizer, the config with its gaps filled in, the windows."""

from __future__ import annotations

import dataclasses
import hashlib

from textdiffusion.config import RunConfig
from textdiffusion.errors import UserError
from textdiffusion.families import family
from textdiffusion.networks.counts import LONGEST, MOST_SYMBOLS, MOST_TOKENS, slots_for
from textdiffusion.networks.ngrams import longest_for
from textdiffusion.text.data import Corpus, fingerprint, load_corpus, tokenize
from textdiffusion.text.shards import TrainingText, is_prepared, open_mixture, training_text
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.tokenizer import build as build_tokenizer
from textdiffusion.text.windows import Windows, evaluation_labels, evaluation_windows

VALIDATION_TOKENS = 8192  # read at each validation
SAMPLED = 100_000  # characters of a text, by which its tokens are reckoned
CPU_TOKENS, GPU_TOKENS = 600_000, 30_000_000  # learnt from in a minute, about: right within a factor of a few


def prepare(
    config: RunConfig, tokenizer: Tokenizer | None = None, device: str = "cpu"
) -> tuple[Corpus, Tokenizer, RunConfig]:
    """Read the text and make, or take, the tokenizer; the config with what follows from them filled in. Of prepared
    corpora the tokens are read when they are needed, and the text is not there. ``device``: where it will be learnt."""
    if is_prepared(config.data.source):
        corpora, _ = open_mixture(config.data.source)
        corpus = Corpus(config.data.source, [], [], provenance="; ".join(c.provenance for c in corpora))
        text = hashlib.sha256(" ".join(c.fingerprint for c in corpora).encode()).hexdigest()[:16]
        own, tokenizer = tokenizer, corpora[0].tokenizer
        if config.data.label is not None:
            raise UserError("prepared corpora have no labels; leave out --label, or train on the text itself")
        if config.init_from and config.text == "":
            own = build_tokenizer(config.tokenizer, [])
        if own is not None and own.to_json() != tokenizer.to_json():
            raise UserError(
                f"{config.data.source} was prepared with another tokenizer than the model's; prepare it with "
                f"--tokenizer {config.tokenizer if config.init_from else 'hf:RUN'}"
            )
        config = dataclasses.replace(config, tokenizer=tokenizer.kind)
    else:
        corpus = load_corpus(config.data)
        tokenizer = tokenizer or build_tokenizer(config.tokenizer, corpus.train)
        text = fingerprint(corpus)
    if config.text not in ("", text):
        raise UserError(
            f"the text of {config.data.source} is not the one this run was trained on, so what was held out "
            "is unknown; put the text back, or start a new run"
        )
    labels = sorted(set(corpus.labels.get("train", ())))
    if config.text != "" and labels != config.labels:
        raise UserError(f"{config.data.source} no longer has the labels of this run; put them back, or start a new run")
    network = config.network
    if not (config.text or config.init_from):
        if not family(config.family).infills:
            # What stands before a position is there in full only where text is written from left to right.
            passes = _passes(config, corpus, tokenizer, device)
            network = {"ngrams": longest_for(passes)} | network
        size = sum(map(len, corpus.train))
        if config.family == "autoregressive":
            known = tokenizer.kind in ("char", "byte") and tokenizer.vocabulary <= MOST_SYMBOLS
            network = {"counts": LONGEST if known and 0 < size <= MOST_TOKENS else 0} | network
        if network.get("counts"):
            network = {"slots": slots_for(size)} | network
    if network.get("counts") and is_prepared(config.data.source):
        raise UserError(
            "network.counts are of a text that is read whole; leave them out with prepared corpora "
            f"({'begin with a run that has none' if config.init_from else '--set network.counts=0'})"
        )
    config = dataclasses.replace(
        config, vocabulary=tokenizer.vocabulary, start=tokenizer.end_of_text, text=text, labels=labels, network=network
    )
    return corpus, tokenizer, config


def _passes(config: RunConfig, corpus: Corpus, tokenizer: Tokenizer, device: str) -> float:
    """How often a training will read its text, about, and of a mixture the part that it reads oftenest: tokens are
    counted in a sample, and minutes hold what they hold on an ordinary processor or GPU."""
    training = config.training
    read = (training.minutes or 0) * (CPU_TOKENS if device == "cpu" else GPU_TOKENS)
    if training.steps is not None:
        read = training.steps * training.batch * int(config.network["window"])
    if is_prepared(config.data.source):
        parts = zip(*open_mixture(config.data.source), strict=True)
        return max(read * weight / max(len(part.parts["train"].tokens), 1) for part, weight in parts)
    some = ""
    for text in corpus.train:
        some += text[: SAMPLED - len(some)]
        if len(some) == SAMPLED:
            break
    return read / max(sum(map(len, corpus.train)) * len(tokenizer.encode(some)) / max(len(some), 1), 1)


def to_learn(config: RunConfig, corpus: Corpus, tokenizer: Tokenizer) -> TrainingText:
    """The windows of a training, and those held out for its validations.

    Raises:
        UserError: too short a text, or damaged shards.
    """
    length, seed = int(config.network["window"]), config.training.seed
    if is_prepared(config.data.source):
        return training_text(config.data.source, length, seed, VALIDATION_TOKENS)
    tokens = tokenize(corpus, tokenizer)
    held_out = evaluation_windows(tokens["validation"], length, limit=VALIDATION_TOKENS)
    learnt, held = (len(tokens[part].tokens) for part in ("train", "validation"))
    labels = evaluation_labels(tokens["validation"], length, limit=VALIDATION_TOKENS)
    return TrainingText(Windows(tokens["train"], length, seed), held_out, learnt, held, labels)
