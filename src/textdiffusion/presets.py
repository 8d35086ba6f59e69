"""From a few flags to a whole config: one dial, --depth, from which width, heads and learning rates follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from textdiffusion.config import RunConfig, override
from textdiffusion.errors import UserError
from textdiffusion.families import check as check_family
from textdiffusion.settings import TrainingConfig
from textdiffusion.text.data import DataConfig
from textdiffusion.text.tokenizer import check_kind

# Blocks. Sizes are for budgets: tiny for minutes of a laptop, small for an hour, base for a GPU.
PRESETS = {"tiny": 3, "small": 6, "base": 12}
HEAD_WIDTH = 64

# Windows in an optimiser step, and of long ones fewer: 8 and 16 windows of 256 characters learn as much in the same
# minutes.
BATCH, STEP_TOKENS = 32, 4096

# Longest text in tokens unless --length says otherwise: 64 characters is the first system's window, and shorter windows
# learn faster per token; a sub-word token holds two to four characters.
DEFAULT_LENGTH = 64


def shape(depth: int) -> dict[str, Any]:
    """Network fields for a depth: 64 of width, and one head, a block."""
    if not 1 <= depth <= 1000:
        raise UserError(f"--depth must be from 1 to 1,000, not {depth}")
    return {"depth": depth, "width": HEAD_WIDTH * depth, "heads": depth}


def depth_for(minutes: float | None) -> int:
    """Blocks for a budget in minutes; measured at 5 (docs/results.md), a guess above. In steps, the smallest preset."""
    if minutes is None or minutes <= 10:
        return 3
    return 4 if minutes <= 40 else 6


def configure(
    *,
    family: str = "masked",
    data: str = "pydoc",
    text_field: str = "text",
    label: str | None = None,
    tokenizer: str = "char",
    length: int = DEFAULT_LENGTH,
    preset: str | None = None,
    depth: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    settings: list[str] | None = None,
    init_from: str | None = None,
) -> RunConfig:
    """The config of a run, checked. ``init_from`` is a model to begin with (adaptation.py), which decides the network.

    Raises:
        UserError: a value that makes no sense, naming what would.
    """
    check_family(family)
    check_kind(tokenizer)
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    if not 1 <= length <= 1_000_000:
        raise UserError(f"--length must be from 1 to 1,000,000, not {length}")
    if steps is not None and minutes is not None:
        raise UserError("give --steps or --minutes, not both")
    if steps is None and minutes is None:
        minutes = 5.0
    if depth is not None:
        chosen = depth
    else:
        chosen = PRESETS[preset] if preset else depth_for(minutes)
    size = shape(chosen)
    # Matrices are taught by Muon, whose steps are scaled to their shape; AdamW's rate falls with the width.
    batch = max(1, min(BATCH, STEP_TOKENS // length))
    training = TrainingConfig(steps=steps, minutes=minutes, seed=seed, batch=batch)
    training = replace(training, rate=round(training.rate * min(1.0, (4 / chosen) ** 0.5), 6))
    config = RunConfig(
        family=family,
        tokenizer=tokenizer,
        data=DataConfig(source=data, text_field=text_field, label=label),
        network=size | {"window": length},
        training=training,
    )
    if init_from is not None:
        if preset is not None or depth is not None:
            raise UserError("--init-from takes the network as it is; leave out --preset and --depth")
        from textdiffusion.training.adaptation import begin_from

        return override(begin_from(config, init_from, None if tokenizer == "char" else tokenizer), settings or [])
    return override(config, settings or [])


def demo_config(minutes: float, seed: int) -> RunConfig:
    """A newcomer's first run: sub-words of the built-in text, which read much better than characters in two minutes."""
    return configure(tokenizer="bpe:512", length=48, preset="tiny", minutes=minutes, seed=seed)
