"""The public system of Gaussian diffusion of embeddings at its own settings, and what each mend is worth: all are in
place, and one at a time is taken out.

    python examples/second_system.py OUT --data war_and_peace.txt --minutes 3

Its settings: 4 blocks, windows of 256, cosine schedule, 1,000 noise levels, no self-conditioning, Muon at 0.02, five
hundredths of the training to warm up and a tenth to cool down. A row is trained for so many minutes (or --steps) and
writes texts; one that is done is not done again, so the script may be stopped and started. OUT/rows.jsonl holds the
figures, OUT/table.md the table. ``--only NAME`` does the row of that name.

Columns: where training stopped, if it did; the bound in bits per character, where the row has one (nothing is a
likelihood whose tokens come of an untaught head); of the tokens of samples, the share of token 0, the share of the
commonest, and their entropy in bits; the share of words that occur in the text; how far apart the embeddings of two
tokens of the text are, over their length (1.41 for independent directions, 0 when they have collapsed); and that
length, as the root mean square of their reals (1 at the start, and where they are kept at it).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows, markdown
from torch import Tensor

from textdiffusion.config import RunConfig, override
from textdiffusion.diffusion.coded import Guess
from textdiffusion.diffusion.denoising import Denoising
from textdiffusion.errors import UserError
from textdiffusion.evaluation.measures import evaluate, text_statistics
from textdiffusion.families.gaussian_embedding import SHARPNESS, GaussianEmbedding
from textdiffusion.machine import fastest_precision, micro_batch_for, tune_allocator
from textdiffusion.mathematics.gaussian import HIGHEST, LogSnr, alpha_sigma, table, to_x_0
from textdiffusion.mathematics.noise import Noise
from textdiffusion.presets import configure
from textdiffusion.run import build
from textdiffusion.sampling.reverse import Counted, sample
from textdiffusion.text.data import Corpus, tokenize, word_set
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.windows import Windows, evaluation_windows
from textdiffusion.training.learning import Learner, train
from textdiffusion.training.preparation import prepare

DEPTH, LEVELS, CALLS = 4, 1000, 100
SETTINGS = [
    "network.heads=2", "process.schedule=cosine", f"process.times={LEVELS}", "process.self_conditioning=0.0",
    "training.matrix_rate=0.02", "training.warmup=0.05", "training.cooldown=0.1",
]  # fmt: skip
REALS = ["process.input=reals", "process.target=eps"]  # the network reads the noisy vectors, and says their noise


def levels(signal: Callable[[Tensor], Tensor], name: str) -> LogSnr:
    """A schedule by its share of signal, alpha^2, of times in [0, 1]."""
    share = signal(torch.linspace(0, 1, 257, dtype=torch.float64))
    return table((share.log() - (1 - share).log()).clamp(max=HIGHEST), name)


# -- the mends, taken out -----------------------------------------------------------------------------------------


class TimesDividedTwice(GaussianEmbedding):
    """The schedule is handed t / T, and divides by T again: its end is at a thousandth of the way."""

    @property
    def schedule(self) -> LogSnr:
        def cosine(t: Tensor) -> Tensor:
            return torch.cos((t / LEVELS + 0.008) / 1.008 * math.pi / 2).square()

        return levels(lambda t: cosine(t) / cosine(torch.zeros_like(t)), "cosine, divided twice")


class LinearNotRescaled(GaussianEmbedding):
    """beta from 1e-4 to 0.02 over 100 levels, as over 1,000: a third of the text's power is left at the end."""

    @property
    def schedule(self) -> LogSnr:
        def left(t: Tensor) -> Tensor:
            return torch.exp(-100 * (1e-4 * t + (0.02 - 1e-4) * t.square() / 2))

        return levels(left, "linear, not rescaled")


class SquareRootBelowZero(GaussianEmbedding):
    """The first system's sqrt schedule: 1 - sqrt(t + 1e-4) is below zero at t = 1, and alpha the root of that."""

    @property
    def schedule(self) -> LogSnr:
        def at(t: Tensor) -> Tensor:
            root = (t.double() + 1e-4).sqrt()
            return (1 - root).log() - root.log()

        return LogSnr("sqrt, below zero", at, lambda t: -0.5 / ((t + 1e-4) * (1 - (t + 1e-4).sqrt())))


class HeadNotTaught(GaussianEmbedding):
    """The tokens' head starts at zero and is in no loss: it stays there, and the likeliest token is the first."""

    def guess(self, said):
        reals = to_x_0(said.outputs, said.z, said.log_snr, "eps")
        logits = reals @ torch.zeros(self.width, self.vocabulary, dtype=reals.dtype)
        first = torch.nn.functional.one_hot(logits.argmax(-1), self.vocabulary)
        return Guess((first.to(logits.dtype) + 1e-30).log(), None, reals)

    def cost(self, said, guess, x_0):
        eps = (said.z - alpha_sigma(said.log_snr)[0] * self.codes().to(said.z)[x_0]) / alpha_sigma(said.log_snr)[1]
        return (said.outputs - eps.detach()).square().mean(-1)


