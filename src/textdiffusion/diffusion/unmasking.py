"""Reverse steps of absorbing noise: which hidden positions are revealed, then what is drawn there.

The choice of positions is made first, then tokens are drawn at those alone: the race between "stay hidden" and V
tokens that a single categorical draw would need is avoided, and so is the head of the network at all other positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from textdiffusion.diffusion.absorbing import hidden_targets
from textdiffusion.diffusion.renewing import Renewal
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import Schedule
from textdiffusion.process import Categorical, Pace, Prediction, Reshape, State, Step


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
    """Ancestral, but a share w of the positions is drawn anew (renewing.py): a shown token is hidden again with
    probability w (1 - a_s), and hidden ones are revealed so much oftener that as many are hidden at s."""

    reverses = False
    draft = None  # type: ignore[assignment]  # what it hides again is no part of a text that is drawn

    def __init__(self, mask: int, schedule: Schedule, renewal: Renewal, note: str):
        super().__init__(mask, schedule)
        self.renewal, self.note = renewal, note  # type: ignore[misc]

    def chances(self, state: State, s: Tensor) -> Tensor:
        """Chance that each position changes, [B L]: from hidden to shown or the other way."""
        a_s = self.schedule.alpha(s)
        share = self.renewal.weight(a_s)
        reveal = (1 - share) * self.probability(state.t, s) + share * a_s
        chance = torch.where(state.x == self.mask, reveal.unsqueeze(-1), (share * (1 - a_s)).unsqueeze(-1))
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

    pace: ClassVar[Pace] = "counts"

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


@final
class FirstHitting(RandomOrder):
    """One random position a call, whatever the budget."""

    note = "one random position a call: always as many calls as positions, and the law of endless ancestral steps"
    pace: ClassVar[Pace] = "each"


@final
class Dilated(_Counted):
    """Reveals evenly spaced positions, in the order of their binary digits read backwards: 0, 1/2, 1/4, 3/4, 1/8 ... of
    a text whose length is a power of two. What is drawn in the same call knows nothing of one another, and neighbours
    would have most to know (2506.19037). Where lengths and numbers are no powers of two, and in gaps, a call may still
    draw two neighbours."""

    note = "evenly spaced positions, first coarsely, then between them; best at few calls"
    deterministic = True
    apart = True

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        length = state.x.shape[1]
        place, rank = torch.arange(length, device=state.x.device), torch.zeros(length, device=state.x.device).double()
        for digit in range((length - 1).bit_length()):
            rank += ((place >> digit) & 1).double() / 2 ** (digit + 1)
        return top_positions((1 - rank).masked_fill(~self.open(state), -1.0), self.count(state, s))

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, self.ask(state, s, Noise.of(0, 1))

    def law(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Categorical:
        return Categorical(asked, reshape(prediction.log_p))

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Revealing:
        return Revealing(self.open(state), reshape(prediction.log_p), asked)


class Ordered(_Counted):
    """Reveals the positions of highest score, a function of log p: a deterministic choice, then a draw there."""

    deterministic = True

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


@final
class Spread(Ordered):
    """Ordered, but no two positions of a call are near to each other while there are others: neighbours say most of one
    another, and those that are drawn in the same call know nothing of it.

    Near is half of the mean distance of as many positions, evenly spread over those that are hidden; at most ``FAR``.
    """

    FAR = 8

    def choose(self, state: State, asked: Tensor, log_p: Tensor, s: Tensor) -> Tensor:
        score = torch.full(state.x.shape, -torch.inf, dtype=torch.float64, device=state.x.device)
        score[asked] = self.score(log_p).double()
        count = self.count(state, s)
        near = (asked.sum(-1) // (2 * count).clamp(min=1)).clamp(max=self.FAR).unsqueeze(-1)
        place = torch.arange(score.shape[1], device=score.device)
        chosen, beside = torch.zeros_like(asked), torch.zeros_like(asked)
        for k in range(int(count.max())):
            left = asked & ~chosen
            apart = left & ~beside
            able = torch.where(apart.any(-1, keepdim=True), apart, left)
            best = score.masked_fill(~able, -torch.inf).argmax(-1, keepdim=True)
            more = (k < count).unsqueeze(-1)
            chosen |= more & (place == best)
            beside |= more & ((place - best).abs() < near)
        return chosen


@final
class Doubtful(Ordered):
    """Reveals as many of the surest positions as a limit on their doubt allows; the limit is set in every call so that,
    were the doubts to stay as they are, the calls that are left would do. So it makes as many as are asked for, and
    most of them where the text is still open.

    Args:
        doubt: of a position, a function of log p [N V]: [N].
        together: doubts of the surest 1, 2 ... positions, [B L] in rising order and their numbers [L], to what it is to
            reveal them together; it never falls along a row.
    """

    pace: ClassVar[Pace] = "left"

    def __init__(
        self, mask: int, schedule: Schedule, doubt: Callable[[Tensor], Tensor],
        together: Callable[[Tensor, Tensor], Tensor], note: str,
    ):  # fmt: skip
        super().__init__(mask, schedule, doubt, note)
        self.together = together

    def _hidden(self, state: State, s: Tensor) -> Tensor:
        return self.open(state)

    def choose(self, state: State, asked: Tensor, log_p: Tensor, s: Tensor) -> Tensor:
        doubt = torch.full(state.x.shape, torch.inf, dtype=torch.float64, device=state.x.device)
        doubt[asked] = self.score(log_p).double().clamp(min=0)
        hidden = asked.sum(-1)
        # Times are even: t / (t - s) calls are left, this one included.
        left = torch.minimum((state.t / (state.t - s).clamp(min=1e-12)).round().long().clamp(min=1), hidden)
        ordered = doubt.sort(-1).values
        whole = torch.where(asked, doubt, 0.0).sum(-1)
        number = torch.arange(1, doubt.shape[1] + 1, device=doubt.device)
        allowed = (self.together(ordered, number) <= (whole / left.clamp(min=1)).unsqueeze(-1)).sum(-1)
        count = torch.where(left <= 1, hidden, torch.minimum(allowed.clamp(min=1), hidden - left + 1))
        return top_positions(-doubt, count.clamp(min=0))


def confidence(log_p: Tensor) -> Tensor:
    """Highest log-probability, [N]."""
    return log_p.amax(-1)


def margin(log_p: Tensor) -> Tensor:
    """Gap between the two highest probabilities, [N] (a good default among deterministic orders: 2603.01367)."""
    best = log_p.topk(min(2, log_p.shape[-1]), -1).values.exp()
    return best[..., 0] - best[..., 1] if best.shape[-1] > 1 else best[..., 0]


def entropy(log_p: Tensor) -> Tensor:
    """Nats, [N]."""
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)


def adaptive_steps(mask: int, schedule: Schedule) -> dict[str, Step]:
    """Samplers that keep what a call reveals apart, or reveal more where they are surer; likelihoods are exact."""
    return {
        # The sum but for the largest: what the tokens can say of one another is no more (2505.24857).
        "entropy": Doubtful(
            mask, schedule, entropy, lambda doubt, n: doubt.cumsum(-1) - doubt,
            "the positions of least entropy, as many as a limit on its sum allows; the limit is what T calls need",
        ),
        # n + 1 tokens of at least this confidence: their joint choice is safe below a limit (2505.22618).
        "threshold": Doubtful(
            mask, schedule, lambda log_p: 1 - confidence(log_p).exp(), lambda doubt, n: (n + 1) * doubt,
            "the positions surer than a threshold, which rises with their number and is what T calls need",
        ),
        "dilated": Dilated(mask, schedule),
        "spread": Spread(
            mask, schedule, lambda log_p: -entropy(log_p), "those of least entropy, no two of a call near to each other"
        ),
    }  # fmt: skip


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
    first, *ordered = counted_steps(mask, schedule).items()
    again = "some of what is written is hidden again, and written anew"
    free: dict[str, Step] = {
        "first_hitting": FirstHitting(mask, schedule),
        "ancestral": Ancestral(mask, schedule),
        "remask": Remasking(mask, schedule, Renewal(most=0.04), f"ancestral, but {again}: a fixed chance (ReMDM)"),
        "psi": Remasking(mask, schedule, Renewal(share=0.1), f"ancestral, but {again}: most while much is hidden"),
    }
    return dict([first, *free.items(), *ordered]) | adaptive_steps(mask, schedule)
