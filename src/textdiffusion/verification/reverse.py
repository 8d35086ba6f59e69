"""The reverse process: do samplers draw the law that their steps state, and are their bounds bounds?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.process import HasKernel
from textdiffusion.sampling.deterministic_order import order_nll
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification.enumeration import (
    call_bound,
    calls_of_bound,
    carries,
    enumerated_law,
    misfit,
    reversed_chain_error,
)
from textdiffusion.verification.subject import DRAWS, IMPROBABLE, ROUNDING, Check, L, Subject, V, most

WORLD = random_table(V, L)


def _carries(process: Any, sampler: str) -> bool:
    process = process.by(sampler)
    first = process.prior_sample(1, L, Noise.of(0, 1))
    return carries(process, first.x, first.t)


def _drawn(process: Any, calls: int, sampler: str, rows: int, **template: Any) -> Tensor:
    """Counts over all texts of what the code samples, float64 [V^L]; unwritten texts are left out."""
    *_, last = sample(process, Noise.of(11, rows), L, calls, sampler=sampler, **template)
    written = last.tokens[(last.tokens >= 0).all(-1)]
    return torch.bincount(WORLD.index(written), minlength=V**L).double()


def sampler(subject: Subject, name: str) -> Iterator[Check]:
    """The law of a sampler's texts, the code's draws, and the bound of T calls."""
    rows, ideal = DRAWS, subject.ideal(WORLD)
    step = ideal.steps[name]
    if step.reverses and isinstance(ideal, HasKernel):
        yield Check(
            f"{name}: its step is the reversed chain's, each position on its own",
            reversed_chain_error(ideal, WORLD, name),
            ROUNDING,
            "the law of a step is not sum over v of p(v | x_t) q(x_s | x_t, v)",
        )
    worst, unfinished, apart = 0.0, 0.0, []
    # What a family remembers multiplies the ways that a run can go.
    many = 6 if _carries(ideal, name) else 16
    for calls in (1, 2, 4, many):
        law = enumerated_law(ideal, L, calls, name)
        unfinished = most(unfinished, abs(float(law.sum()) - 1))
        apart.append(0.5 * float((law - WORLD.p).abs().sum()))
        if calls <= 4:
            worst = most(worst, misfit(_drawn(ideal, calls, name, rows), law, rows))
    wrong = subject.wrong(WORLD, 0)
    worst = most(worst, misfit(_drawn(wrong, 4, name, rows), enumerated_law(wrong, L, 4, name), rows))
    yield Check(f"{name}: every text is finished", unfinished, ROUNDING, "the law of the samples does not sum to one")
    yield Check(f"{name}: samples have the enumerated law", worst, IMPROBABLE, "the code draws from another law")
    one_by_one = not step.reverses and len(ideal.plan(torch.ones(L, dtype=torch.bool), many, name)) == L + 1
    if not one_by_one:
        shown = ", ".join(f"{x:.3f}" for x in apart)
        yield Check(
            f"{name}: many calls come close to the world",
            apart[-1],
            max(apart[0] * 4 / many, ROUNDING),
            f"total variation at 1, 2, 4, {many} calls: {shown}",
        )
    else:
        yield Check(
            f"{name}: one position a call samples the world", apart[-1], ROUNDING, f"total variation {apart[-1]:.3f}"
        )
    if step.deterministic:
        unlike = (
            (order_nll(model, WORLD.texts, calls, name).total + enumerated_law(model, L, calls, name).log()).abs().max()
            for model, calls in itertools.product((ideal, wrong), (1, 2, L))
        )
        yield Check(
            f"{name}: the likelihood of its order is -log of the law of its samples",
            most(*unlike),
            1e-8,
            "what is called exact is of other texts, or of a sampler that chooses by chance",
        )
    if step.reverses:
        rise = most(*(later - earlier for earlier, later in itertools.pairwise(apart)))
        yield Check(f"{name}: total variation falls along T, 2T, 4T", rise, ROUNDING, "more calls are worse")
    yield from _call_bounds(subject, name)


def _call_bounds(subject: Subject, name: str) -> Iterator[Check]:
    ideal = subject.ideal(WORLD)
    wrong = [subject.wrong(WORLD, seed) for seed in range(2)]
    exact = ideal.nll(WORLD.texts, Noise.of(0, len(WORLD.texts))).kind == "exact"
    below, unequal, understated, average = -math.inf, 0.0, 0, []
    # Also an odd number, one above L, and another length: a bound right for the usual ones alone is none.
    worlds = [(WORLD, calls, [ideal, *wrong]) for calls in (1, 2, 3, 4, 8)]
    longer = random_table(2, 5, seed=2)
    worlds += [(longer, calls, [subject.wrong(longer, 0)]) for calls in (2, 3)]
    for world, calls, models in worlds:
        for model in models:
            if (calls > 4 or world is longer) and _carries(model, name):
                continue  # what a family remembers multiplies the ways that a run can go
            try:
                bound = torch.from_numpy(call_bound(model, world.texts, calls, name))
            except UserError:
                return  # none is claimed for this sampler
            law = enumerated_law(model, world.length, calls, name)
            below = most(below, (-law.log() - bound).max())
            unequal = most(unequal, (law.log() + bound).abs().max())
            if model is ideal and calls in (1, 2, 4):
                average.append(float(WORLD.p @ bound))
    for calls in (1, 2, 8):
        said = calls_of_bound(ideal, L, calls, name)
        *_, last = sample(ideal, Noise.of(3, 50), L, calls, sampler=name)
        understated += said is not None and int(last.calls.max()) > said
    yield Check(
        f"{name}: it makes no more calls than its bound is for", understated, 0, "the bound is that of fewer calls"
    )
    if exact:
        yield Check(
            f"{name}: nll is -log of the law of the samples, right and wrong models", unequal, 1e-8, "not exact"
        )
        return
    yield Check(
        f"{name}: bound_T(x) >= -log law_T(x) for every x",
        below,
        1e-8,
        "for the exact or a wrong model, what is called the bound of T calls is below what they give",
    )
    rise = most(*(later - earlier for earlier, later in itertools.pairwise(average)))
    yield Check(
        f"{name}: the bound falls along T, 2T, 4T, not below the entropy",
        most(rise, WORLD.entropy - average[-1]),
        ROUNDING,
        "with the exact posterior, more calls make a worse bound, or one that is too good",
    )


def infilling(subject: Subject, name: str) -> Iterator[Check]:
    """The law of infilled templates, every pattern of gaps, against the exact conditional."""
    ideal, tokens = subject.ideal(WORLD), WORLD.texts[16]
    patterns = [
        given
        for given in itertools.product((True, False), repeat=L)
        if 0 < sum(given) < L and (ideal.infills or list(given) == sorted(given, reverse=True))
    ]
    # All patterns in one batch, as users may mix them.
    which = torch.arange(DRAWS) % len(patterns)
    *_, last = sample(
        ideal, Noise.of(11, DRAWS), L, 16, sampler=name,
        tokens=tokens.expand(DRAWS, -1), given=torch.tensor(patterns)[which],
    )  # fmt: skip
    changed, unlike, far, shown = 0.0, 0.0, -math.inf, []
    many = 6 if _carries(ideal, name) else 16
    for number, pattern in enumerate(patterns):
        given = torch.tensor(pattern)
        agrees = (WORLD.texts[:, given] == tokens[given]).all(-1)
        conditional = WORLD.p * agrees / (WORLD.p * agrees).sum()
        law_of = partial(enumerated_law, ideal, L, sampler=name, tokens=tokens, given=given)
        drawn = last.tokens[which == number]
        written = drawn[(drawn >= 0).all(-1)]
        counts = torch.bincount(WORLD.index(written), minlength=V**L).double()
        changed += float(counts[~agrees].sum()) + len(drawn) - len(written)
        unlike = most(unlike, misfit(counts, law_of(calls=16), len(drawn)))
        apart = [0.5 * float((law_of(calls=calls) - conditional).abs().sum()) for calls in (1, many)]
        far = most(far, apart[1] - max(apart[0] * 4 / many, ROUNDING))
        shown.append(f"{apart[0]:.3f}, {apart[1]:.3f}")
    yield Check(f"{name}: infilling keeps what is given", changed, 0, "given positions were changed, or gaps left")
    yield Check(f"{name}: infilling draws the enumerated law", unlike, IMPROBABLE, "another law is drawn")
    yield Check(
        f"{name}: infilling comes close to the exact conditional",
        far,
        0,
        f"total variation at 1 and {many} calls, by pattern: {'; '.join(shown)} (figure: what is beyond {4 / many:.2g} "
        "of the first)",
    )
