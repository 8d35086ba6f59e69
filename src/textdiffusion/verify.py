"""Prove a family right on worlds small enough to enumerate: its noise, its bound, its samplers.

The exact posterior of a world takes the network's place (``Process.ideal``); then the bound must be -log p(x) for every
text and samples must have the enumerated law. For networks that are wrong, the bound of the T-call sampler must not be
below -log of that sampler's enumerated law for any text. The checks are the same for a family in families/ and for one
in a user's own file: what a family gives (a kernel, a signal, a curve, steps) decides which of them apply.

What cannot be enumerated is drawn, and judged by its own standard error; draws are keyed, so a verdict does not change
from run to run.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textdiffusion.enumeration import (
    call_bound,
    enumerated_law,
    integrated_bound,
    misfit,
    prior_term,
    wrong_network,
)
from textdiffusion.errors import UserError
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.noise import Noise
from textdiffusion.process import Discrete, HasKernel, HasSignal, Network, Process
from textdiffusion.sampling import sample
from textdiffusion.worlds import Table, constant, copy, parity, random_table, uniform

V, L = 3, 3
DRAWS = 4000
ROUNDING = 1e-9  # of float64
DEVIATIONS = 4.5  # standard errors, or standard deviations of chi-square, that draws may be off


@dataclass(frozen=True)
class Check:
    """One check: a figure that must not exceed its tolerance, and what it means if it does."""

    name: str
    figure: float
    tolerance: float
    meaning: str

    @property
    def passed(self) -> bool:
        return self.figure <= self.tolerance  # a NaN fails


class Subject:
    """The family under test, over the networks that the checks put in."""

    def __init__(self, family: type[Process], config: Any = None):
        self.family, self.config = family, family.Config() if config is None else config

    def over(self, network: Network, vocabulary: int) -> Any:
        return self.family(network, self.config, vocabulary)

    def ideal(self, world: Table) -> Any:
        """The process whose network knows the world."""
        bare = self.over(_silent(world.vocabulary), world.vocabulary)
        return bare.over(bare.ideal(world.context))

    def wrong(self, world: Table, seed: int) -> Any:
        bare = self.over(_silent(world.vocabulary), world.vocabulary)
        return bare.over(wrong_network(bare, world, seed))


def _silent(vocabulary: int) -> Network:
    """A network whose head is at zero."""

    def network(x: Tensor, *_: Any, positions: Tensor | None = None, **__: Any) -> Tensor:
        out = torch.zeros(*x.shape[:2], vocabulary, dtype=torch.float64)
        return out if positions is None else out[positions]

    return network


def verify(family: type[Process], config: Any = None) -> Iterator[Check]:
    """Every check that fits the family, one by one. A family that cannot be run fails a check that says where."""
    subject = Subject(family, config)
    try:
        process = subject.ideal(random_table(V, L))
    except Exception as error:
        yield _broken("the family can be built", error)
        return
    parts: list[Iterator[Check]] = [_contract(subject)]
    if isinstance(process, HasKernel):
        parts.append(_kernel(process))
    if isinstance(process, HasSignal):
        parts.append(_signal(process))
    if isinstance(process, (HasKernel, HasSignal)):
        parts.append(_bound(subject))
    parts.append(_units(subject))
    parts += [_sampler(subject, sampler) for sampler in process.steps]
    if process.steps:
        parts.append(_infilling(subject))
    if isinstance(process.space, Discrete):
        parts.append(_learning(subject))
    for part in parts:
        try:
            yield from part
        except Exception as error:
            yield _broken("the next check can be made", error)


def _broken(name: str, error: Exception) -> Check:
    """The check that fails when the family's code does, naming the line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error} (line {last.lineno} of {Path(last.filename).name})"
    return Check(name, math.inf, 0, " ".join(said.split()))


# -- contract and units -------------------------------------------------------------------------------------------


def _contract(subject: Subject) -> Iterator[Check]:
    process = subject.ideal(random_table(V, L))
    text = random_table(V, L).texts
    noise = Noise.of(0, len(text))
    back = process.decode(process.q_sample(text, torch.zeros(len(text), dtype=torch.float64), noise))
    yield Check("no noise at t = 0", float((back != text).sum()), 0, "decode(q_sample(x, 0)) is not x")
    prior = process.prior_sample(len(text), L, noise)
    yield Check("the prior is at t = 1", float((prior.t - 1).abs().max()), 0, "sampling starts at another noise level")
    worst = 0.0
    for t in (0.3, 0.7, 1.0):
        state = process.q_sample(text, torch.full((len(text),), t, dtype=torch.float64), noise)
        worst = max(worst, float((process.predict(state).log_p.exp().sum(-1) - 1).abs().max()))
    yield Check("predictions sum to one", worst, 1e-6, "log_p is not normalised: guidance or reshaping without it?")


