"""The whole way from text to a trained run, as an iterator of events that the command line prints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from textdiffusion.config import RunConfig, check_new
from textdiffusion.errors import UserError
from textdiffusion.evaluation.measures import Figure, evaluate
from textdiffusion.files import alone_in
from textdiffusion.machine import fastest_precision, micro_batch_for, tune_allocator
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.network import TextNetwork
from textdiffusion.parallel.distributed import Group, joined
from textdiffusion.parallel.sharding import Parallel, sharded
from textdiffusion.parallel.stopping import Signals
from textdiffusion.process import Process, count_parameters
from textdiffusion.run import Run, build
from textdiffusion.sampling.pacing import EXAMPLES, measure_costs
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.data import Corpus
from textdiffusion.text.shards import TrainingText
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.windows import Windows
from textdiffusion.training import card
from textdiffusion.training.adaptation import fill
from textdiffusion.training.checkpoints import Checkpoints
from textdiffusion.training.learning import Learner, train
from textdiffusion.training.preparation import prepare, to_learn

VALIDATION_SHARE = 0.04  # of the training's time
STEPS_A_VALIDATION = 10  # that one takes as long as, about, until one has been made
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


@dataclass(frozen=True)
class Warned:
    """Something went wrong, and the training goes on."""

    line: str


Event = Started | Stepped | Validated | Warned | Stopped


def _begin(config: RunConfig, path: Path, resume: bool, device: str, group: Group) -> tuple[Run, Corpus, TrainingText]:
    """The run, its text and its tokens: made or opened by the main process, then opened by the others."""

    def main() -> tuple[Run, Corpus]:
        before = Run.open(path) if resume else None
        corpus, tokenizer, full = prepare(
            before.config if before else config, before.tokenizer if before else None, device
        )
        if before:
            before.tidy()
            return Run(path, full, tokenizer), corpus
        # Precision and micro-batches that are fast here; a resumed run keeps what it began with.
        training = full.training
        if training.precision == "auto":
            training = dataclasses.replace(training, precision=fastest_precision(torch.device(device)))
        network: Any = build(full).network
        if full.init_from:
            fill(network, full)  # and again when it is taught: what cannot be read must not leave a run behind
        if training.micro_batch is None:
            symbols = int(full.network["window"]) * network.symbols_a_token
            size = micro_batch_for(symbols, full.vocabulary, network.config.width, device)
            training = dataclasses.replace(training, micro_batch=min(training.batch, size))
        return Run(path, dataclasses.replace(full, training=training), tokenizer), corpus

    found, failure = None, None
    if group.main:
        try:
            run, corpus = main()
            found = (run, corpus, to_learn(run.config, corpus, run.tokenizer))
            if not resume:
                Run.create(path, run.config, run.tokenizer)
        except UserError as error:
            if group.size == 1:
                raise
            failure = str(error)
    group.together(failure)
    if found is not None:
        return found
    run = Run.open(path)
    corpus, tokenizer, _ = prepare(run.config, run.tokenizer)
    return run, corpus, to_learn(run.config, corpus, tokenizer)


def fit(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    parallel: Parallel = "auto",
    group: Group | None = None,
) -> Iterator[Event]:
    """Train a run in ``path``; the consumer's reading of the iterator drives it.

    Args:
        resume: go on with the run that is there.
        parallel: with several processes (torchrun): "ddp", "fsdp", or "auto" for the first where memory allows it.
        group: those that train it together; None: all that torchrun has started.
    Raises:
        UserError: unusable data or settings, a run that is there already, none to resume, or one that another process
            is training.
    """
    tune_allocator()
    with contextlib.ExitStack() as held:
        group = group or held.enter_context(joined(device))
        path, failure = Path(group.told(str(path))), None
        if group.main:
            try:
                if not resume:
                    check_new(path)
                    path.mkdir(parents=True, exist_ok=True)
                    held.callback(_remove_if_empty, path)  # as it is if the text is refused
                if path.is_dir():
                    held.enter_context(alone_in(path))
            except UserError as error:
                failure = str(error)
        group.together(failure)
        there = set(path.iterdir()) if path.is_dir() else set()
        begun = False
        try:
            for event in _train(config, path, resume, device, parallel, group):
                begun = True
                yield event
        except UserError:
            # What is refused before it has begun must not leave a run behind that could be resumed.
            if group.main and not resume and not begun:
                for file in set(path.iterdir()) - there:
                    file.unlink() if file.is_file() else shutil.rmtree(file)
            raise


def _train(
    config: RunConfig, path: Path, resume: bool, device: str, parallel: Parallel, group: Group
) -> Iterator[Event]:
    # 1. Text to tokens.
    run, corpus, text = _begin(config, path, resume, device, group)
    config, tokenizer, window = run.config, run.tokenizer, int(run.config.network["window"])

    # 2. Network.
    process = build(config)
    network: Any = process.network
    checkpoints = Checkpoints(path / "checkpoints", group)
    if not (resume and checkpoints.whole()):  # also of a run that was killed before its first checkpoint
        if config.init_from:
            fill(network, config)
        if getattr(network, "counts", None) is not None:
            assert isinstance(text.windows, Windows)  # prepared corpora are refused (preparation.py)
            network.counts.count(text.windows.tokens)
    parameters = count_parameters(network)
    shard = sharded(parallel, group, parameters)
    if not shard:
        network.to(device)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    learner = Learner(network, config.training, group, shard=shard)
    if config.training.compile:
        network.compile_blocks()
    averaged: Any = learner.average.module
    for net in (network, averaged):
        net.compute_dtype = dtype
    if config.training.activation_checkpointing:
        if not isinstance(network, TextNetwork):
            raise UserError("training.activation_checkpointing is for networks of this library; leave it out")
        network.recompute()
    numbers: dict[str, float] = {"best": math.inf, "best_step": 0, "smooth": 0.0}
    wrong: list[str] = []
    if resume:
        # A run killed before its first checkpoint begins anew, with the same draws.
        found, wrong = checkpoints.restore(learner)
        numbers = found or numbers
        if group.main:
            run.forget_after(learner.step)
        if not group.decided(float(group.main and run.has_weights))[0]:
            numbers["best"] = math.inf  # what is used is made again, by the next validation
    yield Started(
        path, config.family, parameters, tokenizer.vocabulary, text.training_tokens,
        text.validation_tokens, str(config.training.precision), tokenizer.describe(), learner.step,
    )  # fmt: skip
    if resume and learner.progress >= 1:
        yield Warned(
            f"this run has made all of its steps; to train on with its weights: textdiffusion train --init-from {path} "
            f"--data {config.data.source} --minutes 5"
        )
    for line in wrong:
        yield Warned(f"{line}; going on from step {learner.step:,}")

    # 3. Learn.
    best, best_step, smooth = numbers["best"], int(numbers["best_step"]), numbers["smooth"]
    validations = math.floor(learner.progress * config.training.evaluations)
    troubles: list[str] = []

    def keep() -> bool:
        """Save the averaged weights as those to use; whether that could be done."""
        weights, done = learner.whole_average() if group.main or shard else {}, True
        if group.main:
            try:
                run.save_weights(weights)
            except OSError as error:
                done = False
                troubles.append(f"the weights could not be written ({error.strerror}); those before are kept")
        return bool(group.decided(float(done))[0])

    def validate(with_sample: bool) -> Validated:
        nonlocal best, best_step
        view = process.over(averaged.eval())
        said = learner.averaged(
            lambda: evaluate(
                view, text.held_out, tokenizer.characters, tokenizer.spelling, labels=text.labels, device=device,
                group=group,
            )
        )  # fmt: skip
        figure = said.figure
        better = figure.bits_per_char < best and keep()
        if better:
            best, best_step = figure.bits_per_char, learner.step
        written = None
        if with_sample and (group.main or shard):
            written = learner.averaged(show, view, tokenizer, window, config.training.seed, device)
        risen = best_step if figure.bits_per_char > best + 4 * (figure.standard_error or math.inf) else None
        record: dict[str, object] = {"step": learner.step, "seconds": round(learner.seconds, 2), "objective": smooth}
        if group.main:
            try:
                run.log(record | vars(figure) | {"sample": written})
            except OSError as error:
                troubles.append(f"metrics.jsonl could not be written ({error.strerror})")
        return Validated(learner.step, figure, better, written, risen)

    def save() -> None:
        trouble = checkpoints.save(learner, {"best": best, "best_step": best_step, "smooth": smooth})
        if trouble:
            troubles.append(f"a checkpoint could not be written: {trouble}; those before are kept")

    def told() -> Iterator[Warned]:
        while troubles:
            yield Warned(troubles.pop(0))

    def write_card() -> None:
        if group.main:
            card.write_card(run, best, learner.step, learner.seconds, corpus)

    finished, spent, dearest = learner.progress >= 1, 0.0, 0.0
    saved, begin, begin_step = time.monotonic(), time.perf_counter(), learner.step
    with Signals(group) as signals:
        for now in train(process, text.windows.rows, learner, device, getattr(text.windows, "labels", None)):
            if math.isfinite(now.loss):
                smooth += max(0.05, 1 / now.step) * (now.loss - smooth)
            else:
                yield Warned(f"step {now.step:,} changed nothing: its loss or gradient was not a number")
            made, elapsed = now.step - begin_step, time.perf_counter() - begin
            if config.training.steps is not None:
                left = (config.training.steps - now.step) * elapsed / made
            else:
                left = 60 * (config.training.minutes or 0.0) - now.seconds
            yield Stepped(
                now.step, now.progress, smooth, made * now.tokens / (elapsed - spent), now.seconds, max(left, 0.0)
            )
            due = math.floor(now.progress * config.training.evaluations)
            # By the clock, validation may take its share of the time and no more; by steps, it must not depend on time.
            # The first is taken to cost as much as some steps.
            dear, pace = max(dearest, STEPS_A_VALIDATION * (elapsed - spent) / made), VALIDATION_SHARE * now.seconds
            whole = VALIDATION_SHARE * 60 * (config.training.minutes or math.inf)
            afford = config.training.steps is not None or (spent <= pace and spent + dear <= whole)
            late = time.monotonic() - saved >= config.training.checkpoint_seconds
            afford, late = map(bool, group.decided(afford, late))
            if validations < due < config.training.evaluations and afford:
                validations, since = due, time.perf_counter()
                event = validate(due % SHOWN_EVERY == 0)
                dearest = max(dearest, time.perf_counter() - since)
                spent += time.perf_counter() - since
                yield event
            received = signals.agreed()
            if received is not None and now.progress < 1:
                if math.isinf(best):
                    keep()  # something to sample from; no validation that a whole run would not make
                save()
                if trouble := checkpoints.finish():
                    raise UserError(f"stopped, and the last checkpoint could not be written: {trouble}; make room")
                write_card()
                yield from told()
                yield Stopped(path, now.step, now.seconds, None if math.isinf(best) else best, received)
                return
            # Not at the end: what a finished run keeps includes its last validation. Not while steps are skipped.
            if late and now.progress < 1 and not learner.astray:
                save()
                saved = time.monotonic()
            yield from told()
        if not finished or math.isinf(best):
            yield validate(True)
            save()
            yield from told()
        if trouble := checkpoints.finish():
            raise UserError(
                f"the last checkpoint could not be written: {trouble}; make room, then --resume makes the last steps "
                "again"
            )
        if math.isinf(best):
            raise UserError(
                "no weights could be kept: no validation gave a number, or there was no room; make room and "
                "--resume, or start again with a lower --set training.rate and training.matrix_rate"
            )
    # As many windows as are a small part of those that were learnt from.
    examples = min(EXAMPLES, learner.step * config.training.batch // 25)
    if group.main:
        kept = run.load(device)
        run.save_grid(measure_costs(kept, text.held_out, examples=examples, device=device), examples)
    write_card()
    yield Stopped(path, learner.step, learner.seconds, best)


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def show(process: Process, tokenizer: Tokenizer, length: int, seed: int, device: str) -> str:
    """One sample, always from the same noise, so that the eye can follow the training."""
    *_, last = sample(process, Noise.of(seed, 1, device=device), length, min(length, 64))
    return tokenizer.decode(last.tokens[0].tolist())
