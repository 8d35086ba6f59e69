"""Time our training and sampling against plain re-statements of what public repositories do, in turn in one process.

    make bench                                   (about 20 minutes; writes benchmarks/results.json and docs/speed.svg)
    python benchmarks/bench.py --only training   (a part, as --help lists them; printed, not written)

Every figure is a median over rounds in which all rivals take their turn, so that the drift of a shared machine falls on
all alike; compare ratios, not times. Parameter counts of rivals are equal but for our depthwise convolutions (0.3%) and
learned positions. Ours steps with Muon, and theirs with AdamW, which costs less.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import PlainTraining, PlainTransformer, plain_generate, plain_sample
from torch.utils.flop_counter import FlopCounterMode

from textdiffusion.data import TokenRuns, Windows
from textdiffusion.doctor import machine
from textdiffusion.noise import Noise
from textdiffusion.run import RunConfig, build
from textdiffusion.sampling import sample
from textdiffusion.training import Learner, TrainingConfig, micro_batch_for, tune_allocator

HERE = Path(__file__).parent
# Settings of the comparison: sizes that people train on small machines.
SETTINGS: dict[str, dict[str, int]] = {
    "(i) 6 layers of 256, 256 characters": {
        "depth": 6, "width": 256, "heads": 4, "length": 256, "batch": 32, "vocabulary": 100,
    },
    "(ii) 6 layers of 384, 256 tokens of 8,192": {
        "depth": 6, "width": 384, "heads": 6, "length": 256, "batch": 16, "vocabulary": 8192,
    },
}  # fmt: skip
FAMILIES = ("masked", "autoregressive")


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


def peak() -> dict[str, float]:
    """GFLOP/s of matrix products, the best over sizes and rounds, by precision."""
    best = {"fp32": 0.0, "bf16": 0.0}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for rows, width in ((8192, 256), (8192, 768), (4096, 4096)):
            x, w = torch.ones(rows, width).to(dtype), torch.ones(width, width).to(dtype)
            for _ in range(8):
                begin = time.perf_counter()
                torch.mm(x, w)
                best[name] = max(best[name], 2 * rows * width * width / (time.perf_counter() - begin) / 1e9)
    return best


def process_of(family: str, size: dict[str, int], half: bool = True, own: dict[str, Any] | None = None) -> Any:
    """Our process at a size, in the precision wished for."""
    config = RunConfig(
        family=family,
        process=own or {},
        network={k: size[k] for k in ("depth", "width", "heads")} | {"window": size["length"]},
        vocabulary=size["vocabulary"],
        training=TrainingConfig(steps=1),
    )
    process = build(config)
    process.network.compute_dtype = torch.bfloat16 if half else torch.float32  # type: ignore[attr-defined]
    with torch.no_grad():  # a head that is not at zero
        process.network.head.weight.normal_(std=0.02)  # type: ignore[attr-defined]
    return process


def plain_of(size: dict[str, int], causal: bool) -> PlainTransformer:
    vocabulary = size["vocabulary"]
    shape = (size["depth"], size["width"], size["heads"], size["length"])
    return PlainTransformer(vocabulary + 1 - causal, vocabulary, *shape, causal)


def flops_a_token(size: dict[str, int], share: float = 1.0) -> float:
    """Of a training step: 6 a weight of the blocks, 12 L D a layer for attention, the head on a share of the rows."""
    depth, width, length = size["depth"], size["width"], size["length"]
    return 6 * 12 * depth * width**2 + 12 * depth * width * length + 6 * share * width * size["vocabulary"]


def learner_of(process: Any, size: dict[str, int]) -> Learner:
    batch = size["batch"]
    micro = micro_batch_for(size["length"], size["vocabulary"], size["width"])
    return Learner(process.network, TrainingConfig(steps=10**6, batch=batch, micro_batch=micro))


def training(rounds: int) -> dict[str, Any]:
    """Milliseconds a step."""
    out: dict[str, Any] = {}
    for setting, size in SETTINGS.items():
        x_0 = torch.randint(0, size["vocabulary"], (size["batch"], size["length"]))
        noise = Noise.of(0, size["batch"])
        rivals: dict[str, Callable[[], object]] = {}
        for family in FAMILIES:
            causal = family == "autoregressive"
            for half in (False, True):
                plain = PlainTraining(plain_of(size, causal), size["vocabulary"], causal, half)
                precision = "bf16 autocast" if half else "fp32"
                rivals[f"{family}, plain, {precision}"] = partial(plain.step, x_0)
            process = process_of(family, size)
            learner = learner_of(process, size)
            rivals[f"{family}, ours"] = partial(learner.learn, process, x_0, noise)
        seconds = in_turn(rivals, rounds)
        tokens = x_0.numel()
        out[setting] = {
            name: {"ms": round(1e3 * s, 1), "tokens_per_second": round(tokens / s)} for name, s in seconds.items()
        }
        for family, share in (("masked", 0.5), ("autoregressive", 1.0)):
            s = seconds[f"{family}, ours"]
            out[setting][f"{family}, ours"] |= {
                "times_plain_fp32": round(seconds[f"{family}, plain, fp32"] / s, 2),
                "times_plain_bf16": round(seconds[f"{family}, plain, bf16 autocast"] / s, 2),
                "gflops_per_second": round(tokens * flops_a_token(size, share) / s / 1e9, 1),
            }
    return out


def draw_all(process: Any, rows: int, length: int, calls: int, **how: Any) -> None:
    for _ in sample(process, Noise.of(0, rows), length, calls, **how):
        pass


def sampling(rounds: int, calls: int = 32) -> dict[str, Any]:
    """Milliseconds a network call, everything counted."""
    out: dict[str, Any] = {}
    for setting, size in SETTINGS.items():
        length, vocabulary = size["length"], size["vocabulary"]
        plain, causal = plain_of(size, False).eval(), plain_of(size, True).eval()
        process, baseline = (process_of(family, size) for family in FAMILIES)
        for p in (process, baseline):
            p.network.eval().hold(torch.bfloat16)
        for rows in (1, 16):
            seconds = in_turn(
                {
                    "masked, plain, fp32": partial(plain_sample, plain, rows, length, calls, vocabulary, False),
                    "masked, plain, bf16": partial(plain_sample, plain, rows, length, calls, vocabulary, True),
                    "masked, ours": partial(draw_all, process, rows, length, calls),
                },
                max(3, rounds // 3),
            )
            ours = seconds["masked, ours"]
            out[f"{setting}, {rows} at a time"] = {
                name: {"ms_a_call": round(1e3 * s / calls, 2), "times_ours": round(s / ours, 2)}
                for name, s in seconds.items()
            }
        seconds = in_turn(
            {
                "autoregressive, plain without a cache, fp32": partial(plain_generate, causal, 1, 64, False),
                "autoregressive, plain without a cache, bf16": partial(plain_generate, causal, 1, 64, True),
                "autoregressive, ours": partial(draw_all, baseline, 1, 64, 64),
            },
            max(2, rounds // 3),
        )
        ours = seconds["autoregressive, ours"]
        out[f"{setting}, left to right, 64 tokens"] = {
            name: {"ms_a_call": round(1e3 * s / 64, 2), "times_ours": round(s / ours, 2)} for name, s in seconds.items()
        }
    return out


class Timed:
    """A network whose time is taken."""

    def __init__(self, network: Any):
        self.network, self.seconds = network, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        out = self.network(*args, **kwargs)
        self.seconds += time.perf_counter() - begin
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


def profile(rounds: int) -> dict[str, Any]:
    """Where the time goes: shares of a training step, and of sampling, in percent."""
    out: dict[str, Any] = {}
    small = {"depth": 3, "width": 192, "heads": 3, "length": 64, "batch": 32, "vocabulary": 100}
    for setting, size in {"3 layers of 192, 64 characters": small, **SETTINGS}.items():
        x_0 = torch.randint(0, size["vocabulary"], (size["batch"], size["length"]))
        runs = TokenRuns(np.zeros(10**6, np.uint16), np.array([0, 10**6]), 10**6)
        windows = Windows(runs, size["length"], 0)
        for family in FAMILIES:
            process = process_of(family, size)
            learner = learner_of(process, size)
            micro = micro_batch_for(size["length"], size["vocabulary"], size["width"])
            spent: dict[str, list[float]] = {}
            for turn in range(rounds + 1):
                marks, passes = {}, -(-size["batch"] // micro)
                begin = time.perf_counter()
                windows.rows(turn * size["batch"] + np.arange(size["batch"]))
                marks["loader"] = time.perf_counter() - begin
                noise = Noise.of(0, size["batch"], step=turn)
                begin = time.perf_counter()
                loss = process.loss(x_0[:micro], noise.select(slice(0, micro))).sum()
                marks["forward and loss"] = passes * (time.perf_counter() - begin)
                begin = time.perf_counter()
                loss.backward()
                marks["backward"] = passes * (time.perf_counter() - begin)
                process.network.zero_grad(set_to_none=True)
                begin = time.perf_counter()
                learner.learn(process, x_0, noise)
                step = time.perf_counter() - begin
                marks["optimisers, clipping, average"] = max(0.0, step - marks["forward and loss"] - marks["backward"])
                marks["step"] = step + marks["loader"]
                for name, seconds in marks.items():
                    spent.setdefault(name, []).extend([seconds] * (turn > 0))
            middle = {name: statistics.median(kept) for name, kept in spent.items()}
            out[f"{setting}: training, {family}"] = {"ms": round(1e3 * middle.pop("step"), 1)} | {
                name: f"{100 * seconds / (sum(middle.values())):.0f}%" for name, seconds in middle.items()
            }
    for vocabulary in (100, 8192, 50257):
        size = SETTINGS["(ii) 6 layers of 384, 256 tokens of 8,192"] | {"vocabulary": vocabulary}
        for family, calls in (("masked", 32), ("autoregressive", 256)):
            process = process_of(family, size)
            process.network.eval().hold(torch.bfloat16)
            timed = Timed(process.network)
            whole = in_turn({"all": partial(draw_all, process.over(timed), 1, size["length"], calls)}, rounds // 4 + 1)
            inside = timed.seconds / (rounds // 4 + 2)
            share = 100 * max(0.0, 1 - inside / whole["all"])
            out[f"6 layers of 384, {vocabulary} symbols: sampling one text, {family}"] = {
                "ms_a_call": round(1e3 * whole["all"] / calls, 2), "outside the network": f"{share:.0f}%",
            }  # fmt: skip
    return out


def sizes(rounds: int) -> dict[str, Any]:
    """Tokens a second in training by size, and milliseconds a call in sampling by batch."""
    out: dict[str, Any] = {"training": {}, "sampling": {}}
    for depth in (2, 3, 4, 6, 8):
        size = {"depth": depth, "width": 64 * depth, "heads": depth, "length": 64, "batch": 32, "vocabulary": 100}
        x_0, noise = torch.randint(0, 100, (32, 64)), Noise.of(0, 32)
        rivals: dict[str, Callable[[], object]] = {}
        for family in FAMILIES:
            process = process_of(family, size)
            rivals[family] = partial(learner_of(process, size).learn, process, x_0, noise)
        plain = PlainTraining(plain_of(size, False), 100, False, True)
        rivals["masked, plain, bf16 autocast"] = partial(plain.step, x_0)
        parameters = sum(p.numel() for p in plain.network.parameters())
        for name, seconds in in_turn(rivals, rounds).items():
            out["training"].setdefault(name, {})[parameters] = round(x_0.numel() / seconds)
    size = SETTINGS["(i) 6 layers of 256, 256 characters"]
    process, plain_network = process_of("masked", size), plain_of(size, False)
    process.network.eval().hold(torch.bfloat16)
    for rows in (1, 2, 4, 8, 16, 32):
        seconds = in_turn(
            {
                "masked": partial(draw_all, process, rows, 256, 16),
                "masked, plain, bf16 autocast": partial(plain_sample, plain_network, rows, 256, 16, 100, True),
            },
            max(2, rounds // 5),
        )
        for name, s in seconds.items():
            out["sampling"].setdefault(name, {})[rows] = round(1e3 * s / 16, 2)
    return out


def long_texts(rounds: int) -> dict[str, Any]:
    """Seconds, and FLOPs of the network, of a text of 1,024 characters, a token a call: masked with a window of all of
    it, block with one of 256."""
    small = {"depth": 3, "width": 192, "heads": 3, "vocabulary": 100}
    out: dict[str, Any] = {}
    for calls in (1024, 256):
        rivals: dict[str, Callable[[], object]] = {}
        flops: dict[str, int] = {}
        for name, family, window, fields in (
            ("masked", "masked", 1024, {}),
            *((f"block of {n}", "block", 256, {"block_length": n}) for n in (4, 16)),
        ):
            process = process_of(family, small | {"length": window}, own=fields)
            process.network.eval().hold(torch.bfloat16)
            rivals[name] = partial(draw_all, process, 1, 1024, calls)
            with FlopCounterMode(display=False) as counter:
                draw_all(process, 1, 1024, calls)
            flops[name] = counter.get_total_flops()
        seconds = in_turn(rivals, max(1, rounds // 5))
        out[f"1,024 characters, {calls} calls"] = {
            name: {
                "seconds": round(s, 2), "gigaflops": round(flops[name] / 1e9, 1),
                "seconds_of_masked": round(seconds["masked"] / s, 1),
                "flops_of_masked": round(flops["masked"] / flops[name], 1),
            }
            for name, s in seconds.items()
        }  # fmt: skip
    return out


def projection() -> dict[str, Any]:
    """What arithmetic alone says of one and eight H100s: 989 TFLOP/s in bf16 each, of which 40% are assumed to be
    reached, as good public trainers do; gradients of all weights cross a 450 GB/s link once a step. Not measured."""
    out = {}
    for name, depth, width, length, vocabulary in (("162 M", 12, 768, 1024, 50257), ("1.4 B", 24, 2048, 1024, 50257)):
        size = {"depth": depth, "width": width, "length": length, "vocabulary": vocabulary}
        parameters = 12 * depth * width**2 + 2 * width * vocabulary
        a_second = 0.4 * 989e12 / flops_a_token(size)
        tokens = 2**19  # a step
        step = tokens / 8 / a_second + 2 * 2 * parameters / 450e9
        out[name] = {"one H100, tokens/s": round(a_second), "eight, tokens/s": round(tokens / step)}
    return out


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens a second against size, milliseconds a call against batch."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "textdiffusion"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), constrained_layout=True)
    colours = {"masked": "#0072b2", "autoregressive": "#009e73", "masked, plain, bf16 autocast": "#d55e00"}
    for axes, part in ((left, "training"), (right, "sampling")):
        for name, points in results["sizes"][part].items():
            x = [float(k) / (1e6 if part == "training" else 1) for k in points]
            axes.plot(x, list(points.values()), "o-", label=name, color=colours[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    left.set(xlabel="parameters (millions)", ylabel="tokens a second", title="training, windows of 64")
    right.set(xlabel="texts at a time", ylabel="milliseconds a call", title="sampling, 256 characters, 6 layers of 256")
    right.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    left.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "training": training, "sampling": sampling, "profile": profile, "sizes": sizes, "long": long_texts,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["peak", *PARTS])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    tune_allocator()
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "machine": {
            "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
            "processor": machine("cpu")["processor"], "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "peak_gflops_per_second": {k: round(v) for k, v in peak().items()},
    }  # fmt: skip
    for name, part in PARTS.items():
        if args.only in (None, name):
            begin = time.perf_counter()
            results[name] = part(args.rounds)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if "training" in results:
        for setting in results["training"].values():
            for row in setting.values():
                if "gflops_per_second" in row:
                    share = row["gflops_per_second"] / results["peak_gflops_per_second"]["bf16"]
                    row["share_of_bf16_peak"] = round(share, 3)
    if args.only is None:
        results["projection, not measured"] = projection()
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        plot(results, HERE.parent / "docs" / "speed.svg")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
