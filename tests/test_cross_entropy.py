"""Cross-entropy by rows against the library's, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from textdiffusion.mathematics import cross_entropy
from textdiffusion.mathematics.cross_entropy import token_nats


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Three rows of ten at a time."""
    monkeypatch.setattr(cross_entropy, "MANY", 30)


def sides(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(values, gradient of the logits) by rows, and the library's; a sum with weights of either sign."""
    logits = (4 * torch.randn(17, 10, dtype=torch.float64)).to(dtype)
    tokens, weight = torch.randint(0, 10, (17,)), torch.randn(17, dtype=torch.float64)
    out = []
    for function in (token_nats, lambda x, y: F.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), y,
                                                              reduction="none")):  # fmt: skip
        leaf = logits.clone().requires_grad_()
        nats = function(leaf, tokens)
        (nats * weight.to(nats.dtype)).sum().backward()
        out.append((nats.detach(), leaf.grad))
    return out


def test_in_float64_it_is_the_library_s():
    (nats, grad), (expected, expected_grad) = sides(torch.float64)
    assert torch.allclose(nats, expected, atol=1e-13, rtol=1e-13)
    assert torch.allclose(grad, expected_grad, atol=1e-13, rtol=1e-13)


def test_the_gradient_is_that_of_the_value():
    logits = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 10, (7,))
    assert torch.autograd.gradcheck(lambda x: token_nats(x, tokens), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_narrower_types_it_is_as_near_as_they_can_say(dtype):
    (nats, grad), (expected, expected_grad) = sides(dtype)
    assert nats.dtype == expected.dtype == torch.float32 and grad.dtype == dtype
    assert torch.allclose(nats, expected, atol=2e-6, rtol=2e-6)
    assert torch.allclose(grad.float(), expected_grad.float(), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


def test_certain_and_impossible_tokens():
    logits = torch.full((4, 10), -torch.inf)
    logits[:, 3] = 0.0
    nats = token_nats(logits, torch.tensor([3, 3, 3, 4]))
    assert nats[:3].tolist() == [0.0] * 3 and nats[3] == torch.inf
