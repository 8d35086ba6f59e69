"""The reverse step of the autoregressive family: the leftmost position that is not written yet."""

from __future__ import annotations

from torch import Tensor

from textdiffusion.noise import Noise
from textdiffusion.process import Prediction, Reshape, State, Step
from textdiffusion.steps.unmasking import reveal


class LeftToRight(Step):
    """One position a call, in reading order."""

    note = "one token a call, in reading order; exact likelihood"

    def __init__(self, mask: int):
        self.mask = mask

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        hidden = state.x == self.mask
        return hidden & (hidden.cumsum(-1) == 1)

    def move(
        self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, noise: Noise, reshape: Reshape
    ) -> State:
        return reveal(state, asked, reshape(prediction.log_p), s, noise, prediction.memory)
