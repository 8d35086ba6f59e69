"""Time the small choices that the code claims are the fast ones, each against its rival, in turn in one process.

    python benchmarks/kernels.py [--json]

Medians of milliseconds, forward and backward; the ratio says how many times faster the first is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from subjects import number_type
from textdiffusion.networks.convolution import Convolution
from textdiffusion.training.learning import side_by_side
from textdiffusion.training.muon import Muon


def compare(first: Callable[[], object], second: Callable[[], object], runs: int = 21) -> tuple[float, float]:
    """Median milliseconds of both, run alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 3):
        for act, kept in zip((first, second), times):
            begin = time.perf_counter()
            act()
            if run >= 3:
                kept.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[0]), statistics.median(times[1])


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def pairs() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is compared: (the choice made, its rival)."""
    half, full = leaf(2048, 256), leaf(2048, 256, dtype=torch.float32)
    weight_half, weight_full = leaf(1024, 256), leaf(1024, 256, dtype=torch.float32)
    q, k, v = (leaf(32, 4, 64, 64) for _ in range(3))
    grad = torch.ones(32, 4, 64, 64, dtype=torch.bfloat16)
    wide, grad_wide = leaf(2048, 1024), torch.ones(2048, 1024, dtype=torch.bfloat16)
    grad_half = torch.ones(2048, 256, dtype=torch.bfloat16)
    gain = leaf(256)
    rows, asked = leaf(32, 64, 256), torch.rand(32, 64) < 0.5
    index = asked.flatten().nonzero().squeeze(-1)
    grad_windows = torch.ones(32, 64, 256, dtype=torch.bfloat16)
    grad_rows = torch.ones(len(index), 256, dtype=torch.bfloat16)
    # The matrices of a network of 3 blocks of width 192, one Muon each or one Muon for all.
    shapes = 3 * [(576, 192), (192, 192), (768, 192), (192, 768)]

    def muons(dtype: torch.dtype, together: bool = False) -> list[Muon]:
        matrices = [leaf(*shape, dtype=torch.float32) for shape in shapes]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        how = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.0, "dtype": dtype}
        return [Muon(some, **how) for some in ([matrices] if together else [[matrix] for matrix in matrices])]

    apart, at_once = muons(number_type()), muons(number_type(), True)
    in_full, in_half = muons(torch.float32), muons(torch.bfloat16)
    convolution = Convolution(256, 5)
    plain = torch.nn.Conv1d(256, 256, 5, padding=2, groups=256, bias=False).bfloat16()
    pool = side_by_side(min(torch.get_num_threads(), 4))
    return {
        "linear map in bfloat16 / float32": (
            lambda: F.linear(half, weight_half).sum().backward(),
            lambda: F.linear(full, weight_full).sum().backward(),
        ),
        "attention by three operations / fused, bfloat16": (
            lambda: (((q * 0.125) @ k.transpose(-1, -2)).softmax(-1) @ v).backward(grad),
            lambda: F.scaled_dot_product_attention(q, k, v).backward(grad),
        ),
        "GELU erf / tanh": (
            lambda: F.gelu(wide).backward(grad_wide),
            lambda: F.gelu(wide, approximate="tanh").backward(grad_wide),
        ),
        "layer norm / RMS norm": (
            lambda: F.layer_norm(half, (256,), gain).backward(grad_half),
            lambda: F.rms_norm(half, (256,), gain).backward(grad_half),
        ),
        "asked rows by index / by mask": (
            lambda: rows.flatten(0, 1).index_select(0, index).backward(grad_rows),
            lambda: rows[asked].backward(grad_rows),
        ),
        "depthwise convolution, own gradient / library": (
            lambda: convolution(rows).backward(grad_windows),
            lambda: plain(rows.transpose(1, 2)).transpose(1, 2).backward(grad_windows),
        ),
        "Muon's matrices side by side / in turn": (
            lambda: list(pool.map(lambda one: one.step(), apart)),
            lambda: [one.step() for one in at_once],
        ),
        "Muon's products in float32 / bfloat16": (
            lambda: list(pool.map(lambda one: one.step(), in_full)),
            lambda: list(pool.map(lambda one: one.step(), in_half)),
        ),
    }


def allocator(tuned: bool) -> float:
    """Median milliseconds of a training-sized elementwise operation in a fresh process."""
    code = (
        "import statistics, time, torch\n"
        + ("from textdiffusion.machine import tune_allocator; tune_allocator()\n" if tuned else "")
        + "x, out = torch.randn(8192, 1024), []\n"
        "for _ in range(23):\n"
        "    begin = time.perf_counter(); y = torch.nn.functional.gelu(x)\n"
        "    out.append(time.perf_counter() - begin); del y\n"
        "print(1e3 * statistics.median(out[3:]))"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    results = {name: compare(*both) for name, both in pairs().items()}
    results["freed memory kept / given back"] = (allocator(True), allocator(False))
    table = {k: {"ms": round(a, 3), "rival_ms": round(b, 3), "ratio": round(b / a, 2)} for k, (a, b) in results.items()}
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if as_json:
        print(json.dumps(facts | {"results": table}))
        return
    print(*(f"{k} {v}" for k, v in facts.items()), sep=", ")
    for name, row in table.items():
        print(f"{name:<50}{row['ms']:>9.2f} ms {row['rival_ms']:>9.2f} ms   x{row['ratio']:.2f}")


if __name__ == "__main__":
    main()