def _units(subject: Subject) -> Iterator[Check]:
    world = random_table(V, L)
    nll = subject.ideal(world).nll(world.texts, Noise.of(0, len(world.texts)))
    if nll.kind == "exact":
        worst = float((nll.total + world.log_prob(world.texts)).abs().max())
        yield Check("nll(x) = -log p(x) for every x", worst, ROUNDING, "called exact, and is not")
    if nll.kind == "none":
        return
    fair, rows = uniform(V, L), 64
    silent = subject.over(_silent(V), V).nll(fair.texts[:1].expand(rows, -1), Noise.of(0, rows)).total
    error = max(4 * float(silent.std()) / rows**0.5, 1e-6)
    yield Check(
        "a head at zero scores log V a token",
        abs(float(silent.mean()) - L * math.log(V)),
        error,
        "units: base of the logarithm, length, or a prediction that is not uniform when nothing is known",
    )
    sure = constant(V, L)
    nats = subject.ideal(sure).nll(sure.texts[sure.p > 0].expand(rows, -1), Noise.of(0, rows)).total
    yield Check("a certain text costs nothing", float(nats.abs().max()), 1e-4, "units: a constant in the bound")


def _learning(subject: Subject) -> Iterator[Check]:
    fields = subject.family.network_fields(subject.config, V)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Transformer(TransformerConfig(window=4, depth=1, width=16, heads=2, **fields))
    process = subject.over(network, V)
    x = torch.randint(0, V, (8, 4), generator=torch.Generator().manual_seed(0))
    untaught = {name for name, _ in network.named_parameters()}
    # The head starts at zero, and so do what writes to the residual stream and what modulates it: three steps wake all.
    for step in range(4):
        loss = process.loss(x, Noise.of(0, 8, step=step)).mean()
        if loss.requires_grad:
            loss.backward()
        untaught -= {n for n, p in network.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        with torch.no_grad():
            for p in network.parameters():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad.sign())
                    p.grad = None
    yield Check(
        "after three steps a gradient reaches every parameter",
        len(untaught),
        0,
        f"no gradient reaches {', '.join(sorted(untaught)) or 'them'}",
    )


# -- noise --------------------------------------------------------------------------------------------------------


def _kernel(process: Any) -> Iterator[Check]:
    size, times = process.space.size, (0.0, 0.2, 0.5, 0.8, 1.0)
    pairs = [process.kernel(s, t) for s, t in itertools.combinations(times, 2)]
    worst = max(max(float((k.sum(-1) - 1).abs().max()), -float(k.min())) for k in pairs)
    yield Check("the kernel is a law", worst, ROUNDING, "rows of kernel(s, t) are negative or do not sum to one")
    worst = max(
        float((process.kernel(s, t) @ process.kernel(t, u) - process.kernel(s, u)).abs().max())
        for s, t, u in itertools.combinations(times, 3)
    )
    yield Check("Chapman-Kolmogorov", worst, ROUNDING, "noise to t, and from t to u, is not noise to u")
    # Rates by finite differences: forward they carry the marginal, and their reverse by Bayes' rule carries it back.
    worst, h = 0.0, 1e-5
    for t, v in itertools.product((0.3, 0.6), range(V)):
        forward = (process.kernel(t, t + h) - torch.eye(size, dtype=torch.float64)) / h
        q = process.kernel(0.0, t)[v]
        change = (process.kernel(0.0, t + h)[v] - process.kernel(0.0, t - h)[v]) / (2 * h)
        flow = q[:, None] * forward * (1 - torch.eye(size, dtype=torch.float64))  # [from, to]
        backward = flow.T / q.clamp(min=1e-300)[:, None]  # rates of the reverse chain, [from, to]
        returned = (q[:, None] * backward).sum(0) - q * backward.sum(-1)
        worst = max(worst, float((flow.sum(0) - flow.sum(1) - change).abs().max()))
        worst = max(worst, float((returned + change).abs().max()))
    yield Check("rates carry the marginals, reverse rates carry them back", worst, 1e-3, "the kernel is no flow in t")
    end, prior = process.kernel(0.0, 1.0)[:V], process.prior_law()
    uncovered = float(((end > 0) & (prior <= 0)).sum())
    yield Check(
        "the prior covers q(x_1 | x_0)", uncovered, 0, "text is left at t = 1: the bound's prior term is infinite"
    )
    yield Check(
        "q(x_1 | x_0) is the prior, but for 0.01 nat",
        float(prior_term(process, torch.arange(V).unsqueeze(-1)).max()),
        0.01,
        "text is left at t = 1: sampling starts from noise that training never saw",
    )
    rows = 4 * DRAWS
    noise = Noise.of(3, rows)
    worst = _pair_misfit(process.prior_sample(rows, 2, noise).x, prior[:, None] * prior)
    yield Check("prior_sample draws prior_law", worst, DEVIATIONS, "sampling starts from another law than the bound's")
    text, worst = torch.tensor([[0, V - 1]]).expand(rows, -1), 0.0
    for t in (0.25, 0.75):
        q = process.kernel(0.0, t)
        x = process.q_sample(text, torch.full((rows,), t, dtype=torch.float64), noise).x
        worst = max(worst, _pair_misfit(x, q[0][:, None] * q[V - 1]))
    yield Check("q_sample draws the kernel, each position on its own", worst, DEVIATIONS, "training sees other noise")


