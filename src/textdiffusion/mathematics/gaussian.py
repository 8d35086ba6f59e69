"""Gaussian noise, z = alpha x + sigma eps with alpha^2 + sigma^2 = 1: schedules, conversions, posteriors.

A schedule is a log-SNR, lambda(t) = log(alpha^2 / sigma^2), falling from t = 0 (text) to t = 1 (noise), so that
alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda) (VDM 2107.00630). Whatever path a paper uses, rectified flow
included, is one of these up to a scale of z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# At 12 a code of unit variance is read off its noise without fail; at -12 it leaves 3e-6 of a nat a real.
HIGHEST, LOWEST = 12.0, -12.0
BINS = 48  # of the learned clock, over the log-SNRs
KNOTS = 65
EVEN_SHARE = 0.1  # of a learned clock's time that is spread evenly, so that no noise level is ever forgotten


@dataclass(frozen=True)
class LogSnr:
    """lambda(t) and its derivative; both take and return tensors of any shape, computed in float64."""

    name: str
    at: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _cosine() -> LogSnr:
    """alpha = cos(pi t / 2), between the ends of HIGHEST and LOWEST (2102.09672; 2107.00630)."""
    low, high = math.atan(math.exp(-HIGHEST / 2)), math.atan(math.exp(-LOWEST / 2))

    def angle(t: Tensor) -> Tensor:
        return low + (high - low) * t.double()

    return LogSnr(
        "cosine",
        lambda t: -2 * torch.log(torch.tan(angle(t))),
        lambda t: -4 * (high - low) / torch.sin(2 * angle(t)),
    )


def _linear() -> LogSnr:
    """beta linear in t: alpha^2 = exp(-(1e-4 + 10 t^2)), near DDPM's 1e-4 .. 0.02 of 1,000 steps (2006.11239)."""

    def grown(t: Tensor) -> Tensor:
        return 1e-4 + 10 * t.double().square()

    return LogSnr(
        "linear",
        lambda t: -torch.log(torch.expm1(grown(t))),
        lambda t: -20 * t.double() / -torch.expm1(-grown(t)),
    )


def _sqrt() -> LogSnr:
    """alpha^2 = 1 - sqrt(u), u from 1e-4 to just below 1 (2205.14217): starts noisy, and never comes to zero or below,
    where the public formula has no square root."""
    first, last = 1e-4, (1 - 1e-5) ** 2

    def root(t: Tensor) -> Tensor:
        return (first + (last - first) * t.double()).sqrt()

    return LogSnr(
        "sqrt",
        lambda t: torch.log1p(-root(t)) - root(t).log(),
        lambda t: -(last - first) / (2 * root(t).square() * (1 - root(t))),
    )


def _rectified() -> LogSnr:
    """The straight path z = (1 - u) x + u eps of rectified flow (2209.03003), scaled to unit variance."""
    low, high = 1 / (1 + math.exp(HIGHEST / 2)), 1 / (1 + math.exp(LOWEST / 2))

    def place(t: Tensor) -> Tensor:
        return low + (high - low) * t.double()

    return LogSnr(
        "rectified",
        lambda t: 2 * torch.log((1 - place(t)) / place(t)),
        lambda t: -2 * (high - low) / (place(t) * (1 - place(t))),
    )


def _even() -> LogSnr:
    """The log-SNR itself is linear in t."""
    return LogSnr(
        "even",
        lambda t: HIGHEST + (LOWEST - HIGHEST) * t.double(),
        lambda t: torch.full_like(t, LOWEST - HIGHEST, dtype=torch.float64),
    )


LOG_SNRS: dict[str, LogSnr] = {s.name: s for s in (_cosine(), _linear(), _sqrt(), _rectified(), _even())}


def table(knots: Tensor, name: str = "table") -> LogSnr:
    """lambda by linear interpolation between ``knots`` [n] at even times; falling."""
    knots = knots.double()
    pieces = len(knots) - 1

    def piece(t: Tensor) -> Tensor:
        return (t.double() * pieces).long().clamp(0, pieces - 1)

    def at(t: Tensor) -> Tensor:
        i = piece(t)
        return knots[i] + (knots[i + 1] - knots[i]) * (t.double() * pieces - i)

    return LogSnr(name, at, lambda t: (knots[piece(t) + 1] - knots[piece(t)]) * pieces)


