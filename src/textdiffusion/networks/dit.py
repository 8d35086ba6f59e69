"""The diffusion transformer of published checkpoints: SEDD (2310.16834), MDLM (2406.07524), BD3-LM (2503.09573), ddlm.

Shapes: B batch, L length, W window (longest length), D width, C width of the condition, S input symbols, V output
symbols, N asked positions. Names of weights are those of the first three, which differ by a prefix; ddlm's are renamed
(checkpoints.py). Blocks of pre-norm attention and feed-forward part, modulated by the noise level sigma (adaLN):

    c = silu(mlp(cos, sin of sigma));  (shift, scale, gate) of both parts = linear(c)
    x = x + gate * part((1 + scale) * norm(x) + shift)

What is published with a condition but trained without one (MDLM) reads sigma = 0 always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textdiffusion.errors import UserError
from textdiffusion.networks.attention import attend, rotate
from textdiffusion.networks.network import Linear

FREQUENCIES = 256  # numbers that say sigma to the network, half of them cosines


@dataclass
class DiTConfig:
    """Shape of a published diffusion transformer."""

    inputs: int
    outputs: int
    window: int = 1024
    depth: int = 12
    width: int = 768
    heads: int = 12
    condition: int = 128  # C; 0: no condition at all (BD3-LM with adaln off)
    noise: Literal["none", "loglinear", "geometric"] = "none"  # none: sigma is always 0
    sigma_min: float = 1e-3  # the least noise it was told of in training; of geometric noise, also its parameter
    sigma_max: float = 6.907755278982137  # the most; of loglinear noise with eps = 1e-3, -log eps
    attention: Literal["bidirectional", "block"] = "bidirectional"
    block_length: int = 8  # for attention = "block"
    positions: Literal["rotary", "learned"] = "rotary"
    gelu: Literal["tanh", "none"] = "tanh"  # approximation of GELU
    bias: bool = False  # of norms and attention
    feed_bias: bool = True  # of the feed-forward part
    last_norm: bool = False  # one more norm before the head's own
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "window", "depth", "width", "heads", "block_length"):
            if not 1 <= getattr(self, name) <= 10**7:
                raise UserError(f"network.{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads or (self.positions == "rotary" and self.width // self.heads % 2):
            raise UserError(f"network.width {self.width} must be an even multiple of network.heads {self.heads}")
        if not (0 < self.sigma_min < self.sigma_max and 0 <= self.dropout < 1 and self.condition >= 0):
            raise UserError("network.sigma_min must be below network.sigma_max, network.dropout in [0, 1)")


class Norm(nn.LayerNorm):
    """Layer norm, in float32, that gives back the type it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """(1 + scale) x + shift, [B L D] with [B 1 D]; x itself where there is no condition."""
    return x if shift is None or scale is None else x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention and feed-forward part."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.heads, self.rotary = config.heads, config.positions == "rotary"
        self.norm1 = Norm(width, bias=config.bias)
        self.attn_qkv = Linear(width, 3 * width, bias=config.bias)
        self.attn_out = Linear(width, width, bias=config.bias)
        self.norm2 = Norm(width, bias=config.bias)
        self.mlp = nn.Sequential(
            Linear(width, 4 * width, bias=config.feed_bias),
            nn.GELU(approximate=config.gelu),
            Linear(4 * width, width, bias=config.feed_bias),
        )
        self.dropout = nn.Dropout(config.dropout)
        self.adaLN_modulation = Linear(config.condition, 6 * width) if config.condition else None

    def forward(self, x: Tensor, c: Tensor | None, at: Tensor, bias: Tensor | None) -> Tensor:
        parts: list[Tensor | None] = [None] * 6
        if self.adaLN_modulation is not None and c is not None:
            parts = list(self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1))
        rows, length, width = x.shape
        h = modulated(self.norm1(x), parts[0], parts[1])
        q, k, v = self.attn_qkv(h).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = rotate(q, at), rotate(k, at)
        h = self.dropout(self.attn_out(attend(q, k, v, bias).transpose(1, 2).reshape(rows, length, width)))
        x = x + (h if parts[2] is None else parts[2] * h)
        h = self.dropout(self.mlp(modulated(self.norm2(x), parts[3], parts[4])))
        return x + (h if parts[5] is None else parts[5] * h)


class Table(nn.Module):
    """Embeddings, under the name that they have in the files."""

    def __init__(self, symbols: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(symbols, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))