def _pair_misfit(x: Tensor, law: Tensor) -> float:
    """Misfit of pairs of symbols [n 2] to a joint law [S S]."""
    observed = torch.bincount(x[:, 0] * len(law) + x[:, 1], minlength=law.numel()).double()
    return misfit(observed, law.flatten(), len(x))


def _signal(process: Any) -> Iterator[Check]:
    rows = 4 * DRAWS
    text, worst = torch.tensor([[0, V - 1]]).expand(rows, -1), 0.0
    for t in (0.0, 0.25, 0.75, 1.0):
        alpha, sigma = process.signal(t)
        z = process.q_sample(text, torch.full((rows,), t, dtype=torch.float64), Noise.of(3, rows)).x.double()
        standard = (z - alpha * process.codes().double()[text]) / sigma
        worst = max(worst, float(standard.mean(0).abs().max()) * rows**0.5)
        worst = max(worst, float((standard.var(0) - 1).abs().max()) * (rows / 2) ** 0.5)
        worst = max(worst, float((standard[:, 0] * standard[:, 1]).mean(0).abs().max()) * rows**0.5)
    yield Check("q_sample draws the signal, each position on its own", worst, DEVIATIONS, "training sees other noise")
    z = process.prior_sample(rows, 2, Noise.of(3, rows)).x.double()
    worst = max(float(z.mean(0).abs().max()) * rows**0.5, float((z.var(0) - 1).abs().max()) * (rows / 2) ** 0.5)
    yield Check(
        "prior_sample is standard normal", worst, DEVIATIONS, "sampling starts from another law than the bound's"
    )
    yield Check(
        "q(x_1 | x_0) is the prior, but for 0.01 nat",
        float(prior_term(process, torch.arange(V).unsqueeze(-1)).max()),
        0.01,
        "text is left at t = 1: sampling starts from noise that training never saw",
    )


# -- bounds -------------------------------------------------------------------------------------------------------


def _bound(subject: Subject) -> Iterator[Check]:
    discrete = isinstance(subject.ideal(random_table(V, L)).space, Discrete)
    # A quadrature over reals holds no more than two positions.
    worlds = (
        (random_table(V, L), random_table(2, 4, seed=1), parity(), copy())
        if discrete
        else (random_table(2, 2), parity(2), random_table(V, 1))
    )
    worst = 0.0
    for world in worlds:
        text = world.texts[world.p > 0]
        worst = max(worst, float((integrated_bound(subject.ideal(world), text) + world.log_prob(text)).abs().max()))
    yield Check(
        "bound(x) = -log p(x) for every x, the posterior exact",
        worst,
        1e-6 if discrete else 1e-3,
        "the bound's weight, its integrand, or the use of the posterior in it",
    )
    world, most = worlds[0], 0.0
    for seed in range(3):
        process = subject.wrong(world, seed)
        most = max(most, float(integrated_bound(process, world.texts).neg().exp().sum()))
        for calls in (None, 2):
            some = world.texts[1 + seed : 2 + seed]
            try:
                exact = integrated_bound(process, some) if calls is None else _call_bound(process, some, calls)
                nll = process.nll(some.expand(DRAWS, -1), Noise.of(seed, DRAWS), calls)
            except UserError:
                continue  # no bound for this number of calls
            draws = nll.total.double()
            error = float(draws.std()) / DRAWS**0.5
            yield Check(
                f"nll estimates the {'bound' if calls is None else 'bound of 2 calls'} (wrong model {seed + 1})",
                abs(float(draws.mean()) - float(exact[0])) / max(error, ROUNDING),
                DEVIATIONS,
                "the mean of nll's draws is not the enumerated bound (in standard errors)",
            )
    yield Check(
        "bounds of a wrong model belong to a law", most, 1 + 1e-6, "sum over x of exp(-bound(x)) is above one: no bound"
    )


