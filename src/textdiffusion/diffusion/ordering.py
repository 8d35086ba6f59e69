"""The reverse step of the autoregressive family: the leftmost position that is not written yet."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from textdiffusion.diffusion.unmasking import Revealing
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Categorical, Prediction, Reshape, State, Step


class LeftToRight(Step):
    """One position a call, in reading order."""

    note = "one token a call, in reading order; exact likelihood"
    deterministic = True
    pace = "each"

    def __init__(self, mask: int):
        self.mask = mask

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        return self._leftmost(state)

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, self._leftmost(state)

    def _leftmost(self, state: State) -> Tensor:
        hidden = state.x == self.mask
        return hidden & (hidden.cumsum(-1) == 1)

    def law(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Categorical:
        return Categorical(asked, reshape(prediction.log_p))

    def foreseen(self, state: State) -> Tensor:
        return self._leftmost(state)

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Revealing:
        return Revealing(asked, reshape(prediction.log_p), asked)
