"""What every network of ours has: how it reads a noisy text, what it is told, and what training and runs ask of it.

Shapes: B batch, L length, D width of what is read, S input symbols or reals, V output symbols, N asked positions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textdiffusion.networks.clock import Clock
from textdiffusion.networks.shape import TransformerConfig


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


class TextNetwork(nn.Module, ABC):
    """A network over the positions of a text: its reading, its codes and clock, and a head over ``blocks``.

    Weights are held in float32 and cast where they are used, so that activations may be bfloat16 while gradients add up
    in float32.

    Args:
        config: its shape.
        width: D.
    """

    endless: bool = False  # True: it reads texts of any length, also past the window that it was trained on
    blocks: nn.Module  # all between reading and head
    head: Linear

    def __init__(self, config: TransformerConfig, width: int):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embedding: nn.Module = nn.Embedding(config.inputs, width)
        if config.reals:
            self.embedding = Linear(config.inputs, width, bias=False)
        self.estimate = Linear(config.estimates, width, bias=False) if config.estimates else None
        self.codes = nn.Parameter(torch.randn(config.codes, config.code_width)) if config.codes else None
        self.clock = Clock(config.clock) if config.clock else None
        self.time = nn.Sequential(Linear(64, width), nn.SiLU(), Linear(width, width)) if config.time else None
        self.clean = nn.Parameter(torch.zeros(width)) if config.clean else None  # added where there is no noise
        self.classes = nn.Embedding(config.classes + 1, width) if config.classes else None

    @abstractmethod
    def compile_blocks(self) -> None:
        """Compile what has one shape in training; what is before and after it has many."""

    @property
    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """The modules that take most of the memory: each can be kept in shards of its own, and computed again."""

    def recompute(self) -> None:
        """From now on compute the activations inside the parts again in the backward pass, where they are not kept."""
        for part in self.parts:
            # Inside of what is called, so that a sharded part is whole when it is computed again.
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)

    def start(self, embedding: float, skip: nn.Module | None = None) -> None:
        """Hidden matrices with variance 1 / fan-in, tables (but for ``skip``) with deviation ``embedding``, the head at
        zero: an untaught network says nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding) and module is not skip:
                nn.init.normal_(module.weight, std=embedding)
        for read in (self.embedding, self.estimate):
            if isinstance(read, Linear):
                nn.init.normal_(read.weight, std=0.5)  # as a table's: what comes in is about of unit norm

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The 2-D weights inside the blocks: what Muon is for."""
        return [p for name, p in self.blocks.named_parameters() if p.dim() == 2 and "conv" not in name]

    def hold(self, dtype: torch.dtype) -> Self:
        """Keep the weights in ``dtype`` and compute in it: for sampling, which then casts nothing in a call."""
        self.compute_dtype = dtype
        # The clock is no weight: what a noise level is does not depend on the precision.
        clock, self.clock = self.clock, None
        self.to(dtype)
        self.clock = clock
        return self

    @property
    def symbols_a_token(self) -> int:
        """Symbols read in training for each token of a text."""
        return 2 if self.config.attention == "block" else 1

    @property
    def products(self) -> float:
        """Weights that a position is multiplied by: all but tables, which are looked up. Attention comes on top."""
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return sum(p.numel() for p in self.parameters()) - tables

    def read(self, x: Tensor) -> Tensor:
        """Symbols int64 [B L], or reals [B L S], as vectors [B L D]."""
        if isinstance(self.embedding, Linear):
            return self.embedding(x.to(self.compute_dtype))
        table = self.embedding.weight
        assert isinstance(table, Tensor)
        # Cast after the choice of rows: in bfloat16 the gradients of a symbol's many places would not add up.
        return F.embedding(x, table).to(self.compute_dtype)

    def marked(self, h: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """h [B L D] with positions marked that have no noise, and the time of each row [B], from times [B] or [B L]."""
        if t is None or t.dim() < 2:
            return h, t
        if self.clean is not None:
            h = h + (t == 0).unsqueeze(-1).to(h.dtype) * self.clean.to(h.dtype)
        return h, t.amax(-1)

    def told(self, rows: Tensor, t: Tensor | None, condition: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What modulates every block, [B D], or None; ``rows`` is any tensor of B rows."""
        c = None
        if self.time is not None:
            if t is None:
                raise ValueError("this network is conditioned on time: pass t, [B] or [B L]")
            frequency = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=rows.device))
            angle = t.float().unsqueeze(-1) * frequency
            c = self.time(torch.cat((angle.sin(), angle.cos()), -1).to(dtype))
        if self.classes is not None:
            label = torch.full((len(rows),), -1, device=rows.device) if condition is None else condition
            embedded = self.classes(label + 1).to(dtype)
            c = embedded if c is None else c + embedded
        return None if c is None else F.silu(c)

    def answer(self, h: Tensor, positions: Tensor | None) -> Tensor:
        """Outputs of vectors h [B L D]: [B L V], or [N V] for the asked positions (bool [B L])."""
        if positions is not None:
            # The gradient of an index_select is cheaper than that of a mask.
            h = h.flatten(0, 1).index_select(0, positions.flatten().nonzero().squeeze(-1))
        out: Tensor = self.head(normalise(h))
        return out
