"""What a token costs at each noise level, measured once on held-out text: the optimal grid follows from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from textdiffusion.errors import UserError
from textdiffusion.mathematics.grids import Grid
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import HasCounts, Process

LEVELS = 32  # of noise, in families whose steps reveal no exact numbers
EXAMPLES = 1024  # noisy windows that are read
LEAST = 2  # for each level: with fewer nothing is claimed
FILE = "grid.json"


def levels_of(process: Process, length: int) -> int:
    """How many noise levels are told apart; 0 for a family that writes one token a call, whatever is asked for."""
    if all(step.pace == "each" for step in process.steps.values()):
        return 0
    return process.together(length) if isinstance(process, HasCounts) else LEVELS


@torch.inference_mode()
def measure_costs(
    process: Process,
    windows: Sequence[np.ndarray],
    *,
    examples: int = EXAMPLES,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> tuple[float, ...]:
    """Nats of a token at each of n noise levels 1/n ... 1, in equal parts of ``examples`` noisy windows.

    The level is the share that is hidden, where samplers reveal exact numbers, and the token one of the hidden; else it
    is the time, and the mean is over all tokens.

    Args:
        windows: token arrays, of which those of the most common length are read, over and over.
    Returns:
        () where there are no levels, or too few examples for them.
    """
    lengths = [len(window) for window in windows]
    length = max(set(lengths), key=lengths.count)
    levels = levels_of(process, length)
    if levels == 0 or examples < LEAST * levels:
        return ()
    text = torch.from_numpy(np.stack([w for w in windows if len(w) == length]).astype(np.int64)).to(device)
    number = torch.arange(examples, device=device)
    # Neighbours have different levels, so that each is read on windows from all over the text.
    level, row = number % levels + 1, (number // levels + number) % len(text)
    costs = torch.zeros(examples, dtype=torch.float64, device=device)
    for part in number.split(batch):
        noise = Noise(seed, part.cpu().numpy(), examples, 0, device)
        x_0 = text[row[part]]
        if isinstance(process, HasCounts):
            costs[part] = process.curve_point(x_0, level[part], noise).double()
        else:
            state = process.q_sample(x_0, level[part].double() / levels, noise)
            log_p = process.predict(state).log_p
            costs[part] = -log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1).double().mean(-1)
    total = torch.zeros(levels, dtype=torch.float64, device=device).index_add(0, level - 1, costs)
    return tuple((total / torch.bincount(level - 1, minlength=levels)).tolist())


def costs_to_json(costs: Sequence[float], examples: int) -> str:
    """What a run keeps in ``FILE``."""
    what = "nats of a token at even levels of noise, from the least to all; read by --grid optimal"
    return json.dumps({"what": what, "examples": examples, "costs": [round(cost, 6) for cost in costs]}) + "\n"


def grid_of(run: Path) -> Grid:
    """The optimal grid that a run holds, or "time" where it holds none.

    Raises:
        UserError: the file is damaged.
    """
    file = run / FILE
    if not file.exists():
        return Grid()
    try:
        costs = tuple(float(cost) for cost in json.loads(file.read_text(encoding="utf-8"))["costs"])
    except (ValueError, TypeError, KeyError):
        costs = ()
    if not costs or not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise UserError(f"{file} is damaged; delete it, or measure it anew with `textdiffusion eval {run} --keep-grid`")
    return Grid("optimal", costs)
