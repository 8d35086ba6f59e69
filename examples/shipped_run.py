"""Makes the run that the package carries again: a small masked model of the built-in text (about ten minutes).

    python examples/shipped_run.py [FOLDER]

Without a folder it is written where the package looks for it. It is trained in runs/shipped; begun there, it is gone on
with. What is trained depends on the text, which is that of the
Python that runs this (the card names its release), and to the last bit on the machine; not on the clock: the budget is
in steps. Weights are kept in half precision, and the card's figures are of what is kept.
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import textdiffusion as td
from textdiffusion.config import RUNS
from textdiffusion.files import write
from textdiffusion.presets import configure
from textdiffusion.report import report
from textdiffusion.training.terminal import follow

MOST_BYTES = 1_400_000  # what an installation should not notice
KEPT = ("config.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "grid.json")
STEPS = 2800


def make(place: Path) -> None:
    """Train, and keep what sampling needs."""
    config = configure(
        family="masked", data="pydoc", tokenizer="bpe:512", length=64, depth=3, steps=STEPS, seed=0,
        settings=["network.width=112", "network.heads=2", "training.precision=fp32"],
    )  # fmt: skip
    run = RUNS / "shipped"
    stopped = follow(config, run, (run / "config.json").exists(), "cpu", Console())
    if stopped.signal is not None:
        sys.exit(128 + stopped.signal)
    pack(run, place, f"{STEPS:,} steps with seed 0; the same command makes it again.")


def pack(run: Path, place: Path, steps: str) -> None:
    """Copy what sampling needs of a run, with a card that says how it came about and what it reaches."""
    place.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run / name, place / name)
    halves = {name: tensor.to(torch.float16) for name, tensor in load_file(run / "model.safetensors").items()}
    save_file(halves, place / "model.safetensors", metadata={"format": "pt"})
    card = (run / "README.md").read_text(encoding="utf-8")
    table, _, _ = card.partition("Use it:")
    model = td.load(place, "cpu", "fp32")
    found = report(model, data=None, split="validation", calls=[8, 64], sampler=None, tokens=None, draws=None,
                   samples=32, seed=0)  # fmt: skip
    figures = "\n".join(found.lines())
    write(place / "README.md", f"""{table.replace("# shipped", "# The run that comes with textdiffusion")}
It is small, so that it can be shipped, and shows what the library does the minute after installing; it is no example
of good writing. It was trained by `python examples/shipped_run.py` on the built-in text of Python
{platform.python_version()} (`pydoc_data.topics`, under the Python Software Foundation's licence): {steps}
Its weights are kept in half precision.

Held-out figures of the weights as they are here (`textdiffusion eval --calls 8,64 --samples 32`, with this run chosen):

```text
{figures}
```

Use it, from a folder without a `runs/`:

```text
textdiffusion sample --watch
textdiffusion sample --infill "The ____ of the ____ is a string."
textdiffusion ui
```
""")  # fmt: skip
    size = sum(file.stat().st_size for file in place.iterdir())
    print(f"{place}: {size:,} bytes")
    if size > MOST_BYTES:
        sys.exit(f"that is more than {MOST_BYTES:,} bytes: choose a smaller network")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else td.SHIPPED)