def learned_clock(costs: Tensor) -> LogSnr:
    """lambda(t) with what a token costs linear in t, from mean costs [n] in n equal ranges of falling log-SNR."""
    if not bool((costs > 0).any()):
        return LOG_SNRS["cosine"]  # nothing has been learnt yet
    # A range's mean stands at its middle; nothing is paid at the top, and no more than in the last range at the bottom.
    known = costs.double()
    rising = torch.cat((known.new_zeros(1), known, known[-1:])).cummax(0).values
    width = (HIGHEST - LOWEST) / len(costs)
    middles = HIGHEST - width * (torch.arange(len(costs), dtype=torch.float64, device=costs.device) + 0.5)
    places = torch.cat((middles.new_tensor([HIGHEST]), middles, middles.new_tensor([LOWEST])))
    share = (1 - EVEN_SHARE) * rising.diff() / rising[-1] + EVEN_SHARE * -places.diff() / (HIGHEST - LOWEST)
    t = torch.cat((share.new_zeros(1), share.cumsum(0)))
    wanted = torch.linspace(0, 1, KNOTS, dtype=torch.float64, device=costs.device)
    piece = (torch.searchsorted(t, wanted, right=True) - 1).clamp(0, len(places) - 2)
    within = ((wanted - t[piece]) / (t[piece + 1] - t[piece])).clamp(0, 1)
    return table(places[piece] + within * places.diff()[piece], "adaptive")


def time_of(share: np.ndarray, log_snr: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Times in (0, 1] at which sigma^2 is ``share``, by bisection. Some schedules begin with noise and none ends in it
    quite: shares that they do not come to, and those next to them, share what is next to their ends."""

    def noise(t: np.ndarray) -> np.ndarray:
        return torch.sigmoid(-log_snr(torch.from_numpy(t))).cpu().numpy()

    low, high = np.zeros_like(share), np.ones_like(share)
    least, most = noise(low), noise(high)
    wanted = np.where(share < 2 * least, least + share / 2, share)
    wanted = np.where(1 - share < 2 * (1 - most), most - (1 - share) / 2, wanted)
    for _ in range(60):
        less = noise((low + high) / 2) < wanted
        low, high = np.where(less, (low + high) / 2, low), np.where(less, high, (low + high) / 2)
    return high


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), each accurate where it is small."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


# -- what a network may be taught to say ------------------------------------------------------------------------------

Target = Literal["x_0", "eps", "v", "flow"]


def to_x_0(said: Tensor, z: Tensor, log_snr: Tensor, target: Target) -> Tensor:
    """x_0 from the target that was said; log_snr broadcasts against z.

    v = alpha eps - sigma x_0 (2202.00512). flow = eps - x_0, the velocity of the straight path, on which the state
    is z / (alpha + sigma).
    """
    alpha, sigma = alpha_sigma(log_snr)
    if target == "x_0":
        return said
    if target == "eps":
        return (z - sigma * said) / alpha
    if target == "v":
        return alpha * z - sigma * said
    return (z - sigma * said) / (alpha + sigma)


def from_x_0(x_0: Tensor, z: Tensor, log_snr: Tensor, target: Target) -> Tensor:
    """The target from x_0 and the noisy z."""
    alpha, sigma = alpha_sigma(log_snr)
    if target == "x_0":
        return x_0
    eps = (z - alpha * x_0) / sigma
    if target == "eps":
        return eps
    return alpha * eps - sigma * x_0 if target == "v" else eps - x_0


# -- laws -------------------------------------------------------------------------------------------------------------


def posterior(z: Tensor, x_0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z_s | z_t, x_0), s < t (2107.00630, appendix A)."""
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    fresh = -torch.expm1(log_snr_t - log_snr_s)  # 1 - SNR(t) / SNR(s)
    mean = (1 - fresh) * alpha_s / alpha_t * z + alpha_s * fresh * x_0
    return mean, sigma_s * fresh.sqrt()


def deterministic(z: Tensor, x_0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """DDIM (2010.02502): the noise that x_0 implies is kept, and scaled."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    return alpha_s * x_0 + sigma_s / sigma_t * (z - alpha_t * x_0)


def noised(z: Tensor, log_snr_s: Tensor, log_snr_t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z_t | z_s), s < t."""
    (alpha_t, sigma_t), (alpha_s, _) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    return alpha_t / alpha_s * z, sigma_t * (-torch.expm1(log_snr_t - log_snr_s)).sqrt()


def prior_divergence(x_0: Tensor, log_snr: Tensor) -> Tensor:
    """KL(N(alpha x_0, sigma^2) || standard normal), nats a real, of x_0's shape."""
    alpha, sigma = alpha_sigma(log_snr)
    return 0.5 * ((alpha * x_0).square() + sigma.square() - 1 - 2 * sigma.log())


def evidence(z: Tensor, codes: Tensor, log_snr: Tensor) -> Tensor:
    """log q(z | token v) up to a constant, [... V], for z [... W], codes [V W] and log_snr that broadcasts to [... 1].

    alpha / sigma^2 <z, e_v> - SNR / 2 |e_v|^2: the matched filter.
    """
    gain = torch.sigmoid(log_snr).sqrt() / torch.sigmoid(-log_snr)
    return gain * (z @ codes.T) - 0.5 * log_snr.exp() * codes.square().sum(-1)
