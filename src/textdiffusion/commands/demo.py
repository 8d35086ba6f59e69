"""The first two minutes: a model is trained on built-in text, writes, fills gaps, and is put in its place."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from textdiffusion.config import RUNS
from textdiffusion.evaluation.measures import text_statistics
from textdiffusion.loading import load, pick_device
from textdiffusion.presets import demo_config
from textdiffusion.text.data import load_corpus, word_set
from textdiffusion.training.terminal import follow, leave_plot


def demo(minutes: float, seed: int, out: Path | None, device: str) -> int:
    """Train in ``out``, or a new run/demo, and show what it gives; the exit code."""
    console = Console()
    path, number = out or RUNS / "demo", 2
    while out is None and path.exists():
        path, number = RUNS / f"demo-{number}", number + 1
    console.rule("1. a masked diffusion model learns the Python reference")
    stopped = follow(demo_config(minutes, seed), path, False, pick_device(device), console)
    if stopped.signal is not None:
        return 128 + stopped.signal
    leave_plot(path, lambda plots: plots.save_training(path))
    model = load(path, device)
    console.rule("2. text appears out of noise")
    model.watch(2, seed=seed)
    console.rule("3. it fills gaps, anywhere")
    model.watch(1, infill="The ________ of the ________ is a string.", seed=seed)
    console.rule("4. what this is, and is not")
    words = text_statistics(model.sample(16, seed=seed), word_set(load_corpus(model.config.data))).valid_words
    # After `make demo` the command is in a virtual environment that nobody has activated.
    me = "textdiffusion" if shutil.which("textdiffusion") else sys.argv[0]
    console.print(
        f"{minutes:g} minutes and {stopped.step:,} steps teach a small network something of the spelling and habits of "
        f"its text: of the words of 16 more texts {words:.0%} are words of it; sentences do not hold together. More "
        "time, more text and a larger network give more.",
        highlight=False, markup=False,
    )  # fmt: skip
    console.print(
        f"""
Try next:
  {me} sample {path} --watch --calls 8           the same in 8 network calls: faster, rougher
  {me} sample {path} --infill "Return the ____"  fill gaps; an underscore is one token
  {me} eval {path} --calls 1,2,4,8,16,32         bits per character, and what fewer calls cost
  {me} train --data my.txt --minutes 20 {" " * max(len(str(path)) - 1, 0)}    your own text
The run is in {path}.""",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return 0