class EmbeddingsLeftFree(GaussianEmbedding):
    """Embeddings of any length, taught by the error of eps alone, by way of the noisy vectors that are read."""

    def codes(self) -> Tensor:
        return self.network.codes.float()  # type: ignore[attr-defined]

    def guess(self, said):
        reals = to_x_0(said.outputs, said.z, said.log_snr, "eps")
        near = torch.cdist(reals, self.codes().to(reals)).square()
        return Guess(-0.5 * math.exp(SHARPNESS) * near, None, reals)

    def cost(self, said, guess, x_0):
        alpha, sigma = alpha_sigma(said.log_snr)
        return (said.outputs - (said.z - alpha * self.codes()[x_0]) / sigma).square().mean(-1)


class BeginsInTheMiddle(GaussianEmbedding):
    """A run of n calls goes through the last n of 1,000 noise levels, and takes pure noise for the n-th."""

    first = 1.0  # of the run being made: the level that is told where there is nothing but noise

    def plan(self, free, calls, sampler):
        self.first = calls / LEVELS
        return [1.0, *((calls - k) / LEVELS for k in range(1, calls)), 0.0]

    def log_snr(self, t: Tensor) -> Tensor:
        return super().log_snr(torch.where(t == 1, torch.full_like(t, self.first), t))


