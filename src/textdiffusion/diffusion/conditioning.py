"""Positions that are given: what training does so that prompts and gaps are nothing new to a network.

A family whose noisy text does not itself say which positions are noise (uniform, Gaussian) is biased when given tokens
are put among noisy ones and called as noisy as they (replacement). So on a share of the examples some positions are
left without noise, and the network is told which.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from textdiffusion.mathematics.noise import Noise

Conditioning = Literal["clean", "replacement"]  # what the network is told of given positions


def random_given(rows: int, length: int, noise: Noise, share: float) -> Tensor:
    """Positions to leave without noise in training, bool [B L]: none in most rows; in a ``share`` of them a prefix, or
    positions here and there."""
    kind, much = noise.uniform("given", 2).T
    prefix = torch.arange(length, device=noise.device) < (much * length).unsqueeze(-1)
    scattered = noise.uniform("scattered", length) < much.unsqueeze(-1)
    chosen = torch.where((kind < share / 2).unsqueeze(-1), prefix, scattered)
    return chosen & (kind < share).unsqueeze(-1)


def at_least_one(coin: Tensor) -> Tensor:
    """Rows where a coin, bool [B], fell so; the first where it fell so nowhere. Which calls a loss makes must not
    depend on its draws: several processes that share a network make them together."""
    rows = coin.nonzero().squeeze(-1)
    return rows if len(rows) else rows.new_zeros(1)
