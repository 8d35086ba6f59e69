"""Noise schedules of discrete processes: alpha(t), the probability that a token survives to time t.

t = 0 is text and t = 1 is noise, so alpha falls from exactly 1 to exactly 0: no leftover mass at t = 1 that
would make the prior term of the bound infinite (MDLM, 2406.07524, uses an eps there; we do not need one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """alpha(t) and its derivative; both take and return tensors of any shape, computed in float64.

    ``inverse`` gives t from the mask rate 1 - alpha(t).
    """

    name: str
    alpha: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]

    def time_of(self, rate: np.ndarray) -> np.ndarray:
        """Times at which the mask rate is so much."""
        return self.inverse(torch.from_numpy(rate)).numpy()

    def rate_at(self, t: np.ndarray) -> np.ndarray:
        """Mask rates at such times."""
        return (1 - self.alpha(torch.from_numpy(t))).numpy()


def bell(uniform: Tensor) -> Tensor:
    """Shares of noise for training from uniform draws: N(1/2, 1/4) cut to (0, 1), by its inverse CDF (2605.13026)."""
    low, high = (torch.special.ndtr(torch.tensor(b, dtype=torch.float64)) for b in (-2.0, 2.0))
    return 0.5 + 0.25 * torch.special.ndtri(low + (high - low) * uniform)


def _linear() -> Schedule:
    return Schedule("linear", lambda t: 1 - t, lambda t: -torch.ones_like(t), lambda rate: rate)


def _cosine() -> Schedule:
    """alpha = 1 - cos(pi/2 (1 - t)): few tokens are revealed while there is little to go by (MaskGIT, 2202.04200)."""
    half = math.pi / 2

    def inverse(rate: Tensor) -> Tensor:
        return 1 - torch.arccos(rate.clamp(0, 1)) / half

    def alpha(t: Tensor) -> Tensor:
        # 1 - cos(x) as 2 sin^2(x / 2): exactly 0 at t = 1, and no cancellation near it; exactly 1 at t = 0 by decree.
        return torch.where(t == 0, 1.0, 2 * torch.sin(half * (1 - t) / 2).square())

    return Schedule("cosine", alpha, lambda t: -half * torch.sin(half * (1 - t)), inverse)


def _quadratic() -> Schedule:
    """alpha = 1 - t^2 (polynomial schedule of MD4, 2406.04329)."""
    return Schedule("quadratic", lambda t: 1 - t.square(), lambda t: -2 * t, lambda rate: rate.sqrt())


SCHEDULES: dict[str, Schedule] = {s.name: s for s in (_linear(), _cosine(), _quadratic())}


def geometric(smallest: float, largest: float) -> Schedule:
    """alpha = exp(-sigma), sigma = smallest^(1 - t) largest^t - smallest (SEDD 2310.16834, moved to alpha(0) = 1).

    Not one of SCHEDULES: alpha(1) is small, and not 0.
    """
    ratio = math.log(largest / smallest)

    def grown(t: Tensor) -> Tensor:
        return smallest * torch.exp(ratio * t)

    return Schedule(
        "geometric",
        lambda t: torch.exp(smallest - grown(t)),
        lambda t: -ratio * grown(t) * torch.exp(smallest - grown(t)),
        lambda rate: torch.log((smallest - torch.log1p(-rate)) / smallest) / ratio,
    )
