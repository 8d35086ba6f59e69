"""Grids: where the calls of a run stand between noise and text.

time        even in the process's own t
rate        even in the share of noise: 1 - alpha(t) of noise that hides or replaces tokens, sigma(t)^2 among reals
log_snr     even in log(signal / noise)
quadratic   the share of noise falls as (1 - u)^2, u the share of the calls made (2010.02502): long steps first
cosine      it falls as cos(pi u / 2) (MaskGIT, 2202.04200): short steps first
optimal     from what a token costs at each share of noise, measured once on held-out text. Where exact numbers of
            random positions are revealed, n_k being hidden before call k, their expected divergence is

                sum_k m_k curve(n_k) - sum_{n=1..L} curve(n)                (2510.25544)

            and dynamic programming finds the counts m_k for which that is least. Elsewhere each call gets the same
            part of the entropy (CDCD, 2211.15089).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.polynomial import Polynomial

from textdiffusion.errors import UserError

GRIDS = ("time", "rate", "log_snr", "quadratic", "cosine", "optimal")

REACH = 6.0  # log(signal / noise) of grids even in it, from -REACH to REACH: a token in 400 is noise, or is not
DEGREE = 6  # of the polynomial that measured costs are smoothed by
EVEN_SHARE = 0.05  # of grids of equal entropy that is spread evenly, so that no noise level is left out


@dataclass(frozen=True)
class Grid:
    """Where calls stand.

    name: one of GRIDS. costs: of "optimal", nats of a token at noise shares (or times) 1/n, 2/n ... 1.
    """

    name: str = "time"
    costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in GRIDS:
            raise UserError(f"--grid must be one of {', '.join(GRIDS)}, not {self.name!r}")
        if (self.name == "optimal") != bool(self.costs):
            raise ValueError("what tokens cost belongs to the grid optimal, and to no other")

    def shares(self, calls: int, reach: float = REACH) -> np.ndarray | None:
        """Shares of noise before each call and after the last, from 1 to 0, [calls + 1]; None for grids that are not
        made of such shares."""
        u = np.arange(calls + 1) / calls
        if self.name == "rate":
            return 1 - u
        if self.name == "log_snr":
            inner = 1 / (1 + np.exp(reach * (2 * u[1:-1] - 1)))
            return np.concatenate(([1.0], inner, [0.0]))
        if self.name == "quadratic":
            return np.square(1 - u)
        return np.cos(math.pi / 2 * u) if self.name == "cosine" else None

    def times(self, calls: int, time_of: Callable[[np.ndarray], np.ndarray], reach: float = REACH) -> list[float]:
        """Times 1 = t_0 > ... > t_T = 0 of ``calls`` steps; ``time_of`` says at which time there is such a share of
        noise."""
        shares = self.shares(calls, reach)
        if shares is not None:
            inner = time_of(shares[1:-1]).tolist()
        elif self.name == "optimal":
            inner = equal_entropy(self.costs, calls)[1:-1].tolist()
        else:
            inner = [1 - k / calls for k in range(1, calls)]
        return [1.0, *inner, 0.0]

    def hidden(
        self, free: int, length: int, calls: int, rate: Callable[[np.ndarray], np.ndarray] = lambda t: t
    ) -> tuple[int, ...]:
        """Numbers still hidden before each call and after the last: ``free`` of ``length`` positions are, to begin
        with, and each call reveals at least one, so that there are no more calls than those.

        Args:
            rate: the share that is hidden at a time, for the grid "time".
        """
        calls = max(1, min(calls, free))
        if self.name == "optimal":
            return optimal_hidden(stretched(self.costs, length)[:free], calls)
        shares = self.shares(calls)
        if shares is None:
            shares = rate(1 - np.arange(calls + 1) / calls)
        # The small term makes a product that is an integer but for rounding error come out as that integer.
        wanted = np.ceil(free * shares - 1e-9).astype(int)
        made = np.arange(calls + 1)
        return tuple(np.clip(np.minimum.accumulate(np.minimum(wanted, free - made)), calls - made, None).tolist())


def rising(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The nearest sequence, by least squares, that never falls: with more noise a token never costs less, but for the
    error of the measurement. (Isotonic regression: max over a <= i of min over b >= i of the mean of a..b.)"""
    x = np.asarray(values, dtype=np.float64)
    sums = np.concatenate(([0.0], x.cumsum()))
    first, last = np.arange(len(x))[:, None], np.arange(len(x))[None]
    means = np.where(last >= first, sums[last + 1] - sums[first], np.inf) / np.maximum(last - first + 1, 1)
    least = np.minimum.accumulate(means[:, ::-1], 1)[:, ::-1]  # over b >= i, for each a
    return np.where(last >= first, least, -np.inf).max(0)


