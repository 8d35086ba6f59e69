"""The bound: is it one, is it tight where it must be, and does the code estimate it?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import Table, copy, parity, random_table
from textdiffusion.process import Discrete, HasCurve, HasKernel, HasPatterns, HasSignal
from textdiffusion.verification.enumeration import (
    by_orders,
    call_bound,
    continuous_bound,
    enumerated_law,
    exact_curve,
    integrated_bound,
    prior_term,
)
from textdiffusion.verification.reals import fitting, signal_call_bound
from textdiffusion.verification.subject import DEVIATIONS, DRAWS, Check, L, Subject, V, most

BLOCKS = 40  # of draws, whose means give the standard error: within a block draws are stratified
RESOLUTION = 0.05  # share of a bound that its estimate may be off unseen, where so many draws can show it:
MOST_DRAWS = 48_000  # of each text
BLIND = 0.2  # where they cannot even show this, the estimate is no use
SHOWN = (5, 16, 24)  # numbers of the texts that estimates are compared for


def _worlds(subject: Subject) -> list[Table]:
    """Worlds whose noisy states can be enumerated; two reals are as many as a grid holds."""
    if isinstance(subject.silent(V).space, Discrete):
        return [random_table(V, L), random_table(2, 4, seed=1), parity(), copy()]
    return fitting(subject)


def bounds(subject: Subject) -> Iterator[Check]:
    """The continuous bound against the truth, and the code's estimates against enumeration."""
    process = subject.ideal(random_table(V, L))
    worlds = _worlds(subject)
    if isinstance(process, (HasKernel, HasSignal, HasPatterns)):
        yield from _continuous(subject, worlds)
    if isinstance(process, HasCurve):
        yield from _curve(subject)
    for sampler in [*(name for name in process.steps if process.by(name) is not process), None]:
        yield from _estimates(subject, worlds[0], sampler)


def _continuous(subject: Subject, worlds: list[Table]) -> Iterator[Check]:
    worst, leftover = 0.0, 0.0
    for world in worlds:
        text, process = world.texts[world.p > 0], subject.ideal(world)
        worst = most(worst, (continuous_bound(process, text) + world.log_prob(text)).abs().max())
        leftover = most(leftover, prior_term(process, text).max())
    yield Check(
        "bound(x) = -log p(x) for every x, the posterior exact",
        worst,
        # Where some text is left at t = 1, the bound exceeds -log p by what the prior does not know of it.
        (1e-6 if isinstance(process.space, Discrete) else 1e-3) + (3 * leftover if leftover < 1 else 0.0),
        "the bound's weight, its integrand, or the use of the posterior in it",
    )
    total, gaps, below = 0.0, [], -math.inf
    for seed in range(2):
        process = subject.wrong(worlds[0], seed)
        bound = continuous_bound(process, worlds[0].texts)
        total = most(total, bound.neg().exp().sum())
        below = most(below, _below_its_law(process, worlds[0], bound))
        for sampler, step in process.steps.items():
            if step.reverses and claimed(process, sampler, 2):
                # First order in 1 / T: two of them give the limit.
                few, many = (_call_bound(process, worlds[0].texts, calls, sampler) for calls in (32, 64))
                gaps.append(float((2 * many - few - bound).abs().max()) / most((many - bound).abs().max(), 1e-3))
    if below > -math.inf:
        yield Check(
            "bound(x) >= -log of the law of many calls, wrong models",
            below,
            0.01,
            "what is called a bound is below what its sampler gives (in nats; the limit is read off 32 and 64 calls)",
        )
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


def _below_its_law(process: Any, world: Table, bound: Tensor) -> float:
    """How far the continuous bound is below -log of its sampler's law at many calls, for a step that does not say of
    itself that it is the noise reversed; -inf where the next check sees to it."""
    said = process.nll(world.texts, Noise.of(0, len(world.texts)))
    if hasattr(process, "patterns"):
        # One position a call is as many as there can be.
        return float((-enumerated_law(process, world.length, world.length, said.sampler).log() - bound).max())
    enumerable = isinstance(process, HasKernel) and not isinstance(process, HasCurve)  # a curve has checks of its own
    if said.kind != "upper" or not enumerable:
        return -math.inf
    if said.sampler not in process.steps or process.steps[said.sampler].reverses:
        return -math.inf
    if process.remembers:
        raise UserError("a bound in continuous time, of steps that remember, is not proven by anything here")
    # First order in 1 / T, as the bound is.
    few, many = (-enumerated_law(process, world.length, calls, said.sampler).log() for calls in (32, 64))
    return float((2 * many - few - bound).max())


