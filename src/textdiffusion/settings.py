"""What can be set, and how a wrong value is refused: without torch, so that a mistake is answered at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from textdiffusion.errors import UserError

LONGEST = 1_000_000  # tokens, texts or calls; more is a slip of the finger
MOST_REPLAYED = 32  # texts in a replay
Precision = Literal["auto", "bf16", "fp32"]


@dataclass
class TrainingConfig:
    """How to train. Shares are of the whole training, be it counted in steps or in minutes."""

    steps: int | None = None  # optimiser steps; exactly resumable
    minutes: float | None = None  # or wall-clock time
    batch: int = 32  # windows in an optimiser step, over all micro-batches and processes
    micro_batch: int | None = None  # windows in one forward and backward pass; None: what suits this machine's cache
    matrix_rate: float = 0.01  # learning rate of Muon, for the matrices inside the blocks
    rate: float = 0.012  # learning rate of AdamW, for all else
    weight_decay: float = 0.0
    momentum: float = 0.95
    beta2: float = 0.98
    clip: float = 1.0  # largest norm of the gradient
    warmup: float = 0.02  # share over which the rates rise
    cooldown: float = 0.5  # share over which they fall to zero at the end
    average: float = 0.05  # horizon of the weight average as a share of the steps made so far
    unlabelled: float = 0.1  # share of the examples whose label is kept from the network, for guidance
    precision: Precision = "auto"
    compile: bool = False  # fuse elementwise work with torch.compile, which needs a C++ compiler on a CPU
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower
    evaluations: int = 20  # validations over the training
    checkpoint_seconds: float = 60.0  # between two checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise UserError("give either training.steps or training.minutes")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps must be at least 1, not {self.steps}")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"--minutes must be above 0, not {self.minutes:g}")
        if self.minutes is not None and not self.minutes <= 1e6:
            raise UserError(f"--minutes must be at most a million, not {self.minutes:g}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, not {self.seed}")
        for name, low, high in (
            ("batch", 1, 1e9), ("micro_batch", 1, 1e9), ("evaluations", 1, 1e6), ("matrix_rate", 0, 10),
            ("rate", 0, 10), ("weight_decay", 0, 1), ("momentum", 0, 0.9999), ("beta2", 0, 0.999999),
            ("clip", 1e-9, 1e9), ("warmup", 0, 1), ("cooldown", 0, 1), ("average", 1e-6, 1),
            ("checkpoint_seconds", 0, 1e9), ("unlabelled", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"training.{name} must be from {low:g} to {high:g}, not {value}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise UserError(f"training.precision must be auto, bf16 or fp32, not {self.precision!r}")


def check_grid(name: str) -> None:
    """Refuse a grid that there is not.

    Raises:
        UserError: naming those that there are.
    """
    from textdiffusion.mathematics.grids import GRIDS  # here, for it loads numpy, which --help can do without

    if name not in ("auto", *GRIDS):
        raise UserError(f"--grid must be one of auto, {', '.join(GRIDS)}, not {name!r}")


def check_device(device: str) -> None:
    """Refuse a device that nothing here can compute on.

    Raises:
        UserError: a GPU without float64.
    """
    if device == "mps":
        raise UserError("draws are made in float64, which Apple GPUs lack; use --device cpu")


def check_parallel(parallel: str) -> None:
    """Refuse to spread a training over processes that have not been started.

    Raises:
        UserError: saying how they are started.
    """
    if parallel != "auto" and os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):
        raise UserError(
            f"--parallel {parallel} needs several processes; start them with: "
            f"torchrun --nproc_per_node=2 -m textdiffusion train --parallel {parallel} ..."
        )


def check_writing(
    n: int | None = None,
    length: int | None = None,
    calls: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    prompt: str | None = None,
    infill: str | None = None,
    top_k: int | None = None,
    edit: str | None = None,
) -> None:
    """Refuse what no run could write: numbers out of range, two templates. None is what is not asked for.

    Raises:
        UserError: naming the flag and what it may be.
    """
    for name, value, low in (("-n", n, 1), ("--length", length, 1), ("--calls", calls, 1), ("--top-k", top_k, 1)):
        if value is not None and not low <= value <= LONGEST:
            raise UserError(f"{name} must be from {low} to {LONGEST:,}, not {value}")
    if temperature is not None and not 0 <= temperature <= LONGEST:
        raise UserError(f"--temperature must be from 0 to {LONGEST:,}, not {temperature:g}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, not {top_p:g}")
    if prompt is not None and infill is not None:
        raise UserError("give --prompt or --infill, not both: a template can begin with the prompt")
    if edit == "":
        raise UserError("--edit rewrites the text that it is given, and was given none")
    if edit is not None and (prompt is not None or infill is not None):
        raise UserError("--edit rewrites the text that it is given; leave out --prompt and --infill")


def check_label(label: str | None, labels: Sequence[str], guidance: float, ramp: float) -> None:
    """Refuse a label that a run does not know, and guidance without one.

    Raises:
        UserError: naming the labels that there are.
    """
    if label is None:
        if guidance != 0 or ramp != 0:
            raise UserError("--guidance and --ramp are towards a label; give --label as well")
        return
    if not labels:
        raise UserError("this run was trained without labels; train one with --label FIELD, or leave out --label")
    if label not in labels:
        shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
        raise UserError(f"this run has no label {label!r}; it has: {shown}")
    if not (-1 <= guidance <= 100 and 0 <= ramp <= 1):
        raise UserError(f"--guidance must be from -1 to 100 and --ramp from 0 to 1, not {guidance:g} and {ramp:g}")


def check_replay(path: str | Path | None, n: int) -> None:
    """Refuse a file that a replay of n texts cannot be written to.

    Raises:
        UserError: naming what would do.
    """
    if path is None:
        return
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--save-replay writes a web page: give a file that ends in .html, not {path}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: choose a file in a folder that is there")
    if n > MOST_REPLAYED:
        raise UserError(f"a replay shows at most {MOST_REPLAYED} texts, not {n:,}; ask for fewer with -n")


def with_fields(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a config dataclass; a wrong name or type is one clear line.

    Raises:
        UserError: naming the field and what it may be.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a group of fields, not {values!r}")
    hints = get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"there is no field {where}.{name}; {where} has: {', '.join(fields) or 'no fields'}")
        if not _fits(value, hints[name]):
            raise UserError(f"{where}.{name} must be {_wanted(hints[name])}, not {value!r}")
    try:
        return cls(**values)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in values]
        raise UserError(f"{where} lacks fields; it needs some of: {', '.join(missing)}") from None


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint) and isinstance(value, str)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_wanted(part) for part in get_args(hint))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
