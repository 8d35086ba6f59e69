"""Reverse steps of absorbing noise: which hidden positions are revealed, then what is drawn there.

The choice of positions is made first, then tokens are drawn at those alone: the race between "stay hidden" and V
tokens that a single categorical draw would need is avoided, and so is the head of the network at all other positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from textdiffusion.absorbing import hidden_targets
from textdiffusion.noise import Noise
from textdiffusion.process import Categorical, Prediction, Reshape, State, Step
from textdiffusion.schedules import Schedule


def top_positions(score: Tensor, count: Tensor) -> Tensor:
    """The ``count`` [B] positions of highest score [B L] in each row, bool [B L]; ties go to the leftmost."""
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < count.unsqueeze(-1)


@final
@dataclass(frozen=True)
class Revealing:
    """A step that reveals some positions of a text (drafts.Draft).

    positions: bool [B L], the N positions where tokens are predicted; log_p: [N V]; revealed: bool [B L], some of them.
    """

    positions: Tensor
    log_p: Tensor
    revealed: Tensor

    def given(self, text: Tensor) -> Categorical:
        shown = self.revealed[self.positions]
        return Categorical(self.revealed, one_hot(text[shown], self.log_p.shape[-1]).double().log())

    def evidence(self, x: Tensor) -> Tensor:
        shown = self.revealed[self.positions]
        out = torch.zeros_like(self.log_p, dtype=torch.float64)
        out[shown] = one_hot(x[self.revealed], self.log_p.shape[-1]).double().log()
        return out


class Ancestral(Step):
    """Each hidden position is revealed on its own with probability (a_s - a_t) / (1 - a_t) (MDLM, 2406.07524)."""

    note = "each hidden position is revealed independently, as the reverse process says; has a T-call bound"
    reverses = True
    apart = True

    def __init__(self, mask: int, schedule: Schedule):
        self.mask, self.schedule = mask, schedule

    def probability(self, t: Tensor, s: Tensor) -> Tensor:
        """Chance that a position hidden at t is shown at s."""
        a_t, a_s = self.schedule.alpha(t), self.schedule.alpha(s)
        return (a_s - a_t) / (1 - a_t)

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        shown = noise.uniform("reveal", state.x.shape[1]) < self.probability(state.t, s).unsqueeze(-1)
        return shown & (state.x == self.mask)

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        hidden = state.x == self.mask
        chance = float(self.probability(state.t, s))
        for shown in itertools.product((False, True), repeat=int(hidden.sum())):
            asked = torch.zeros_like(hidden)
            asked[hidden] = torch.tensor(shown, dtype=torch.bool)
            yield math.prod(chance if yes else 1 - chance for yes in shown), asked

    def law(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Categorical:
        return Categorical(asked, reshape(prediction.log_p))

    def foreseen(self, state: State) -> Tensor:
        return state.x == self.mask

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Revealing:
        return Revealing(self.foreseen(state), reshape(prediction.log_p), asked)


class Remasking(Ancestral):
    """Ancestral, but a shown token is hidden again with probability sigma = min(``most``, (1 - a_s) / a_t), and hidden
    ones are revealed so much oftener, (a_s - (1 - sigma) a_t) / (1 - a_t), that as many are hidden at s (ReMDM,
    2503.00307). So an early mistake can be mended."""

    note = "ancestral, but some of what is written is hidden again, and written anew (ReMDM)"
    reverses = False
    draft = None  # type: ignore[assignment]  # what it hides again is no part of a text that is drawn

    def __init__(self, mask: int, schedule: Schedule, most: float = 0.04):
        super().__init__(mask, schedule)
        self.most = most

    def chances(self, state: State, s: Tensor) -> Tensor:
        """Chance that each position changes, [B L]: from hidden to shown or the other way."""
        a_t, a_s = self.schedule.alpha(state.t), self.schedule.alpha(s)
        again = ((1 - a_s) / a_t.clamp(min=1e-300)).clamp(max=self.most)
        reveal = (a_s - (1 - again) * a_t) / (1 - a_t)
        chance = torch.where(state.x == self.mask, reveal.unsqueeze(-1), again.unsqueeze(-1))
        return chance if state.given is None else chance.masked_fill(state.given, 0.0)

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        return noise.uniform("reveal", state.x.shape[1]) < self.chances(state, s)

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        chance = self.chances(state, s)[0].tolist()
        for changed in itertools.product((False, True), repeat=len(chance)):
            share = math.prod(p if yes else 1 - p for p, yes in zip(chance, changed, strict=True))
            yield share, torch.tensor([changed], dtype=torch.bool, device=state.x.device)

    def law(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Categorical:
        hide = one_hot(torch.full_like(state.x[asked], self.mask), self.mask + 1).to(prediction.log_p.dtype).log()
        write = pad(reshape(prediction.log_p), (0, 1), value=-torch.inf)
        return Categorical(asked, torch.where((state.x[asked] == self.mask).unsqueeze(-1), write, hide))


class _Counted(Step):
    """Reveals exact numbers of positions, so that no call is wasted and none reveals too much.

    Args:
        mask: the hidden symbol.
        schedule: how many are hidden at a time.
        block: only the first block of this length with hidden positions is open; None: all the text.
    """

    def __init__(self, mask: int, schedule: Schedule, block: int | None = None):
        self.mask, self.schedule, self.block = mask, schedule, block

    def open(self, state: State) -> Tensor:
        """Hidden positions that may be revealed now, bool [B L]."""
        hidden = state.x == self.mask
        if self.block is None:
            return hidden
        block = torch.arange(hidden.shape[1], device=hidden.device) // self.block
        return hidden & (block == block[hidden.long().argmax(-1)].unsqueeze(-1))

    def count(self, state: State, s: Tensor) -> Tensor:
        """How many positions of each row to reveal, [B]."""
        hidden = (state.x == self.mask).sum(-1)
        free = hidden.new_full(hidden.shape, state.x.shape[1]) if state.given is None else (~state.given).sum(-1)
        wanted = (hidden - hidden_targets(free, s, self.schedule)).clamp(min=0)
        return torch.minimum(wanted, self.open(state).sum(-1))

    def foreseen(self, state: State) -> Tensor:
        return self.open(state)


class RandomOrder(_Counted):
    """Reveals a fixed number of uniformly random positions a call.

    With one position a call this is the first-hitting sampler (2409.02908): the law of infinitely many ancestral steps
    in exactly L calls.
    """

    note = "fixed numbers of random positions; has a T-call bound, and one at a time samples the model's law exactly"
    apart = True

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        score = noise.uniform("order", state.x.shape[1]).masked_fill(~self.open(state), -1.0)
        return top_positions(score, self.count(state, s))

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        hidden = self.open(state)[0].nonzero().squeeze(-1).tolist()
        chosen = list(itertools.combinations(hidden, int(self.count(state, s))))
        for positions in chosen:
            asked = torch.zeros_like(state.x, dtype=torch.bool)
            asked[0, list(positions)] = True
            yield 1 / len(chosen), asked

    def law(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Categorical:
        return Categorical(asked, reshape(prediction.log_p))

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Revealing:
        return Revealing(self.open(state), reshape(prediction.log_p), asked)


class Ordered(_Counted):
    """Reveals the positions of highest score, a function of log p: a deterministic choice, then a draw there."""

    def __init__(
        self, mask: int, schedule: Schedule, score: Callable[[Tensor], Tensor], note: str, block: int | None = None
    ):
        super().__init__(mask, schedule, block)
        self.score, self.note = score, note  # type: ignore[misc]

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        return self._hidden(state, s)

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, self._hidden(state, s)

    def _hidden(self, state: State, s: Tensor) -> Tensor:
        return self.open(state) & (self.count(state, s) > 0).unsqueeze(-1)

    def choose(self, state: State, asked: Tensor, log_p: Tensor, s: Tensor) -> Tensor:
        """The positions that are revealed, bool [B L]."""
        score = torch.full(state.x.shape, -torch.inf, dtype=torch.float64, device=state.x.device)
        score[asked] = self.score(log_p).double()
        return top_positions(score, self.count(state, s))

    def law(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Categorical:
        chosen = self.choose(state, asked, prediction.log_p, s)
        return Categorical(chosen, reshape(prediction.log_p[chosen[asked]]))

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Revealing:
        opened = self.open(state)
        return Revealing(opened, reshape(prediction.log_p), self.choose(state, opened, prediction.log_p, s))


def confidence(log_p: Tensor) -> Tensor:
    """Highest log-probability, [N]."""
    return log_p.amax(-1)


def margin(log_p: Tensor) -> Tensor:
    """Gap between the two highest probabilities, [N] (a good default among deterministic orders: 2603.01367)."""
    best = log_p.topk(min(2, log_p.shape[-1]), -1).values.exp()
    return best[..., 0] - best[..., 1] if best.shape[-1] > 1 else best[..., 0]


def counted_steps(mask: int, schedule: Schedule, block: int | None = None) -> dict[str, Step]:
    """Samplers that reveal exact numbers, the default first; of the whole text, or block by block."""
    leading, surest = "the positions whose best token leads most", "the positions that are surest"
    return {
        "random": RandomOrder(mask, schedule, block),
        "margin": Ordered(mask, schedule, margin, f"{leading}; reads well, less diverse", block),
        "confidence": Ordered(mask, schedule, confidence, f"{surest}; reads well, least diverse", block),
    }


def unmasking_steps(mask: int, schedule: Schedule) -> dict[str, Step]:
    """All samplers of absorbing noise, the default first."""
    first, *others = counted_steps(mask, schedule).items()
    free = [("ancestral", Ancestral(mask, schedule)), ("remask", Remasking(mask, schedule))]
    return dict([first, *free, *others])
