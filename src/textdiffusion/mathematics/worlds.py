"""Worlds small enough to know exactly: laws of text whose posteriors, given any evidence, can be computed.

A world answers one question, from which the ideal network of every family follows: given evidence on each position,
log q(noisy position | v) up to a constant, what is the law of each token according to the *other* positions? (The
leave-one-out posterior; the position's own evidence is added by the family.)

Shapes: B batch, L length, V vocabulary, H hidden states.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


class World(Protocol):
    """A law of texts of L tokens."""

    length: int
    vocabulary: int

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), nats, float64 [B], for texts int64 [B L]."""
        ...

    def context(self, evidence: Tensor) -> Tensor:
        """Normalised log-law [B n V] of each token given the evidence [B n V] at all other positions; of the first n
        tokens, nothing being known of those after them."""
        ...

    def draw(self, rows: int, seed: int) -> Tensor:
        """Texts int64 [rows L]."""
        ...


def _normalised(log_p: Tensor) -> Tensor:
    """Over the last dimension; where the evidence contradicts the world nothing is known, and every token is as likely
    as another."""
    impossible = log_p.amax(-1, keepdim=True) == -torch.inf
    return log_p.masked_fill(impossible, 0.0).log_softmax(-1)


class Table:
    """Any joint law, as a table over all V^L texts."""

    def __init__(self, p: Tensor):
        """p: float64 [V] * L, summing to one."""
        self.length, self.vocabulary = p.dim(), p.shape[0]
        self.p = p.flatten()
        self.log_p = self.p.log()
        self.texts = torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)))
        self.place = self.vocabulary ** torch.arange(self.length - 1, -1, -1)

    @property
    def entropy(self) -> float:
        """Nats a text."""
        return float(-torch.special.xlogy(self.p, self.p).sum())

    def index(self, x: Tensor) -> Tensor:
        """Row of each text [B L] in the table, int64 [B]."""
        return (x * self.place).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.p[self.index(x)].log()

    def context(self, evidence: Tensor) -> Tensor:
        asked = evidence.shape[1]
        evidence = pad(evidence, (0, 0, 0, self.length - asked))
        known = evidence.double().gather(2, self.texts.T.expand(len(evidence), -1, -1))  # [B L V^L]
        out = []
        for i in range(asked):
            others = known[:, [j for j in range(self.length) if j != i]].sum(1) + self.p.log()  # [B V^L]
            by_token = [others[:, self.texts[:, i] == v].logsumexp(-1) for v in range(self.vocabulary)]
            out.append(torch.stack(by_token, -1))
        return _normalised(torch.stack(out, 1))

    def draw(self, rows: int, seed: int) -> Tensor:
        index = np.random.default_rng(seed).choice(len(self.p), size=rows, p=self.p.numpy())
        return self.texts[torch.from_numpy(index)]


