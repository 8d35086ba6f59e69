"""Worlds whose texts have labels, and networks that know them with and without."""

from __future__ import annotations

import torch
from torch import Tensor

from textdiffusion.mathematics.worlds import Table, random_table


class Labels:
    """A law of texts for each label, labels being as likely as one another; and of texts without them, the mixture."""

    def __init__(self, vocabulary: int, length: int, count: int = 2, seed: int = 0):
        self.worlds = [random_table(vocabulary, length, seed=seed + i) for i in range(count)]
        self.mixture = Table(sum(world.p for world in self.worlds).view([vocabulary] * length) / count)
        self.texts = self.mixture.texts

    def law(self, label: int) -> Tensor:
        """p(x | label) of every text, or p(x) for -1."""
        return self.mixture.p if label < 0 else self.worlds[label].p

    def guided_token(self, evidence: Tensor, label: int, weight: float) -> Tensor:
        """c^(1 + w) u^(-w) / Z for each token, [L V], with c and u its laws given log-evidence [L V] at all positions:
        by listing every text."""
        out = []
        for law in (self.law(label), self.mixture.p):
            joint = law * evidence[torch.arange(evidence.shape[0]), self.texts].sum(-1).exp()
            token = torch.stack(
                [
                    torch.stack([joint[self.texts[:, i] == v].sum() for v in range(evidence.shape[1])])
                    for i in range(evidence.shape[0])
                ]
            )
            out.append(token / token.sum(-1, keepdim=True))
        law = torch.where(out[0] > 0, out[0] ** (1 + weight) * out[1] ** -weight, 0.0) if weight > -1 else out[1]
        return law / law.sum(-1, keepdim=True)

    def process(self, bare):
        """The process over a network that knows all of this; ``bare`` is one around any."""
        ideals = [bare.ideal(world.context) for world in (self.mixture, *self.worlds)]

        def network(x, t=None, *, condition=None, positions=None, **more):
            rows = torch.full((len(x),), -1) if condition is None else condition
            said = torch.stack([ideal(x, t, **more) for ideal in ideals])
            out = said[rows + 1, torch.arange(len(x))]
            return out if positions is None else out[positions]

        return bare.over(network)
