"""Depthwise convolution over positions, as every block of the transformer has it (transformer.py).

Shapes: B batch, L length, D width, W slots of a cache. In training on texts that are written block by block, the noisy
text comes with the clean one behind it, as two halves (families/block.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of x [B L D] over positions with weight [taps D], ``left`` of the taps looking back.

    Both passes over positions are the library's 2-D convolution on the same memory, seen as channels-last images of one
    line; the gradient of the weight is written out, since the library's own is four times as slow (benchmarks/).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, left: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.left = left
        return _Depthwise.apply_taps(x, weight, left)

    @staticmethod
    def apply_taps(x: Tensor, weight: Tensor, left: int) -> Tensor:
        taps, length = len(weight), x.shape[1]
        # Padding is the same on both sides in a library's convolution: what there is too much of is cut.
        wide = max(left, taps - 1 - left)
        image = x.transpose(1, 2).unsqueeze(2)
        kernel = weight.t().reshape(-1, 1, 1, taps)
        y = F.conv2d(image, kernel, padding=(0, wide), groups=x.shape[-1]).squeeze(2).transpose(1, 2)
        return y[:, wide - left : wide - left + length]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        length, taps, left = grad.shape[1], len(weight), ctx.left
        of_x = _Depthwise.apply_taps(grad, weight.flip(0), taps - 1 - left)
        padded = F.pad(x, (0, 0, left, taps - 1 - left))
        of_weight = torch.stack([(padded[:, tap : tap + length] * grad).sum((0, 1)) for tap in range(taps)])
        return of_x, of_weight, None


@dataclass(frozen=True)
class Taps:
    """What convolutions over a cache read: the positions' own slots int64 [B n], the slots of their taps [B n taps],
    and which of these hold what they should, bool."""

    own: Tensor
    slot: Tensor
    there: Tensor


class Convolution(nn.Module):
    """Depthwise convolution over positions; it starts as the identity.

    Args:
        width: D.
        taps: of the kernel.
        block: no position reads past the end of its own block of this length: 1 looks back only. None: centred.
    """

    def __init__(self, width: int, taps: int, block: int | None = None):
        super().__init__()
        self.block = block
        self.left = taps - 1 - (taps // 2 if block is None else min(taps // 2, block - 1))
        self.weight = nn.Parameter(torch.zeros(taps, width))
        nn.init.ones_(self.weight[self.left])

    def forward(self, x: Tensor, halves: bool = False) -> Tensor:
        """x [B L D]; with ``halves`` [B 2L D], of which the first reads the second where it looks back past the start
        of a block."""
        weight = self.weight.to(x.dtype)
        if self.block is None or (self.block == 1 and not halves):
            return cast(Tensor, _Depthwise.apply(x, weight, self.left))
        parts = x.unflatten(1, (2 if halves else 1, -1))
        length = parts.shape[2]
        parts = F.pad(parts, (0, 0, 0, -length % self.block))
        # Each block goes with the clean positions before it, as an image of its own: [B halves blocks left D].
        clean = F.pad(parts[:, -1], (0, 0, self.left, 0))
        before = clean.unfold(1, max(self.left, 1), self.block)[:, : parts.shape[2] // self.block, :, : self.left]
        blocks = parts.unflatten(2, (-1, self.block))
        before = before.transpose(2, 3).unsqueeze(1).expand(-1, blocks.shape[1], -1, -1, -1)
        image = torch.cat((before, blocks), 3)
        y = cast(Tensor, _Depthwise.apply(image.flatten(0, 2), weight, self.left))
        return y[:, self.left :].reshape(parts.shape)[:, :, :length].flatten(1, 2)

    def taps(self, at: Tensor, places: Tensor) -> Taps:
        """Where the inputs of positions ``at`` [B n] lie in a cache whose slots hold ``places`` [B W]: the same for all
        convolutions of a network, so worked out once a pass."""
        assert self.block is not None  # a centred one has no cache: all that is written may change
        slots = places.shape[1]
        source = at.unsqueeze(-1) - self.left + torch.arange(len(self.weight), device=at.device)
        slot = source % slots
        end = (at // self.block + 1) * self.block
        there = (places.gather(1, slot.flatten(1)).view_as(source) == source) & (source < end.unsqueeze(-1))
        return Taps(at % slots, slot, there)

    def step(self, x: Tensor, taps: Taps, seen: Tensor) -> Tensor:
        """The same as a call, for some positions of a text [B n D] whose inputs are in ``seen`` [B W D], written in
        place."""
        rows = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        seen[rows[..., 0], taps.own] = x
        read = seen[rows, taps.slot] * taps.there.unsqueeze(-1)
        return (read * self.weight.to(x.dtype)).sum(2)
