"""Steps as two draws, a text and a state given that text: what makes it possible to hold them to texts of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from torch import Tensor

from textdiffusion.process import Categorical, Normal, Prediction, Reshape, State

SHARPEST = 1e-6  # deviation that stands for none: a state that is the text tells its tokens apart without fail


class Draft(Protocol):
    """A step as two draws: a text, then the state at s given that text; together they have the law that the step
    states. So it can be held to texts of a kind (constraints.py): only the first draw changes, and is a joint one.
    """

    @property
    def positions(self) -> Tensor:
        """Where the text is drawn, bool [B L], N of them."""
        ...

    @property
    def log_p(self) -> Tensor:
        """The law of each of its tokens on its own, [N V]."""
        ...

    def given(self, text: Tensor) -> Categorical | Normal:
        """The law of the state at s, given the text's tokens int64 [N]."""
        ...

    def evidence(self, x: Tensor) -> Tensor:
        """log of the chance (among reals the density) that the state at s is x [B L] or [B L W], given each token, up
        to a constant: float64 [N V]."""
        ...


@runtime_checkable
class HasDraft(Protocol):
    """A step that can be held to texts of a kind."""

    def foreseen(self, state: State) -> Tensor:
        """Positions that are not settled and whose tokens one network call predicts, bool [B L]."""
        ...

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Draft:
        """The step; ``prediction`` is for the foreseen positions, of which ``ask`` asked about ``asked``.

        Raises:
            UserError: its law is no such two draws.
        """
        ...


@final
@dataclass(frozen=True)
class Mixture:
    """Law of a step among reals that is two draws, and so a Draft, each position on its own: a token v, then the reals
    from N(start + share e_v, deviation^2).

    positions: bool [B L], N of them. log_p: of the tokens, [N V]. start: [N W]. share, deviation: [N 1]; a deviation of
    0 is the text itself. codes: e, [V W]. All float64, but for log_p.
    """

    positions: Tensor
    log_p: Tensor
    start: Tensor
    share: Tensor
    deviation: Tensor
    codes: Tensor

    def given(self, text: Tensor) -> Normal:
        """The law of the reals, given the tokens int64 [N]."""
        return Normal(self.positions, self.start + self.share * self.codes[text], self.deviation)

    def evidence(self, x: Tensor) -> Tensor:
        """log N(x; start + share e_v, deviation^2) for each v, up to a constant [N V]: the matched filter of what a
        step has moved, as gaussian.evidence is that of a state."""
        gain = self.share / self.deviation.clamp(min=SHARPEST).square()
        moved = x[self.positions].double() - self.start
        return gain * (moved @ self.codes.T - 0.5 * self.share * self.codes.square().sum(-1))
