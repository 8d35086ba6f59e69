"""Where the time goes, for every family: stages and kinds of operation of a training step, parts of sampling."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from subjects import Plan, Size, draw_all, learner_of, micro, number_type, process_of
from textdiffusion.families import names
from textdiffusion.mathematics.noise import Noise
from textdiffusion.text.windows import TokenRuns, Windows

KINDS = (
    ("matrix products", ("mm", "linear", "matmul")),
    ("convolutions", ("conv",)),
    ("layer norms", ("layer_norm",)),
    ("softmax and loss", ("softmax", "nll_loss")),
    ("GELU", ("gelu",)),
    ("look-ups", ("index", "scatter", "gather", "embedding", "nonzero", "searchsorted", "sort")),
    ("copies and casts", ("copy_", "cat", "constant_pad", "fill_", "zero_")),
)


def kinds(act: Callable[[], object]) -> dict[str, float]:
    """Shares of the time, in percent, by kind of operation."""
    act()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        act()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        found = (kind for kind, parts in KINDS if any(part in event.key for part in parts))
        kind = next(found, "the rest, mostly elementwise")
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
    return shares(spent)


def shares(spent: dict[str, float]) -> dict[str, float]:
    whole = sum(spent.values())
    return {name: round(100 * part / whole, 1) for name, part in sorted(spent.items(), key=lambda item: -item[1])}


def stages(process: Any, size: Size, rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of a training step, and the shares of its stages in percent."""
    x_0 = torch.randint(0, size["vocabulary"], (size["batch"], size["length"]))
    tokens = TokenRuns(np.zeros(10**6, np.uint16), np.array([0, 10**6]), 10**6)
    windows, learner, part = Windows(tokens, size["length"], 0), learner_of(process, size), micro(size, process)
    passes = -(-size["batch"] // part)
    spent: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        clock = [time.perf_counter()]
        windows.rows(turn * size["batch"] + np.arange(size["batch"]))
        clock.append(time.perf_counter())
        noise = Noise.of(0, size["batch"], step=turn)
        loss = process.loss(x_0[:part], noise.select(slice(0, part))).sum()
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        process.network.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        learner.learn(process, x_0, noise)
        step = time.perf_counter() - begin
        loader, forward, backward = np.diff(clock)
        # The passes of a step are as many as it has micro-batches; the last may be smaller.
        rest = max(0.0, step - passes * (forward + backward))
        marks = {"loader": loader, "forward and loss": passes * forward, "backward": passes * backward,
                 "clipping, optimisers, average": rest, "step": step + loader}  # fmt: skip
        if turn:
            for name, seconds in marks.items():
                spent.setdefault(name, []).append(seconds)
    middle = {name: statistics.median(kept) for name, kept in spent.items()}
    return middle.pop("step"), shares(middle)


class Timed:
    """A function, or a network, whose time is taken."""

    def __init__(self, act: Any):
        self.act, self.seconds = act, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        out = self.act(*args, **kwargs)
        self.seconds += time.perf_counter() - begin
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.act, name)


@contextlib.contextmanager
def timed_noise() -> Iterator[Timed]:
    """What drawing random numbers takes."""
    timed, own = Timed(Noise.uniform), Noise.uniform
    Noise.uniform = lambda self, *args: timed(self, *args)  # type: ignore[assignment, method-assign]
    try:
        yield timed
    finally:
        Noise.uniform = own  # type: ignore[method-assign]


def profile(plan: Plan) -> dict[str, Any]:
    """Shares in percent of a training step, and of sampling at growing vocabularies."""
    out: dict[str, Any] = {"training": {}, "sampling": {}}
    first = next(iter(plan.settings))
    for setting, size in {"as trained by default": plan.default, first: plan.settings[first]}.items():
        for family in names():
            process = process_of(family, size)
            seconds, parts = stages(process, size, max(1, plan.rounds // 2))
            x_0 = torch.randint(0, size["vocabulary"], (micro(size, process), size["length"]))
            one_pass = partial(one_loss, process, x_0)
            out["training"].setdefault(setting, {})[family] = {
                "ms_a_step": round(1e3 * seconds, 1),
                "tokens_per_second": round(size["batch"] * size["length"] / seconds),
                "stages_percent": parts,
                "kinds_percent": kinds(one_pass),
            }
    largest = list(plan.settings.values())[-1]
    for vocabulary in plan.vocabularies:
        size = largest | {"vocabulary": vocabulary}
        for family in names():
            process = process_of(family, size)
            process.network.eval().hold(number_type())
            length = size["length"] // (8 if family == "autoregressive" else 1)
            calls = length if family == "autoregressive" else size["length"] // 8
            if family in ("uniform", "score_entropy"):
                calls = max(1, calls // 8)  # every call asks about every position
            network = Timed(process.network)
            with timed_noise() as noise:
                draw_all(process.over(network), 1, length, calls)
                network.seconds = noise.seconds = 0.0
                begin = time.perf_counter()
                draw_all(process.over(network), 1, length, calls)
                whole = time.perf_counter() - begin
                rest = max(0.0, whole - network.seconds - noise.seconds)
                spent = {"network": network.seconds, "random numbers": noise.seconds, "laws, draws, frames": rest}
            out["sampling"].setdefault(f"{vocabulary:,} symbols", {})[family] = {
                "ms_a_call": round(1e3 * whole / calls, 2),
                "parts_percent": shares(spent),
            }
    return out


def one_loss(process: Any, x_0: torch.Tensor) -> None:
    process.loss(x_0, Noise.of(0, len(x_0))).sum().backward()
    process.network.zero_grad(set_to_none=True)
