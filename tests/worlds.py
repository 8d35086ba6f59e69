"""Worlds small enough to enumerate, with exact posteriors, and networks that know them."""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


class World:
    """A law over all V^L strings."""

    def __init__(self, p: Tensor):
        self.p = p  # [V] * L
        self.length, self.vocabulary = p.dim(), p.shape[0]
        self.strings = torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)))
        self.log_p = p.flatten().log()

    @property
    def entropy(self) -> float:
        """Nats."""
        return float(-(self.p * self.p.clamp(min=1e-300).log()).sum())

    @cached_property
    def _posteriors(self) -> Tensor:
        """The answer for each of the (V + 1)^L partly hidden strings, [(V + 1)^L, L, V]."""
        v, n = self.vocabulary, self.length
        states = torch.tensor(list(itertools.product(range(v + 1), repeat=n)))
        agrees = ((states.unsqueeze(1) == self.strings) | (states.unsqueeze(1) == v)).all(-1)
        one_hot = torch.nn.functional.one_hot(self.strings, v).double()
        out = torch.einsum("sx,xlv->slv", agrees * self.p.flatten(), one_hot)
        return (out / out.sum(-1, keepdim=True)).log()

    def masked_posterior(self, x: Tensor) -> Tensor:
        """log p(x_i = v | shown tokens) for texts x [B L] in which V means hidden, float64 [B L V]."""
        index = (x * (self.vocabulary + 1) ** torch.arange(self.length - 1, -1, -1)).sum(-1)
        return self._posteriors[index]

    def draw(self, n: int, seed: int) -> Tensor:
        index = np.random.default_rng(seed).choice(len(self.strings), size=n, p=self.p.flatten().numpy())
        return self.strings[torch.from_numpy(index)]


def random_world(vocabulary: int = 3, length: int = 3, seed: int = 0) -> World:
    """A random joint table, far from independent."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand([vocabulary] * length, generator=generator, dtype=torch.float64) ** 3
    return World(p / p.sum())


def markov_world(vocabulary: int = 4, length: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(start law [V], transition matrix [V V]) of a random, strongly dependent chain."""
    del length  # a chain goes on as long as it is asked to
    generator = torch.Generator().manual_seed(seed)
    transition = torch.rand(vocabulary, vocabulary, generator=generator, dtype=torch.float64) ** 3
    transition /= transition.sum(-1, keepdim=True)
    start = torch.full((vocabulary,), 1 / vocabulary, dtype=torch.float64)
    return start, transition


def chain_entropy(start: Tensor, transition: Tensor, length: int) -> float:
    """Entropy of a chain of ``length`` states, nats."""
    now, total = start, float(-(start * start.log()).sum())
    row = -(transition * transition.clamp(min=1e-300).log()).sum(-1)
    for _ in range(length - 1):
        total += float((now * row).sum())
        now = now @ transition
    return total


def draw_chain(start: Tensor, transition: Tensor, length: int, n: int, seed: int) -> Tensor:
    """Texts int64 [n L] from a chain."""
    rng = np.random.default_rng(seed)
    x = np.empty((n, length), dtype=np.int64)
    x[:, 0] = rng.choice(len(start), size=n, p=start.numpy())
    cdf = transition.numpy().cumsum(-1)
    for i in range(1, length):
        x[:, i] = (rng.random(n)[:, None] > cdf[x[:, i - 1]]).sum(-1).clip(max=len(start) - 1)
    return torch.from_numpy(x)


def masked_oracle(world: World):
    """A network that answers with the exact posterior; in the calling form of every network."""

    def network(x: Tensor, condition: Tensor | None = None, positions: Tensor | None = None, **_: object) -> Tensor:
        out = world.masked_posterior(x)
        return out if positions is None else out[positions]

    return network


def causal_oracle(world: World, start: int):
    """The exact log p(x_i | x_<i), from inputs moved one to the right behind ``start``."""

    def network(x: Tensor, condition: Tensor | None = None, positions: Tensor | None = None, **_: object) -> Tensor:
        out = torch.zeros(*x.shape, world.vocabulary, dtype=torch.float64)
        for i in range(x.shape[1]):
            seen = torch.full((len(x), world.length), world.vocabulary)
            seen[:, :i] = x[:, 1 : i + 1]
            out[:, i] = world.masked_posterior(seen)[:, i]
        return out if positions is None else out[positions]

    return network


def wrong_network(vocabulary: int, length: int, seed: int):
    """A deterministic function of the noisy text that knows nothing: random logits by position and whole context."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn((vocabulary + 1) ** length, length, vocabulary, generator=generator, dtype=torch.float64)
    base = (vocabulary + 1) ** torch.arange(length)

    def network(x: Tensor, condition: Tensor | None = None, positions: Tensor | None = None, **_: object) -> Tensor:
        padded = torch.full((len(x), length), vocabulary)
        padded[:, : x.shape[1]] = x
        out = table[(padded * base).sum(-1)][:, : x.shape[1]]
        return out if positions is None else out[positions]

    return network
