"""One transformer for every family: bidirectional, causal or block-causal; with or without time and classes.

Shapes: B batch, L length, W window (longest length), D width, H heads, S input symbols, V output symbols, N asked
positions. It departs from the usual DiT of diffusion language models (SEDD, MDLM) where that paid on a
CPU, in bits (docs/results.md) or in time (benchmarks/kernels.py):

- a short depthwise convolution before attention and before the feed-forward part, so that spelling need not be
  learnt by attention; it starts as the identity;
- learned positions, erf GELU and layer norm, which are the cheap ones on a CPU;
- no time input unless asked for: a masked text says by itself how noisy it is (RADD, 2406.03736);
- weights are held in float32 and cast where they are used, so that activations may be bfloat16 while gradients
  add up in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textdiffusion.errors import UserError

Attention = Literal["bidirectional", "causal", "block"]


@dataclass
class TransformerConfig:
    """Shape of a transformer.

    ``inputs`` S, ``outputs`` V and ``attention`` are set by the family; the rest is free.
    """

    inputs: int
    outputs: int
    window: int = 64  # longest text, in tokens
    depth: int = 4
    width: int = 256
    heads: int = 4
    attention: Attention = "bidirectional"
    block_length: int = 1  # for attention = "block"
    positions: Literal["learned", "rotary"] = "learned"
    convolution: int = 5  # taps of the depthwise convolutions; 0 leaves them out
    expansion: float = 4.0  # width of the feed-forward part over the width
    dropout: float = 0.0
    bias: bool = False
    time: bool = False  # condition on t in [0, 1]
    clean: bool = False  # with time: positions at t = 0 among noisy ones are marked
    classes: int = 0  # number of class labels; one more is kept for "no label"

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "window", "depth", "width", "heads", "block_length"):
            if not 1 <= getattr(self, name) <= 10**7:
                raise UserError(f"network.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1 or not 0 < self.expansion <= 64 or self.classes < 0:
            raise UserError(
                "network.dropout must be in [0, 1), network.expansion in (0, 64], network.classes 0 or more"
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise UserError("rotary positions need an even network.width / network.heads")
        if self.width % self.heads:
            raise UserError(f"network.width {self.width} is no multiple of network.heads {self.heads}; change one")
        if self.convolution < 0 or (
            self.attention == "bidirectional" and self.convolution and not self.convolution % 2
        ):
            raise UserError(f"network.convolution must be 0 or an odd number of taps, not {self.convolution}")


class Linear(nn.Linear):
    """A linear map whose weights are cast to the type of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def normalise(x: Tensor) -> Tensor:
    """Layer norm without a gain: what follows it, a convolution or a linear map, scales every channel itself.

    In bfloat16 the library's gradient of a gain is off by a tenth at thousands of rows.
    """
    return F.layer_norm(x, x.shape[-1:], None, None, 1e-5)


@dataclass
class Cache:
    """What a causal network remembers of the positions it has seen: keys, values and convolution inputs, by layer.

    Every tensor has B in front, so that rows can be selected.
    """

    keys: list[Tensor]  # [B H W D/H]
    values: list[Tensor]  # [B H W D/H]
    shifted: list[Tensor]  # [B W D], two a layer

    def select(self, rows: Tensor) -> Cache:
        return Cache(*([x[rows] for x in part] for part in (self.keys, self.values, self.shifted)))


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


