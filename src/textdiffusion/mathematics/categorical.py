"""Exact draws from categorical laws, and the reshaping of such laws by temperature, top-k and top-p.

Draws are by inverse CDF in float64. The usual Gumbel trick in float32 cuts the tail off: a uniform of 24 bits
bounds the Gumbel variable by 16.6, so tokens rarer than about e^-16.6 are never drawn, which over many steps
and a large vocabulary acts like a lower temperature (2409.02908).
"""

from __future__ import annotations

import torch
from torch import Tensor

from textdiffusion.errors import UserError


def draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index a row by inverse CDF.

    Args:
        log_p: log-probabilities [N, V] (-inf allowed), normalised or not.
        uniform: draws in [0, 1), float64 [N].
    Returns:
        int64 [N]. Never an index of probability zero.
    Raises:
        UserError: log_p is not a number, as that of a network gone astray.
    """
    p = log_p.double()
    highest = p.amax(-1, keepdim=True)
    p = (p - highest if p is log_p else p.sub_(highest)).exp_()
    cdf = p.cumsum(-1)
    if bool(cdf[:, -1].isnan().any()):
        raise UserError("the network's output is not a number; its weights are damaged, or training went astray")
    target = uniform.unsqueeze(-1) * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    # uniform < 1 makes the target smaller than the last entry; where the product was rounded up to it, the last index
    # with mass is meant.
    if bool((index == p.shape[-1]).any()):
        last = p.shape[-1] - 1 - (p > 0).flip(-1).to(torch.uint8).argmax(-1)
        index = torch.minimum(index, last)
    return index


def reshape_law(
    log_p: Tensor, *, temperature: float = 1.0, top_p: float | None = None, top_k: int | None = None
) -> Tensor:
    """Sharpen or cut a categorical law, and normalise it again.

    Args:
        log_p: normalised log-probabilities [..., V].
        temperature: divides the log-probabilities; 0 keeps the likeliest token alone.
        top_p: keep the smallest set of likeliest tokens that holds at least this mass.
        top_k: keep this many likeliest tokens.
    Returns:
        log-probabilities [..., V].
    """
    if temperature == 0.0:
        best = log_p.argmax(-1, keepdim=True)
        return torch.full_like(log_p, -torch.inf).scatter(-1, best, 0.0)
    if temperature != 1.0:
        # The highest is taken off first: a tiny temperature must not divide its way to infinity minus infinity.
        log_p = ((log_p - log_p.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    if top_k is not None and top_k < log_p.shape[-1]:
        # By place: a threshold would let all pass that tie with the last.
        kept, place = log_p.topk(top_k, -1)
        log_p = torch.full_like(log_p, -torch.inf).scatter(-1, place, kept).log_softmax(-1)
    if top_p is not None and top_p < 1.0:
        ordered, index = log_p.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = (before >= top_p).scatter(-1, index, before >= top_p)
        log_p = log_p.masked_fill(cut, -torch.inf).log_softmax(-1)
    return log_p
