"""Plain re-statements of what public repositories of text diffusion do, to be timed against: nothing here is tuned.

One transformer as most of them have it (rotary positions, tanh GELU, fused attention, a head over all positions), a
masked and a left-to-right training step with AdamW and an average of the weights (MDLM 2406.07524; nanoGPT), and the
ancestral sampler that draws by Gumbel noise at every position (MDLM). Time conditioning by modulated norms, which MDLM
and SEDD add on top, is left out: with equal parameters the rival is the faster for it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward part."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.mix(h.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class PlainTransformer(nn.Module):
    """Symbols [B L] to logits [B L V] at every position."""

    def __init__(self, inputs: int, outputs: int, depth: int, width: int, heads: int, length: int, causal: bool):
        super().__init__()
        self.embedding = nn.Embedding(inputs, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, causal) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, outputs)
        half = width // heads // 2
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def hidden(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h, self.cos[: x.shape[1]], self.sin[: x.shape[1]])
        return self.norm(h)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))  # type: ignore[no-any-return]


class PlainTraining:
    """A training step as it is usually written: whole batch at once, loss over all positions."""

    def __init__(self, network: PlainTransformer, vocabulary: int, causal: bool, half: bool):
        self.network, self.vocabulary, self.causal, self.half = network, vocabulary, causal, half
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        self.average = [p.detach().clone() for p in network.parameters()]

    def precision(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext()

    def step(self, x_0: Tensor) -> None:
        with self.precision():
            if self.causal:
                loss = F.cross_entropy(self.network(x_0).flatten(0, 1), x_0.roll(-1, 1).flatten())
            else:
                t = torch.rand(len(x_0), 1)
                hidden = torch.rand(x_0.shape) < t
                log_p = self.network(torch.where(hidden, self.vocabulary, x_0)).log_softmax(-1)
                nats = -log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1)
                loss = (nats * hidden / t).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for kept, p in zip(self.average, self.network.parameters(), strict=True):
                kept.lerp_(p, 1e-4)


@torch.no_grad()
def plain_sample(network: PlainTransformer, rows: int, length: int, calls: int, vocabulary: int, half: bool) -> Tensor:
    """Ancestral sampling of the masked family, every position drawn anew in every call by Gumbel noise."""
    x = torch.full((rows, length), vocabulary)
    for k in range(calls):
        t, s = 1 - k / calls, 1 - (k + 1) / calls
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            p = network(x).log_softmax(-1).exp()
        law = torch.cat((p * (t - s), torch.full_like(p[..., :1], s)), -1)
        drawn = (law / (1e-10 - (torch.rand_like(law) + 1e-10).log())).argmax(-1)
        x = torch.where(x == vocabulary, drawn, x)
    return x


@torch.no_grad()
def plain_generate(network: PlainTransformer, rows: int, length: int, half: bool) -> Tensor:
    """Left to right without a cache, the head at the last position alone (nanoGPT)."""
    x = torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(length - 1):
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            p = network.head(network.hidden(x)[:, -1]).softmax(-1)
        x = torch.cat((x, torch.multinomial(p.float(), 1)), 1)
    return x
