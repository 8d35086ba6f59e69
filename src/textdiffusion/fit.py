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

import torch

from textdiffusion import card
from textdiffusion.data import Corpus, Windows, evaluation_windows, load_corpus, tokenize
from textdiffusion.errors import UserError
from textdiffusion.evaluation import BITS, Figure, evaluate
from textdiffusion.networks.transformer import Transformer
from textdiffusion.noise import Noise
from textdiffusion.process import Process, count_parameters
from textdiffusion.run import Run, RunConfig, build
from textdiffusion.sampling import sample
from textdiffusion.tokenizer import Tokenizer
from textdiffusion.tokenizer import build as build_tokenizer
from textdiffusion.training import Learner, fastest_precision, train, tune_allocator

VALIDATION_TOKENS = 8192  # read at each validation
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
    bits_per_char: float  # of the training objective on the last batches
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
    best: float  # bits per character
    signal: int | None = None


Event = Started | Stepped | Validated | Stopped


class _Signals:
    """Notes SIGINT and SIGTERM while training, so that a checkpoint can be saved before stopping."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __enter__(self) -> _Signals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread: signals are someone else's business
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> tuple[Corpus, Tokenizer, RunConfig]:
    """Read the text and make, or take, the tokenizer; the config with what follows from them filled in."""
    corpus = load_corpus(config.data)
    tokenizer = tokenizer or build_tokenizer(config.tokenizer, corpus.train)
    config = dataclasses.replace(config, vocabulary=tokenizer.vocabulary, start=tokenizer.end_of_text)
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

    # 2. Network, on the precision that is fast here. A resumed run keeps what it began with.
    if config.training.precision == "auto":
        fastest = fastest_precision(torch.device(device), int(config.network["width"]))
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=fastest))
    process = build(config)
    network = process.network
    assert isinstance(network, Transformer)
    network.to(device)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    learner = Learner(network, config.training)
    averaged = learner.average.module
    assert isinstance(averaged, Transformer)
    for net in (network, averaged):
        net.compute_dtype = dtype
    numbers = {"best": math.inf, "best_step": 0.0}
    if before:
        run, numbers = before, before.restore(learner)
        run.forget_after(learner.step)
    else:
        run = Run.create(path, config, tokenizer)
    yield Started(
        path, config.family, count_parameters(network), tokenizer.vocabulary, len(tokens["train"].tokens),
        len(tokens["validation"].tokens), str(config.training.precision), tokenizer.describe(), learner.step,
    )  # fmt: skip

    # 3. Learn.
    best, best_step = numbers["best"], int(numbers["best_step"])
    train_characters = tokenizer.characters[tokens["train"].tokens[:100_000]].mean()
    validations = math.floor(learner.progress * config.training.evaluations)
    smooth, saved, begin, begin_step = 0.0, time.monotonic(), time.perf_counter(), learner.step
    with _Signals() as signals:
        for now in train(process, windows.rows, learner, device):
            share = max(0.05, 1 / (learner.step - begin_step))
            smooth += share * (now.loss - smooth)
            elapsed = time.perf_counter() - begin
            rate = (now.step - begin_step) * now.tokens / elapsed
            if config.training.steps is not None:
                left = (config.training.steps - now.step) * elapsed / (now.step - begin_step)
            else:
                left = 60 * (config.training.minutes or 0.0) - now.seconds
            yield Stepped(now.step, now.progress, smooth * BITS / train_characters, rate, now.seconds, max(left, 0.0))
            due = math.floor(now.progress * config.training.evaluations)
            if due > validations:
                validations = due
                view = process.over(averaged.eval())
                figure = evaluate(view, held_out, tokenizer.characters, device=device).figure
                better = figure.bits_per_char < best
                if better:
                    best, best_step = figure.bits_per_char, now.step
                    run.save_weights(averaged)
                text = None
                if due % SHOWN_EVERY == 0 or now.progress >= 1:
                    text = show(view, tokenizer, window, config.training.seed, device)
                risen = best_step if figure.bits_per_char > best + 4 * figure.standard_error else None
                record: dict[str, object] = {"step": now.step, "seconds": round(now.seconds, 2), "sample": text}
                record |= {"tokens_per_second": round(rate), "train_bits_per_char": smooth * BITS / train_characters}
                run.log(record | vars(figure))
                yield Validated(now.step, figure, better, text, risen)
            wanted = time.monotonic() - saved >= config.training.checkpoint_seconds
            if wanted or signals.received or now.progress >= 1:
                if not (path / "model.safetensors").exists():
                    run.save_weights(averaged)
                run.save_checkpoint(learner, {"best": best, "best_step": best_step})
                saved = time.monotonic()
            if signals.received and now.progress < 1:
                yield Stopped(path, now.step, now.seconds, best, signals.received)
                return
    if not (path / "model.safetensors").exists():
        raise UserError(f"{path} is trained to its end already; to train more, start another run with more --steps")
    card.write_card(run, best, learner.step, learner.seconds, corpus)
    yield Stopped(path, learner.step, learner.seconds, best)


def show(process: Process, tokenizer: Tokenizer, length: int, seed: int, device: str) -> str:
    """One sample, always from the same noise, so that the eye can follow the training."""
    *_, last = sample(process, Noise.of(seed, 1, device=device), length, min(length, 64))
    return tokenizer.decode(last.tokens[0].tolist())