class HiddenMarkov:
    """A hidden Markov model of any length; posteriors by forward and backward messages."""

    def __init__(self, start: Tensor, transition: Tensor, emission: Tensor, length: int):
        """start [H], transition [H H] and emission [H V], float64, each row summing to one."""
        self.start, self.transition, self.emission = start, transition, emission
        self.length, self.vocabulary = length, emission.shape[1]

    def _messages(self, likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From p(evidence_i | h) [B L H]: the law of h_i before position i is seen, what is behind it, both [B L H] up
        to a constant, and the log-probability of all the evidence [B]."""
        rows, length, _ = likelihood.shape
        now, total = self.start.expand(rows, -1), likelihood.new_zeros(rows)
        ahead = []
        for i in range(length):
            ahead.append(now)
            seen = now * likelihood[:, i]
            mass = seen.sum(-1, keepdim=True)
            total = total + mass.squeeze(-1).log()
            now = (seen / mass.clamp(min=1e-300)) @ self.transition
        back = torch.ones_like(now)
        behind = [back]
        for i in range(length - 1, 0, -1):
            back = (back * likelihood[:, i]) @ self.transition.T
            back = back / back.sum(-1, keepdim=True).clamp(min=1e-300)
            behind.insert(0, back)
        return torch.stack(ahead, 1), torch.stack(behind, 1), total

    def log_prob(self, x: Tensor) -> Tensor:
        return self._messages(self.emission.T[x])[2]

    def context(self, evidence: Tensor) -> Tensor:
        # A constant is free at each position: take the highest off before leaving the log.
        evidence = evidence.double() - evidence.double().amax(-1, keepdim=True)
        ahead, behind, _ = self._messages(evidence.exp() @ self.emission.T)
        return _normalised(((ahead * behind) @ self.emission).log())

    def draw(self, rows: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)

        def choose(p: Tensor) -> Tensor:
            cdf = p.cumsum(-1)
            return (torch.from_numpy(rng.random(rows))[:, None] * cdf[:, -1:] >= cdf).sum(-1).clamp(max=p.shape[1] - 1)

        state = choose(self.start.expand(rows, -1))
        out = []
        for _ in range(self.length):
            out.append(choose(self.emission[state]))
            state = choose(self.transition[state])
        return torch.stack(out, 1)


def random_table(vocabulary: int = 3, length: int = 3, seed: int = 0) -> Table:
    """A random joint law, far from independent, in which every text is possible."""
    p = torch.rand([vocabulary] * length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return Table(p / p.sum())


def parity(length: int = 3) -> Table:
    """Fair bits of even sum: any position follows from all the others, and from no fewer."""
    bits = torch.tensor(list(itertools.product((0, 1), repeat=length)))
    p = (bits.sum(-1) % 2 == 0).double()
    return Table((p / p.sum()).view([2] * length))


def copy(vocabulary: int = 3, length: int = 3, seed: int = 0) -> Table:
    """A first token, and its copies."""
    p = torch.rand(vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    table = torch.zeros([vocabulary] * length, dtype=torch.float64)
    for v in range(vocabulary):
        table[(v,) * length] = p[v] / p.sum()
    return Table(table)


def uniform(vocabulary: int = 3, length: int = 3) -> Table:
    """Every text is as likely as another."""
    p = torch.ones([vocabulary] * length, dtype=torch.float64)
    return Table(p / p.sum())


def constant(vocabulary: int = 3, length: int = 3) -> Table:
    """One text, and no other."""
    p = torch.zeros([vocabulary] * length, dtype=torch.float64)
    p[(1,) * length] = 1.0
    return Table(p)


def _rows(generator: torch.Generator, *shape: int) -> Tensor:
    p = torch.rand(*shape, generator=generator, dtype=torch.float64) ** 3
    return p / p.sum(-1, keepdim=True)


def chain(vocabulary: int = 4, length: int = 8, seed: int = 0) -> HiddenMarkov:
    """A strongly dependent Markov chain that starts anywhere."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.full((vocabulary,), 1 / vocabulary, dtype=torch.float64)
    transition = _rows(generator, vocabulary, vocabulary)
    return HiddenMarkov(start, transition, torch.eye(vocabulary, dtype=torch.float64), length)


def hidden_chain(states: int = 5, vocabulary: int = 4, length: int = 64, seed: int = 0) -> HiddenMarkov:
    """A hidden Markov model as long as real windows."""
    generator = torch.Generator().manual_seed(seed)
    start, transition = _rows(generator, states), _rows(generator, states, states)
    return HiddenMarkov(start, transition, _rows(generator, states, vocabulary), length)


def chain_entropy(world: HiddenMarkov) -> float:
    """Entropy of a Markov chain whose states are seen, nats a text."""
    now, total = world.start, float(-torch.special.xlogy(world.start, world.start).sum())
    row = -torch.special.xlogy(world.transition, world.transition).sum(-1)
    for _ in range(world.length - 1):
        total += float((now * row).sum())
        now = now @ world.transition
    return total