class Convolution(nn.Module):
    """Depthwise convolution over positions; centred, or looking back only if ``causal``. Starts as the identity."""

    def __init__(self, width: int, taps: int, causal: bool):
        super().__init__()
        self.left = taps - 1 if causal else taps // 2
        self.weight = nn.Parameter(torch.zeros(taps, width))
        nn.init.ones_(self.weight[self.left])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Depthwise.apply(x, self.weight.to(x.dtype), self.left))

    def step(self, x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """The same for new positions [B n] of a text whose earlier inputs are in ``seen`` [B W D], written in place."""
        seen.scatter_(1, positions.unsqueeze(-1).expand_as(x), x)
        weight = self.weight.to(x.dtype)
        y = torch.zeros_like(x)
        for tap in range(len(weight)):
            source = positions - self.left + tap
            value = seen.gather(1, source.clamp(min=0).unsqueeze(-1).expand_as(x))
            y = y + value * (source >= 0).unsqueeze(-1).to(x.dtype) * weight[tap]
        return y


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention; q [B H n d], k and v [B H m d], bias [n m] or [B 1 n m] added to the logits.

    In bfloat16 on a CPU the fused kernel is slower than three plain operations (benchmarks/kernels.py).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        return logits.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position code (2104.09864) on x [B H n d] at integer positions [n] or [B n]."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions.unsqueeze(-1).float() * frequency
    if positions.dim() == 2:
        angle = angle.unsqueeze(1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    """Pre-norm attention and feed-forward part."""

    def __init__(self, config: TransformerConfig, conditioned: bool):
        super().__init__()
        self.config = config
        width, hidden = config.width, int(config.width * config.expansion)
        causal = config.attention != "bidirectional"
        self.qkv = Linear(width, 3 * width, bias=config.bias)
        self.mix = Linear(width, width, bias=config.bias)
        self.up = Linear(width, hidden, bias=config.bias)
        self.down = Linear(hidden, width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        taps = config.convolution
        self.conv_attention = Convolution(width, taps, causal) if taps else None
        self.conv_feed = Convolution(width, taps, causal) if taps else None
        self.modulation = Linear(width, 6 * width) if conditioned else None

    def _attention(
        self, h: Tensor, bias: Tensor | None, positions: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        rows, length, width = h.shape
        q, k, v = self.qkv(h).view(rows, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        if self.config.positions == "rotary":
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            index = positions[:, None, :, None].expand_as(k)
            k, v = cache[0].scatter_(2, index, k), cache[1].scatter_(2, index, v)
        return self.mix(attend(q, k, v, bias).transpose(1, 2).reshape(rows, length, width))

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        positions: Tensor,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        modulation = None
        if self.modulation is not None and c is not None:
            modulation = self.modulation(c).unsqueeze(1).chunk(6, -1)
        past = None if cache is None else (cache.keys[layer], cache.values[layer])
        for part, convolution in enumerate((self.conv_attention, self.conv_feed)):
            h = normalise(x)
            if modulation is not None:
                shift, scale, gate = modulation[3 * part : 3 * part + 3]
                h = h * (1 + scale) + shift
            if convolution is not None:
                h = convolution(h) if cache is None else convolution.step(h, positions, cache.shifted[2 * layer + part])
            h = self._attention(h, bias, positions, past) if part == 0 else self.down(F.gelu(self.up(h)))
            h = self.dropout(h)
            x = x + h if modulation is None else x + gate * h
        return x


class Transformer(nn.Module):
    """Symbols in, context outputs out.

    ``forward(x, t=None, condition=None, positions=None, cache=None, at=None)``:
        x: symbols, int64 [B L].
        t: times in [0, 1], [B]; or [B L], each position standing at its row's time or, without noise, at 0. Needed if
            and only if ``config.time``.
        condition: class labels, int64 [B], -1 for none; optional if ``config.classes``.
        positions: bool [B L]; outputs are computed for these positions only.
        cache, at: for causal networks: a cache to read and write, and the positions int64 [B L] that x stands at.
    Returns outputs [B L V], or [N V] for the N asked positions in row-major order, in the compute type.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        width = config.width
        self.embedding = nn.Embedding(config.inputs, width)
        self.position = nn.Parameter(torch.zeros(config.window, width)) if config.positions == "learned" else None
        conditioned = config.time or config.classes > 0
        self.time = nn.Sequential(Linear(64, width), nn.SiLU(), Linear(width, width)) if config.time else None
        self.clean = nn.Parameter(torch.zeros(width)) if config.clean else None  # added where there is no noise
        self.classes = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.blocks = nn.ModuleList(Block(config, conditioned) for _ in range(config.depth))
        self.head = Linear(width, config.outputs)
        self.initialise()

    def initialise(self) -> None:
        """Hidden matrices with variance 1 / fan-in; everything that writes to the residual stream or out at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                # Without convolutions attention must find a token's neighbours by their positions, which it does not
                # learn in thousands of steps when tokens drown them out.
                nn.init.normal_(module.weight, std=0.5 if self.config.convolution else 0.1)
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

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The 2-D weights inside the blocks: what Muon is for."""
        return [p for name, p in self.blocks.named_parameters() if p.dim() == 2 and "conv" not in name]

    def compile_blocks(self) -> None:
        """Compile the blocks: they have one shape in training, where what is before and after them has many."""
        for block in self.blocks:
            block.compile()

    def hold(self, dtype: torch.dtype) -> Transformer:
        """Keep the weights in ``dtype`` and compute in it: for sampling, which then casts nothing in a call."""
        self.compute_dtype = dtype
        return self.to(dtype)

    def empty_cache(self, rows: int) -> Cache:
        """A cache for ``rows`` texts of up to ``window`` tokens."""
        c = self.config

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=self.compute_dtype, device=self.head.weight.device)

        heads = (rows, c.heads, c.window, c.width // c.heads)
        layers, shifted = range(c.depth), range(2 * c.depth if c.convolution else 0)
        return Cache(
            [zeros(*heads) for _ in layers],
            [zeros(*heads) for _ in layers],
            [zeros(rows, c.window, c.width) for _ in shifted],
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        condition: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        length = x.shape[1]
        if cache is None and length > self.config.window:
            raise UserError(f"this network reads at most {self.config.window} tokens, not {length}")
        at = torch.arange(length, device=x.device) if at is None else at
        # Cast after the choice of rows: in bfloat16 the gradients of a symbol's many places would not add up.
        h = F.embedding(x, self.embedding.weight).to(self.compute_dtype)
        if self.position is not None:
            h = h + self.position.to(h.dtype)[at]
        if t is not None and t.dim() == 2:
            if self.clean is not None:
                h = h + (t == 0).unsqueeze(-1).to(h.dtype) * self.clean.to(h.dtype)
            t = t.amax(-1)
        h = F.dropout(h, self.config.dropout, self.training)
        c = self._condition(x, t, condition, h.dtype)
        # With a cache all its positions can be seen; those not written yet are hidden by the causal mask.
        seen = at if cache is None else torch.arange(self.config.window, device=x.device)
        bias = self._mask(at, seen)
        for layer, block in enumerate(self.blocks):
            h = block(h, c, bias, at, cache, layer)
        if positions is not None:
            # The gradient of an index_select is cheaper than that of a mask.
            h = h.flatten(0, 1).index_select(0, positions.flatten().nonzero().squeeze(-1))
        return self.head(normalise(h))

    def _condition(self, x: Tensor, t: Tensor | None, condition: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What modulates every block, [B D], or None."""
        c = None
        if self.time is not None:
            if t is None:
                raise ValueError("this network is conditioned on time: pass t, [B] or [B L]")
            frequency = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=x.device))
            angle = t.float().unsqueeze(-1) * frequency
            c = self.time(torch.cat((angle.sin(), angle.cos()), -1).to(dtype))
        if self.classes is not None:
            label = x.new_full((len(x),), -1) if condition is None else condition
            embedded = self.classes(label + 1).to(dtype)
            c = embedded if c is None else c + embedded
        return None if c is None else F.silu(c)

    def _mask(self, at: Tensor, seen: Tensor) -> Tensor | None:
        """Who sees whom, as 0 or -inf: [n m] for positions [n] and [m], [B 1 n m] for positions [B n]."""
        if self.config.attention == "bidirectional":
            return None
        block = self.config.block_length if self.config.attention == "block" else 1
        hidden = seen // block > (at // block).unsqueeze(-1)
        mask = torch.zeros(hidden.shape, device=at.device).masked_fill(hidden, -torch.inf)
        return mask.unsqueeze(1) if mask.dim() == 3 else mask