def _call_bound(process: Any, x_0: Tensor, calls: int) -> Tensor:
    return torch.from_numpy(call_bound(process, x_0, calls, next(iter(process.steps), "")))


# -- samplers -----------------------------------------------------------------------------------------------------


def _drawn(process: Any, calls: int, sampler: str, rows: int, **template: Any) -> Tensor:
    """Counts over all texts of what the code samples, float64 [V^L]; unwritten texts are left out."""
    *_, last = sample(process, Noise.of(11, rows), L, calls, sampler=sampler, **template)
    written = last.tokens[(last.tokens >= 0).all(-1)]
    return torch.bincount(random_table(V, L).index(written), minlength=V**L).double()


def _sampler(subject: Subject, sampler: str) -> Iterator[Check]:
    world, rows = random_table(V, L), 2 * DRAWS
    process = subject.ideal(world)
    worst, total, apart = 0.0, 0.0, []
    for calls in (1, 2, 4, 16):
        law = enumerated_law(process, L, calls, sampler)
        total = max(total, abs(float(law.sum()) - 1))
        apart.append(0.5 * float((law - world.p).abs().sum()))
        if calls in (1, 2):
            worst = max(worst, misfit(_drawn(process, calls, sampler, rows), law, rows))
    yield Check(f"{sampler}: every text is finished", total, ROUNDING, "the law of the samples does not sum to one")
    yield Check(f"{sampler}: samples have the enumerated law", worst, DEVIATIONS, "the code draws from another law")
    shown = ", ".join(f"{x:.3f}" for x in apart)
    yield Check(
        f"{sampler}: 16 calls come close to the world",
        apart[-1],
        max(apart[0] / 4, ROUNDING),
        f"total variation at 1, 2, 4, 16 calls: {shown}",
    )

    below, slack, average = -math.inf, -math.inf, []
    for calls in (1, 2, 4):
        for model in (process, subject.wrong(world, 0), subject.wrong(world, 1)):
            try:
                bound = torch.from_numpy(call_bound(model, world.texts, calls, sampler))
            except UserError:
                return  # no bound is claimed for this sampler
            law = enumerated_law(model, L, calls, sampler)
            below = max(below, float((-law.log() - bound).max()))
            if model is process:
                average.append(float(world.p @ bound))
                divergence = float(torch.special.xlogy(world.p, world.p / law).sum())
                slack = max(slack, world.entropy + divergence - average[-1])
    rise = max(later - earlier for earlier, later in itertools.pairwise(average))
    yield Check(
        f"{sampler}: bound_T(x) >= -log law_T(x) for every x",
        below,
        1e-8,
        "for the exact or a wrong model, what is called the bound of T calls is below what they give",
    )
    yield Check(f"{sampler}: the bound falls along T, 2T, 4T", rise, ROUNDING, "more calls make a worse bound")
    yield Check(
        f"{sampler}: bound_T >= entropy + KL(data || law_T)", slack, 1e-8, "on average the bound is below the truth"
    )


def _infilling(subject: Subject) -> Iterator[Check]:
    world, rows = random_table(V, L), 2 * DRAWS
    process = subject.ideal(world)
    sampler = next(iter(process.steps))
    given = torch.tensor([False, True, False] if process.infills else [True, False, False])
    tokens = world.texts[16]
    agrees = (world.texts[:, given] == tokens[given]).all(-1)
    conditional = world.p * agrees / (world.p * agrees).sum()
    law_of = partial(enumerated_law, process, L, sampler=sampler, tokens=tokens, given=given)
    counts = _drawn(process, 16, sampler, rows, tokens=tokens.expand(rows, -1), given=given.expand(rows, -1))
    yield Check("infilling keeps what is given", float(counts[~agrees].sum()), 0, "given positions were changed")
    law = law_of(calls=16)
    yield Check("infilling draws the enumerated law", misfit(counts, law, rows), DEVIATIONS, "another law is drawn")
    apart = [0.5 * float((x - conditional).abs().sum()) for x in (law_of(calls=1), law)]
    yield Check(
        "infilling comes close to the exact conditional",
        apart[1],
        max(apart[0] / 4, ROUNDING),
        f"total variation at 1 and 16 calls: {apart[0]:.3f}, {apart[1]:.3f}",
    )
