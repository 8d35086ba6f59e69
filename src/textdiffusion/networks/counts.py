"""What followed the last n symbols in the training text, counted: a second opinion for a network from left to right.

A short training goes a long way to learn what a table knows after one look at the text. The counts' law is that of
interpolated absolute discounting (Ney, Essen and Kneser 1994): with c the counts of what followed the last k
symbols, N their sum, U how many are not 0, and D the discount,

    p_k(v) = (max(c(v) - D, 0) + D U p_{k-1}(v)) / N,    p_{k-1}(v) where N = 0,    p_{-1} = 1 / V.

What is said is a mixture of it and the network's law, in a share that follows from how often the contexts were seen and
from how sure the two are: a half at first. The share is learnt beside the network and not through it: taught together,
the network leaves to the table what it would else have learnt, and both are worse (docs/results.md). In training a
position's own occurrence is not counted (leave one out): else the table would know the answer.

Counts are kept by hash, in a table of at most 32 MB: of entries that fall on the same slot the larger is kept, and a
mark of 11 bits tells it from others, so that what never was is taken for what was at most once in two thousand.

Shapes: ... any leading ones, B batch, L length, K longest context, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textdiffusion.networks.preceding import preceding

LONGEST = 8  # symbols of the longest context, by default
MOST_SYMBOLS = 300  # of a vocabulary that has counts by default, characters or bytes: all are looked up at a position
DISCOUNT = 0.75
MOST_TOKENS = 2**24  # of the text that are counted
LEAST_SLOTS, MOST_SLOTS = 2**10, 2**23
_COUNT_BITS, _MARK_BITS = 20, 11  # of an entry
_GOLDEN = -7046029254386353131  # odd, and without pattern; as a signed 64-bit number, like the others
_FACTORS = (
    -4417276706812531889, 7809847782465536323, -5808590958014384161, 4863048586425983149,
    -3335678366873096957, 6364136223846793005, -7286425919675154353, 2862933555777941757,
)  # fmt: skip


def slots_for(tokens: int) -> int:
    """Slots of the table for a text of so many tokens: a power of two, of which a third is filled or so."""
    return int(min(max(2 ** (2 * tokens).bit_length(), LEAST_SLOTS), MOST_SLOTS))


def _mixed(x: Tensor) -> Tensor:
    """int64 to int64, one to one, so that all bits depend on all."""
    x = x * _GOLDEN
    return (x ^ (x >> 32)) * _FACTORS[2]


class Counts(nn.Module):
    """The table, and how far it is trusted.

    Args:
        longest: K, at most 8.
        vocabulary: V.
        slots: of the table.
    """

    table: Tensor

    def __init__(self, longest: int, vocabulary: int, slots: int):
        super().__init__()
        self.longest, self.vocabulary = longest, vocabulary
        self.register_buffer("table", torch.zeros(slots, dtype=torch.int32))  # mark and count
        # Of the contexts' numbers, of the entropies of the network's law and the table's, and a bias.
        self.trust = nn.Parameter(torch.zeros(longest + 4))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The table is not learnt: the average of a network's weights reads the very same."""
        memo[id(self.table)] = self.table
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def _hash(self, contexts: Tensor) -> Tensor:
        """Of the last 0..K symbols of contexts int64 [... K], nearest first: [... K + 1]. Products wrap round."""
        sums = F.pad(((contexts + 2) * contexts.new_tensor(_FACTORS[: self.longest])).cumsum(-1), (1, 0))
        return _mixed(sums + torch.arange(1, self.longest + 2, device=contexts.device))

    def _place(self, hashed: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Slot and mark of the entries of symbols behind contexts: of two tensors that broadcast."""
        mixed = _mixed(hashed + symbols * _FACTORS[1])
        return mixed >> 24 & len(self.table) - 1, mixed >> 50 & 2**_MARK_BITS - 1

    def contexts(self, x: Tensor) -> Tensor:
        """The last symbols up to each of x [B L], nearest first, [B L K]; -1 for none."""
        return torch.cat((x.unsqueeze(-1), preceding(x, self.longest - 1)), -1)[..., : self.longest]

    @torch.no_grad()
    def count(self, tokens: np.ndarray) -> None:
        """Take down what follows what in a text, int [tokens]; of a long one, in its first 2^24 tokens."""
        text = torch.from_numpy(np.asarray(tokens[:MOST_TOKENS], dtype=np.int64))
        found, sums = [], torch.zeros_like(text)
        for order in range(self.longest + 1):
            if len(text) <= order:
                break
            if order:  # the hash of one symbol more, of each position that has so many before it
                sums = sums[1:] + (text[:-order] + 2) * _FACTORS[order - 1]
            slot, mark = self._place(_mixed(sums + order + 1), text[order:])
            key, number = (slot << _MARK_BITS | mark).unique(return_counts=True)
            found.append(torch.stack((key, number.clamp(max=2**_COUNT_BITS - 1))))
        if not found:
            return
        key, number = torch.cat(found, 1)
        slot, mark = key >> _MARK_BITS, key & 2**_MARK_BITS - 1
        # The largest of each slot is the last of it.
        order = (slot << _COUNT_BITS | number).argsort()
        slot, mark, number = slot[order], mark[order], number[order]
        largest = torch.cat((slot[1:] != slot[:-1], slot.new_ones(1, dtype=torch.bool)))
        self.table.zero_()
        self.table[slot[largest]] = (mark << _COUNT_BITS | number)[largest].int().to(self.table.device)

    def law(self, contexts: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p of what follows the last 0..K symbols of contexts int64 [... K] (-1: none), float32 [... V], and how
        often each was followed by anything, [... K + 1]; without the occurrence of symbols ``own`` [...], if given."""
        symbols = torch.arange(self.vocabulary, device=contexts.device)
        hashed = self._hash(contexts).unsqueeze(-1)
        whole = F.pad((contexts >= 0).cumprod(-1), (1, 0), value=1).unsqueeze(-1)
        p, totals = torch.full((*contexts.shape[:-1], self.vocabulary), 1 / self.vocabulary, device=symbols.device), []
        for order in range(self.longest + 1):
            slot, mark = self._place(hashed[..., order, :], symbols)
            held = self.table[slot]
            number = torch.where(held >> _COUNT_BITS == mark, held & 2**_COUNT_BITS - 1, 0) * whole[..., order, :]
            if own is not None:
                number = (number - (own.unsqueeze(-1) == symbols).int()).clamp(min=0)
            total = number.sum(-1, keepdim=True)
            passed_on = DISCOUNT * (number > 0).sum(-1, keepdim=True) * p
            p = torch.where(total > 0, ((number - DISCOUNT).clamp(min=0) + passed_on) / total.clamp(min=1), p)
            totals.append(total.float())
        return p.clamp(min=1e-30).log(), torch.cat(totals, -1)

    def forward(self, logits: Tensor, contexts: Tensor, own: Tensor | None = None) -> Tensor:
        """log of the mixture, float32 [... V], of a network's logits [... V] and the table's law behind contexts
        [... K]; without the occurrence of symbols ``own`` [...] there, if given."""
        said, (counted, total) = logits.float().log_softmax(-1), self.law(contexts, own)
        unsure = torch.stack([torch.special.entr(log_p.exp()).sum(-1) for log_p in (said, counted)], -1)
        told = torch.cat((total.log1p(), unsure, torch.ones_like(unsure[..., :1])), -1)
        trust = (told @ self.trust.float()).unsqueeze(-1)
        return torch.logaddexp(said + F.logsigmoid(-trust), counted + F.logsigmoid(trust))
