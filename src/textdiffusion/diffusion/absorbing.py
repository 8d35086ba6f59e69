"""What all families that hide tokens share: hiding, carry-over, and the count form of their bounds.

The hidden symbol, ``mask``, is the one after the V tokens.

Let curve(n) be the mean cross-entropy, in nats, of a hidden token when n random positions of an L-token text are
hidden. For a network that takes no time (the hidden positions say how noisy the text is) every bound of the family is
a sum over that one curve:

- continuous time:                 sum_{n=1..L} curve(n)                          (MDLM 2406.07524 with the time
                                                                                  integrated out; ARDM 2110.02037)
- the ancestral sampler, T calls:  sum_n n * curve(n) * sum_k Bin(n; L, 1 - a_t) (a_s - a_t) / (1 - a_t)
- a sampler that reveals m_k random positions in its k-th call, n_k being hidden before it:  sum_k m_k curve(n_k)
                                                                                  (2510.25544)
so one measured curve gives them all, with no further network call.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from textdiffusion.errors import UserError
from textdiffusion.mathematics.grids import Grid
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import SCHEDULES, Schedule, bell
from textdiffusion.process import Discrete, Network, Nll, Process, State


def check_training(mask_rate: str, weight: str) -> None:
    """Refuse values that the two fields of training (mask_rate, weight) do not have."""
    if mask_rate not in ("uniform", "bell") or weight not in ("bound", "flat"):
        raise UserError("process.mask_rate must be uniform or bell, process.weight bound or flat")


def mask_rates(uniform: Tensor, law: str) -> Tensor:
    """Mask rates for training from uniform draws: as they are, or from a bell around 1/2."""
    return bell(uniform) if law == "bell" else uniform


def hide_counts(length: int, hidden: Tensor, noise: Noise, tag: str = "hide") -> Tensor:
    """Choose exactly ``hidden`` [B] of ``length`` positions, uniformly at random: bool [B L]."""
    order = noise.uniform(tag, length).argsort(-1).argsort(-1)
    return order < hidden.unsqueeze(-1)


class Hiding(Process):
    """A family whose prior is that every token is hidden; what remains open is how they are hidden and predicted."""

    def __init__(self, network: Network, config: Any, vocabulary: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
        self.mask = vocabulary
        self.space = Discrete(vocabulary + 1)

    def prior_sample(self, rows: int, length: int, noise: Noise) -> State:
        x = torch.full((rows, length), self.mask, dtype=torch.long, device=noise.device)
        return State(x, torch.ones(rows, dtype=torch.float64, device=noise.device))

    def prior_law(self) -> Tensor:
        """Law of a position at t = 1, float64 [V + 1]."""
        return one_hot(torch.tensor(self.mask), self.mask + 1).double()

    def template(self, tokens: Tensor, given: Tensor, noise: Noise) -> State:
        if not self.infills and bool((given[:, 1:] & ~given[:, :-1]).any()):
            raise UserError("this family writes on from what is given: hold it to what stands behind a gap (hold_gaps)")
        prior = self.prior_sample(len(tokens), tokens.shape[1], noise)
        return State(torch.where(given, tokens, prior.x), prior.t, given)

    def decode(self, state: State) -> Tensor:
        return state.x.masked_fill(state.x == self.mask, -1)


class AnyOrder(Hiding):
    """A family that hides all positions alike, under ``config.schedule``, and predicts them without being told a time:
    its noise, and the bounds that are sums over its curve."""

    schedule: Schedule

    def __init__(self, network: Network, config: Any, vocabulary: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
        self.schedule = SCHEDULES[config.schedule]
        self.passes = 1  # network calls of a step

    @abstractmethod
    def _cross_entropy(self, x_0: Tensor, hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        """Sum over hidden positions (bool [B L]) of -log p(x_0 | the rest), as the steps predict them, [B]."""

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Noise) -> State:
        hidden = noise.uniform("mask", x_0.shape[1]) >= self.schedule.alpha(t.double()).unsqueeze(-1)
        return State(x_0.masked_fill(hidden, self.mask), t.double())

    def nll_by_curve(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """One draw of the bound: n uniform on 1..L, stratified over the rows. For T calls, of the first sampler."""
        length = x_0.shape[1]
        n = (noise.stratified("count") * length).long().clamp(max=length - 1) + 1
        weights, made = self.curve_weights(length, calls)
        diffusion = length * torch.from_numpy(weights).to(x_0.device)[n] * self.curve_point(x_0, n, noise)
        zero = torch.zeros_like(diffusion)
        return Nll(diffusion, zero, zero, "upper", next(iter(self.steps)), made)

    def curve_point(self, x_0: Tensor, hidden: Tensor, noise: Noise) -> Tensor:
        return self._cross_entropy(x_0, hide_counts(x_0.shape[1], hidden, noise)).double() / hidden

    def curve_weights(
        self, length: int, calls: int | None, sampler: str | None = None
    ) -> tuple[np.ndarray, int | None]:
        sampler = sampler or next(iter(self.steps))
        if sampler not in ("random", "first_hitting", "ancestral"):
            raise UserError(
                f"no bound is known for the sampler {sampler!r}; there is one for random, first_hitting and ancestral"
            )
        if calls is None:
            return np.concatenate(([0.0], np.ones(length))), None
        times = self.plan(torch.ones(length, dtype=torch.bool), calls, sampler)
        if sampler == "ancestral":
            return ancestral_weights(length, self.schedule, times), self.passes * (len(times) - 1)
        free = torch.full((len(times),), length)
        hidden = hidden_targets(free, torch.tensor(times, dtype=torch.float64), self.schedule)
        counts = [m for m in (hidden[:-1] - hidden[1:]).tolist() if m]
        return count_weights(length, counts), self.passes * len(counts)

    def kernel(self, s: float, t: float) -> Tensor:
        return hiding_kernel(self.schedule, self.mask, s, t)

    def rate(self, x_0: Tensor, state: State) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)) times the cross-entropy of the hidden tokens (MDLM, 2406.07524, and MD4)."""
        weight = -self.schedule.derivative(state.t) / (1 - self.schedule.alpha(state.t))
        return weight * self._cross_entropy(x_0, state.x == self.mask)

    def together(self, length: int) -> int:
        return length

    def plan(self, free: Tensor, calls: int, sampler: str) -> Sequence[float]:
        length, steps, pace = int(free.sum()), max(1, calls // self.passes), self.steps[sampler].pace
        if pace == "left":
            return [1 - k / min(steps, length) for k in range(min(steps, length))] + [0.0]
        if pace == "times" and (self.grid.name != "optimal" or steps > length):
            # The optimal grid says how many to reveal; of more calls than there are positions it says nothing.
            grid = Grid() if self.grid.name == "optimal" else self.grid
            return grid.times(steps, self.schedule.time_of)
        # What is best for exact numbers is also near it for numbers that are so on average.
        hidden = self.grid.hidden(length, len(free), length if pace == "each" else steps, self.schedule.rate_at)
        return [float(t) for t in self.schedule.inverse(torch.tensor(hidden, dtype=torch.float64) / length)]


def by_row(nats: Tensor, hidden: Tensor) -> Tensor:
    """Sums [B] of values [N] at the true entries of a mask [B L]."""
    row = torch.arange(len(hidden), device=hidden.device).unsqueeze(-1).expand_as(hidden)[hidden]
    return nats.new_zeros(len(hidden)).index_add(0, row, nats)


def carry_over(logits: Tensor, symbols: Tensor, mask: int) -> Tensor:
    """log p(x_0 | x_t) from logits [..., V] at positions that hold ``symbols`` [...]: a shown token stays what it is.

    Normalised in float32 at least: half precision is the network's business.
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    shown = symbols != mask
    if not bool(shown.any()):
        return log_p  # as in sampling, which asks about hidden positions: nothing of size V to copy
    certain = torch.full_like(log_p, -torch.inf).scatter_(-1, symbols.clamp(max=mask - 1).unsqueeze(-1), 0.0)
    return torch.where(shown.unsqueeze(-1), certain, log_p)


def hidden_evidence(x: Tensor, mask: int) -> Tensor:
    """log q(x_t | v) up to a constant, float64 [B L V]: nothing at hidden positions, certainty at shown ones."""
    shown = one_hot(x.clamp(max=mask - 1), mask).double().log()
    return torch.where((x == mask).unsqueeze(-1), torch.zeros_like(shown), shown)


def hiding_kernel(schedule: Schedule, mask: int, s: float, t: float) -> Tensor:
    """q(x_t | x_s) of independent hiding, float64 [V + 1, V + 1]."""
    at_s, at_t = (float(schedule.alpha(torch.tensor(u, dtype=torch.float64))) for u in (s, t))
    stay = at_t / at_s if at_s else 1.0
    kernel = stay * torch.eye(mask + 1, dtype=torch.float64)
    kernel[:, mask] += 1 - stay
    return kernel


def ancestral_weights(length: int, schedule: Schedule, times: Sequence[float]) -> np.ndarray:
    """Weights of curve(0..L) in the bound of the ancestral sampler on the grid 1 = t_0 > ... > t_T = 0, [L + 1].

    E sum over steps of (expected reveals in the step) x (cross-entropy there), the number hidden at time t being
    binomial.
    """
    alpha = schedule.alpha(torch.tensor(times, dtype=torch.float64)).numpy()
    n = np.arange(length + 1)
    log_choose = _log_factorial(length) - np.array(
        [_log_factorial(k) + _log_factorial(length - k) for k in range(length + 1)]
    )
    weights = np.zeros(length + 1)
    for a_t, a_s in itertools.pairwise(alpha):
        rate = 1.0 - a_t
        with np.errstate(divide="ignore", invalid="ignore"):
            # 0 * log 0 = 0: at t = 1 every token is hidden.
            log_bin = log_choose + np.where(n > 0, n * np.log(rate), 0.0)
            log_bin = log_bin + np.where(n < length, (length - n) * np.log(a_t if a_t > 0 else 0.0), 0.0)
        weights += np.exp(log_bin) * n * (a_s - a_t) / rate
    return weights


def count_weights(length: int, counts: Sequence[int]) -> np.ndarray:
    """Weights of curve(0..L) in the bound of the sampler that reveals ``counts`` random positions, call by call."""
    weights, hidden = np.zeros(length + 1), length
    for count in counts:
        weights[hidden] += count
        hidden -= count
    return weights


def hidden_targets(free: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """How many of ``free`` [B] positions are still hidden at times s [B] in samplers that reveal exact counts."""
    # The small term makes a product that is an integer but for rounding error come out as that integer.
    return torch.ceil(free * (1 - schedule.alpha(s)) - 1e-9).long()


def _log_factorial(n: int) -> float:
    return float(torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)))
