"""Time our training and sampling against plain re-statements of what public repositories do, in turn in one process.

    make bench                                    (all parts: about a quarter of an hour on two quiet cores)
    python benchmarks/bench.py --only training    (a part, as --help lists them; may be repeated)
    python benchmarks/bench.py --missing          (the parts that results.json does not hold yet)
    python benchmarks/bench.py --page             (measures nothing: writes the page and the plot again)
    python benchmarks/bench.py --quick            (tiny sizes, to see that it runs: printed, written nowhere)

Each part is written to benchmarks/results.json when it is done, with the machine it was measured on; docs/speed.md and
docs/speed.svg are made from that file (page.py). Every figure is a median over rounds in which all rivals take their
turn, so that the drift of a shared machine falls on all alike; compare ratios, not times. Parameter counts of rivals
are equal but for our depthwise convolutions (0.3%) and learned positions. Ours steps with Muon, and theirs with AdamW,
which costs less; all run with the C library told to keep freed memory, which helps the rivals more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from breakdown import profile
from page import plot, write_up
from plain import PlainTraining, plain_generate, plain_sample
from torch.utils.flop_counter import FlopCounterMode

import textdiffusion as td
from subjects import (
    FULL,
    PLAIN,
    QUICK,
    Plan,
    Products,
    draw_all,
    flops_a_token,
    in_turn,
    learner_of,
    number_type,
    peak,
    plain_of,
    process_of,
)
from textdiffusion.doctor import machine
from textdiffusion.machine import tune_allocator
from textdiffusion.mathematics.noise import Noise

HERE = Path(__file__).parent


def training(plan: Plan) -> dict[str, Any]:
    """Milliseconds a step, and the share of what matrix products reach at their best."""
    out: dict[str, Any] = {}
    for setting, size in plan.settings.items():
        x_0 = torch.randint(0, size["vocabulary"], (size["batch"], size["length"]))
        noise = Noise.of(0, size["batch"])
        rivals: dict[str, Callable[[], object]] = {}
        for family in PLAIN:
            causal = family == "autoregressive"
            for half in (False, True):
                plain = PlainTraining(plain_of(size, causal), size["vocabulary"], causal, half)
                precision = "bf16 autocast" if half else "fp32"
                rivals[f"{family}, plain, {precision}"] = partial(plain.step, x_0)
            process = process_of(family, size)
            learner = learner_of(process, size)
            rivals[f"{family}, ours"] = partial(learner.learn, process, x_0, noise)
        rivals["masked, its matrix products alone"] = Products(size, 0.5).step
        before = peak(plan)
        seconds = in_turn(rivals, plan.rounds)
        best = {name: max(speed, before[name]) for name, speed in peak(plan).items()}
        tokens = x_0.numel()
        out[setting] = {
            name: {"ms": round(1e3 * s, 1), "tokens_per_second": round(tokens / s)} for name, s in seconds.items()
        }
        subjects = ("masked, ours", 0.5), ("autoregressive, ours", 1.0), ("masked, its matrix products alone", 0.5)
        for name, share in subjects:
            s, family = seconds[name], name.split(",")[0]
            speed = tokens * flops_a_token(size, share) / s / 1e9
            out[setting][name] |= {
                "times_plain_fp32": round(seconds[f"{family}, plain, fp32"] / s, 2),
                "times_plain_bf16": round(seconds[f"{family}, plain, bf16 autocast"] / s, 2),
                "gflops_per_second": round(speed, 1),
                "share_of_bf16_peak": round(speed / best["bf16"], 3),
            }
        out[setting]["peak_gflops_per_second"] = {name: round(speed) for name, speed in best.items()}
    return out


def sampling(plan: Plan) -> dict[str, Any]:
    """Milliseconds a network call, everything counted."""
    out: dict[str, Any] = {}
    for setting, size in plan.settings.items():
        length, vocabulary = size["length"], size["vocabulary"]
        plain, causal = plain_of(size, False).eval(), plain_of(size, True).eval()
        process, baseline = (process_of(family, size) for family in PLAIN)
        for p in (process, baseline):
            p.network.eval().hold(number_type())
        for rows, calls in plan.calls.items():
            seconds = in_turn(
                {
                    "masked, plain, fp32": partial(plain_sample, plain, rows, length, calls, vocabulary, False),
                    "masked, plain, bf16 autocast": partial(plain_sample, plain, rows, length, calls, vocabulary, True),
                    "masked, ours": partial(draw_all, process, rows, length, calls),
                },
                max(1, plan.rounds // 2),
            )
            ours = seconds["masked, ours"]
            out[f"{setting}, {rows} at a time, {calls} calls"] = {
                name: {"ms_a_call": round(1e3 * s / calls, 2), "times_ours": round(s / ours, 2)}
                for name, s in seconds.items()
            }
        tokens = plan.tokens
        seconds = in_turn(
            {
                "autoregressive, plain, no cache, fp32": partial(plain_generate, causal, 1, tokens, False),
                "autoregressive, plain, no cache, bf16 autocast": partial(plain_generate, causal, 1, tokens, True),
                "autoregressive, ours": partial(draw_all, baseline, 1, tokens, tokens),
            },
            max(1, plan.rounds // 2),
        )
        ours = seconds["autoregressive, ours"]
        out[f"{setting}, left to right, {tokens} tokens"] = {
            name: {"ms_a_call": round(1e3 * s / tokens, 2), "times_ours": round(s / ours, 2)}
            for name, s in seconds.items()
        }
    return out


def sizes(plan: Plan) -> dict[str, Any]:
    """Tokens a second in training by size, and milliseconds a call in sampling by batch."""
    out: dict[str, Any] = {"training": {}, "sampling": {}}
    window, batch = plan.default["length"], plan.default["batch"]
    for depth in plan.depths:
        size = {"depth": depth, "width": 64 * depth, "heads": depth, "length": window, "batch": batch}
        size |= {"vocabulary": 100}
        x_0, noise = torch.randint(0, 100, (batch, window)), Noise.of(0, batch)
        rivals: dict[str, Callable[[], object]] = {}
        for family in PLAIN:
            process = process_of(family, size)
            rivals[family] = partial(learner_of(process, size).learn, process, x_0, noise)
        plain = PlainTraining(plain_of(size, False), 100, False, True)
        rivals["masked, plain, bf16 autocast"] = partial(plain.step, x_0)
        parameters = sum(p.numel() for p in plain.network.parameters())
        for name, seconds in in_turn(rivals, plan.rounds).items():
            out["training"].setdefault(name, {})[str(parameters)] = round(x_0.numel() / seconds)
    size = next(iter(plan.settings.values()))
    length, vocabulary, calls = size["length"], size["vocabulary"], max(1, size["length"] // 16)
    process, plain_network = process_of("masked", size), plain_of(size, False)
    process.network.eval().hold(number_type())
    for rows in plan.rows:
        seconds = in_turn(
            {
                "masked": partial(draw_all, process, rows, length, calls),
                "masked, plain, bf16 autocast": partial(
                    plain_sample, plain_network, rows, length, calls, vocabulary, True
                ),
            },
            max(1, plan.rounds // 3),
        )
        for name, s in seconds.items():
            out["sampling"].setdefault(name, {})[str(rows)] = round(1e3 * s / calls, 2)
    return out


def long_texts(plan: Plan) -> dict[str, Any]:
    """Seconds, and FLOPs of the network, of one long text: masked with a window of all of it, block with a quarter."""
    out: dict[str, Any] = {}
    for calls in (plan.long, plan.long // 4):
        rivals: dict[str, Callable[[], object]] = {}
        flops: dict[str, int] = {}
        for name, family, window, fields in (
            ("masked", "masked", plan.long, {}),
            *((f"block of {n}", "block", plan.long // 4, {"block_length": n}) for n in (4, 16)),
        ):
            process = process_of(family, plan.default | {"length": window}, own=fields)
            process.network.eval().hold(number_type())
            rivals[name] = partial(draw_all, process, 1, plan.long, calls)
            with FlopCounterMode(display=False) as counter:
                draw_all(process, 1, plan.long, calls)
            flops[name] = counter.get_total_flops()
        seconds = {name: statistics.median(once(act) for _ in range(2)) for name, act in rivals.items()}
        out[f"{plan.long:,} characters, {calls:,} calls"] = {
            name: {
                "seconds": round(s, 3), "gigaflops": round(flops[name] / 1e9, 1),
                "times_faster_than_masked": round(seconds["masked"] / s, 1),
                "times_fewer_flops": round(flops["masked"] / flops[name], 1),
            }
            for name, s in seconds.items()
        }  # fmt: skip
    return out


def once(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def memory(plan: Plan) -> dict[str, Any]:
    """Peak megabytes at V = 50,257, of which memory.py tells more."""
    families = ["masked"] if plan is QUICK else []
    return script("memory.py", *families)


def kernels(plan: Plan) -> dict[str, Any]:
    """The small choices, each against its rival; kernels.py."""
    return {} if plan is QUICK else script("kernels.py")


def script(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / name), "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if not result.stdout:
        raise RuntimeError(result.stderr)
    return dict(json.loads(result.stdout))


def start_up(plan: Plan) -> dict[str, Any]:
    """Seconds of commands, in turn, and of importing torch, which most of them wait for."""
    python = [sys.executable, "-m", "textdiffusion"]
    with tempfile.TemporaryDirectory() as folder:
        td.train(Path(folder) / "run", steps=1, settings=["training.batch=4"])
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "--help": [*python, "--help"],
            "families": [*python, "families"],
            "train --data nowhere.txt": [*python, "train", "--data", "nowhere.txt"],
            "sample RUN --temperature -1": [*python, "sample", "run", "--temperature", "-1"],
            "sample RUN -n 1": [*python, "sample", "run", "-n", "1"],
        }
        act = partial(subprocess.run, cwd=folder, capture_output=True, check=False)
        seconds = in_turn({name: partial(act, command) for name, command in commands.items()}, plan.rounds)
    return {name: round(s, 2) for name, s in seconds.items()}


def reproducible(plan: Plan) -> dict[str, Any]:
    """Seconds that texts take as they come, and as the same texts for any number of them (sample --reproducible)."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = plan.default
        model = td.train(
            Path(folder) / "run", steps=1, depth=size["depth"], length=size["length"], settings=["training.batch=4"]
        )
        for number in (1, 16, 128):
            rivals = {
                name: partial(model.sample_counted, number, size["length"], 32, reproducible=wish)
                for name, wish in (("as they come", False), ("reproducible", True))
            }
            seconds = in_turn(rivals, max(1, plan.rounds // 2))
            out[f"{number} texts"] = {name: round(s, 3) for name, s in seconds.items()} | {
                "times": round(seconds["reproducible"] / seconds["as they come"], 2)
            }
    return out


def precision(plan: Plan) -> dict[str, Any]:
    """Bits per character of held-out text after as many steps in float32 and in bfloat16, three seeds each."""
    steps, depth = (3, 1) if plan is QUICK else (2000, 2)
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0,) if plan is QUICK else (0, 1, 2):
            for name in ("fp32", "bf16"):
                run = Path(folder) / f"{name}{seed}"
                settings = [f"training.precision={name}", "training.evaluations=1"]
                begin = time.perf_counter()
                td.train(run, steps=steps, depth=depth, length=64, seed=seed, settings=settings)
                seconds = time.perf_counter() - begin
                command = [sys.executable, "-m", "textdiffusion", "eval", str(run), "--samples", "1", "--json"]
                said = subprocess.run(command, capture_output=True, text=True, check=True)
                figure = json.loads(said.stdout)
                out[f"{name}, seed {seed}"] = {
                    "bits_per_char": round(figure["bits_per_char"], 4),
                    "standard_error": round(figure["standard_error"], 4),
                    "seconds": round(seconds),
                }
    return out


def projection(plan: Plan) -> dict[str, Any]:
    """What arithmetic alone says of one and eight H100s, not measured: 989 TFLOP/s in bf16 and 3.35 TB/s each, of which
    40% and 60% are assumed to be reached, as good public code does; gradients cross a 450 GB/s link once a step."""
    out = {}
    speed, bandwidth, link, step_tokens = 0.4 * 989e12, 0.6 * 3.35e12, 450e9, 2**19
    for name, depth, width, length, vocabulary in (("162 M", 12, 768, 1024, 50257), ("1.4 B", 24, 2048, 1024, 50257)):
        size = {"depth": depth, "width": width, "length": length, "vocabulary": vocabulary}
        parameters = 12 * depth * width**2 + 2 * width * vocabulary
        # A step of the optimiser reads and writes weights, gradients, moments and the average: some 40 bytes a weight.
        update = 40 * parameters / bandwidth
        one = step_tokens * flops_a_token(size, 0.5) / speed + update
        eight = step_tokens / 8 * flops_a_token(size, 0.5) / speed + update + 2 * 2 * parameters / link
        # A call reads all weights, and computes 2 FLOPs a weight of the blocks and a token; the head on 1 row in 16.
        call = {
            rows: max(
                2 * parameters / bandwidth,
                rows * length * (flops_a_token(size, 1 / 16) / 3) / speed,
            )
            for rows in (1, 64)
        }
        out[name] = {
            "masked, one H100, tokens/s": round(step_tokens / one),
            "masked, eight H100s, tokens/s": round(step_tokens / eight),
            "ms a call, one text of 1,024": round(1e3 * call[1], 2),
            "ms a call, 64 texts": round(1e3 * call[64], 2),
        }
    return out


PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "training": training, "sampling": sampling, "profile": profile, "sizes": sizes, "long": long_texts,
    "memory": memory, "kernels": kernels, "start-up": start_up, "reproducible": reproducible,
    "projection": projection, "precision": precision,
}  # fmt: skip
ASKED_FOR = ("precision",)  # a quarter of an hour by itself: only when it is named


