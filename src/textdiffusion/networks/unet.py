"""A 1-D U-Net with skip connections (1505.04597), for texts of any length: what bits at character level came with.

Shapes: B batch, L length, D width, V output symbols, N asked positions. The text is halved ``config.levels`` times by
convolutions, read as a whole where it is shortest, and brought back to its length; on the way up each block also reads
what the block that mirrors it wrote on the way down. It departs from the public system's network, which has no skips,
also in what made that slow or tied it to lengths:

- a text of L positions is halved to L / 2 rounded up, and cut to its length again on the way up. That is a run at the
  next multiple, cut afterwards, in which the padding is kept at zero in every convolution: so what is said of a text
  depends on nothing behind its end, and its likelihood is that of what is sampled, at every length;
- each position is normalised by itself, not with all others of its text, so that a longer text is read like a shorter;
- widths grow by half of the first from level to level, where they grew to eight times it;
- attention, at the lowest level alone, knows distances (rotary, 2104.09864);
- a convolution is one product with a matrix, of every few positions side by side: Muon teaches those.

A shape of ``depth`` and ``width`` costs about what a transformer of that shape costs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textdiffusion.networks.attention import attend, rotate
from textdiffusion.networks.network import Linear, TextNetwork, normalise
from textdiffusion.networks.shape import TransformerConfig


class Convolve(nn.Module):
    """Convolution of x [B L D] over positions to [B ceil(L / stride) E], zeros standing before and behind the text."""

    def __init__(self, inputs: int, outputs: int, taps: int, stride: int = 1):
        super().__init__()
        self.taps, self.stride = taps, stride
        self.map = Linear(taps * inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        count, before = -(-length // self.stride), (self.taps - self.stride) // 2
        last = (count - 1) * self.stride + self.taps  # position past the last one read, with ``before`` zeros in front
        x = F.pad(x, (0, 0, before, max(0, last - before - length)))
        side = [x[:, tap : tap + (count - 1) * self.stride + 1 : self.stride] for tap in range(self.taps)]
        out: Tensor = self.map(torch.cat(side, -1))
        return out


class Residual(nn.Module):
    """Two convolutions of three taps beside a shortcut; what modulates scales and shifts what they read."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig):
        super().__init__()
        self.first = Convolve(inputs, outputs, 3)
        self.second = Convolve(outputs, outputs, 3)
        self.shortcut = Linear(inputs, outputs, bias=False) if inputs != outputs else None
        conditioned = config.time or config.classes > 0
        self.modulation = Linear(channels(config)[0], 2 * inputs) if conditioned else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        h = normalise(x)
        if self.modulation is not None and c is not None:
            shift, scale = self.modulation(c).unsqueeze(1).chunk(2, -1)
            h = h * (1 + scale) + shift
        h = self.dropout(self.second(F.gelu(self.first(h))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Whole(nn.Module):
    """Attention of all positions to all."""

    def __init__(self, width: int, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.mix = Linear(width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(normalise(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(length, device=x.device)
        out = attend(rotate(q, at), rotate(k, at), v, None)
        return x + self.dropout(self.mix(out.transpose(1, 2).reshape(rows, length, width)))


def channels(config: TransformerConfig) -> list[int]:
    """Width of each level, the text's own first: 3/4 of ``config.width``, and by half of that more from level to level;
    multiples of twice the heads."""
    even = 2 * config.heads
    return [even * max(1, round(3 * config.width * (2 + level) / 8 / even)) for level in range(config.levels + 1)]


class Levels(nn.Module):
    """Down, through the shortest, and up again: h [B L D] and what modulates it [B D'] to [B L D]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        widths = channels(config)
        low, steps = widths[-1], list(pairwise(widths))
        each_way = range(max(1, round(config.depth / 3)))  # residual blocks of a level
        self.down = nn.ModuleList(Residual(high, high, config) for high, _ in steps for _ in each_way)
        self.shrink = nn.ModuleList(Convolve(high, lower, 4, stride=2) for high, lower in steps)
        self.middle = nn.ModuleList(Residual(low, low, config) for _ in (*each_way, *each_way))
        self.whole = Whole(low, config)
        self.grow = nn.ModuleList(Convolve(lower, high, 3) for high, lower in reversed(steps))
        self.up = nn.ModuleList(Residual(2 * high, high, config) for high, _ in reversed(steps) for _ in each_way)

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        skips, each_way = [], len(self.down) // len(self.shrink)
        for number, block in enumerate(self.down, 1):
            h = block(h, c)
            skips.append(h)
            if number % each_way == 0:
                h = self.shrink[number // each_way - 1](h)
        for number, block in enumerate(self.middle):
            if number == each_way:
                h = self.whole(h)
            h = block(h, c)
        for number, block in enumerate(self.up):
            if number % each_way == 0:
                h = self.grow[number // each_way](h.repeat_interleave(2, 1)[:, : skips[-1].shape[1]])
            h = block(torch.cat((h, skips.pop()), -1), c)
        return h


@final
class UNet(TextNetwork):
    """Symbols in, context outputs out.

    ``forward(x, t=None, condition=None, positions=None, estimate=None)``:
        x: symbols, int64 [B L]; or reals [B L inputs], if ``config.reals``; of any length.
        t: times in [0, 1], [B]; or [B L], each position standing at its row's time or, without noise, at 0. Needed if
            and only if ``config.time``.
        condition: class labels, int64 [B], -1 for none; optional if ``config.classes``.
        positions: bool [B L]; outputs are computed for these positions only.
        estimate: what the network said before, [B L estimates]; None: nothing.
    Returns outputs [B L V], or [N V] for the N asked positions in row-major order, in the compute type.
    """

    endless = True

    def __init__(self, config: TransformerConfig):
        width = channels(config)[0]
        super().__init__(config, width)
        self.blocks: Levels = Levels(config)
        self.head = Linear(width, config.outputs)
        self.start(0.5)
        # What writes to the residual stream or out starts at zero, and so does what modulates.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.blocks.whole.mix.weight)
        for block in self.residuals:
            nn.init.zeros_(block.second.map.weight)
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)

    @property
    def residuals(self) -> list[Residual]:
        """All residual blocks."""
        return [module for module in self.blocks.modules() if isinstance(module, Residual)]

    @property
    def parts(self) -> list[nn.Module]:
        return [*self.residuals, self.blocks.whole]

    @property
    def products(self) -> float:
        # A level's positions are half as many as those of the level above.
        blocks, lowest = self.blocks, self.config.levels
        each_way = len(blocks.down) // lowest
        level: list[tuple[nn.Module, int]] = [(blocks.whole, lowest), *((block, lowest) for block in blocks.middle)]
        level += [(block, number // each_way) for number, block in enumerate(blocks.down)]
        level += [(block, lowest - 1 - number // each_way) for number, block in enumerate(blocks.up)]
        level += [(shrink, number + 1) for number, shrink in enumerate(blocks.shrink)]
        level += [(grow, lowest - 1 - number) for number, grow in enumerate(blocks.grow)]
        spared = sum(sum(p.numel() for p in module.parameters()) * (1 - 0.5**depth) for module, depth in level)
        return super().products - spared

    def compile_blocks(self) -> None:
        for block in self.residuals:
            block.compile()

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        condition: Tensor | None = None,
        positions: Tensor | None = None,
        estimate: Tensor | None = None,
    ) -> Tensor:
        h = self.read(x)
        if self.estimate is not None and estimate is not None:
            h = h + self.estimate(estimate.to(h.dtype))
        h, t = self.marked(h, t)
        h = F.dropout(h, self.config.dropout, self.training)
        return self.answer(self.blocks(h, self.told(x, t, condition, h.dtype)), positions)
