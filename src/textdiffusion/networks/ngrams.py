"""Embeddings of the n-grams that end at a position, hashed: what often follows them need not be learnt by attention.

Shapes: B batch, L length, D width, K orders (n = 2 .. K + 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, WIDTH = 2**15, 32  # of each order's table
LONGEST, FEW_PASSES = 5, 2.0
# Odd and without pattern: n-grams that share a row should have nothing else in common.
_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)


def longest_for(passes: float) -> int:
    """The n-grams that a training of so many passes over its text should have: up to 5, or none.

    In a pass or so they save a small autoregressive network up to a tenth of a bit a character; in four they cost as
    much, for rows that come up a few times each are learnt by heart (docs/results.md).
    """
    return LONGEST if passes <= FEW_PASSES else 0


class Ngrams(nn.Module):
    """Sum over n = 2 .. ``longest`` of an embedding of the last n symbols (hashed, as in 2412.09871).

    Args:
        longest: n of the longest n-gram, at most 8.
        width: D.
    """

    def __init__(self, longest: int, width: int):
        super().__init__()
        self.longest = longest
        orders = longest - 1
        self.table = nn.Embedding(orders * ROWS, WIDTH)
        self.up = nn.Parameter(torch.empty(width, orders * WIDTH))
        nn.init.normal_(self.table.weight, std=0.1)
        nn.init.normal_(self.up, std=(orders * WIDTH) ** -0.5)

    def forward(self, x: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings [B L D] in ``dtype``, of symbols x int64 [B L] and those ``before`` them, nearest first,
        [B L longest - 1] or more; -1 for none (preceding.py)."""
        # Cast after the choice of rows: in bfloat16 the gradients of a row's many places would not add up.
        found = F.embedding(self.rows(x, before), self.table.weight).flatten(-2).to(dtype)
        return F.linear(found, self.up.to(dtype))

    def rows(self, x: Tensor, before: Tensor) -> Tensor:
        """Where in the table the n-grams are found, [B L K]."""
        symbols = torch.cat((x.unsqueeze(-1), before), -1)[..., : self.longest] + 2
        mixed = (symbols * symbols.new_tensor(_FACTORS[: self.longest])).cumsum(-1)[..., 1:]
        # The high bits of a product depend on most bits of what was multiplied.
        row = ((mixed & 0xFFFFFFFF) * _FACTORS[0] >> 17) % ROWS
        return row + ROWS * torch.arange(self.longest - 1, device=x.device)
