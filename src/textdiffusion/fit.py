"""The whole way from text to a trained run, as an iterator of events that the command line prints."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from textdiffusion import card
from textdiffusion.adaptation import fill
from textdiffusion.config import RunConfig
from textdiffusion.data import Corpus, fingerprint, load_corpus, tokenize
from textdiffusion.errors import UserError
from textdiffusion.evaluation import Figure, evaluate
from textdiffusion.noise import Noise
from textdiffusion.pacing import EXAMPLES, measure_costs
from textdiffusion.process import Process, count_parameters
from textdiffusion.run import Run, build
from textdiffusion.sampling import sample
from textdiffusion.tokenizer import Tokenizer
from textdiffusion.tokenizer import build as build_tokenizer
from textdiffusion.training import Learner, fastest_precision, micro_batch_for, train, tune_allocator
from textdiffusion.windows import Windows, evaluation_labels, evaluation_windows

VALIDATION_TOKENS = 8192  # read at each validation
VALIDATION_SHARE = 0.04  # of the training's time
SHOWN_EVERY = 2  # validations between two printed samples


@dataclass(frozen=True)
class Started:
    """What is about to be trained."""

    run: Path
    family: str
    parameters: int
    vocabulary: int
    training_tokens: int
    validation_tokens: int
    precision: str
    tokenizer: str
    resumed_at: int = 0


@dataclass(frozen=True)
class Stepped:
    """After an optimiser step."""

    step: int
    progress: float
    objective: float  # what training minimises, nats a token, averaged over the last batches; no likelihood
    tokens_per_second: float
    seconds: float
    left: float  # seconds


@dataclass(frozen=True)
class Validated:
    """After a validation of the averaged weights."""

    step: int
    figure: Figure
    best: bool
    sample: str | None
    risen_since: int | None  # step of the best figure, if the figure has risen clearly since: over-fitting


@dataclass(frozen=True)
class Stopped:
    """The end, or a stop asked for by a signal."""

    run: Path
    step: int
    seconds: float
    best: float | None  # bits per character, of the weights that are kept
    signal: int | None = None


Event = Started | Stepped | Validated | Stopped


class _Signals:
    """Notes SIGINT and SIGTERM while training, so that a checkpoint can be saved first; a second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.before = {}

    def __enter__(self) -> _Signals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread: signals are someone else's business
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> tuple[Corpus, Tokenizer, RunConfig]:
    """Read the text and make, or take, the tokenizer; the config with what follows from them filled in."""
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
    config = dataclasses.replace(
        config, vocabulary=tokenizer.vocabulary, start=tokenizer.end_of_text, text=text, labels=labels
    )
    return corpus, tokenizer, config


