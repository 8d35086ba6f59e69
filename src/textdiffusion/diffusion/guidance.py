"""Labels told to a network, and classifier-free guidance of what it says (2207.12598; for tokens 2412.10193).

A network that learnt with labels, and without them on a share of the examples, says two laws of each token: c(v), given
the label, and u(v), given none. Guided by weight w, the law of each token is

    g(v) = c(v)^(1 + w) u(v)^(-w) / Z,

normalised token by token. w = 0 is the law given the label, w = -1 the one without it. What is guided is what all
*other* positions say of a token, before the position's own evidence is added; where noise replaces tokens or is
Gaussian that is the same as to guide the denoiser p(x_0 | x_t), since the evidence is in both laws and comes out once:
(c e)^(1 + w) (u e)^(-w) = c^(1 + w) u^(-w) e.

Z must not be left in: where rates are free (score entropy) it would be taken for the rate of reveals, so that tokens
come out too early (2507.08965). So the outputs keep the sum of exponentials that they have given the label.

What comes out is no law of texts that can be written down: the product of guided laws of single tokens is not
p(x | label)^(1 + w) p(x)^(-w), but for texts of one token. tests/test_guidance.py has the law that it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.process import Network, Process

MOST = 100.0  # weights above are a slip of the finger


@runtime_checkable
class HasGuidance(Protocol):
    """A process whose network's outputs are no logits of tokens, and which says how they are guided."""

    def guided(self, labelled: Tensor, bare: Tensor, weight: Tensor, x: Tensor, t: Tensor | None) -> Tensor:
        """Outputs [N ...] from those with and without a label, weights [N 1], and what the network was told of the N
        positions: x [N] or [N W], times [N] or None."""
        ...


@dataclass(frozen=True)
class Guidance:
    """How much, and when.

    weight: w, from -1 (no label at all) up. ramp: the share of the run, at its noisy end, over which the weight rises
    from 0: strong guidance of what is nothing but noise drives all texts of a label the same way.
    """

    weight: float
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.weight <= MOST:
            raise UserError(f"--guidance must be from -1 (no label) to {MOST:g}, not {self.weight:g}")
        if not 0 <= self.ramp <= 1:
            raise UserError(f"--ramp must be from 0 to 1, not {self.ramp:g}")

    def at(self, t: Tensor) -> Tensor:
        """Weights [B] at times t [B]."""
        if self.ramp == 0:
            return torch.full_like(t, self.weight)
        return self.weight * ((1 - t) / self.ramp).clamp(max=1.0)


def told(process: Process, labels: Tensor, guidance: Guidance | None = None, t: Tensor | None = None) -> Process:
    """The same process around its network, told the labels int64 [B] of its rows (-1 for none); with ``guidance``,
    guided as at times t [B], which takes two calls for one."""
    if guidance is None or guidance.weight == 0 or t is None:
        return process.over(Labelled(process.network, labels))
    return process.over(Guided(process, labels, guidance.at(t)))


def guided_law(labelled: Tensor, bare: Tensor, weight: Tensor) -> Tensor:
    """Logits of c^(1 + w) u^(-w) from logits [... V] and weights that broadcast; their sum of exponentials is that of
    the labelled ones."""
    wide = torch.promote_types(labelled.dtype, torch.float32)
    labelled, bare, weight = labelled.to(wide), bare.to(wide), weight.to(wide)
    impossible = labelled == -torch.inf
    both = (1 + weight) * labelled.masked_fill(impossible, 0.0) - weight * bare.masked_fill(impossible, 0.0)
    both = both.masked_fill(impossible, -torch.inf)
    # Not at all labelled, -1, nothing is lost where the label leaves no chance.
    both = torch.where(weight == -1, bare, both)
    return both + (labelled.logsumexp(-1, keepdim=True) - both.logsumexp(-1, keepdim=True))


@final
class Labelled:
    """A network that is told the labels [B] of its rows; all else it hands on."""

    def __init__(self, network: Network, labels: Tensor):
        self.network, self.labels = network, labels

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.network(x, *args, **kwargs | {"condition": self.labels})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


@dataclass(frozen=True)
class _Both:
    """A cache for each of the two calls."""

    labelled: Any
    bare: Any

    def select(self, rows: Tensor) -> _Both:
        return _Both(self.labelled.select(rows), self.bare.select(rows))


@final
class Guided:
    """A network that is called with labels [B] and without, and says what follows by weights [B]."""

    def __init__(self, process: Process, labels: Tensor, weight: Tensor):
        self.process, self.network, self.labels, self.weight = process, process.network, labels, weight

    def __call__(
        self, x: Tensor, t: Tensor | None = None, *, positions: Tensor | None = None, cache: Any = None, **more: Any
    ) -> Tensor:
        said = []
        for side, labels in (("labelled", self.labels), ("bare", None)):
            kept = {} if cache is None else {"cache": getattr(cache, side)}
            said.append(self.network(x, t, **more | kept | {"condition": labels, "positions": positions}))
        labelled, bare = said
        weight = self.weight.view(-1, *[1] * (labelled.dim() - 1))
        if positions is not None:
            row = positions.nonzero()[:, 0]
            weight = self.weight[row].unsqueeze(-1)
        if not isinstance(self.process, HasGuidance):
            return guided_law(labelled, bare, weight)
        if positions is None:
            positions = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            shape, weight = labelled.shape, weight.expand(*x.shape[:2], 1)[positions]
            labelled, bare = labelled.flatten(0, 1), bare.flatten(0, 1)
            return self.process.guided(labelled, bare, weight, x[positions], _times(t, positions)).view(shape)
        return self.process.guided(labelled, bare, weight, x[positions], _times(t, positions))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.network, name)
        return found if name != "empty_cache" else lambda rows: _Both(found(rows), found(rows))


def _times(t: Tensor | None, positions: Tensor) -> Tensor | None:
    """Times [N] of positions, bool [B L], from times [B] or [B L]."""
    if t is None:
        return None
    return t[positions] if t.dim() == 2 else t[positions.nonzero()[:, 0]]
