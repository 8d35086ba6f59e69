"""Peak memory of one training step and of sampling at V = 50,257 and L = 256, for every family, against a ceiling.

    python benchmarks/memory.py [--json]         (Linux; exit code 1 if a ceiling is broken)

The network is small, one block of width 64 in bfloat16, so that what is measured is what the vocabulary costs: a table
of 256 x 50,257 numbers takes 51 MB in float32 and 103 MB in float64, and that of a micro-batch of training, of five
windows, five times as much. Figures are the 10^6 bytes that the process grew by at its peak. A first training step also
makes the gradients and moments of 6.4 M weights, 77 MB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from textdiffusion.config import RunConfig
from textdiffusion.machine import micro_batch_for
from textdiffusion.mathematics.noise import Noise
from textdiffusion.run import build
from textdiffusion.sampling.reverse import sample
from textdiffusion.settings import TrainingConfig
from textdiffusion.training.learning import Learner

VOCABULARY, LENGTH, CALLS = 50257, 256, 2
# Megabytes (training step, sampling one text): above what was measured when they were set by a tenth to a fifth in
# training, by some 20 MB in sampling. Laws of all positions at once in float64 took 1,090 MB in sampling (uniform,
# score_entropy), cross-entropy over float32 tables 785 MB in training (autoregressive).
CEILINGS = {
    "masked": (380, 80),
    "uniform": (740, 135),
    "score_entropy": (490, 115),
    "block": (245, 65),
    "autoregressive": (490, 40),
}


def resident(field: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held since that was last forgotten (peak_of); bytes."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def peak_of(act: Callable[[], object]) -> float:
    """Megabytes that the process grows by at most while it acts."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    before = resident("VmRSS")
    act()
    return (resident("VmHWM") - before) / 1e6


def write_one(process: object, calls: int) -> None:
    for _ in sample(process, Noise.of(0, 1), LENGTH, calls):  # type: ignore[arg-type]
        pass


def measure(family: str) -> dict[str, float]:
    """Peaks of a family, in megabytes."""
    config = RunConfig(
        family=family,
        network={"depth": 1, "width": 64, "heads": 1, "window": LENGTH},
        vocabulary=VOCABULARY,
        training=TrainingConfig(steps=1),
    )
    process = build(config)
    network = process.network
    network.compute_dtype = torch.bfloat16  # type: ignore[attr-defined]
    with torch.no_grad():
        network.head.weight.normal_(std=0.02)  # type: ignore[attr-defined, union-attr, operator]
    batch = micro_batch_for(LENGTH * network.symbols_a_token, VOCABULARY, 64)  # type: ignore[attr-defined]
    learner = Learner(network, TrainingConfig(steps=10, batch=batch))  # type: ignore[arg-type]
    x_0 = torch.arange(batch * LENGTH).view(batch, LENGTH) * 9973 % VOCABULARY
    step = partial(learner.learn, process, x_0, Noise.of(0, batch))
    training = peak_of(step)
    network.eval()  # type: ignore[attr-defined]
    writing = peak_of(partial(write_one, process, LENGTH if family == "autoregressive" else CALLS))
    return {"windows in a step": batch, "training step": round(training), "sampling": round(writing)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("families", nargs="*", default=list(CEILINGS))
    args = parser.parse_args()
    torch.manual_seed(0)
    found = {family: measure(family) for family in args.families}
    broken = [
        family
        for family, (step, writing) in CEILINGS.items()
        if family in found and (found[family]["training step"] > step or found[family]["sampling"] > writing)
    ]
    if args.json:
        print(json.dumps({"megabytes": found, "ceilings": CEILINGS, "broken": broken}))
    else:
        for family, row in found.items():
            print(f"{family:<16}" + "".join(f"{name} {value:>6.0f}   " for name, value in row.items()))
        print(*(f"over its ceiling: {family}" for family in broken), sep="\n", end="")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
