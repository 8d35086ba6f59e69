"""Particles: several runs for each text, weighted, and resampled where the weights become too uneven.

Sequential Monte Carlo. What weighs them says by how much a step missed the law that is wanted: the pattern that texts
are held to (constraints.py), a reward (steering.py), or both, whose weights multiply. For every text the mean of
(estimate of the normaliser) x [the text is x] is what the sampler itself gives x, times what is wanted of it; so the
law of the one particle that is shown tends to the wanted one as their number grows.
"""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise


@final
class Particles:
    """The weights of all particles of one run; rows [B] are those of one text after those of another.

    Args:
        rows: B.
        each: particles of a text.
    """

    def __init__(self, rows: int, each: int):
        if each < 1:
            raise UserError(f"--particles must be at least 1, not {each}")
        self.each, self.log_weight = each, np.zeros(rows)
        # Log of an unbiased estimate of the normaliser, for each text: complete once the run is finished.
        self.log_chance = np.zeros(rows // each)
        self._carried: list[np.ndarray] = []

    def carry(self) -> np.ndarray:
        """A number for each row, float64 [B], at 0; to be changed in place, and resampled with its particle."""
        self._carried.append(np.zeros(len(self.log_weight)))
        return self._carried[-1]

    def shares(self) -> np.ndarray:
        """The particles' shares of each text, [texts particles]."""
        weight = self.log_weight.reshape(-1, self.each)
        weight = np.exp(weight - weight.max(-1, keepdims=True))
        return np.asarray(weight / weight.sum(-1, keepdims=True))

    def resample(self, noise: Noise, going_on: Tensor) -> Tensor | None:
        """Which row each row goes on from, int64 [B], where the effective number of particles is below half of them;
        of texts that are finished (not ``going_on``, bool [B]) each row from itself."""
        share = self.shares()
        going = going_on.cpu().numpy().reshape(share.shape)[:, 0]
        uneven = np.flatnonzero((1 / (share**2).sum(-1) < self.each / 2) & going)
        if not len(uneven):
            return None
        own = np.arange(share.size).reshape(share.shape)
        start = noise.uniform("resample").cpu().numpy().reshape(share.shape)[:, :1]
        # Systematic: one draw for each text, and points at equal distances.
        points = (start + np.arange(self.each)) / self.each
        for i in uneven:
            chosen = np.searchsorted(share[i].cumsum(), points[i], side="right").clip(max=np.flatnonzero(share[i])[-1])
            weight = self.log_weight[own[i]]
            self.log_chance[i] += float(np.logaddexp.reduce(weight) - np.log(self.each))
            self.log_weight[own[i]] = 0.0
            for carried in self._carried:
                carried[own[i]] = carried[own[i, chosen]]
            own[i] = own[i, chosen]
        return torch.from_numpy(own.reshape(-1))

    def finish(self) -> None:
        """Bring the estimate of the normaliser to its end."""
        weight = self.log_weight.reshape(-1, self.each)
        self.log_chance = self.log_chance + np.logaddexp.reduce(weight, 1) - np.log(self.each)

    def shown(self, noise: Noise | None) -> Tensor:
        """The row that is shown of each text's, int64 [texts]: the weightiest, or one drawn by weight."""
        share = self.shares()
        if noise is None:
            best = share.argmax(-1)
        else:
            uniform = noise.uniform("choose").cpu().numpy().reshape(share.shape)[:, :1]
            best = (share.cumsum(-1) <= uniform * share.sum(-1, keepdims=True)).sum(-1).clip(max=self.each - 1)
        return torch.from_numpy(best + np.arange(len(share)) * self.each)


def several(noise: Noise, particles: int) -> Noise:
    """The noise of so many rows for each row, whatever the batch."""
    rows = (noise.rows[:, None] * particles + np.arange(particles)).reshape(-1)
    return Noise(noise.seed, rows, noise.total * particles, noise.step, noise.device)
