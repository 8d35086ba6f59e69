"""The bound: is it one, is it tight where it must be, and does the code estimate it?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.noise import Noise
from textdiffusion.process import Discrete, Gaussian, HasCurve, HasKernel, HasSignal
from textdiffusion.verification.enumeration import call_bound, exact_curve, integrated_bound, prior_term
from textdiffusion.verification.subject import DEVIATIONS, DRAWS, Check, L, Subject, V, most
from textdiffusion.worlds import Table, copy, parity, random_table

BLOCKS = 40  # of draws, whose means give the standard error: within a block draws are stratified


def _worlds(space: Discrete | Gaussian) -> list[Table]:
    """Worlds whose noisy states can be enumerated; two reals are as many as a grid holds."""
    if isinstance(space, Discrete):
        return [random_table(V, L), random_table(2, 4, seed=1), parity(), copy()]
    if space.width == 1:
        return [random_table(2, 2), parity(2), random_table(V, 1)]
    if space.width == 2:
        return [random_table(V, 1)]
    raise UserError(f"bounds of Gaussian noise can be enumerated for up to 2 reals a text, not {space.width}")


def bounds(subject: Subject) -> Iterator[Check]:
    """The continuous bound against the truth, and the code's estimates against enumeration."""
    process = subject.ideal(random_table(V, L))
    worlds = _worlds(process.space)
    if isinstance(process, (HasKernel, HasSignal)):
        yield from _continuous(subject, worlds)
    if isinstance(process, HasCurve):
        yield from _curve(subject)
    yield from _estimates(subject, worlds[0])


def _continuous(subject: Subject, worlds: list[Table]) -> Iterator[Check]:
    worst, leftover = 0.0, 0.0
    for world in worlds:
        text, process = world.texts[world.p > 0], subject.ideal(world)
        worst = most(worst, (integrated_bound(process, text) + world.log_prob(text)).abs().max())
        leftover = most(leftover, prior_term(process, text).max())
    yield Check(
        "bound(x) = -log p(x) for every x, the posterior exact",
        worst,
        # Where some text is left at t = 1, the bound exceeds -log p by what the prior does not know of it.
        (1e-6 if isinstance(process.space, Discrete) else 1e-3) + 3 * leftover,
        "the bound's weight, its integrand, or the use of the posterior in it",
    )
    total, gaps = 0.0, []
    for seed in range(2):
        process = subject.wrong(worlds[0], seed)
        bound = integrated_bound(process, worlds[0].texts)
        total = most(total, bound.neg().exp().sum())
        for sampler, step in process.steps.items():
            if step.reverses and claimed(process, sampler, 2):
                # First order in 1 / T: two of them give the limit.
                few, many = (_call_bound(process, worlds[0].texts, calls, sampler) for calls in (32, 64))
                gaps.append(float((2 * many - few - bound).abs().max()) / most((many - bound).abs().max(), 1e-3))
    yield Check(
        "bounds of a wrong model belong to a law",
        total,
        1 + 1e-6,
        "sum over x of exp(-bound(x)) is above one: no bound",
    )
    if gaps:
        yield Check(
            "the bound of T calls goes to the continuous one, wrong model",
            most(*gaps),
            0.75,
            "the continuous bound is not that of this sampler at many calls (figure: share of the gap at T = 64)",
        )


def _curve(subject: Subject) -> Iterator[Check]:
    world = random_table(V, L)
    process, text = subject.wrong(world, 0), world.texts
    exact = exact_curve(process, text)
    worst = 0.0
    for n in range(1, L + 1):
        x, hidden = text[5:6].expand(DRAWS // 4, -1), torch.full((DRAWS // 4,), n)
        draws = process.curve_point(x, hidden, Noise.of(n, DRAWS // 4)).double()
        error = most(float(draws.std()) / len(draws) ** 0.5, 1e-6)
        worst = most(worst, abs(float(draws.mean()) - exact[5, n]) / error)
    yield Check("curve_point estimates the curve", worst, DEVIATIONS, "its mean is not the enumerated curve")
    whole = torch.from_numpy(exact @ process.curve_weights(L, None)[0])
    if isinstance(process, HasKernel):
        yield Check(
            "the curve's continuous bound is the integral, wrong model",
            float((whole - integrated_bound(process, text)).abs().max()),
            1e-6,
            "curve_weights(length, None), or a network that takes time, for which there is no curve",
        )


def _estimates(subject: Subject, world: Table) -> Iterator[Check]:
    """Means of nll's draws, for wrong models, in continuous time and for 2 calls."""
    for seed, calls in ((0, None), (1, None), (0, 2), (1, 2)):
        process = subject.wrong(world, seed)
        name = "the bound" if calls is None else "the bound of 2 calls"
        some = world.texts[[(3 + 5 * seed) % len(world.texts)]]
        rows = DRAWS // BLOCKS
        try:
            blocks = [process.nll(some.expand(rows, -1), Noise.of(seed, rows, step=b), calls) for b in range(BLOCKS)]
        except UserError:
            continue  # none is claimed
        if blocks[0].kind != "upper":
            continue
        try:
            if calls is not None:
                exact = _call_bound(process, some, calls, blocks[0].sampler)
            elif isinstance(process, (HasKernel, HasSignal)):
                exact = integrated_bound(process, some)
            else:
                raise UserError("there is neither a kernel nor a signal")
        except UserError as refusal:
            yield Check(f"nll claims {name}, and it can be enumerated", math.inf, 0, f"claimed, not proven: {refusal}")
            continue
        means = torch.stack([block.total.double().mean() for block in blocks])
        error = most(float(means.std()) / BLOCKS**0.5, 1e-6)
        yield Check(
            f"nll estimates {name} (wrong model {seed + 1})",
            abs(float(means.mean()) - float(exact[0])) / error,
            DEVIATIONS,
            "the mean of nll's draws is not the enumerated bound (in standard errors)",
        )


def _call_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> Tensor:
    return torch.from_numpy(call_bound(process, x_0, calls, sampler))


def claimed(process: Any, sampler: str, calls: int) -> bool:
    """Whether a bound of this sampler can be enumerated."""
    try:
        call_bound(process, torch.zeros(1, 1, dtype=torch.long), calls, sampler)
    except UserError:
        return False
    return True