class NoiseDrawnAnew(GaussianEmbedding):
    """A step forgets the state: the predicted mean, and noise drawn anew."""

    def __init__(self, *args: Any, **how: Any):
        super().__init__(*args, **how)

        def move(z: Tensor, x_0: Tensor, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
            alpha, sigma = alpha_sigma(then)
            return alpha * x_0, sigma.expand(*x_0.shape[:-1], 1)

        self.steps = {"ancestral": Denoising(self, "noise drawn anew", move)}


class LengthTakenOff(Counted):
    """A network that normalises the noisy vectors it reads: of how long they are it learns nothing."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(x * (x.square().sum(-1, keepdim=True) + 1e-8).rsqrt(), *args, **kwargs)


class AsPublished(TimesDividedTwice, HeadNotTaught, BeginsInTheMiddle, NoiseDrawnAnew, EmbeddingsLeftFree):
    """All of it."""

    def cost(self, said, guess, x_0):
        return EmbeddingsLeftFree.cost(self, said, guess, x_0)


@dataclass(frozen=True)
class Row:
    """What is trained: settings on top of the system's, the process, what stands between it and its network."""

    name: str
    settings: tuple[str, ...] = ()
    process: type[GaussianEmbedding] = GaussianEmbedding
    reads: Callable[[Any], Any] | None = None
    bounded: bool = True  # its bound is one, and of what it samples


WIDE = ("process.width=256",)
HOT = ("training.rate=0.346",)  # Adam's rate for embeddings, 0.2 over the root of the width, on all else too
ROWS = [
    Row("as published", (*REALS, *WIDE, *HOT), AsPublished, LengthTakenOff, False),
    Row("mended"),
    Row("mended, its embeddings of 256", WIDE),
    Row("mended, with the learned clock", ("process.schedule=adaptive", "process.times=0")),
    Row("mended, predicting eps", tuple(REALS)),
    Row("without: the schedule's end", (), TimesDividedTwice),
    Row("without: a head that is taught", tuple(REALS), HeadNotTaught, None, False),
    Row("without: embeddings held apart", tuple(REALS), EmbeddingsLeftFree, None, False),
    Row("without: the start of a short run", (), BeginsInTheMiddle, None, False),
    Row("without: the reversed chain's step", (), NoiseDrawnAnew, None, False),
    Row("without: the length of what is read", tuple(REALS), GaussianEmbedding, LengthTakenOff),
    Row("without: a linear schedule's scale", (f"process.times={LEVELS // 10}",), LinearNotRescaled),
    Row("without: a rate for each part", HOT),
    Row("without: a sqrt schedule above zero (first system)", (), SquareRootBelowZero),
]


def apart(codes: Tensor, share: Tensor) -> float:
    """Mean distance of the embeddings of two different tokens of the text over their length (root mean square); share
    is that of each token, [V]."""
    both = share.outer(share).fill_diagonal_(0)
    size = (share * codes.square().sum(-1)).sum().sqrt()
    return float((both * torch.cdist(codes, codes)).sum() / both.sum() / size)


@dataclass
class Prepared:
    """The text, and what is made of it once."""

    corpus: Corpus
    tokenizer: Tokenizer
    config: RunConfig
    words: set[str]

    @staticmethod
    def of(options: argparse.Namespace) -> Prepared:
        budget = {"steps": options.steps} if options.steps else {"minutes": options.minutes}
        config = configure(
            family="gaussian_embedding", data=options.data, tokenizer=options.tokenizer, length=options.length,
            depth=DEPTH, settings=[*SETTINGS, *options.set], **budget,
        )  # fmt: skip
        corpus, tokenizer, config = prepare(config)
        return Prepared(corpus, tokenizer, config, word_set(corpus))


def measure(row: Row, ready: Prepared, options: argparse.Namespace) -> dict[str, Any]:
    """Train a row, let it write, and say what came of it."""
    config = override(ready.config, list(row.settings))
    plain = build(config)
    network: Any = plain.network
    window, tokens = options.length, tokenize(ready.corpus, ready.tokenizer)
    if fastest_precision(torch.device("cpu")) == "bf16":
        network.compute_dtype = torch.bfloat16
    reads = network if row.reads is None else row.reads(network)
    process = row.process(reads, plain.config, config.vocabulary, start=config.start)
    size = min(config.training.batch, micro_batch_for(window, config.vocabulary, network.config.width))
    learner = Learner(network, replace(config.training, micro_batch=size))
    averaged: Any = learner.average.module
    averaged.compute_dtype = network.compute_dtype
    windows, stopped, losses = Windows(tokens["train"], window, 0), "", []
    try:
        for now in train(process, windows.rows, learner):
            if math.isnan(now.loss):  # the step was skipped; here the first is what is looked for
                stopped = f"no number, step {now.step}"
                break
            losses.append(now.loss)
            if now.step % 100 == 0:
                left, nats = now.seconds * (1 / now.progress - 1) / 60, np.mean(losses[-100:])
                said = f"  step {now.step}: {nats:.3f} nats a token, {left:.0f} minutes left"
                print(said, file=sys.stderr, flush=True)
    except UserError:
        stopped = f"no number, step {learner.step + 1}"
    view = process.over(averaged if row.reads is None else row.reads(averaged))
    averaged.eval()
    found: dict[str, Any] = {"stopped": stopped, "steps": learner.step, "bits_per_char": None}
    found["objective"] = float(np.mean(losses[-50:])) if losses else None
    with torch.no_grad():
        share = torch.bincount(torch.from_numpy(np.array(tokens["train"].tokens, dtype=np.int64)),
                               minlength=config.vocabulary).double()  # fmt: skip
        codes, share = view.codes().double(), share / share.sum()
        found["embeddings_apart"] = apart(codes, share)
        found["embeddings_length"] = float((share * codes.square().mean(-1)).sum().sqrt())
    if row.bounded and not stopped:
        held_out = evaluation_windows(tokens["validation"], window, limit=options.eval_tokens)
        figure = evaluate(view, held_out, ready.tokenizer.characters, ready.tokenizer.spelling).figure
        found["bits_per_char"] = figure.bits_per_char if math.isfinite(figure.bits_per_char) else None
    try:
        *_, last = sample(view, Noise.of(1, options.samples), window, options.calls)
    except UserError:
        return found | {"stopped": stopped or "no number in sampling", "text": ""}
    share = torch.bincount(last.tokens.flatten(), minlength=config.vocabulary).double() / last.tokens.numel()
    texts = [ready.tokenizer.decode(ids) for ids in last.tokens.tolist()]
    return found | {
        "token_0": float(share[0]),
        "commonest": float(share.max()),
        "entropy": max(0.0, -float(torch.special.xlogy(share, share).sum()) / math.log(2)),
        "valid_words": text_statistics(texts, ready.words).valid_words,
        "text": texts[0],
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown, and how a text of each begins."""
    names = ["name", "stopped", "steps", "bits_per_char", "token_0", "commonest", "entropy", "valid_words"]
    names += ["embeddings_apart", "embeddings_length"]
    begun = "".join(f"\n{r['name']}:\n\n    {r['text'][:96]!r}\n" for r in rows)
    return markdown(rows, names) + begun


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--tokenizer", default="char")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--eval-tokens", type=int, default=40_000)
    parser.add_argument("--set", action="append", default=[], metavar="PART.KEY=VALUE", help="of all rows")
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS], metavar="NAME", help="this row")
    options = parser.parse_args()
    tune_allocator()
    ready = Prepared.of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "rows.jsonl", vars(options))
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        rows.row({"name": row.name}, measure, row, ready, options)
        (options.out / "table.md").write_text(as_table(rows.found), encoding="utf-8")
    print(as_table(rows.found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
