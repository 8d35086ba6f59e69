"""-log p of tokens under logits, without a table of the vocabulary in float32 or wider where logits are many.

The usual way makes three such tables (log-probabilities, and two in the backward pass), four bytes a logit each; here
they are made for some rows at a time, from logits as the network gave them. Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

MANY = 2**22  # logits in a table of float32 that a cache holds; fewer are left to the library


class _ByRows(torch.autograd.Function):
    """``token_nats`` for many logits: the sums are kept, and the probabilities worked out again for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        parts = _parts(logits)
        total = torch.cat([logits[part].to(wide).logsumexp(-1) for part in parts])
        ctx.save_for_backward(logits, tokens, total)
        return total - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        logits, tokens, total = ctx.saved_tensors
        out = torch.empty_like(logits)
        for part in _parts(logits):
            # softmax, less one at the token: in the wide type, and rounded once.
            p = (logits[part].to(total.dtype) - total[part].unsqueeze(-1)).exp_()
            p.scatter_add_(-1, tokens[part].unsqueeze(-1), -torch.ones_like(total[part]).unsqueeze(-1))
            out[part] = p.mul_(grad[part].unsqueeze(-1))
        return out, None


def _parts(logits: Tensor) -> list[slice]:
    size = max(1, MANY // logits.shape[-1])
    return [slice(begin, begin + size) for begin in range(0, len(logits), size)]


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log softmax(logits) at the tokens, nats [N] in float32 or the wider type of the logits.

    Args:
        logits: [N V], in any floating type.
        tokens: int64 [N].
    """
    if logits.numel() > MANY:
        return cast(Tensor, _ByRows.apply(logits, tokens))
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), tokens, reduction="none")
