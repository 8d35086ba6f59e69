"""Masked diffusion (MDLM 2406.07524, MD4 2406.04329, RADD 2406.03736, ARDM 2110.02037).

q           Every token is replaced by [MASK], independently, with probability 1 - alpha(t); alpha(0) = 1, alpha(1) = 0.
network     Context logits f_i(v) from the masked text; no time input (the text says how much of it is hidden).
predict     softmax f_i at a hidden position; at a shown one the token itself (carry-over).
loss        Cross-entropy of the hidden tokens, n of L being hidden. With n uniform on 1..L and the mean over them it is
            one draw of the bound; by default n follows a bell and each hidden token counts the same, which learns
            faster (2602.15014, 2605.13026).
bound       -log p(x) <= sum_{n=1..L} curve(n), curve(n) the expected cross-entropy of a hidden token when n random ones
            are hidden: the schedule-invariant integral of MDLM with time integrated out. No prior term
            (alpha(1) = 0 exactly) and no reconstruction term (alpha(0) = 1).
departs from the papers in: counts instead of Bernoulli masks in training, so that no row is without a hidden token and
            the 1/t weight, with its variance, never appears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from textdiffusion.absorbing import (
    Hiding,
    ancestral_weights,
    carry_over,
    check_training,
    count_weights,
    hidden_evidence,
    hidden_targets,
    hide_counts,
    hiding_kernel,
    mask_rates,
)
from textdiffusion.cross_entropy import token_nats
from textdiffusion.errors import UserError
from textdiffusion.noise import Noise
from textdiffusion.process import Context, Network, Nll, Prediction, State, as_network
from textdiffusion.schedules import SCHEDULES
from textdiffusion.steps.unmasking import unmasking_steps


@dataclass
class MaskedConfig:
    """Fields of the masked family."""

    schedule: str = "linear"  # alpha(t) of the samplers' grid; the bound in continuous time does not depend on it
    mask_rate: Literal["uniform", "bell"] = "bell"  # in training; bell is N(1/2, 1/4) cut to (0, 1) (2605.13026)
    weight: Literal["bound", "flat"] = "flat"  # flat: every hidden token counts the same; bound: every text does

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"process.schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        check_training(self.mask_rate, self.weight)


@final
class Masked(Hiding):
    """Masked diffusion; see the head of the file."""

    Config: ClassVar[type] = MaskedConfig
    summary: ClassVar[str] = "tokens are hidden and revealed in any order; infills anywhere; upper bound on likelihood"
    paper: ClassVar[str] = "MDLM 2406.07524, MD4 2406.04329, RADD 2406.03736"
    bounded: ClassVar[bool] = True
    infills: ClassVar[bool] = True

    def __init__(self, network: Network, config: MaskedConfig, vocabulary: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
        self.schedule = SCHEDULES[config.schedule]
        self.steps = unmasking_steps(self.mask, self.schedule)

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        return {
            "inputs": vocabulary + 1,
            "outputs": vocabulary,
            "attention": "bidirectional",
            "time": False,
            "clean": False,
        }

    # -- forward --------------------------------------------------------------------------------------------------
    def q_sample(self, x_0: Tensor, t: Tensor, noise: Noise) -> State:
        hidden = noise.uniform("mask", x_0.shape[1]) >= self.schedule.alpha(t.double()).unsqueeze(-1)
        return State(x_0.masked_fill(hidden, self.mask), t.double())

    # -- learning -------------------------------------------------------------------------------------------------
    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        logits = self.network(state.x, condition=condition, positions=positions)
        symbols = state.x if positions is None else state.x[positions]
        return Prediction(carry_over(logits, symbols, self.mask))

    def _cross_entropy(self, x_0: Tensor, hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        """Sum over hidden positions (bool [B L]) of -log p(x_0 | the rest), [B]; the head runs on those alone."""
        logits = self.network(x_0.masked_fill(hidden, self.mask), condition=condition, positions=hidden)
        nats = token_nats(logits, x_0[hidden])
        row = torch.arange(len(x_0), device=x_0.device).unsqueeze(-1).expand_as(hidden)[hidden]
        return nats.new_zeros(len(x_0)).index_add(0, row, nats)

    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Nats per token [B]. With mask_rate = uniform and weight = bound, one unbiased draw of the bound over L.

        The defaults are no bound: they spend the gradient where there is most to learn, and reach a lower bound in the
        same steps (docs/results.md).
        """
        length = x_0.shape[1]
        # 1. A mask rate, stratified over the global batch.
        rate = mask_rates(noise.stratified("rate"), self.config.mask_rate)
        # 2. Hide exactly n positions, n = 1..L.
        n = (rate * length).long().clamp(max=length - 1) + 1
        total = self._cross_entropy(x_0, hide_counts(length, n, noise), condition)
        # 3. Weigh.
        return total / n if self.config.weight == "bound" else total * (2 / length)

    def nll(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """One draw of the bound: n uniform on 1..L, stratified over the rows. For T calls, of the "random" sampler."""
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
        if sampler not in ("random", "ancestral"):
            raise UserError(f"no bound is known for the sampler {sampler!r}; there is one for random and ancestral")
        if calls is None:
            return np.concatenate(([0.0], np.ones(length))), None
        times = self.plan(torch.ones(length, dtype=torch.bool), calls, sampler)
        if sampler == "ancestral":
            return ancestral_weights(length, self.schedule, times), len(times) - 1
        free = torch.full((len(times),), length)
        hidden = hidden_targets(free, torch.tensor(times, dtype=torch.float64), self.schedule)
        counts = [m for m in (hidden[:-1] - hidden[1:]).tolist() if m]
        return count_weights(length, counts), len(counts)

    # -- what tests enumerate -------------------------------------------------------------------------------------
    def ideal(self, context: Context) -> Network:
        return as_network(lambda x, t: context(hidden_evidence(x, self.mask)))

    def kernel(self, s: float, t: float) -> Tensor:
        return hiding_kernel(self.schedule, self.mask, s, t)

    def rate(self, x_0: Tensor, state: State) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)) times the cross-entropy of the hidden tokens (MDLM, 2406.07524, and MD4)."""
        weight = -self.schedule.derivative(state.t) / (1 - self.schedule.alpha(state.t))
        return weight * self._cross_entropy(x_0, state.x == self.mask)

    # -- reverse --------------------------------------------------------------------------------------------------
    def plan(self, free: Tensor, calls: int, sampler: str) -> Sequence[float]:
        """Uniform in t; but samplers of exact counts reveal one position a call where the calls suffice for that."""
        length = int(free.sum())
        if sampler != "ancestral" and calls >= length:
            hidden = torch.arange(length, -1, -1, dtype=torch.float64) / length
            return [float(t) for t in self.schedule.inverse(hidden)]
        return [1 - k / calls for k in range(calls)] + [0.0]
