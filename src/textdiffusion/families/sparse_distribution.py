"""Sparse distribution diffusion, as masked diffusion whose hidden positions hold weighted candidates.

The idea, weighted candidates that the network refines, is that of a public system whose samples repeat one word;
examples/reproduce_sdd.py shows why. Here the answer is never among what the network is handed but by chance or by its
own prediction, which makes a likelihood possible (soft masking, 2510.17206, is near to it).

q           A position is committed, which is one slot, its token at probability 1, or open: as in masked diffusion each
            is opened with probability 1 - alpha(t). An open position holds k candidates at their probabilities, not
            renormalised, and what is left to one as a slot of its own, "elsewhere" (the symbol [MASK]).
candidates  At first, k tokens that mean nothing, at 1/V each: drawn by a hash of the text as it stands, so that they
            are a function of x_t. Then the k likeliest of the network's own answer. No slot has a number.
network     Context logits f_i(v) from the slots, pooled into one vector a position or each a key of attention; no time.
predict     "Fresh two passes": a first call with the meaningless candidates, a second one with those that it gave;
            softmax f_i of the second. So a prediction is a function of x_t alone.
loss        Cross-entropy of the hidden tokens, as in masked diffusion; on half of the examples with the candidates of
            a call without gradients.
bound       That of masked diffusion, since predictions are functions of x_t: sum_{n=1..L} curve(n), the curve being
            that of the second pass. A sampler of T calls has T/2 steps.
carried     The sampler "carried" makes one call a step, with the candidates of the step before, and so remembers. Its
            bound is the mean over orders of what the tokens cost on the way from noise to text (``orders``).
departs from the system in: all of the above but the slots and their probabilities; positions are coded, slots are not.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
import torch
from torch import Tensor

from textdiffusion.diffusion.absorbing import (
    AnyOrder,
    by_row,
    carry_over,
    check_training,
    hidden_evidence,
    hidden_targets,
    hide_counts,
    mask_rates,
)
from textdiffusion.diffusion.conditioning import at_least_one
from textdiffusion.diffusion.unmasking import RandomOrder, unmasking_steps
from textdiffusion.errors import UserError
from textdiffusion.mathematics.cross_entropy import token_nats
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import SCHEDULES
from textdiffusion.networks.candidates import Slots, with_elsewhere
from textdiffusion.process import Context, Network, Nll, Prediction, State, as_network


@dataclass
class SparseDistributionConfig:
    """Fields of the sparse-distribution family."""

    candidates: int = 8  # k, of an open position
    attention: Literal["pooled", "slots"] = "pooled"  # slots: every candidate of every position is a key
    passes: int = 2  # network calls of a step; 1 leaves the candidates without a meaning: masked diffusion
    refined: float = 0.5  # share of the training examples whose candidates are the network's own
    schedule: str = "linear"  # as in the masked family, and so the next two
    mask_rate: Literal["uniform", "bell"] = "bell"  # of training
    weight: Literal["bound", "flat"] = "flat"  # every hidden token counts the same (flat), or every text (bound)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"process.schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if not 1 <= self.candidates <= 1000 or not 1 <= self.passes <= 100 or not 0 <= self.refined <= 1:
            raise UserError(
                "process.candidates must be from 1 to 1000, process.passes from 1 to 100, process.refined from 0 to 1"
            )
        if self.attention not in ("pooled", "slots"):
            raise UserError(f"process.attention must be pooled or slots, not {self.attention!r}")
        check_training(self.mask_rate, self.weight)


class Carried(RandomOrder):
    """Random positions, as ``RandomOrder``; the process remembers (``SparseDistribution.by``)."""

    draft = None  # type: ignore[assignment]  # a text drawn jointly would need all positions predicted, and so remembered
    note = "as random, with the candidates of the step before: one call a step; its bound is over whole orders"


@final
class SparseDistribution(AnyOrder):
    """Sparse distribution diffusion; see the head of the file."""

    Config: ClassVar[type] = SparseDistributionConfig
    summary: ClassVar[str] = "hidden positions hold weighted candidates, refined call by call; infills; upper bound"
    paper: ClassVar[str] = "Sparse Distribution Diffusion, mended; near to soft masking 2510.17206"
    bounded: ClassVar[bool] = True
    infills: ClassVar[bool] = True

    def __init__(self, network: Network, config: SparseDistributionConfig, vocabulary: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
        self.k, self.passes = min(config.candidates, vocabulary), config.passes
        self.ring = _mixed(torch.arange(vocabulary)).argsort()  # the tokens in an order without a pattern
        self.steps = unmasking_steps(self.mask, self.schedule) | {"carried": Carried(self.mask, self.schedule)}
        for step in self.steps.values():
            step.apart = False  # type: ignore[misc]  # the candidates of all open positions are asked for first

    def by(self, sampler: str) -> Self:
        if sampler != "carried" or self.remembers:
            return self
        other = copy.copy(self)
        other.remembers, other.passes = True, 1  # type: ignore[misc]
        other.steps = {"carried": self.steps["carried"]}
        return other

    @classmethod
    def small(cls) -> SparseDistributionConfig:
        return SparseDistributionConfig(candidates=2)

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        return {
            "inputs": vocabulary + 1,
            "outputs": vocabulary,
            "attention": "bidirectional",
            "time": False,
            "clean": False,
            "candidates": config.attention,
        }

    # -- candidates -----------------------------------------------------------------------------------------------
    def first(self, x: Tensor) -> Slots:
        """Slots [B L K], K = k + 1, of noisy texts x [B L] before any call: at open positions k tokens at 1/V each.

        They follow each other on a ring of all tokens from a place that a hash of the text gives, so they differ from
        each other and the hidden token is among them in k of V cases.
        """
        at = torch.arange(x.shape[1], device=x.device)
        text = _mixed(((x + 1) * (2 * _mixed(at) + 1)).sum(-1, keepdim=True))
        begin = _mixed(text + 2 * at + 1).unsqueeze(-1)
        tokens = self.ring.to(x.device)[(begin + torch.arange(self.k, device=x.device)) % self.vocabulary]
        share = torch.full(tokens.shape, 1 / self.vocabulary, dtype=torch.float64, device=x.device)
        return self.committed(x, with_elsewhere(tokens, share.log(), self.mask))

    def best(self, x: Tensor, logits: Tensor) -> Slots:
        """Slots of x [B L] whose open positions, N of them, hold the likeliest tokens of the network's answer [N V]."""
        log_p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        likely = log_p.topk(self.k, -1)
        found = with_elsewhere(likely.indices, likely.values, self.mask)
        hidden = x == self.mask
        symbols = x.unsqueeze(-1).repeat(1, 1, self.k + 1)
        shares = torch.zeros(symbols.shape, dtype=found.log_p.dtype, device=x.device)
        symbols[hidden], shares[hidden] = found.symbols, found.log_p
        return self.committed(x, Slots(symbols, shares))

    def committed(self, x: Tensor, slots: Slots) -> Slots:
        """The same, but a position of x [B L] that shows its token holds that alone."""
        shown = (x != self.mask).unsqueeze(-1)
        certain = torch.full_like(slots.log_p[..., :1], -torch.inf).expand_as(slots.log_p).clone()
        certain[..., 0] = 0.0
        symbols = torch.where(shown, x.unsqueeze(-1), slots.symbols)
        return Slots(symbols, torch.where(shown, certain, slots.log_p))

    def answer(self, x: Tensor, slots: Slots, positions: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """One network call: outputs [B L V], or [N V] at asked positions."""
        return self.network(x, condition=condition, positions=positions, candidates=slots.symbols, log_p=slots.log_p)

    def refine(self, x: Tensor, slots: Slots, calls: int, condition: Tensor | None = None) -> Slots:
        """Candidates after so many more calls."""
        for _ in range(calls):
            slots = self.best(x, self.answer(x, slots, x == self.mask, condition))
        return slots

    # -- learning -------------------------------------------------------------------------------------------------
    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        x = state.x
        symbols = x if positions is None else x[positions]
        if not self.remembers:
            slots = self.refine(x, self.first(x), self.passes - 1, condition)
            return Prediction(carry_over(self.answer(x, slots, positions, condition), symbols, self.mask))
        slots = self.first(x) if state.memory is None else self.committed(x, state.memory)
        logits, hidden = self.answer(x, slots, None, condition), x == self.mask
        asked = logits if positions is None else logits[positions]
        return Prediction(carry_over(asked, symbols, self.mask), memory=self.best(x, logits[hidden]))

    def _cross_entropy(self, x_0: Tensor, hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        x = x_0.masked_fill(hidden, self.mask)
        return self._cost(x_0, x, self.refine(x, self.first(x), self.passes - 1, condition), condition)

    def _cost(self, x_0: Tensor, x: Tensor, slots: Slots, condition: Tensor | None) -> Tensor:
        """-log p(x_0 | x_t, candidates) summed over the hidden positions of x [B L], [B]."""
        hidden = x == self.mask
        logits = self.answer(x, slots, hidden, condition)
        return by_row(token_nats(logits, x_0[hidden]), hidden)

    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Nats per token [B]; what mask_rate and weight do to it is said in families/masked.py."""
        length = x_0.shape[1]
        # 1. A mask rate, stratified over the global batch, and exactly n hidden positions.
        rate = mask_rates(noise.stratified("rate"), self.config.mask_rate)
        n = (rate * length).long().clamp(max=length - 1) + 1
        x = x_0.masked_fill(hide_counts(length, n, noise), self.mask)
        # 2. Candidates: of no meaning, or on a share of the rows the network's own.
        slots = self.first(x)
        share = self.config.refined if self.passes > 1 else 0.0
        if share > 0:
            coin = noise.uniform("refined") < share
            rows = at_least_one(coin)
            with torch.no_grad():
                label = None if condition is None else condition[rows]
                own = self.refine(x[rows], slots.select(rows), 1, label).select(coin[rows])
            rows = rows[coin[rows]]
            slots = Slots(
                slots.symbols.index_copy(0, rows, own.symbols),
                slots.log_p.index_copy(0, rows, own.log_p.to(slots.log_p.dtype)),
            )
        # 3. The last call is what is learnt from.
        total = self._cost(x_0, x, slots, condition)
        return total / n if self.config.weight == "bound" else total * (2 / length)

    def nll(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """One draw of the bound: of fresh passes, in continuous time or for the "random" sampler; or, where candidates
        are carried, of one order, at ``calls`` calls or as many as positions."""
        if not self.remembers:
            return self.nll_by_curve(x_0, noise, calls)
        length = x_0.shape[1]
        counts = self._counts(length, length if calls is None else calls)
        order = noise.uniform("order", length).argsort(-1).argsort(-1)
        state = self.prior_sample(len(x_0), length, noise)
        total = torch.zeros_like(state.t)
        for begin, end in itertools.pairwise(np.cumsum([0, *counts])):
            group = (order >= int(begin)) & (order < int(end))
            said = self.predict(state, group)
            total += by_row(-said.log_p.gather(-1, x_0[group].unsqueeze(-1)).squeeze(-1).double(), group)
            state = State(torch.where(group, x_0, state.x), state.t, memory=said.memory)
        return Nll(total, 0 * total, 0 * total, "upper", "carried", len(counts))

    def _counts(self, length: int, calls: int) -> list[int]:
        """How many positions each call of the sampler "carried" reveals."""
        times = self.by("carried").plan(torch.ones(length, dtype=torch.bool), calls, "carried")
        free = torch.full((len(times),), length)
        hidden = hidden_targets(free, torch.tensor(times, dtype=torch.float64), self.schedule)
        return (hidden[:-1] - hidden[1:]).tolist()

    # -- what tests enumerate -------------------------------------------------------------------------------------
    def ideal(self, context: Context) -> Network:
        return as_network(lambda x, t: context(hidden_evidence(x, self.mask)))

    def orders(self, length: int, calls: int, sampler: str) -> Iterator[tuple[float, Sequence[Tensor]]]:
        if sampler != "carried":
            raise UserError(f"no bound over orders is known for the sampler {sampler!r}; there is one for carried")
        counts = self._counts(length, calls)
        ways = set()
        for order in itertools.permutations(range(length)):
            cuts = np.cumsum([0, *counts])
            ways.add(tuple(frozenset(order[a:b]) for a, b in itertools.pairwise(cuts)))
        for way in ways:
            places = torch.arange(length)
            yield 1 / len(ways), [torch.isin(places, torch.tensor(sorted(group), dtype=torch.long)) for group in way]


def _mixed(x: Tensor) -> Tensor:
    """Integers to integers from 0 to 2^31 - 1 that show no pattern."""
    for factor in (0x9E3779B1, 0x85EBCA6B):
        x = (x & 0x7FFFFFFF) * factor
        x = (x ^ (x >> 15)) & 0x7FFFFFFF
    return x
