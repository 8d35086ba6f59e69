"""Positions that hold several weighted symbols: one vector from them, or keys of their own in attention.

A position has K slots, each a symbol and the log of its probability; they add up to one. No slot has a number: a sum
over slots is all that there is, so that their order changes nothing.

Shapes: B batch, L length, K slots of a position, D width, S input symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = -12.0  # log of the least probability that is told from nothing


@dataclass(frozen=True)
class Slots:
    """What positions hold: symbols int64 [B L K], and their log-probabilities [B L K], -inf for an empty slot."""

    symbols: Tensor
    log_p: Tensor

    def select(self, rows: Tensor) -> Slots:
        """Some rows,."""
        return Slots(self.symbols[rows], self.log_p[rows])


def with_elsewhere(symbols: Tensor, log_p: Tensor, elsewhere: int) -> Slots:
    """Slots [... K] of candidates [... K - 1] whose probabilities add up to one at most; what is left to one is that of
    the symbol ``elsewhere``, in a slot of its own."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0).log()
    return Slots(F.pad(symbols, (0, 1), value=elsewhere), torch.cat((log_p, rest), -1))


def trusted(log_p: Tensor, trust: Tensor) -> Tensor:
    """What is added to a slot's logit, float32; -inf for an empty one, of which the trust learns nothing."""
    log_p = log_p.float()
    return (trust.float() * log_p.clamp(min=2 * LEAST)).masked_fill(log_p == -torch.inf, -torch.inf)


class Candidates(nn.Module):
    """Attention over the slots of a position: logits are a learned readout of the symbol plus the log of its
    probability, times a learned trust that starts at one. So it starts as the mean embedding.

    ``forward(table, symbols, log_p, dtype)``: embeddings [S D], symbols int64 [B L K], log_p float [B L K] (-inf for an
    empty slot) to vectors [B L D].
    """

    def __init__(self, width: int):
        super().__init__()
        self.readout = nn.Parameter(torch.zeros(width))
        self.trust = nn.Parameter(torch.ones(1))  # with a dimension: shards are cut along one
        # What a symbol's probability adds to its embedding; nothing at certainty, whose vector is the embedding.
        self.doubt = nn.Parameter(torch.zeros(width, 2))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        trust = state_dict.get(prefix + "trust")
        if trust is not None and trust.dim() == 0:  # of a run from when it was a scalar
            state_dict[prefix + "trust"] = trust.unsqueeze(0)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, table: Tensor, symbols: Tensor, log_p: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.weights(table, symbols, log_p)
        shares = weight.to(table.dtype).flatten(0, 1)
        mean = F.embedding_bag(symbols.flatten(0, 1), table, per_sample_weights=shares, mode="sum")
        mean = mean.view(*symbols.shape[:2], -1)
        told = (weight.unsqueeze(-1) * self.features(log_p)).sum(-2)
        return mean.to(dtype) + F.linear(told.to(dtype), self.doubt.to(dtype))

    def weights(self, table: Tensor, symbols: Tensor, log_p: Tensor) -> Tensor:
        """Shares of the slots in their position's vector, float32 [B L K]."""
        asked = table.float() @ self.readout.float()
        logits = asked[symbols] + trusted(log_p, self.trust)
        return logits.softmax(-1)

    def features(self, log_p: Tensor) -> Tensor:
        """What is told of a probability, [B L K 2]."""
        return torch.stack((1 - log_p.float().exp(), log_p.float().clamp(min=LEAST) / LEAST), -1)

    def offsets(self, table: Tensor, symbols: Tensor, log_p: Tensor, dtype: torch.dtype) -> Tensor:
        """How each slot differs from its position's vector, [B L K D]."""
        own = F.embedding(symbols, table).to(dtype) + F.linear(self.features(log_p).to(dtype), self.doubt.to(dtype))
        return own - self(table, symbols, log_p, dtype).unsqueeze(2)
