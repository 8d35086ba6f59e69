"""One transformer for every family: bidirectional, causal or block-causal; with or without time and classes.

Shapes: B batch, L length, W window (longest length), D width, H heads, S input symbols, V output symbols, N asked
positions. It departs from the usual DiT of diffusion language models (SEDD, MDLM) where that paid on a
CPU, in bits (docs/results.md) or in time (benchmarks/kernels.py):

- a short depthwise convolution before attention and before the feed-forward part, so that spelling need not be
  learnt by attention; it starts as the identity;
- learned positions, erf GELU and layer norm, which are the cheap ones on a CPU;
- no time input unless asked for: a masked text says by itself how noisy it is (RADD, 2406.03736).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textdiffusion.errors import UserError
from textdiffusion.networks.attention import View, attend, attend_halves, rotate
from textdiffusion.networks.candidates import Candidates, trusted
from textdiffusion.networks.convolution import Convolution
from textdiffusion.networks.counts import Counts
from textdiffusion.networks.network import Linear, TextNetwork, normalise
from textdiffusion.networks.ngrams import Ngrams
from textdiffusion.networks.preceding import preceding, recalled
from textdiffusion.networks.shape import TransformerConfig


@dataclass
class Cache:
    """What a network that writes from left to right remembers: keys, values and convolution inputs, by layer.

    A ring of W slots: position p is kept in slot p modulo W. Every tensor has B in front, so that rows can be selected.
    """

    keys: list[Tensor]  # [B H W D/H]
    values: list[Tensor]  # [B H W D/H]
    shifted: list[Tensor]  # [B W D], two a layer
    places: Tensor  # int64 [B W], the position in each slot; -1 for none
    symbols: Tensor  # int64 [B W]

    def select(self, rows: Tensor) -> Cache:
        keys, values, shifted = ([x[rows] for x in part] for part in (self.keys, self.values, self.shifted))
        return Cache(keys, values, shifted, self.places[rows], self.symbols[rows])

    def note(self, x: Tensor, at: Tensor) -> None:
        """Take down that symbols x [B n] stand at positions ``at``."""
        slots = at % self.places.shape[1]
        self.places.scatter_(1, slots, at)
        self.symbols.scatter_(1, slots, x)

    def filled(self) -> Tensor:
        """``places`` without the slots at the end that no text has come to."""
        return self.places[:, : int((self.places >= 0).any(0).sum())]


class Block(nn.Module):
    """Pre-norm attention and feed-forward part."""

    def __init__(self, config: TransformerConfig, conditioned: bool):
        super().__init__()
        self.config = config
        width, hidden = config.width, int(config.width * config.expansion)
        reach = {"bidirectional": None, "causal": 1, "block": config.block_length}[config.attention]
        self.qkv = Linear(width, 3 * width, bias=config.bias)
        self.mix = Linear(width, width, bias=config.bias)
        self.up = Linear(width, hidden, bias=config.bias)
        self.down = Linear(hidden, width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        taps = config.convolution
        self.conv_attention = Convolution(width, taps, reach) if taps else None
        self.conv_feed = Convolution(width, taps, reach) if taps else None
        self.modulation = Linear(width, 6 * width) if conditioned else None
        self.trust = nn.Parameter(torch.ones(config.heads)) if config.candidates == "slots" else None

    def _attention(self, h: Tensor, view: View, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        rows, length, width = h.shape
        q, k, v = self.qkv(h).view(rows, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        if self.trust is not None and view.slots is not None:
            return self.mix(self._over_slots(q, k, v, view).transpose(1, 2).reshape(rows, length, width))
        if self.config.positions == "rotary":
            at = view.at.repeat(2) if view.halves else view.at
            q, k = rotate(q, at), rotate(k, at)
        if cache is not None:
            index = (view.at % cache[0].shape[2])[:, None, :, None].expand_as(k)
            k, v = cache[0].scatter_(2, index, k), cache[1].scatter_(2, index, v)
            if view.bias is not None:
                k, v = k[:, :, : view.bias.shape[-1]], v[:, :, : view.bias.shape[-1]]
        if view.halves:
            out = attend_halves(q, k, v, view, self.config.block_length)
        else:
            out = attend(q, k, v, view.bias)
        return self.mix(out.transpose(1, 2).reshape(rows, length, width))

    def _over_slots(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        """Attention of positions [B H L D/H] to all slots of all positions, by their content and probability."""
        assert view.slots is not None and view.log_p is not None and self.trust is not None
        rows, length, slots, width = view.slots.shape
        # What a slot adds to its position's key and value; a committed position's one slot adds nothing.
        more = F.linear(view.slots, self.qkv.weight[width:].to(view.slots.dtype))
        more = more.view(rows, length, slots, 2, self.config.heads, -1).permute(3, 0, 4, 1, 2, 5)
        k, v = ((part.unsqueeze(3) + extra).flatten(2, 3) for part, extra in zip((k, v), more, strict=True))
        if self.config.positions == "rotary":
            q, k = rotate(q, view.at), rotate(k, view.at.repeat_interleave(slots))
        return attend(q, k, v, trusted(view.log_p.flatten(1)[:, None, None], self.trust.view(1, -1, 1, 1)))

    def forward(self, x: Tensor, c: Tensor | None, view: View, cache: Cache | None, layer: int) -> Tensor:
        modulation = None
        if self.modulation is not None and c is not None:
            modulation = self.modulation(c).unsqueeze(1).chunk(6, -1)
        past = None if cache is None else (cache.keys[layer], cache.values[layer])
        for part, convolution in enumerate((self.conv_attention, self.conv_feed)):
            h = normalise(x)
            if modulation is not None:
                shift, scale, gate = modulation[3 * part : 3 * part + 3]
                h = h * (1 + scale) + shift
            if convolution is not None and cache is not None and view.taps is not None:
                h = convolution.step(h, view.taps, cache.shifted[2 * layer + part])
            elif convolution is not None:
                h = convolution(h, view.halves)
            h = self._attention(h, view, past) if part == 0 else self.down(F.gelu(self.up(h)))
            h = self.dropout(h)
            x = x + h if modulation is None else x + gate * h
        return x


@final
class Transformer(TextNetwork):
    """Symbols in, context outputs out.

    ``forward(x, t=None, condition=None, positions=None, cache=None, at=None, halves=False, estimate=None,
    candidates=None, log_p=None, alone=False)``:
        x: symbols, int64 [B L]; or reals [B L inputs], if ``config.reals``.
        t: times in [0, 1], [B]; or [B L], each position standing at its row's time or, without noise, at 0. Needed if
            and only if ``config.time``.
        condition: class labels, int64 [B], -1 for none; optional if ``config.classes``.
        positions: bool [B L]; outputs are computed for these positions only.
        cache, at: for networks from left to right: a cache to read and write, and the positions int64 [B L] that x
            stands at. Those of attention = "block" may lie past the window, of which so much is seen.
        halves: for attention = "block": x is a noisy text and the clean one behind it, [B 2L]. A noisy position sees
            its own block, and the clean blocks before it; ``positions`` asks among both halves.
        estimate: what the network said before, [B L estimates]; None: nothing.
        candidates, log_p: for ``config.candidates``: symbols int64 [B L K] and their log-probabilities [B L K], which
            are read in the place of x.
        alone: with ``config.counts``: what the network itself says, without them; in training.
    Returns outputs [B L V], or [N V] for the N asked positions in row-major order, in the compute type.
    """

    blocks: nn.ModuleList

    def __init__(self, config: TransformerConfig):
        width = config.width
        if config.counts and config.attention != "causal":
            raise UserError("network.counts are of what stands before: leave them at 0 for all but autoregressive")
        super().__init__(config, width)
        self.candidates = Candidates(width) if config.candidates != "none" else None
        self.ngrams = Ngrams(config.ngrams, width) if config.ngrams else None
        self.position = nn.Parameter(torch.zeros(config.window, width)) if config.positions == "learned" else None
        conditioned = config.time or config.classes > 0
        self.blocks = nn.ModuleList(Block(config, conditioned) for _ in range(config.depth))
        self.head = Linear(width, config.outputs)
        self.counts = Counts(config.counts, config.outputs, config.slots) if config.counts else None
        self.initialise()

    def initialise(self) -> None:
        """Hidden matrices with variance 1 / fan-in; everything that writes to the residual stream or out at zero."""
        # Without convolutions attention must find a token's neighbours by their positions, which it does not learn in
        # thousands of steps when tokens drown them out.
        self.start(0.5 if self.config.convolution else 0.1, None if self.ngrams is None else self.ngrams.table)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.1)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.mix.weight)
            nn.init.zeros_(block.down.weight)
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
                # Gates start at one: the branches they gate start at zero already.
                with torch.no_grad():
                    block.modulation.bias.view(6, -1)[[2, 5]] = 1.0

    def compile_blocks(self) -> None:
        """Compile the blocks: they have one shape in training, where what is before and after them has many."""
        for block in self.blocks:
            block.compile()

    @property
    def parts(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def span(self) -> int:
        """How far before its own block a position sees with attention = "block": as far as in a window of training, so
        that what lies behind it can be forgotten."""
        size = self.config.block_length
        return (-(-self.config.window // size) - 1) * size

    @property
    def blocks_at_once(self) -> int:
        """Blocks that can be read into a cache in one pass: the one just written and the next, or a window's."""
        return max(2, self.config.window // self.config.block_length)

    def empty_cache(self, rows: int) -> Cache:
        """A cache for ``rows`` texts: of up to ``window`` tokens, or by blocks of any length."""
        c = self.config

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=self.compute_dtype, device=self.head.weight.device)

        slots = c.window
        if c.attention == "block":
            # What is read at once, and what is seen before it, by attention, convolutions or n-grams.
            slots = self.blocks_at_once * c.block_length + max(self.span, c.convolution, c.ngrams)
        heads = (rows, c.heads, slots, c.width // c.heads)
        layers, shifted = range(c.depth), range(2 * c.depth if c.convolution else 0)
        return Cache(
            [zeros(*heads) for _ in layers],
            [zeros(*heads) for _ in layers],
            [zeros(rows, slots, c.width) for _ in shifted],
            torch.full((rows, slots), -1, dtype=torch.long, device=self.head.weight.device),
            torch.full((rows, slots), -1, dtype=torch.long, device=self.head.weight.device),
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        condition: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        at: Tensor | None = None,
        halves: bool = False,
        estimate: Tensor | None = None,
        candidates: Tensor | None = None,
        log_p: Tensor | None = None,
        alone: bool = False,
    ) -> Tensor:
        length = x.shape[1] // 2 if halves else x.shape[1]
        if cache is None and length > self.config.window:
            raise UserError(f"this network reads at most {self.config.window} tokens, not {length}")
        at = torch.arange(length, device=x.device) if at is None else at
        slots = None
        if self.candidates is not None and candidates is not None and log_p is not None:
            table = self.embedding.weight
            assert isinstance(table, Tensor)
            h = self.candidates(table, candidates, log_p, self.compute_dtype)
            if self.config.candidates == "slots":
                slots = self.candidates.offsets(table, candidates, log_p, h.dtype)
        else:
            h = self.read(x)
        if self.estimate is not None and estimate is not None:
            h = h + self.estimate(estimate.to(h.dtype))
        if cache is not None:
            cache.note(x, at)
        if self.ngrams is not None:
            if cache is None:
                before = preceding(x, self.config.ngrams - 1, halves, self.config.block_length)
            else:
                before = recalled(at, self.config.ngrams - 1, cache.symbols, cache.places)
            h = h + self.ngrams(x, before, h.dtype)
        if self.position is not None:
            h = h + self.position.to(h.dtype)[at.repeat(2) if halves else at]
        h, t = self.marked(h, t)
        h = F.dropout(h, self.config.dropout, self.training)
        c = self.told(x, t, condition, h.dtype)
        view = self._view(at, at if cache is None else cache.filled(), halves)
        if slots is not None:
            view = replace(view, slots=slots, log_p=log_p)
        if cache is not None and self.config.convolution:
            view = replace(view, taps=self.blocks[0].conv_attention.taps(at, cache.places))  # type: ignore[union-attr,operator]
        for layer, block in enumerate(self.blocks):
            h = block(h, c, view, cache, layer)
        out = self.answer(h, positions)
        if self.counts is None or alone:
            return out
        seen = None if cache is None else recalled(at, self.config.counts - 1, cache.symbols, cache.places)
        contexts = self.counts.contexts(x, at, seen)
        mixed: Tensor = self.counts(out, contexts if positions is None else contexts[positions])
        return mixed

    def _view(self, at: Tensor, seen: Tensor, halves: bool) -> View:
        """What positions ``at`` [n] or [B n] see of those at ``seen`` [m] or [B m], -1 being none."""
        config = self.config
        if config.attention == "bidirectional":
            return View(at, None)
        size = config.block_length if config.attention == "block" else 1
        block, other = at.unsqueeze(-1) // size, seen.unsqueeze(-2)
        hidden = (other // size > block) | (other < 0)
        if config.attention == "block":
            hidden = hidden | (other < block * size - self.span)

        def bias(hidden: Tensor) -> Tensor:
            return torch.zeros(hidden.shape, device=at.device).masked_fill(hidden, -torch.inf)

        if halves:
            own = block * size + torch.arange(size, device=at.device) > at[-1]  # past the end of the text
            return View(at, bias(torch.cat((hidden | (other // size == block), hidden))), True, bias(own))
        return View(at, bias(hidden.unsqueeze(1) if hidden.dim() == 3 else hidden))
