"""Muon (Jordan et al., kellerjordan.github.io/posts/muon): steps along the nearest orthogonal matrix to the momentum.

torch has it too, and always multiplies in bfloat16. On a processor without units for that, as most laptops have, those
products are ten times as slow as in float32, and were five sixths of a training step (benchmarks/kernels.py). Here the
number type is a choice; in bfloat16 the steps are torch's, bit for bit (tests/test_training.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # takes singular values from 0.003 to 1 into [0.68, 1.20] within ITERATIONS
ITERATIONS = 5


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of a matrix [m n] = U S V^T, nearly: singular values near 1, by Newton-Schulz iterations in ``dtype``."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x  # the smaller of the two products with itself
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@final
class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices; their decay is decoupled. Matrices may be sharded (FSDP2).

    Args:
        matrices: parameters of two dimensions.
        lr: rate for a square or wide matrix; of a tall one [m n] the rate is times sqrt(m / n).
        dtype: number type of the products.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, *, momentum: float, weight_decay: float, dtype: torch.dtype
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; ``closure`` is not for this optimiser."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(average, group["momentum"])
                rows, columns = matrix.shape
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(orthogonalised(ahead, self.dtype), alpha=-rate)
