"""What followed the last n symbols in the training text, counted: a prior that a network from left to right corrects.

A short training goes a long way to learn what a table knows after one look at the text (2210.14431). The prior is that
of interpolated absolute discounting (Ney, Essen and Kneser 1994): with c the counts of what followed the last k
symbols, N their sum, U how many are not 0, and D the discount,

    p_k(v) = (max(c(v) - D, 0) + D U p_{k-1}(v)) / N,    p_{k-1}(v) where N = 0,    p_{-1} = 1 / V.

Logits are those of the network plus w log p, with a weight w > 0 that the network says at each position: 1 at first.
In training a position's own occurrence is not counted (leave one out), without which the prior would know the answer.

Counts are kept by hash, in a table of at most 16 MB: of entries that fall on the same slot the larger is kept, and a
mark of 11 bits tells it from others, so that what never was is taken for what was at most once in two thousand.

Shapes: ... any leading ones, K longest context, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 5  # symbols of the longest context, by default
MOST_SYMBOLS = 256  # of a vocabulary for which there are counts by default: all of it is looked up at every position
DISCOUNT = 0.75
MOST_TOKENS = 2**24  # of the text that are counted
LEAST_SLOTS, MOST_SLOTS = 2**10, 2**22
_COUNT_BITS, _MARK_BITS = 20, 11  # of an entry
_GOLDEN = -7046029254386353131  # odd, and without pattern; as a signed 64-bit number, like the others
_FACTORS = (
    -4417276706812531889, 7809847782465536323, -5808590958014384161, 4863048586425983149,
    -3335678366873096957, 6364136223846793005, -7286425919675154353, 2862933555777941757,
)  # fmt: skip


def slots_for(tokens: int) -> int:
    """Slots of the table for a text of so many tokens: a power of two."""
    return int(min(max(2 ** max(tokens - 1, 1).bit_length(), LEAST_SLOTS), MOST_SLOTS))


class Counts(nn.Module):
    """The prior, and how far the network trusts it.

    Args:
        longest: K, at most 8.
        width: D.
        vocabulary: V.
        slots: of the table.
    """

    table: Tensor

    def __init__(self, longest: int, width: int, vocabulary: int, slots: int):
        super().__init__()
        self.longest, self.vocabulary = longest, vocabulary
        self.register_buffer("table", torch.zeros(slots, dtype=torch.int32))  # mark and count
        self.trust = nn.Parameter(
            torch.zeros(width + longest + 2)
        )  # of the vectors, of the contexts' numbers, and a bias

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The table is not learnt: the average of a network's weights reads the very same."""
        memo[id(self.table)] = self.table
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def _hash(self, contexts: Tensor) -> Tensor:
        """Of the last 0..K symbols of contexts int64 [... K], nearest first: [... K + 1]. Products wrap round."""
        sums = F.pad(((contexts + 2) * contexts.new_tensor(_FACTORS[: self.longest])).cumsum(-1), (1, 0))
        order = torch.arange(self.longest + 1, device=contexts.device)
        mixed = (sums + order + 1) * _GOLDEN
        return (mixed ^ (mixed >> 29)) * _FACTORS[0]

    def _place(self, hashed: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Slot and mark of the entries of symbols behind contexts: of two tensors that broadcast."""
        mixed = (hashed + symbols * _FACTORS[1]) * _GOLDEN
        mixed = (mixed ^ (mixed >> 32)) * _FACTORS[2]
        return mixed >> 24 & len(self.table) - 1, mixed >> 50 & 2**_MARK_BITS - 1

    @torch.no_grad()
    def count(self, tokens: np.ndarray) -> None:
        """Take down what follows what in a text, int [tokens]; of a long one, in its first 2^24 tokens."""
        text = torch.from_numpy(np.asarray(tokens[:MOST_TOKENS], dtype=np.int64))
        found = []
        for longest in range(self.longest + 1):
            if len(text) <= longest:
                break
            rows = text.unfold(0, longest + 1, 1).flip(-1)  # the symbol, and those before it, nearest first
            contexts = F.pad(rows[:, 1:], (0, self.longest - longest), value=-1)
            entry = torch.stack(self._place(self._hash(contexts)[:, longest], rows[:, 0]))
            key, number = (entry[0] << _MARK_BITS | entry[1]).unique(return_counts=True)
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

    def found(self, contexts: Tensor, own: Tensor | None = None) -> Tensor:
        """How often each symbol followed the last 0..K symbols of contexts int64 [... K] (-1: none), float32
        [... K + 1 V]; without the occurrence of symbols ``own`` [...] there, if given."""
        symbols = torch.arange(self.vocabulary, device=contexts.device)
        slot, mark = self._place(self._hash(contexts).unsqueeze(-1), symbols)
        held = self.table[slot]
        number = torch.where(held >> _COUNT_BITS == mark, held & 2**_COUNT_BITS - 1, 0)
        if own is not None:
            at = own.unsqueeze(-1).unsqueeze(-1).expand(*number.shape[:-1], 1)
            number.scatter_(-1, at, (number.gather(-1, at) - 1).clamp(min=0))
        whole = F.pad((contexts >= 0).cumprod(-1), (1, 0), value=1)
        return (number * whole.unsqueeze(-1)).float()

    def prior(self, contexts: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p of what follows, float32 [... V], and how often each context was followed by anything [... K + 1]."""
        number = self.found(contexts, own)
        total = number.sum(-1)
        kept, kinds = (number - DISCOUNT).clamp(min=0), (number > 0).sum(-1)
        # A share of p_{k-1}, and the rest from the counts; where there are none, all of it.
        share = torch.where(total > 0, DISCOUNT * kinds / total.clamp(min=1), 1.0).unsqueeze(-1)
        kept = kept / total.clamp(min=1).unsqueeze(-1)
        p = torch.full_like(number[..., 0, :], 1 / self.vocabulary)
        for order in range(self.longest + 1):
            p = kept[..., order, :] + share[..., order, :] * p
        return p.clamp(min=1e-30).log(), total

    def forward(self, contexts: Tensor, h: Tensor, own: Tensor | None = None) -> Tensor:
        """What is added to logits, float32 [... V], of contexts [... K] and the network's vectors h [... D]."""
        log_p, total = self.prior(contexts, own)
        told = torch.cat((h.float(), total.log1p(), torch.ones_like(total[..., :1])), -1)
        return 2 * torch.sigmoid(told @ self.trust.float()).unsqueeze(-1) * log_p
