"""Codes that stand for no token, which a family that says its codes' reals can think likely (analog_bits.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Prediction

MOST, AT_ONCE = 256, 16  # windows that the share is read off, and in one call


@runtime_checkable
class HasDeadCodes(Protocol):
    """A process whose law of codes is wider than its vocabulary, as it can be set."""

    def dead_share(self, prediction: Prediction) -> Tensor | None:
        """How likely a call thinks codes that stand for no token, [N]; None where they have no chance."""
        ...


@torch.inference_mode()
def dead_codes(
    process: Any, windows: Sequence[np.ndarray], calls: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> float | None:
    """Mean share of a token's law that lies on codes of no token, at the last of ``calls`` calls, which draws it.

    The text is held-out windows (the first 256 of the longest), made as noisy as that call finds it and read afresh,
    with self-conditioning in two passes. None for a family that gives such codes no chance.
    """
    if not isinstance(process, HasDeadCodes):
        return None
    length = max(len(window) for window in windows)
    text = torch.from_numpy(np.stack([w for w in windows if len(w) == length][:MOST]).astype(np.int64)).to(device)
    step: Any = next(iter(process.steps))  # type: ignore[attr-defined]
    last = process.plan(torch.ones_like(text[0], dtype=torch.bool), calls, step)[-2]  # type: ignore[attr-defined]
    shares, noise = [], Noise.of(seed, len(text), device=device)
    for part in torch.arange(len(text)).split(AT_ONCE):
        x_0 = text[part]
        t = torch.full((len(x_0),), last, dtype=torch.float64, device=device)
        state = process.q_sample(x_0, t, noise.select(part))  # type: ignore[attr-defined]
        share = process.dead_share(process.predict(state, torch.ones_like(x_0, dtype=torch.bool)))  # type: ignore[attr-defined]
        if share is None:
            return None
        shares.append(share.double())
    return float(torch.cat(shares).mean())
