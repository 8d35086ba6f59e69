"""Drawing anew what is written already, so that an early mistake can be mended: one rule for every noise.

A step of Psi (2602.21185) is, with chance w, the noise of time s put on a text that is drawn from the denoiser, and
else the noise's own bridge:

    p(x_s | x_t) = (1 - w) sum_v p(v | x_t) q(x_s | x_t, v) + w sum_v p(v | x_t) q(x_s | v)

Whatever w is, a position has the law of its time after it, if it had before. Where noise only hides, a shown token is
its own denoiser, so that it is hidden again with chance w (1 - alpha_s): remasking, ReMDM (2503.00307), which caps this
chance instead of w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from textdiffusion.diffusion.replacing import Bridge, Outlook, Replacing, Rewriting
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Prediction, Reshape, State


@final
@dataclass(frozen=True)
class Renewal:
    """What is drawn anew in a step: a share w of the positions, or as many as make a position noise again with a chance
    of at most ``most``."""

    share: float = 1.0
    most: float | None = None

    def weight(self, alpha_s: Tensor) -> Tensor:
        """w, of alpha_s's shape."""
        if self.most is None:
            return torch.full_like(alpha_s, self.share)
        return (self.most / (1 - alpha_s).clamp(min=1e-300)).clamp(max=self.share)


class Renewing(Bridge):
    """The bridge, but a share of the positions is drawn anew from what the model expects at the step's end.

    From the denoiser: the Psi sampler. From the context: a Gibbs move, each such position drawn given all others as
    they were; exact for one position at a time, while here a share of them moves together, so that many calls come
    close to the law and do not reach it. Either lets an early mistake be mended, also where the noise alone would never
    lead away from a shown token.
    """

    reverses = False

    def __init__(self, process: Replacing, renewal: Renewal, blind: bool, note: str):
        super().__init__(process)
        self.renewal, self.blind = renewal, blind
        self.note = note  # type: ignore[misc]

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        return self.process.free(state)

    def foreseen(self, state: State) -> Tensor:
        return self.process.free(state)

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Rewriting:
        share = self._share(asked, s)
        fresh = reshape(prediction.native.context)
        log_p = self.process.denoiser(state, asked, fresh)
        if not self.blind:
            return self.rewriting(state, asked, log_p, share.expand(log_p.shape), s)
        # The text is drawn from the mixture; given its token, this is the chance that it came of the context.
        both = torch.logaddexp(log_p + (1 - share).log(), fresh + share.log())
        return self.rewriting(state, asked, both, (fresh + share.log() - both).exp(), s)

    def laws(self, state: State, asked: Tensor, outlook: Outlook, s: Tensor, reshape: Reshape) -> Tensor:
        row, process, share = asked.nonzero()[:, 0], self.process, self._share(asked, s)
        token = reshape(outlook.context)
        if not self.blind:
            token = process.denoiser(state, asked, token)
        fresh = process.marginal(token.exp(), process.alpha(s)[row])
        return (1 - share) * super().laws(state, asked, outlook, s, reshape) + share * fresh

    def _share(self, asked: Tensor, s: Tensor) -> Tensor:
        """w of the asked positions, [N 1]."""
        return self.renewal.weight(self.process.alpha(s))[asked.nonzero()[:, 0]]
