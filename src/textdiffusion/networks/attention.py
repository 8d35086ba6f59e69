"""Attention: who sees whom, the products themselves, and the code of positions by rotation.

Shapes: B batch, H heads, n queries, m keys, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from textdiffusion.networks.convolution import Taps


@dataclass(frozen=True)
class View:
    """Who sees whom in a pass of the network.

    at: positions, int64 [n] or [B n]. bias: 0 or -inf, [n m] or [B 1 n m], or None where all see all; with ``halves``
    [2n n], what both halves see of the clean one. own: with ``halves``, what a noisy position sees of its own block,
    [n block]. slots, log_p: what the slots of the positions add to them [B m K D], and their log-probabilities [B m K].
    taps: with a cache, where convolutions find their inputs in it.
    """

    at: Tensor
    bias: Tensor | None
    halves: bool = False
    own: Tensor | None = None
    slots: Tensor | None = None
    log_p: Tensor | None = None
    taps: Taps | None = None


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


def attend_halves(q: Tensor, k: Tensor, v: Tensor, view: View, block: int) -> Tensor:
    """Attention over a noisy text and the clean one behind it, [B H 2n d]: of the noisy half a position sees its own
    block and no more, so the logits are [2n n] and [n block], not [2n 2n]."""
    assert view.bias is not None and view.own is not None
    n = k.shape[2] // 2
    q = q * q.shape[-1] ** -0.5

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -n % block)).unflatten(2, (-1, block))

    def text(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, :n]

    to_clean = q @ k[:, :, n:].transpose(-1, -2) + view.bias.to(q.dtype)
    to_own = text(blocks(q[:, :, :n]) @ blocks(k[:, :, :n]).transpose(-1, -2)) + view.own.to(q.dtype)
    noisy = torch.cat((to_clean[:, :, :n], to_own), -1).softmax(-1)
    seen = torch.cat((noisy[..., :n], to_clean[:, :, n:].softmax(-1)), 2) @ v[:, :, n:]
    own = text(blocks(noisy[..., n:]) @ blocks(v[:, :, :n]))
    return torch.cat((seen[:, :, :n] + own, seen[:, :, n:]), 2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position code (2104.09864) on x [B H n d] at integer positions [n] or [B n]."""
    half = x.shape[-1] // 2
    # In float64: at a position of a million an angle of float32 is off by a thirtieth of a radian.
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions.unsqueeze(-1) * frequency
    if positions.dim() == 2:
        angle = angle.unsqueeze(1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
