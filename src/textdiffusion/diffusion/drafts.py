"""Steps as two draws, a text and a state given that text: what makes it possible to hold them to texts of a kind."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from textdiffusion.process import Categorical, Prediction, Reshape, State


class Draft(Protocol):
    """A step of a discrete family as two draws: a text, then the state at s given that text; together they have the law
    that the step states. So it can be held to texts of a kind (constraints.py): only the first draw changes, and is a
    joint one.
    """

    @property
    def positions(self) -> Tensor:
        """Where the text is drawn, bool [B L], N of them."""
        ...

    @property
    def log_p(self) -> Tensor:
        """The law of each of its tokens on its own, [N V]."""
        ...

    def given(self, text: Tensor) -> Categorical:
        """The law of the state at s, given the text's tokens int64 [N]."""
        ...

    def evidence(self, x: Tensor) -> Tensor:
        """log of the chance that the state at s is x [B L], given each token, up to a constant: float64 [N V]."""
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
