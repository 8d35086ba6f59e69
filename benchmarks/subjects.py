"""What is timed, and how: the sizes, our processes and their plain rivals, turns, FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from plain import PlainTransformer

from textdiffusion.config import RunConfig
from textdiffusion.machine import fastest_precision, micro_batch_for
from textdiffusion.mathematics.noise import Noise
from textdiffusion.run import build
from textdiffusion.sampling.reverse import sample
from textdiffusion.settings import Precision, TrainingConfig
from textdiffusion.training.learning import Learner

Size = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    settings: dict[str, Size]  # of the comparison: sizes that people train on small machines
    default: Size  # what `textdiffusion train` makes
    rounds: int
    calls: dict[int, int]  # network calls of a sampling run, by texts at a time
    tokens: int  # of a text from left to right
    depths: tuple[int, ...]
    rows: tuple[int, ...]
    vocabularies: tuple[int, ...]
    long: int  # characters of a long text
    products: tuple[tuple[int, int], ...]  # rows and width of matrix products whose best speed is the peak


FULL = Plan(
    settings={
        "(i) 6 layers of 256, 256 characters": {
            "depth": 6, "width": 256, "heads": 4, "length": 256, "batch": 32, "vocabulary": 100,
        },
        "(ii) 6 layers of 384, 256 tokens of 8,192": {
            "depth": 6, "width": 384, "heads": 6, "length": 256, "batch": 16, "vocabulary": 8192,
        },
    },
    default={"depth": 3, "width": 192, "heads": 3, "length": 64, "batch": 32, "vocabulary": 100},
    rounds=5,
    calls={1: 32, 16: 8},
    tokens=64,
    depths=(2, 3, 4, 6, 8),
    rows=(1, 2, 4, 8, 16, 32),
    vocabularies=(100, 8192, 50257),
    long=1024,
    products=((8192, 256), (8192, 768), (4096, 4096)),
)  # fmt: skip
TINY = {"depth": 1, "width": 32, "heads": 2, "length": 16, "batch": 4, "vocabulary": 50}
QUICK = Plan({"(i) tiny": TINY, "(ii) tiny": TINY}, TINY, 1, {1: 2, 2: 2}, 8, (1,), (1, 2), (50, 60), 64, ((64, 64),))
PLAIN = ("masked", "autoregressive")  # the families that have a plain rival


def in_turn(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each rival; one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, act in rivals.items():
            begin = time.perf_counter()
            act()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(kept) for name, kept in times.items()}


def peak(plan: Plan) -> dict[str, float]:
    """GFLOP/s of matrix products, the best over sizes and tries, by precision."""
    best = {"fp32": 0.0, "bf16": 0.0}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for rows, width in plan.products:
            x, w = torch.ones(rows, width).to(dtype), torch.ones(width, width).to(dtype)
            for _ in range(8):
                begin = time.perf_counter()
                torch.mm(x, w)
                best[name] = max(best[name], 2 * rows * width * width / (time.perf_counter() - begin) / 1e9)
    return best


def number_type() -> torch.dtype:
    """What this machine multiplies faster, in which training and sampling would run here."""
    return torch.bfloat16 if fastest_precision(torch.device("cpu")) == "bf16" else torch.float32


def process_of(family: str, size: Size, own: dict[str, Any] | None = None) -> Any:
    """Our process at a size, in the number type that is fast here."""
    config = RunConfig(
        family=family,
        process=own or {},
        network={k: size[k] for k in ("depth", "width", "heads")} | {"window": size["length"]},
        vocabulary=size["vocabulary"],
        training=TrainingConfig(steps=1),
    )
    process = build(config)
    process.network.compute_dtype = number_type()  # type: ignore[attr-defined]
    with torch.no_grad():  # a head that is not at zero
        process.network.head.weight.normal_(std=0.02)  # type: ignore[attr-defined]
    return process


def plain_of(size: Size, causal: bool) -> PlainTransformer:
    vocabulary = size["vocabulary"]
    shape = (size["depth"], size["width"], size["heads"], size["length"])
    return PlainTransformer(vocabulary + 1 - causal, vocabulary, *shape, causal)


def flops_a_token(size: Size, share: float = 1.0) -> float:
    """Of a training step: 6 a weight of the blocks, 12 L D a layer for attention, the head on a share of the rows."""
    depth, width, length = size["depth"], size["width"], size["length"]
    return 6 * 12 * depth * width**2 + 12 * depth * width * length + 6 * share * width * size["vocabulary"]


class Products:
    """The matrix products of a training step in bfloat16 and nothing between them: what no step of this library can
    be faster than. Every layer has tensors of its own, as in a step, so that they do not lie in the nearest cache."""

    def __init__(self, size: Size, share: float = 1.0):
        depth, width, length, batch = size["depth"], size["width"], size["length"], size["batch"]
        rows, heads = batch * length, size["heads"]

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape).bfloat16()

        shapes = [(rows, width, n * width) for n in (3, 1, 4)] + [(rows, 4 * width, width)]
        layers = [shape for _ in range(depth) for shape in shapes] + [(int(share * rows), width, size["vocabulary"])]
        self.maps = [(some(n, i), some(o, i), some(n, o)) for n, i, o in layers]
        inner = (batch * heads, length, width // heads)
        self.attention = [tuple(some(*inner) for _ in range(4)) for _ in range(depth)]
        self.weights = [some(batch * heads, length, length) for _ in range(depth)]
        self.kept: list[torch.Tensor] = []

    def step(self) -> None:
        kept = []
        for x, w, _ in self.maps:
            kept.append(x @ w.t())
        for (q, k, v, _), p in zip(self.attention, self.weights, strict=True):
            kept += [q @ k.transpose(1, 2), p @ v]
        for x, w, g in self.maps:
            kept += [g @ w, g.t() @ x]
        for (q, k, v, g), p in zip(self.attention, self.weights, strict=True):
            kept += [p.transpose(1, 2) @ g, g @ v.transpose(1, 2), p @ k, p.transpose(1, 2) @ q]
        self.kept = kept


def micro(size: Size, process: Any) -> int:
    """Windows of a forward and backward pass, as training would choose them."""
    symbols = size["length"] * process.network.symbols_a_token
    return min(size["batch"], micro_batch_for(symbols, size["vocabulary"], size["width"]))


def learner_of(process: Any, size: Size) -> Learner:
    precision: Precision = "bf16" if process.network.compute_dtype == torch.bfloat16 else "fp32"
    config = TrainingConfig(steps=10**6, batch=size["batch"], micro_batch=micro(size, process), precision=precision)
    return Learner(process.network, config)


def draw_all(process: Any, rows: int, length: int, calls: int, **how: Any) -> None:
    for _ in sample(process, Noise.of(0, rows), length, calls, **how):
        pass