def smooth(costs: Sequence[float]) -> np.ndarray:
    """Measured costs without the error of single points, never falling: a polynomial, exact for up to DEGREE + 1 of
    them. A schedule that is best for what was measured would else be best for its errors."""
    place = np.arange(1, len(costs) + 1) / len(costs)
    fitted = Polynomial.fit(place, np.asarray(costs), min(DEGREE, len(costs) - 1))(place)
    return np.maximum(rising(fitted), 0.0)


@lru_cache(maxsize=64)
def stretched(costs: tuple[float, ...], length: int) -> tuple[float, ...]:
    """Costs at the shares 1/n ... 1 as costs at 1/length ... 1, never falling."""
    known = np.arange(1, len(costs) + 1) / len(costs)
    return tuple(np.interp(np.arange(1, length + 1) / length, known, smooth(costs)).tolist())


@lru_cache(maxsize=256)
def optimal_hidden(curve: tuple[float, ...], calls: int) -> tuple[int, ...]:
    """Numbers hidden before each of ``calls`` calls and after the last for which sum_k m_k curve(n_k) is least, each
    call revealing at least one position.

    Args:
        curve: curve(1) ... curve(L), nats of a hidden token when so many are hidden; all of L are, to begin with.
    """
    size = len(curve)
    if calls >= size:
        return tuple(range(size, -1, -1))
    number = np.arange(size + 1)
    revealed = number[:, None] - number[None]
    cost = np.concatenate(([0.0], curve))
    # Among equals the most even: a flat curve would leave it open.
    step = np.where(revealed > 0, revealed * cost[:, None] + 1e-9 * revealed**2, np.inf)
    best = np.where(number == 0, 0.0, np.inf)
    choices = []
    for _ in range(calls):
        total = step + best
        choices.append(total.argmin(1))
        best = total.min(1)
    hidden = [size]
    for choice in reversed(choices):
        hidden.append(int(choice[hidden[-1]]))
    return tuple(hidden)


@lru_cache(maxsize=256)
def _equal_entropy(costs: tuple[float, ...], calls: int) -> np.ndarray:
    t = np.arange(len(costs) + 1) / len(costs)
    entropy = np.concatenate(([0.0], smooth(costs)))
    share = t if entropy[-1] == 0 else (1 - EVEN_SHARE) * entropy / entropy[-1] + EVEN_SHARE * t
    return np.interp(1 - np.arange(calls + 1) / calls, share, t)


def equal_entropy(costs: tuple[float, ...], calls: int) -> np.ndarray:
    """Times from 1 to 0 [calls + 1] between which what a token costs falls by equal parts; costs are those at the times
    1/n ... 1, and nothing at 0."""
    return _equal_entropy(costs, calls)


def expected_divergence(curve: Sequence[float], hidden: Sequence[int]) -> float:
    """Nats by which the law of exact counts, on average over orders, is from that of one position a call: E KL
    (2510.25544), for the exact posterior's curve(1) ... curve(L) and the numbers hidden before each call and after the
    last."""
    return math.fsum((a - b) * curve[a - 1] - math.fsum(curve[b:a]) for a, b in itertools.pairwise(hidden))