class Level(nn.Module):
    """The noise level sigma [B] as a condition [B C]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=sigma.device))
        angle = sigma.float().unsqueeze(-1) * frequency
        return F.silu(self.mlp(torch.cat((angle.cos(), angle.sin()), -1)))


class Output(nn.Module):
    """The last norm, modulated, and the head."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = Norm(config.width, bias=config.bias)
        self.linear = Linear(config.width, config.inputs)
        self.adaLN_modulation = Linear(config.condition, 2 * config.width) if config.condition else None

    def modulation(self, c: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.adaLN_modulation is None or c is None:
            return None, None
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, -1)
        return shift, scale


class DiT(nn.Module):
    """Symbols in, outputs out; the head's output for the masked symbol, which nothing uses, is left off.

    ``forward(x, t=None, condition=None, positions=None, halves=False)``:
        x: symbols, int64 [B L]. t: times in [0, 1], [B] or [B L], of which the latest counts; needed if and only if
            ``config.noise`` is not "none". condition: class labels, of which these networks know none.
        positions: bool [B L]; outputs are computed for these positions only.
        halves: for attention = "block": x is a noisy text and the clean one behind it, [B 2L].
    Returns outputs [B L V], or [N V] for the N asked positions in row-major order.

    Raises:
        UserError: a text longer than the window.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.vocab_embed = Table(config.inputs, config.width)
        self.position = nn.Embedding(config.window, config.width) if config.positions == "learned" else None
        self.sigma_map = Level(config.condition) if config.condition else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.last_norm = Norm(config.width, bias=config.bias) if config.last_norm else None
        self.output_layer = Output(config)

    # -- what training asks of a network --------------------------------------------------------------------------
    def hidden_matrices(self) -> list[nn.Parameter]:
        """None: weights that have been taught by AdamW are taught on by it."""
        return []

    def compile_blocks(self) -> None:
        """Compile the blocks."""
        for block in self.blocks:
            block.compile()

    @property
    def products(self) -> float:
        """Weights that a position is multiplied by: all but tables, which are looked up. Attention comes on top."""
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return float(sum(p.numel() for p in self.parameters()) - tables)

    @property
    def symbols_a_token(self) -> int:
        """Symbols read in training for each token of a text."""
        return 2 if self.config.attention == "block" else 1

    # -- forward --------------------------------------------------------------------------------------------------
    def sigma(self, t: Tensor) -> Tensor:
        """Noise told to the network at times t [B]: -log alpha(t), within what it knows."""
        config, t = self.config, t.double()
        if config.noise == "geometric":
            noise = config.sigma_min * torch.expm1(math.log(config.sigma_max / config.sigma_min) * t)
        else:
            noise = -torch.log1p(-t)
        return noise.clamp(config.sigma_min, config.sigma_max)

    def _condition(self, x: Tensor, t: Tensor | None) -> Tensor | None:
        if self.sigma_map is None:
            return None
        sigma = torch.zeros(len(x), device=x.device)
        if self.config.noise != "none":
            if t is None:
                raise ValueError("this network is conditioned on time: pass t, [B] or [B L]")
            sigma = self.sigma(t if t.dim() == 1 else t.amax(-1))
        return self.sigma_map(sigma).to(self.compute_dtype)

    def _seen(self, length: int, halves: bool, device: torch.device) -> Tensor | None:
        """What is added to the logits of attention: nothing, or -inf where a position is not seen, [n n]."""
        if self.config.attention == "bidirectional":
            return None
        block = torch.arange(length, device=device) // self.config.block_length
        own, before = block.unsqueeze(-1) == block, block.unsqueeze(-1) > block
        seen = own | before
        if halves:
            seen = torch.cat((torch.cat((own, before), 1), torch.cat((torch.zeros_like(own), seen), 1)))
        return torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        condition: Tensor | None = None,
        positions: Tensor | None = None,
        halves: bool = False,
    ) -> Tensor:
        del condition
        length = x.shape[1] // 2 if halves else x.shape[1]
        if length > self.config.window:
            raise UserError(f"this network reads at most {self.config.window} tokens, not {length}")
        c = self._condition(x, t)
        at = torch.arange(length, device=x.device)
        at = at.repeat(2) if halves else at
        h = F.embedding(x, self.vocab_embed.embedding).to(self.compute_dtype)
        if self.position is not None:
            h = h + self.position(at).to(h.dtype)
        bias = self._seen(length, halves, x.device)
        for block in self.blocks:
            h = block(h, c, at, bias)
        if self.last_norm is not None:
            h = self.last_norm(h)
        shift, scale = self.output_layer.modulation(c)
        h = modulated(self.output_layer.norm_final(h), shift, scale)
        if positions is not None:
            h = h[positions]
        head, outputs = self.output_layer.linear, self.config.outputs
        assert head.bias is not None
        return F.linear(h, head.weight[:outputs].to(h.dtype), head.bias[:outputs].to(h.dtype))
