"""What tokens cost at each noise level, as training goes: what ``gaussian.learned_clock`` makes a schedule of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FORGET = 0.05  # share of what is known of a level that a step's examples of it replace


class Clock(nn.Module):
    """Costs by noise level, in buffers, so that they are saved, resumed and averaged with the weights.

    What the micro-batches of a step say is added up, and counts from the next step on: the draws of a step do not
    depend on how it is cut.
    """

    costs: Tensor
    pending: Tensor
    step: Tensor

    def __init__(self, levels: int):
        super().__init__()
        self.register_buffer("costs", torch.zeros(levels))
        self.register_buffer("pending", torch.zeros(2, levels, dtype=torch.float64))
        self.register_buffer("step", torch.tensor(-1))

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """An optimiser step begins, or goes on."""
        if int(self.step) == step:
            return
        total, count = self.pending
        seen = count > 0
        mean = (total / count.clamp(min=1)).to(self.costs.dtype)
        share = torch.where(self.costs[seen] == 0, 1.0, FORGET)  # what is seen first is all that is known
        self.costs[seen] += share * (mean[seen] - self.costs[seen])
        self.pending.zero_()
        self.step.fill_(step)

    def forget(self) -> None:
        """What has been noted in this step is not to count."""
        self.pending.zero_()

    @torch.no_grad()
    def note(self, level: Tensor, nats: Tensor) -> None:
        """Costs ``nats`` [N] at ``level`` [N], from 0 (text) to 1 (noise)."""
        place = (level * len(self.costs)).long().clamp(0, len(self.costs) - 1)
        self.pending[0].index_add_(0, place, nats.double())
        self.pending[1] += torch.bincount(place, minlength=len(self.costs))
