"""What control costs, and what it gives: constraints in every family, gaps of held-out text, and guidance by labels.

    python examples/control.py OUT --runs runs/masked runs/uniform ... --judge runs/autoregressive
    python examples/control.py OUT --labelled runs/labelled

Of every run of ``--runs``: so many texts (--texts) under each kind of constraint, each checked by means of its own;
what they cost in CPU time beside free ones, and in quality: bits a character to the judge, a left-to-right run, and
the share of their words that occur in its training text. And gaps of held-out windows, filled. The judge is measured
beside them: held to the same patterns, and filling gaps of which it sees the left side alone.

Of every run of ``--labelled``, trained with ``train --label``: texts of each label over a sweep of guidance weights,
the share that a naive Bayes classifier of character trigrams, which knows nothing of the model, takes for their label,
and the entropy of their words.

Every row is written to OUT/rows.jsonl as soon as it is there, and is not measured again, so the script may be stopped
and started; OUT/control.md has the tables.
"""

from __future__ import annotations

import argparse
import collections
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows, markdown

import textdiffusion as td
from textdiffusion.evaluation.measures import BITS, text_statistics
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import HasCurve, Process, State
from textdiffusion.text.data import Corpus, tokenize, word_set
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.training.preparation import prepare

PARTS = ("constraints", "gaps", "guidance")
WEIGHTS = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
RAMPS = (0.0, 1.0)
REGEX, CONTAINED, ACROSTIC, COMMONEST = r"Then [a-z ,]+\.", "Prince", "war", 300


# -- constraints --------------------------------------------------------------------------------------------------


def kinds(words: list[str]) -> dict[str, tuple[dict[str, Any], Callable[[str], bool]]]:
    """Each kind of constraint: how it is asked for, and whether a text satisfies it, seen without the library."""
    allowed = set(words) | {word[:1].upper() + word[1:] for word in words}
    return {
        "free": ({}, lambda text: True),
        "regex": ({"regex": REGEX}, lambda text: re.fullmatch(REGEX, text) is not None),
        "must contain": ({"must_contain": CONTAINED}, lambda text: CONTAINED in text),
        "words": ({"words": words}, lambda text: set(re.findall(r"[^\W\d_]+", text)) <= allowed),
        "acrostic": (
            {"acrostic": ACROSTIC},
            lambda text: [line[:1].lower() for line in text.split("\n")] == list(ACROSTIC),
        ),
    }


def bits_of(judge: td.Model, texts: list[str]) -> float | None:
    """Bits a character of texts to a left-to-right model, exact; what it cannot spell is left out."""
    nats, characters = 0.0, 0
    known = [judge.tokenizer.encode(text) for text in texts if not judge.tokenizer.unseen(text)]
    known = [ids for ids in known if len(ids) <= judge.window]
    for length in {len(ids) for ids in known}:
        some = [ids for ids in known if len(ids) == length]
        with torch.inference_mode():
            nats += float(judge.process.nll(torch.tensor(some), Noise.of(0, len(some))).total.sum())
        characters += sum(int(judge.tokenizer.characters[np.array(ids)].sum()) for ids in some)
    return nats * BITS / characters if characters else None


