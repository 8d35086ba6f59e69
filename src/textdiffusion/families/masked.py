"""Masked diffusion (MDLM 2406.07524, MD4 2406.04329, RADD 2406.03736, ARDM 2110.02037).

q           Every token is replaced by [MASK], independently, with probability 1 - alpha(t); alpha(0) = 1, alpha(1) = 0.
network     Context logits f_i(v) from the masked text; no time input (the text says how much of it is hidden).
predict     softmax f_i at a hidden position; at a shown one the token itself (carry-over).
loss        Cross-entropy of the hidden tokens, n of L being hidden. With n uniform on 1..L and the mean over them it is
            one draw of the bound; by default n follows a bell and each hidden token counts the same, which learns
            faster (2602.15014, 2605.13026).
bound       -log p(x) <= sum_{n=1..L} curve(n), curve(n) the expected cross-entropy of a hidden token when n random ones
            are hidden: the schedule-invariant integral of MDLM with time integrated out. No prior term
            (alpha(1) = 0 exactly) and no reconstruction term (alpha(0) = 1). absorbing.py has it, and the noise.
departs from the papers in: counts instead of Bernoulli masks in training, so that no row is without a hidden token and
            the 1/t weight, with its variance, never appears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from textdiffusion.diffusion.absorbing import (
    AnyOrder,
    by_row,
    carry_over,
    check_training,
    hidden_evidence,
    hide_counts,
    mask_rates,
)
from textdiffusion.diffusion.unmasking import unmasking_steps
from textdiffusion.errors import UserError
from textdiffusion.mathematics.cross_entropy import token_nats
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import SCHEDULES
from textdiffusion.process import Context, Network, Nll, Prediction, State, as_network


@dataclass
class MaskedConfig:
    """Fields of the masked family."""

    schedule: str = "linear"  # alpha(t) of the samplers' grid; the bound in continuous time does not depend on it
    mask_rate: Literal["uniform", "bell"] = "bell"  # in training; bell is N(1/2, 1/4) cut to (0, 1) (2605.13026)
    weight: Literal["bound", "flat"] = "flat"  # every hidden token counts the same (flat), or every text (bound)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"process.schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        check_training(self.mask_rate, self.weight)


@final
class Masked(AnyOrder):
    """Masked diffusion; see the head of the file."""

    Config: ClassVar[type] = MaskedConfig
    summary: ClassVar[str] = "tokens are hidden and revealed in any order; infills anywhere; upper bound on likelihood"
    paper: ClassVar[str] = "MDLM 2406.07524, MD4 2406.04329, RADD 2406.03736"
    bounded: ClassVar[bool] = True
    infills: ClassVar[bool] = True

    def __init__(self, network: Network, config: MaskedConfig, vocabulary: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
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

    # -- learning -------------------------------------------------------------------------------------------------
    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        logits = self.network(state.x, condition=condition, positions=positions)
        symbols = state.x if positions is None else state.x[positions]
        return Prediction(carry_over(logits, symbols, self.mask))

    def _cross_entropy(self, x_0: Tensor, hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        # The head runs on the hidden positions alone.
        logits = self.network(x_0.masked_fill(hidden, self.mask), condition=condition, positions=hidden)
        return by_row(token_nats(logits, x_0[hidden]), hidden)

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
        """One draw of the bound, for T calls that of the "random" sampler."""
        return self.nll_by_curve(x_0, noise, calls)

    # -- what tests enumerate -------------------------------------------------------------------------------------
    def ideal(self, context: Context) -> Network:
        return as_network(lambda x, t: context(hidden_evidence(x, self.mask)))