def facts() -> dict[str, Any]:
    """What a part was measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {
        "textdiffusion": td.__version__, "commit": commit.stdout.strip(), "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
        "processor": machine("cpu")["processor"], "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append", default=[], help="a part; may be repeated")
    parser.add_argument("--missing", action="store_true", help="the parts that results.json does not hold yet")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page and the plot again")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, printed and written nowhere")
    args = parser.parse_args()
    tune_allocator()
    torch.manual_seed(0)
    place, docs = HERE / "results.json", HERE.parent / "docs"
    known = place.exists() and not args.quick
    results: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if known else {}
    usual = [name for name in PARTS if name not in ASKED_FOR or args.quick]
    wanted = args.only or [name for name in usual if not (args.missing and name in results)]
    for name in [] if args.page else wanted:
        begin = time.perf_counter()
        measured = facts()
        found = PARTS[name](QUICK if args.quick else FULL)
        seconds = round(time.perf_counter() - begin)
        results[name] = {"measured_on": measured, "seconds": seconds, "results": found}
        print(f"{name}: {seconds} s", file=sys.stderr, flush=True)
        if not args.quick:
            place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = write_up(results)
    if args.quick:
        print(page)
        return
    (docs / "speed.md").write_text(page, encoding="utf-8")
    if "sizes" in results:
        plot(results["sizes"]["results"], docs / "speed.svg")


if __name__ == "__main__":
    main()