def constrained(
    model: td.Model, judge: td.Model, book: set[str], how: dict[str, Any], fits: Callable[[str], bool],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Texts under one constraint, free ones by the same sampler: how many satisfy it, their cost and quality."""
    how["sampler"], how["grid"] = model.recommended(options.calls, options.length, held=True)
    model.sample(1, options.length, 2, **how)  # patterns are compiled once
    begin = time.process_time()
    texts = model.sample(options.texts, options.length, options.calls, seed=1, **how)
    spent = time.process_time() - begin
    return {
        "texts": len(texts), "satisfied": sum(map(fits, texts)), "ms a text": 1000 * spent / len(texts),
        "bits": bits_of(judge, texts), "words": text_statistics(texts, book).valid_words, "example": texts[0],
    }  # fmt: skip


# -- gaps ---------------------------------------------------------------------------------------------------------


def gaps(corpus: Corpus, judge: td.Model, options: argparse.Namespace) -> list[np.ndarray]:
    """Held-out windows, int64 [L], evenly spaced."""
    runs = tokenize(corpus, judge.tokenizer)["validation"]
    whole = [w for w in evaluation_windows(runs, options.window) if len(w) == options.window]
    return whole[:: max(1, len(whole) // options.gaps)][: options.gaps]


@torch.inference_mode()
def gap_bits(process: Process, ids: np.ndarray, gap: slice, draws: int = 4) -> float | None:
    """Bits a character of a gap given all else: of a masked family, whose network takes no time, a draw of its bound,
    the mean over numbers n = 1 .. m of hidden tokens of m / n times what they cost; None for other families."""
    if not isinstance(process, HasCurve) or process.remembers:
        return None
    m, rng, rows = gap.stop - gap.start, np.random.default_rng(0), []
    for n in range(1, m + 1):
        rows += [(n, rng.choice(m, n, replace=False) + gap.start) for _ in range(draws)]
    hidden = torch.zeros(len(rows), len(ids), dtype=torch.bool)
    for i, (_, places) in enumerate(rows):
        hidden[i, torch.from_numpy(places)] = True
    x = torch.from_numpy(ids).expand(len(rows), -1)
    state = State(torch.where(hidden, process.vocabulary, x), torch.full((len(rows),), 0.5, dtype=torch.float64))
    log_p = process.predict(state, hidden).log_p.gather(-1, x[hidden].unsqueeze(-1)).squeeze(-1).double()
    cost = torch.zeros(len(rows), dtype=torch.float64).index_add(0, hidden.nonzero()[:, 0], -log_p)
    weight = torch.tensor([m / n for n, _ in rows])
    return float((cost * weight).mean()) * BITS / m


@torch.inference_mode()
def left_bits(judge: td.Model, ids: np.ndarray, gap: slice) -> float | None:
    """Bits a character of the gap to a left-to-right model that sees what stands on its left; None if its likelihood is
    a bound, for the difference of two bounds is nothing."""
    ends = (torch.from_numpy(ids[:end]).unsqueeze(0) for end in (gap.start, gap.stop))
    before, behind = (judge.process.nll(part, Noise.of(0, 1)) for part in ends)
    if before.kind != "exact":
        return None
    return float(behind.total - before.total) * BITS / (gap.stop - gap.start)


def filled(model: td.Model, windows: list[np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    """Gaps filled by one model: bits of the right ones, and how often what is written is right, letter by letter and
    all of it; of one text, and of the best of several by their bound."""
    start = (options.window - options.gap) // 2
    gap, infills = slice(start, start + options.gap), model.process.infills
    bits, right, letters, best, held, held_letters = [], 0, 0, 0, 0, 0
    for number, ids in enumerate(windows):
        text = model.tokenizer.decode(ids.tolist())
        escaped = [part.replace("_", "\\_") for part in (text[: gap.start], text[gap.stop :])]
        template = {"infill": escaped[0] + "_" * options.gap + escaped[1]}
        how: dict[str, Any] = {"prompt": text[: gap.start], "length": gap.stop}
        if infills:
            how = template
            bits.append(gap_bits(model.process, ids, gap))
        else:
            bits.append(left_bits(model, ids, gap))
            # The same model, held to both sides: it learns of the right one by what its particles come to.
            shown = model.sample(1, seed=number, **template)[0][gap]
            held += shown == text[gap]
            held_letters += sum(a == b for a, b in zip(shown, text[gap]))
        written = model.sample(1, calls=options.gap, seed=number, **how)[0][gap]
        right += written == text[gap]
        letters += sum(a == b for a, b in zip(written, text[gap]))
        ((found, _),) = model.best(1, options.alternatives, options.draws, calls=options.gap, seed=number, **how)
        best += found[gap] == text[gap]
    known = [b for b in bits if b is not None]
    return {
        "gaps": len(windows), "bits": float(np.mean(known)) if known else None, "exact": right / len(windows),
        "letters": letters / len(windows) / options.gap, "exact, best": best / len(windows),
        "exact, held": None if infills else held / len(windows),
        "letters, held": None if infills else held_letters / len(windows) / options.gap,
    }  # fmt: skip


# -- guidance -----------------------------------------------------------------------------------------------------


class NaiveBayes:
    """Which label a text has, by its character trigrams."""

    def __init__(self, texts: dict[str, str]):
        self.counts = {label: collections.Counter(self.grams(text)) for label, text in texts.items()}
        self.seen = len(set().union(*self.counts.values()))

    @staticmethod
    def grams(text: str) -> Iterator[str]:
        return (text[i : i + 3] for i in range(len(text) - 2))

    def __call__(self, text: str) -> str:
        def score(label: str) -> float:
            counts = self.counts[label]
            total = math.log(counts.total() + self.seen)
            return sum(math.log(counts[gram] + 1) - total for gram in self.grams(text))

        return max(self.counts, key=score)


def labelled_texts(corpus: Corpus, part: str) -> dict[str, str]:
    """All text of each label."""
    out = collections.defaultdict(list)
    for text, label in zip(getattr(corpus, part), corpus.labels[part]):
        out[label].append(text)
    return {label: "\n".join(texts) for label, texts in out.items()}


def of_held_out_text(classify: NaiveBayes, corpus: Corpus) -> dict[str, Any]:
    """How often the classifier is right about pieces of 64 characters of held-out text."""
    every = labelled_texts(corpus, "validation").items()
    pieces = [(text[i : i + 64], label) for label, text in every for i in range(0, len(text) - 63, 640)]
    return {"texts": len(pieces), "accuracy": sum(classify(text) == label for text, label in pieces) / len(pieces)}


def guided(
    model: td.Model, classify: NaiveBayes, book: set[str], at: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Texts of each label at one weight, in as many steps whatever the weight."""
    calls = options.calls * (1 if at["weight"] == 0 else 2)
    right, texts = 0, []
    for label in model.config.labels:
        each = options.texts // len(model.config.labels)
        some = model.sample(each, calls=calls, label=label, guidance=at["weight"], ramp=at["ramp"], seed=1)
        right += sum(classify(text) == label for text in some)
        texts += some
    said = text_statistics(texts, book)
    return {
        "texts": len(texts), "accuracy": right / len(texts), "entropy": said.entropy, "distinct": said.distinct[2],
        "words": said.valid_words,
    }  # fmt: skip


# -- all of it ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not there yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", nargs="*", default=[])
    parser.add_argument("--judge")
    parser.add_argument("--labelled", nargs="*", default=[])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    for name, value in (("texts", 200), ("length", 32), ("calls", 16), ("window", 64), ("gap", 8), ("gaps", 50),
                        ("alternatives", 4), ("draws", 16)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "rows.jsonl")
    if options.runs and not options.judge:
        raise td.UserError("texts are judged by a left-to-right run: give one as --judge")
    if options.judge:
        judge = td.load(options.judge, "cpu", "fp32")
        corpus, _, _ = prepare(judge.config, judge.tokenizer)
        book = word_set(corpus)
        counts = collections.Counter(re.findall(r"[a-z]+", " ".join(corpus.train)))
        common = [word for word, _ in counts.most_common(COMMONEST)]
        windows = gaps(corpus, judge, options)
    size = {"texts": options.texts, "calls": options.calls, "length": options.length}
    every = [*options.runs, *([options.judge] if options.judge else [])]
    for path in every if "constraints" in options.only else []:
        model = td.load(path, "cpu", "fp32")
        for kind, (how, fits) in kinds(common).items():
            key = {"part": "constraints", "run": Path(path).name, "family": model.config.family, "kind": kind} | size
            rows.row(key, constrained, model, judge, book, how, fits, options)
    for path in every if "gaps" in options.only else []:
        model = td.load(path, "cpu", "fp32")
        key = {"part": "gaps", "run": Path(path).name, "family": model.config.family}
        key |= {"gap": options.gap, "gaps": options.gaps, "held": True}
        if model.tokenizer.to_json() == judge.tokenizer.to_json():
            rows.row(key, filled, model, windows, options)
    for path in options.labelled if "guidance" in options.only else []:
        model = td.load(path, "cpu", "fp32")
        corpus, _, _ = prepare(model.config, model.tokenizer)
        classify = NaiveBayes(labelled_texts(corpus, "train"))
        key = {"part": "guidance", "run": Path(path).name, "family": model.config.family} | size

        rows.row(key | {"weight": "held-out text"}, of_held_out_text, classify, corpus)
        for weight in WEIGHTS:
            for ramp in RAMPS if weight > 0 else (0.0,):
                at = {"weight": weight, "ramp": ramp}
                rows.row(key | at, guided, model, classify, word_set(corpus), at, options)
    parts = {
        "constraints": ["family", "kind", "texts", "satisfied", "ms a text", "bits", "words", "example"],
        "gaps": ["family", "gaps", "bits", "exact", "letters", "exact, best", "exact, held", "letters, held"],
        "guidance": ["family", "weight", "ramp", "texts", "accuracy", "entropy", "distinct", "words"],
    }
    text = "\n".join(
        f"## {part}\n\n{markdown(rows.of(part=part), columns)}" for part, columns in parts.items() if rows.of(part=part)
    )
    (options.out / "control.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except td.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
