"""The forward process: is the noise what the family says it is, and does it end in the prior?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from textdiffusion.mathematics.noise import Noise
from textdiffusion.verification.enumeration import misfit, prior_term
from textdiffusion.verification.subject import DEVIATIONS, DRAWS, IMPROBABLE, ROUNDING, Check, V, most


def kernel(process: Any) -> Iterator[Check]:
    """A kernel on symbols: its identities, its prior, and draws from it."""
    times = (0.0, 0.2, 0.5, 0.8, 1.0)
    pairs = [process.kernel(s, t) for s, t in itertools.combinations(times, 2)]
    worst = most(*(most((k.sum(-1) - 1).abs().max(), -k.min()) for k in pairs))
    yield Check("the kernel is a law", worst, ROUNDING, "rows of kernel(s, t) are negative or do not sum to one")
    worst = most(
        *(
            (process.kernel(s, t) @ process.kernel(t, u) - process.kernel(s, u)).abs().max()
            for s, t, u in itertools.combinations(times, 3)
        )
    )
    yield Check("Chapman-Kolmogorov", worst, ROUNDING, "noise to t, and from t to u, is not noise to u")
    prior = process.prior_law()
    # Mass that rounding leaves, as of cos^2(pi / 2), is none.
    uncovered = float(((process.kernel(0.0, 1.0)[:V] > 1e-12) & (prior <= 0)).sum())
    yield Check(
        "the prior covers q(x_1 | x_0)", uncovered, 0, "text is left at t = 1: the bound's prior term is infinite"
    )
    yield _ends_in_prior(process)
    rows = 4 * DRAWS
    noise = Noise.of(3, rows)
    worst = _misfit(process.prior_sample(rows, V, noise).x, prior.expand(V, -1))
    yield Check("prior_sample draws prior_law", worst, IMPROBABLE, "sampling starts from another law than the bound's")
    text, worst = torch.arange(V).expand(rows, -1), 0.0
    for t in (0.25, 0.75):
        x = process.q_sample(text, torch.full((rows,), t, dtype=torch.float64), noise).x
        worst = most(worst, _misfit(x, process.kernel(0.0, t)[:V]))
    yield Check("q_sample draws the kernel, each position on its own", worst, IMPROBABLE, "training sees other noise")


def _ends_in_prior(process: Any) -> Check:
    return Check(
        "q(x_1 | x_0) is the prior, but for 0.01 nat",
        float(prior_term(process, torch.arange(V).unsqueeze(-1)).max()),
        0.01,
        "text is left at t = 1: sampling starts from noise that training never saw",
    )


def _misfit(x: Tensor, laws: Tensor) -> float:
    """Misfit of texts of V symbols [n V] to independent laws [V S]."""
    joint = laws[0]
    code = x[:, 0]
    for i in range(1, len(laws)):
        joint = (joint.unsqueeze(-1) * laws[i]).flatten()
        code = code * laws.shape[1] + x[:, i]
    return misfit(torch.bincount(code, minlength=len(joint)).double(), joint, len(x))


def signal(process: Any) -> Iterator[Check]:
    """A Gaussian signal: its draws and its prior."""
    rows = 4 * DRAWS
    text, worst = torch.arange(V).expand(rows, -1), 0.0
    for t in (0.0, 0.25, 0.75, 1.0):
        alpha, sigma = process.signal(t)
        z = process.q_sample(text, torch.full((rows,), t, dtype=torch.float64), Noise.of(3, rows)).x.double()
        worst = most(worst, _not_normal((z - alpha * process.codes().double()[text]) / sigma))
    yield Check("q_sample draws the signal, each real on its own", worst, DEVIATIONS, "training sees other noise")
    worst = _not_normal(process.prior_sample(rows, V, Noise.of(3, rows)).x.double())
    yield Check(
        "prior_sample is standard normal", worst, DEVIATIONS, "sampling starts from another law than the bound's"
    )
    yield _ends_in_prior(process)


def _not_normal(z: Tensor) -> float:
    """How many standard errors the first two moments of z [n ...] are off those of independent standard normals."""
    z, rows = z.flatten(1), len(z)
    second = z.T @ z / rows
    off = (second - torch.eye(z.shape[1], dtype=torch.float64)).abs()
    off.diagonal().div_(2**0.5)
    return most(z.mean(0).abs().max(), off.max()) * rows**0.5
