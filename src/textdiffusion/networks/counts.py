"""What followed the last n symbols in the training text, counted: a second opinion for a network from left to right.

A short training goes a long way to learn what a table knows after one look at the text. The counts' law is that of
interpolated absolute discounting (Ney, Essen and Kneser 1994): with c the counts of what followed the last k symbols,
N their sum, U how many are not 0, and D the discount,

    p_k(v) = (max(c(v) - D, 0) + D U p_{k-1}(v)) / N,    p_{k-1}(v) where N = 0,    p_{-1} = 1 / V.

What is said is a mixture of it and the network's law, in a share that follows from how often the contexts were seen and
from how sure the two are: a half at first. The share is learnt beside the network and not through it: taught together,
the network leaves to the table what it would else have learnt, and the whole is worse (docs/results.md). In training a
position's own occurrence is not counted (leave one out): else the table would know the answer.

Counts are kept by hash: of entries that fall on the same slot the larger is kept, and a mark of 11 bits tells it from
others, so that a look-up finds what never was at most once in two thousand times. A count ends at a million (2^20 - 1),
which only single symbols and pairs of a long text come to.

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
MOST_SYMBOLS = 300  # of a vocabulary that has counts by default: all of it is looked up at every position
MOST_TOKENS = 2**24  # of a text that is counted by default
LEAST_SLOTS, MOST_SLOTS = 2**10, 2**23  # the latter are 32 MB
DISCOUNT = 0.75
AT_ONCE = 2**20  # entries that are looked up in one go
_COUNT_BITS, _MARK_BITS = 20, 11  # of an entry
# Odd and without pattern; as signed 64-bit numbers.
_GOLDEN = -7046029254386353131
_FACTORS = (
    -4417276706812531889, 7809847782465536323, -5808590958014384161, 4863048586425983149,
    -3335678366873096957, 6364136223846793005, -7286425919675154353, 2862933555777941757,
)  # fmt: skip


def slots_for(tokens: int) -> int:
    """Slots of the table for a text of so many tokens: a power of two, four to eight times as many, up to a size."""
    return int(min(max(2 ** (4 * tokens).bit_length(), LEAST_SLOTS), MOST_SLOTS))


def _scrambled(x: Tensor) -> Tensor:
    """int64 to int64, one to one, without pattern in its upper half. Products wrap round."""
    x = x * _GOLDEN
    return (x ^ (x >> 32 & 0xFFFFFFFF)) * _FACTORS[2]


class Counts(nn.Module):
    """The table, and how far it is trusted.

    Args:
        longest: K, at most 8.
        vocabulary: V.
        slots: of the table, a power of two.
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

    def contexts(self, x: Tensor, at: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """The last symbols up to each of x [B L], nearest first, [B L K]; -1 for none, and for what stands at position
        0, which is no text: a text is read behind it.

        ``at``: positions of x, [B L], and ``before`` the symbols before them, [B L K - 1]; if x does not begin at 0.
        """
        at = torch.arange(x.shape[1], device=x.device) if at is None else at
        before = preceding(x, self.longest - 1) if before is None else before
        back = torch.arange(self.longest, device=x.device)
        return torch.cat((x.unsqueeze(-1), before), -1).masked_fill(at.unsqueeze(-1) - back <= 0, -1)

    def _place(self, hashed: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Slot and mark of the entries of symbols behind contexts: of two tensors that broadcast."""
        x = _scrambled(hashed + symbols * _FACTORS[1])
        return x >> 24 & len(self.table) - 1, x >> 50 & 2**_MARK_BITS - 1

    @torch.no_grad()
    def count(self, tokens: np.ndarray) -> None:
        """Take down what follows what in a text, int [tokens]."""
        text = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        found, sums = [], torch.zeros_like(text)
        for order in range(min(self.longest + 1, len(text))):
            if order:  # the hash of one symbol more, of each position that has so many before it
                sums = sums[1:] + (text[:-order] + 2) * _FACTORS[order - 1]
            slot, mark = self._place(_scrambled(sums + order + 1), text[order:])
            key, number = (slot << _MARK_BITS | mark).unique(return_counts=True)
            slot, mark = key >> _MARK_BITS, key & 2**_MARK_BITS - 1
            entry = number.clamp(max=2**_COUNT_BITS - 1) << _MARK_BITS | mark
            found.append(slot << _COUNT_BITS + _MARK_BITS | entry)
        if not found:
            return
        # Of each slot the largest count is the last.
        packed = torch.cat(found).sort().values
        slot, entry = packed >> _COUNT_BITS + _MARK_BITS, packed & 2 ** (_COUNT_BITS + _MARK_BITS) - 1
        last = torch.cat((slot[1:] != slot[:-1], slot.new_ones(1, dtype=torch.bool)))
        self.table.zero_()
        self.table[slot[last].to(self.table.device)] = entry[last].int().to(self.table.device)

    def law(self, contexts: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p of what follows the last 0..K symbols of contexts int64 [... K] (-1: none), float32 [... V], and how
        often each was followed by anything, [... K + 1]; without the occurrence of symbols ``own`` [...], if given."""
        rows = contexts.reshape(-1, self.longest)
        owns = None if own is None else own.reshape(-1)
        size = max(1, AT_ONCE // ((self.longest + 1) * self.vocabulary))
        cuts = [slice(begin, begin + size) for begin in range(0, max(len(rows), 1), size)]
        parts = [self._law(rows[cut], None if owns is None else owns[cut]) for cut in cuts]
        log_p, totals = (torch.cat(part) for part in zip(*parts, strict=True))
        leading = contexts.shape[:-1]
        return log_p.view(*leading, self.vocabulary), totals.view(*leading, self.longest + 1)

    def _law(self, contexts: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same for contexts [N K], all at once."""
        symbols = torch.arange(self.vocabulary, device=contexts.device)
        sums = F.pad(((contexts + 2) * contexts.new_tensor(_FACTORS[: self.longest])).cumsum(-1), (1, 0))
        hashed = _scrambled(sums + torch.arange(1, self.longest + 2, device=contexts.device))
        slot, mark = self._place(hashed.unsqueeze(-1), symbols)
        held = self.table[slot]
        number = torch.where(held & 2**_MARK_BITS - 1 == mark, held >> _MARK_BITS, 0)
        number = number * F.pad((contexts >= 0).cumprod(-1), (1, 0), value=1).unsqueeze(-1)
        if own is not None:
            number = (number - (own.unsqueeze(-1) == symbols).int().unsqueeze(1)).clamp(min=0)
        totals = number.sum(-1).float()  # [N K + 1]
        # From the counts themselves, and the share that is left to a shorter context: all, where there are none.
        some = totals.clamp(min=1)
        shorter = torch.where(totals > 0, DISCOUNT * (number > 0).sum(-1) / some, 1.0).unsqueeze(-1)
        counted = (number - DISCOUNT).clamp(min=0) / some.unsqueeze(-1)
        p = torch.full_like(counted[:, 0], 1 / self.vocabulary)
        for order in range(self.longest + 1):
            p = counted[:, order] + shorter[:, order] * p
        return p.clamp(min=1e-30).log(), totals

    def forward(self, logits: Tensor, contexts: Tensor, own: Tensor | None = None) -> Tensor:
        """log of the mixture, float32 [... V], of a network's logits [... V] and the table's law behind contexts
        [... K]; without the occurrence of symbols ``own`` [...] there, if given."""
        said, (counted, totals) = logits.float().log_softmax(-1), self.law(contexts, own)
        unsure = torch.stack([torch.special.entr(log_p.exp()).sum(-1) for log_p in (said, counted)], -1)
        told = torch.cat((totals.log1p(), unsure, torch.ones_like(unsure[..., :1])), -1)
        trust = (told @ self.trust.float()).unsqueeze(-1)
        return torch.logaddexp(said + F.logsigmoid(-trust), counted + F.logsigmoid(trust))