def _curve(subject: Subject) -> Iterator[Check]:
    world = random_table(V, L)
    process, text = subject.wrong(world, 0), world.texts
    exact = exact_curve(process, text)
    worst = 0.0
    # Texts and numbers mixed in one batch, as in evaluation.
    cases = list(itertools.product(SHOWN, range(1, L + 1)))
    which = torch.arange(DRAWS) % len(cases)
    chosen, hidden = torch.tensor(cases)[which].T
    draws = process.curve_point(text[chosen], hidden, Noise.of(0, DRAWS)).double()
    for i, (number, n) in enumerate(cases):
        some = draws[which == i]
        error = most(float(some.std()) / len(some) ** 0.5, 1e-6)
        worst = most(worst, abs(float(some.mean()) - exact[number, n]) / error)
    yield Check("curve_point estimates the curve", worst, DEVIATIONS, "its mean is not the enumerated curve")
    whole = torch.from_numpy(exact @ process.curve_weights(L, None)[0])
    if isinstance(process, HasKernel):
        yield Check(
            "the curve's continuous bound is the integral, wrong model",
            float((whole - integrated_bound(process, text)).abs().max()),
            1e-6,
            "curve_weights(length, None), or a network that takes time, for which there is no curve",
        )


def _estimates(subject: Subject, world: Table, sampler: str | None = None) -> Iterator[Check]:
    """Means of nll's draws, for wrong models, in continuous time and for 2 calls (where positions hold reals, also 4:
    several moves, with what is carried between them); of the process as it is, or as a sampler runs it that makes
    another of it."""
    estimated = []
    cases: list[tuple[int, int | None]] = [(0, None), (1, None), (0, 2), (1, 2)]
    if isinstance(subject.silent(world.vocabulary), HasSignal):
        cases.append((0, 4))
    for seed, calls in cases:
        process = subject.wrong(world, seed)
        process = process if sampler is None else process.by(sampler)
        name = ("the bound" if calls is None else f"the bound of {calls} calls") + (f" of {sampler}" if sampler else "")
        # Texts that begin differently, mixed in one batch, as in evaluation.
        chosen = torch.tensor([number % len(world.texts) for number in SHOWN[::2]])
        some = world.texts[chosen]
        try:
            said = process.nll(some, Noise.of(seed, len(some)), calls)
        except UserError:
            continue  # none is claimed
        if said.kind not in ("exact", "upper", "none") or (
            said.kind != "none" and isinstance(process.space, Discrete) and said.sampler not in process.steps
        ):
            yield Check(
                f"nll says whose likelihood {name} is", math.inf, 0, f"kind {said.kind!r}, sampler {said.sampler!r}"
            )
            continue
        if said.kind != "upper":
            continue
        try:
            if by_orders(process) and said.calls is not None:
                exact = _call_bound(process, some, said.calls, said.sampler)
            elif calls is not None:
                exact = _call_bound(process, some, calls, said.sampler)
            elif isinstance(process, (HasKernel, HasSignal, HasPatterns)):
                exact = continuous_bound(process, some)
            else:
                raise UserError("there is neither a kernel nor a signal nor a list of patterns")
        except UserError as refusal:
            yield Check(f"nll claims {name}, and it can be enumerated", math.inf, 0, f"claimed, not proven: {refusal}")
            continue
        estimated.append((name, process, some, exact, calls, seed))
    for name, process, some, exact, calls, seed in estimated:
        off, resolved = _deviation(process, some, exact, calls, seed)
        yield Check(
            f"nll estimates {name} (wrong model {seed + 1})",
            off,
            resolved,
            "the mean of nll's draws is not the enumerated bound (share of it), or they vary too much to tell",
        )


def _deviation(process: Any, some: Tensor, exact: Tensor, calls: int | None, seed: int) -> tuple[float, float]:
    """Largest difference of the mean of nll's draws from the bound, as a share of it, and what may be chance.

    Blocks grow until chance is at most RESOLUTION, or for as long as is bearable.
    """
    rows = DRAWS // BLOCKS
    while True:
        means = torch.zeros(BLOCKS, len(some), dtype=torch.float64)
        for block in range(BLOCKS):
            noise = Noise.of(seed, rows * len(some), step=block)
            total = process.nll(some.repeat(rows, 1), noise, calls).total.double()
            means[block] = total.view(rows, len(some)).mean(0)
        off = most(*((means.mean(0) - exact).abs() / exact))
        chance = DEVIATIONS * most(*(means.std(0) / BLOCKS**0.5 / exact))
        if chance <= RESOLUTION or rows * BLOCKS >= MOST_DRAWS or math.isnan(chance):
            return off, max(chance, 1e-6) if chance <= BLIND else -1.0
        # A little more than independent draws would need: strata only help.
        rows = min(math.ceil(rows * min(1.2 * (chance / RESOLUTION) ** 2, 40)), MOST_DRAWS // BLOCKS)


def _call_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> Tensor:
    if isinstance(process, HasSignal):
        return signal_call_bound(process, x_0, calls, sampler)
    return torch.from_numpy(call_bound(process, x_0, calls, sampler))


def claimed(process: Any, sampler: str, calls: int) -> bool:
    """Whether a bound of this sampler can be enumerated."""
    try:
        call_bound(process, torch.zeros(1, 1, dtype=torch.long), calls, sampler)
    except UserError:
        return False
    return True
