"""The symbols that stand before a position in its text, for what reads them directly: n-grams and counts.

Shapes: B batch, L length, W slots of a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def preceding(x: Tensor, number: int, halves: bool = False, block: int = 1) -> Tensor:
    """The ``number`` symbols before each of x [B L], nearest first, [B L number]; -1 for none.

    With ``halves`` x is a noisy text and the clean one behind it, [B 2L]: before its own block, of so many positions, a
    noisy position has clean symbols.
    """
    parts = x.unflatten(1, (2 if halves else 1, -1))
    out = []
    for back in range(1, number + 1):
        moved = F.pad(parts, (back, 0), value=-1)[..., : parts.shape[-1]]
        if halves:
            at = torch.arange(parts.shape[-1], device=x.device)
            same = at // block == (at - back) // block
            moved = torch.where(same, moved, moved[:, 1:])
        out.append(moved.flatten(1))
    return torch.stack(out, -1) if out else x.new_empty(*x.shape, 0)


def recalled(at: Tensor, number: int, symbols: Tensor, places: Tensor) -> Tensor:
    """The same of positions ``at`` [B n], from a cache: symbols [B W], and the positions in its slots, [B W]."""
    if not number:
        return at.new_empty(*at.shape, 0)
    source = at.unsqueeze(-1) - torch.arange(1, number + 1, device=at.device)
    slot = source % symbols.shape[1]
    there = places.gather(1, slot.flatten(1)).view(source.shape) == source
    return symbols.gather(1, slot.flatten(1)).view(source.shape).masked_fill(~there, -1)