def fit(config: RunConfig, path: Path, *, resume: bool = False, device: str = "cpu") -> Iterator[Event]:
    """Train a run in ``path``; the consumer's reading of the iterator drives it.

    Raises:
        UserError: unusable data or settings, a run that is there already, or none to resume.
    """
    tune_allocator()
    # 1. Text to tokens.
    before = Run.open(path) if resume else None
    config = before.config if before else config
    corpus, tokenizer, config = prepare(config, before.tokenizer if before else None)
    tokens = tokenize(corpus, tokenizer)
    window = int(config.network["window"])
    windows = Windows(tokens["train"], window, config.training.seed)
    held_out = evaluation_windows(tokens["validation"], window, limit=VALIDATION_TOKENS)
    labels = evaluation_labels(tokens["validation"], window, limit=VALIDATION_TOKENS)

    # 2. Network, in the precision and the micro-batches that are fast here. A resumed run keeps what it began with.
    if config.training.precision == "auto":
        fastest = fastest_precision(torch.device(device))
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=fastest))
    process = build(config)
    network: Any = process.network
    if config.init_from and before is None:
        fill(network, config)
    network.to(device)
    if config.training.micro_batch is None:
        symbols = window * network.symbols_a_token
        size = min(config.training.batch, micro_batch_for(symbols, config.vocabulary, network.config.width, device))
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch=size))
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    learner = Learner(network, config.training)
    if config.training.compile:
        network.compile_blocks()
    averaged: Any = learner.average.module
    for net in (network, averaged):
        net.compute_dtype = dtype
    numbers: dict[str, float] = {"best": math.inf, "best_step": 0, "smooth": 0.0}
    if before:
        # A run killed before its first checkpoint begins anew, with the same draws.
        run, numbers = before, before.restore(learner) or numbers
        run.forget_after(learner.step)
    else:
        run = Run.create(path, config, tokenizer)
    yield Started(
        path, config.family, count_parameters(network), tokenizer.vocabulary, len(tokens["train"].tokens),
        len(tokens["validation"].tokens), str(config.training.precision), tokenizer.describe(), learner.step,
    )  # fmt: skip

    # 3. Learn.
    best, best_step, smooth = numbers["best"], int(numbers["best_step"]), numbers["smooth"]
    validations = math.floor(learner.progress * config.training.evaluations)

    def validate(with_sample: bool) -> Validated:
        nonlocal best, best_step
        view = process.over(averaged.eval())
        said = evaluate(view, held_out, tokenizer.characters, tokenizer.spelling, labels=labels, device=device)
        figure = said.figure
        better = figure.bits_per_char < best
        if better:
            best, best_step = figure.bits_per_char, learner.step
            run.save_weights(averaged)
        text = show(view, tokenizer, window, config.training.seed, device) if with_sample else None
        risen = best_step if figure.bits_per_char > best + 4 * (figure.standard_error or math.inf) else None
        record: dict[str, object] = {"step": learner.step, "seconds": round(learner.seconds, 2), "objective": smooth}
        run.log(record | vars(figure) | {"sample": text})
        return Validated(learner.step, figure, better, text, risen)

    def save() -> None:
        run.save_checkpoint(learner, {"best": best, "best_step": best_step, "smooth": smooth})

    finished, spent = learner.progress >= 1, 0.0
    saved, begin, begin_step = time.monotonic(), time.perf_counter(), learner.step
    with _Signals() as signals:
        for now in train(process, windows.rows, learner, device, windows.labels):
            smooth += max(0.05, 1 / now.step) * (now.loss - smooth)
            made, elapsed = now.step - begin_step, time.perf_counter() - begin
            if config.training.steps is not None:
                left = (config.training.steps - now.step) * elapsed / made
            else:
                left = 60 * (config.training.minutes or 0.0) - now.seconds
            yield Stepped(now.step, now.progress, smooth, made * now.tokens / elapsed, now.seconds, max(left, 0.0))
            due = math.floor(now.progress * config.training.evaluations)
            # By the clock, validation may take its share of the time and no more; by steps, it must not depend on time.
            afford = config.training.steps is not None or spent <= VALIDATION_SHARE * now.seconds
            if validations < due < config.training.evaluations and afford:
                validations, since = due, time.perf_counter()
                event = validate(due % SHOWN_EVERY == 0)
                spent += time.perf_counter() - since
                yield event
            if signals.received is not None and now.progress < 1:
                if math.isinf(best):
                    run.save_weights(
                        averaged
                    )  # something to sample from; no validation that a whole run would not make
                save()
                card.write_card(run, best, now.step, now.seconds, corpus)
                yield Stopped(path, now.step, now.seconds, None if math.isinf(best) else best, signals.received)
                return
            # Not at the end: what a finished run keeps includes its last validation.
            if time.monotonic() - saved >= config.training.checkpoint_seconds and now.progress < 1:
                save()
                saved = time.monotonic()
        if not finished or math.isinf(best):
            yield validate(True)
            save()
    # As many windows as are a small part of those that were learnt from.
    examples = min(EXAMPLES, learner.step * config.training.batch // 25)
    kept = run.load(device)
    run.save_grid(measure_costs(kept, held_out, examples=examples, device=device), examples)
    card.write_card(run, best, learner.step, learner.seconds, corpus)
    yield Stopped(path, learner.step, learner.seconds, best)


def show(process: Process, tokenizer: Tokenizer, length: int, seed: int, device: str) -> str:
    """One sample, always from the same noise, so that the eye can follow the training."""
    *_, last = sample(process, Noise.of(seed, 1, device=device), length, min(length, 64))
    return tokenizer.decode(last.tokens[0].tolist())
