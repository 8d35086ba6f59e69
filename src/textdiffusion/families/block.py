"""Block diffusion (BD3-LM, 2503.09573): blocks from left to right, masked diffusion within each.

q           Within its block a token is replaced by [MASK] as in masked diffusion; of what lies behind its block, the
            future, nothing is seen. As a noise process over the whole text it hides the blocks from the last to the
            first, each in its own share of the time.
network     Block-causal. In training it reads the noisy text and the clean one behind it, 2L symbols in one pass: a
            noisy position sees its own block and the clean blocks before it. No time input.
loss        As in masked diffusion (families/masked.py), a number of hidden tokens for each block.
bound       -log p(x) <= sum over blocks b of sum_{n=1..block} curve_b(n), the expected cross-entropy of a hidden token
            of block b when n random ones of it are hidden. With blocks of one token it is exact: the chain rule.
sampling    Block by block; what is written is read once more, without noise, into a cache, together with the first
            call for the block after it. Attention goes back no further than in a window of training, there as here, so
            the cache is exact and texts may be of any length.
departs from the paper in: counts instead of Bernoulli masks, bell-shaped mask rates instead of clipped ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textdiffusion.diffusion.absorbing import (
    Hiding,
    carry_over,
    check_training,
    count_weights,
    hidden_evidence,
    mask_rates,
)
from textdiffusion.diffusion.unmasking import counted_steps
from textdiffusion.errors import UserError
from textdiffusion.mathematics.cross_entropy import token_nats
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import SCHEDULES
from textdiffusion.process import Context, Network, Nll, Prediction, State, as_network


@dataclass
class BlockConfig:
    """Fields of the block family."""

    block_length: int = 8  # tokens; 1 is left to right, the whole window masked diffusion
    mask_rate: Literal["uniform", "bell"] = "bell"  # in training, as in the masked family
    weight: Literal["bound", "flat"] = "flat"  # hidden tokens of whole blocks count the same (flat), or blocks (bound)

    def __post_init__(self) -> None:
        if not 1 <= self.block_length <= 10**6:
            raise UserError(f"process.block_length must be from 1 to a million, not {self.block_length}")
        check_training(self.mask_rate, self.weight)


@dataclass(frozen=True)
class _Written:
    """A cache, and how many blocks of each row it holds without noise, int64 [B]."""

    cache: Any
    blocks: Tensor

    def select(self, rows: Tensor) -> _Written:
        return _Written(self.cache.select(rows), self.blocks[rows])


@final
class BlockDiffusion(Hiding):
    """Block diffusion; see the head of the file."""

    Config: ClassVar[type] = BlockConfig
    summary: ClassVar[str] = "blocks from left to right, diffusion within each; any length, cached; upper bound"
    paper: ClassVar[str] = "BD3-LM 2503.09573"
    bounded: ClassVar[bool] = False
    infills: ClassVar[bool] = False
    remembers: ClassVar[bool] = True

    def __init__(self, network: Network, config: BlockConfig, vocabulary: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
        self.size = config.block_length
        self.steps = counted_steps(self.mask, SCHEDULES["linear"], self.size)

    @classmethod
    def small(cls) -> BlockConfig:
        return BlockConfig(block_length=2)

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        return {
            "inputs": vocabulary + 1,
            "outputs": vocabulary,
            "attention": "block",
            "block_length": config.block_length,
            "positions": "rotary",
            "time": False,
            "clean": False,
        }

    # -- forward --------------------------------------------------------------------------------------------------
    def q_sample(self, x_0: Tensor, t: Tensor, noise: Noise) -> State:
        # How far the noise has come, in blocks from the last one.
        blocks = -(-x_0.shape[1] // self.size)
        block = torch.arange(x_0.shape[1], device=x_0.device) // self.size
        rate = (t.double() * blocks).unsqueeze(-1) - (blocks - 1 - block)
        return State(x_0.masked_fill(noise.uniform("mask", x_0.shape[1]) < rate, self.mask), t.double())

    # -- learning -------------------------------------------------------------------------------------------------
    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        """log p(x_0 | x_t) at positions up to the end of the first block with hidden ones; others have no meaning."""
        memory = None
        if positions is not None and hasattr(self.network, "empty_cache") and self._within_a_block(state.x, positions):
            logits, memory = self._read_on(state, positions, condition)
        else:
            asked = torch.ones_like(state.x, dtype=torch.bool) if positions is None else positions
            logits = self._logits(state.x, state.x, asked, condition)
            if positions is None:
                logits = logits.view(*state.x.shape, -1)
        symbols = state.x if positions is None else state.x[positions]
        return Prediction(carry_over(logits, symbols, self.mask), memory=memory)

    def _logits(self, noisy: Tensor, clean: Tensor, asked: Tensor, condition: Tensor | None) -> Tensor:
        """Outputs [N V] at asked positions of noisy blocks, each behind the clean ones before it."""
        positions = torch.cat((asked, torch.zeros_like(asked)), 1)
        return self.network(torch.cat((noisy, clean), 1), condition=condition, positions=positions, halves=True)

    def _first(self, x: Tensor) -> Tensor:
        """The first block that has hidden positions, [B]."""
        return (x == self.mask).long().argmax(-1) // self.size

    def _within_a_block(self, x: Tensor, positions: Tensor) -> bool:
        block = torch.arange(x.shape[1], device=x.device) // self.size
        hidden = (x == self.mask).any(-1, keepdim=True)
        return bool((~positions | (hidden & (block == self._first(x).unsqueeze(-1)))).all())

    def _read_on(self, state: State, positions: Tensor, condition: Tensor | None) -> tuple[Tensor, _Written]:
        """Outputs [N V] at positions of each row's current block, reading what the cache does not hold yet."""
        x, size = state.x, self.size
        current = self._first(x)
        memory = state.memory or _Written(self.network.empty_cache(len(x)), torch.zeros_like(current))  # type: ignore[attr-defined]
        done, at_once = memory.blocks, self.network.blocks_at_once  # type: ignore[attr-defined]
        while True:
            count = min(int((current - done).max()) + 1, at_once)
            last = torch.minimum(done + count - 1, current)
            # Rows with less to read read some blocks again; those that begin read ahead, which is overwritten later.
            first = (last - count + 1).clamp(min=0)
            at = first.unsqueeze(-1) * size + torch.arange(count * size, device=x.device)
            # Past the end of the text its last position is repeated.
            inside, at = at < x.shape[1], at.clamp(max=x.shape[1] - 1)
            now = inside & (at // size == current.unsqueeze(-1)) & (last == current).unsqueeze(-1)
            asked = positions.gather(1, at) & now
            whole = bool((last == current).all())
            if not whole:
                asked = torch.zeros_like(asked)
            logits = self.network(x.gather(1, at), condition=condition, positions=asked, cache=memory.cache, at=at)
            if whole:
                return logits, _Written(memory.cache, current)
            done = torch.minimum(last + 1, current)

    def _cross_entropy(self, x_0: Tensor, n: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Sum of -log p over the hidden tokens of each block, [B blocks], so many being hidden at random as n says."""
        length, size = x_0.shape[1], self.size
        order = F.pad(noise.uniform("hide", length), (0, -length % size), value=2.0).unflatten(1, (-1, size))
        hidden = (order.argsort(-1).argsort(-1) < n.unsqueeze(-1)).flatten(1)[:, :length]
        logits = self._logits(x_0.masked_fill(hidden, self.mask), x_0, hidden, condition)
        nats = token_nats(logits, x_0[hidden])
        place = torch.arange(n.numel(), device=x_0.device).view(n.shape).repeat_interleave(size, 1)[:, :length]
        return nats.new_zeros(n.numel()).index_add(0, place[hidden], nats).view(n.shape)

    def _sizes(self, length: int, device: Any = "cpu") -> Tensor:
        """Tokens of each block, [blocks]; the last may be cut."""
        return (length - torch.arange(0, length, self.size, device=device)).clamp(max=self.size)

    def _strata(self, length: int, noise: Noise, tag: str) -> Tensor:
        """Uniform draws for every block, stratified over the rows, [B blocks]."""
        blocks = -(-length // self.size)
        shift = 0.6180339887498949 * torch.arange(blocks, device=noise.device)
        return (noise.stratified(tag).unsqueeze(-1) + shift) % 1

    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Nats per token [B]. With mask_rate = uniform and weight = bound, one unbiased draw of the bound over L."""
        length = x_0.shape[1]
        sizes = self._sizes(length, x_0.device)
        n = _count(mask_rates(self._strata(length, noise, "rate"), self.config.mask_rate), sizes)
        nats = self._cross_entropy(x_0, n, noise, condition)
        # The number hidden is (size + 1) / 2 on average.
        weight = sizes / n if self.config.weight == "bound" else 2 * sizes / (sizes + 1)
        return (nats * weight).sum(-1) / length

    def nll(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """One draw of the bound, exact for blocks of one token; for T calls, of the "random" sampler. There are at
        least as many calls as blocks."""
        length = x_0.shape[1]
        sizes = self._sizes(length, x_0.device)
        n = _count(self._strata(length, noise, "count"), sizes)
        weights, made = self._weights(length, calls)
        weight = torch.from_numpy(weights).to(x_0.device)[torch.arange(len(sizes), device=x_0.device), n]
        diffusion = (sizes * weight * self._cross_entropy(x_0, n, noise).double() / n).sum(-1)
        zero = torch.zeros_like(diffusion)
        if self.size == 1:
            return Nll(diffusion, zero, zero, "exact", "random", length)
        return Nll(diffusion, zero, zero, "upper", "random", made)

    def together(self, length: int) -> int:
        return min(self.size, length)

    def curve_point(self, x_0: Tensor, hidden: Tensor, noise: Noise) -> Tensor:
        """Of the mean over the blocks; a last one that is shorter hides as large a share."""
        sizes = self._sizes(x_0.shape[1], x_0.device)
        n = (hidden.unsqueeze(-1) * sizes / self.together(x_0.shape[1])).ceil().long()
        return (self._cross_entropy(x_0, n, noise).double() / n).mean(-1)

    def _hidden(self, size: int, length: int, calls: int) -> tuple[int, ...]:
        """Numbers hidden in a block of ``size`` open positions, of a text of ``length``, before each of its calls and
        after the last."""
        return self.grid.hidden(size, self.together(length), calls) if size else (0,)

    def _weights(self, length: int, calls: int | None, sampler: str | None = None) -> tuple[np.ndarray, int | None]:
        """Weights of curve_b(n) in the bound, float64 [blocks, block + 1], and the calls that it is of."""
        if sampler not in (None, "random"):
            raise UserError(f"no bound is known for the sampler {sampler!r}; there is one for random")
        sizes = self._sizes(length).tolist()
        spread = sizes if calls is None else _spread(sizes, calls)
        weights = np.zeros((len(sizes), self.size + 1))
        for block, (size, share) in enumerate(zip(sizes, spread, strict=True)):
            hidden = self._hidden(size, length, share)
            weights[block, : size + 1] = count_weights(size, (-np.diff(hidden)).tolist())
        return weights, None if calls is None else sum(spread)

    # -- what tests enumerate -------------------------------------------------------------------------------------
    def patterns(
        self, length: int, calls: int | None, sampler: str | None = None
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        weights, _ = self._weights(length, calls, sampler)
        for block, n in itertools.product(range(len(weights)), range(1, self.size + 1)):
            if weights[block, n]:
                places = range(block * self.size, min((block + 1) * self.size, length))
                sets = list(itertools.combinations(places, n))
                for chosen in sets:
                    scored = torch.zeros(length, dtype=torch.bool)
                    scored[list(chosen)] = True
                    hidden = scored | (torch.arange(length) >= places.stop)
                    yield weights[block, n] / n / len(sets), hidden, scored

    def ideal(self, context: Context) -> Network:
        def outputs(x: Tensor, t: Tensor | None) -> Tensor:
            noisy, clean = x.chunk(2, 1)
            out = []
            for begin in range(0, noisy.shape[1], self.size):
                text = torch.cat((clean[:, :begin], noisy[:, begin : begin + self.size]), 1)
                out.append(context(hidden_evidence(text, self.mask))[:, begin:])
            return torch.cat((*out, torch.zeros_like(torch.cat(out, 1))), 1)

        return as_network(outputs)

    # -- reverse --------------------------------------------------------------------------------------------------
    def plan(self, free: Tensor, calls: int, sampler: str) -> Sequence[float]:
        """Calls are shared out over the blocks by their free positions, at least one each; each call of a block reveals
        as many as the others, or as the grid says."""
        sizes = [int(block.sum()) for block in free.split(self.size)]
        total, left, times = sum(sizes), sum(sizes), [1.0]
        for size, share in zip(sizes, _spread(sizes, calls), strict=True):
            left -= size
            times += [(left + hidden) / total for hidden in self._hidden(size, len(free), share)[1:]]
        return times


def _count(rate: Tensor, sizes: Tensor) -> Tensor:
    """Numbers hidden, 1..size, at rates in [0, 1)."""
    return torch.minimum((rate * sizes).long(), sizes - 1) + 1


def _spread(sizes: Sequence[int], calls: int) -> list[int]:
    """Shares of ``calls`` for blocks with so many free positions: at least one for a block with any, at most one a
    position, and otherwise in proportion."""
    size = np.array(sizes)
    share = np.clip(calls * size // max(size.sum(), 1), np.minimum(size, 1), size)
    while share.sum() < min(calls, size.sum()):
        share[np.argmax(np.where(share < size, size / np.maximum(share, 1), 0.0))] += 1
    while share.sum() > calls and (share > 1).any():
        share[np.argmin(np.where(share > 1, size / np.maximum(share, 1), np.inf))] -= 1
    return [int(part) for part in share]
