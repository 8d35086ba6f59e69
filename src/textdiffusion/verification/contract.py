"""The contract of the interface, the units of likelihoods, and a real network in the family's hands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import Table, constant, random_table
from textdiffusion.networks.bodies import BODIES, network_of
from textdiffusion.networks.candidates import Slots
from textdiffusion.networks.network import TextNetwork
from textdiffusion.networks.shape import TransformerConfig
from textdiffusion.process import Discrete, HasCandidates, HasCurve, HasKernel, HasPatterns, HasSignal, Network, Step
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification.enumeration import integrated_bound, misfit, pattern_bound, prior_term
from textdiffusion.verification.subject import DEVIATIONS, DRAWS, IMPROBABLE, ROUNDING, Check, L, Subject, V, most


def contract(subject: Subject) -> Iterator[Check]:
    """Times 0 and 1, the plan, normalised predictions."""
    world = random_table(V, L)
    process, text = subject.ideal(world), world.texts
    noise = Noise.of(0, len(text))
    back = process.decode(process.q_sample(text, torch.zeros(len(text), dtype=torch.float64), noise))
    yield Check("no noise at t = 0", float((back != text).sum()), 0, "decode(q_sample(x, 0)) is not x")
    prior = process.prior_sample(len(text), L, noise)
    yield Check("the prior is at t = 1", float((prior.t - 1).abs().max()), 0, "sampling starts at another noise level")
    for name in process.steps:
        bad = []
        # Fewer calls than positions, as many, more; and the one position of a template that is nearly full.
        for length, calls in itertools.product((1, L, 8), (1, 2, 3, 5, 64)):
            times = list(process.plan(torch.ones(length, dtype=torch.bool), calls, name))
            falls = all(a > b for a, b in itertools.pairwise(times))
            if not (falls and times[0] == 1 and times[-1] == 0):
                bad.append(f"plan({length}, {calls}) is {times[:4]} ... {times[-1:]}")
        yield Check(f"{name}: the plan falls from 1 to 0", len(bad), 0, "; ".join(bad[:2]) or "it does")
    yield from _draws(subject)
    worst = 0.0
    for t in (0.3, 0.7, 1.0):
        for model in (process, subject.wrong(world, 0)):
            state = model.q_sample(text, torch.full((len(text),), t, dtype=torch.float64), noise)
            worst = most(worst, (model.predict(state).log_p.exp().sum(-1) - 1).abs().max())
    yield Check("predictions sum to one", worst, 1e-6, "log_p is not normalised: guidance or reshaping without it?")


def _draws(subject: Subject) -> Iterator[Check]:
    """Randomness comes from the argument, row by row."""
    world = random_table(V, L)
    process, rows = subject.wrong(world, 0), torch.tensor([7, 2, 5])
    noise, t = Noise.of(4, len(world.texts)), torch.full((len(world.texts),), 0.6, dtype=torch.float64)
    unequal = 0
    acts: list[Callable[[Tensor, Tensor, Noise], Tensor]] = [
        lambda text, t, noise: process.q_sample(text, t, noise).x,
        lambda text, t, noise: process.loss(text, noise),
        lambda text, t, noise: process.prior_sample(len(text), L, noise).x,
    ]
    if isinstance(process, HasCurve):
        acts.append(lambda text, t, noise: process.curve_point(text, (noise.stratified("count") * L).long() + 1, noise))
    if _claims(process, 2):
        acts.append(lambda text, t, noise: process.nll(text, noise, 2).total)
    runs = [process.by(name) for name in process.steps]
    acts += [partial(_cost, run) for run in (process, *(other for other in runs if other is not process))]
    for step in process.steps.values() if isinstance(process.space, Discrete) else ():
        acts.append(partial(_asked, process, step))
    for act in acts:
        whole, part = act(world.texts, t, noise), act(world.texts[rows], t[rows], noise.select(rows))
        unequal += int(not torch.allclose(whole[rows].double(), part.double(), rtol=1e-9, atol=1e-12))
    yield Check(
        "the same row has the same draws in any batch",
        unequal,
        0,
        "what q_sample, nll, loss, prior_sample, curve_point or a step draws is not of ``noise`` alone, or of its row",
    )
    if not isinstance(process.space, Discrete):
        return
    state, s = process.prior_sample(len(noise.rows), L, noise), torch.zeros(len(noise.rows), dtype=torch.float64)
    others = {}
    for name, step in process.steps.items():
        asked = step.ask(state, s, noise)
        # At time 0 there is only text, and only the one token of a law that has no other.
        law = step.law(state, asked, process.predict(state, asked), s, _first_token_alone)
        others[name] = float(law.log_p.exp()[:, 1:V].sum(-1).max())
    deaf = ", ".join(name for name, chance in others.items() if not chance <= ROUNDING)
    yield Check(
        "temperature and top-p reach every step",
        most(*others.values()),
        ROUNDING,
        f"laws reshaped to one token leave the others a chance in {deaf or 'none'}",
    )


def _cost(process: Any, text: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """Nats of texts, [B], as one draw says."""
    return torch.as_tensor(process.nll(text, noise).total)


def _asked(process: Any, step: Step, text: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """What a step from times t [B] to half of them asks about, bool [B L]."""
    return step.ask(process.q_sample(text, t, noise), t / 2, noise)


def _first_token_alone(log_p: Tensor) -> Tensor:
    """Log-laws [N V] reshaped as by a top-p of nothing, were the first token always the likeliest."""
    return torch.full_like(log_p, -torch.inf).index_fill(-1, torch.zeros(1, dtype=torch.long), 0.0)


def _claims(process: Any, calls: int) -> bool:
    """Whether there is a likelihood of exactly so many calls."""
    try:
        process.nll(torch.zeros(1, L, dtype=torch.long), Noise.of(0, 1), calls)
    except UserError:
        return False
    return True


def units(subject: Subject) -> Iterator[Check]:
    """What nothing known, and everything known, must cost."""
    world, rows = random_table(V, L), DRAWS
    nll = subject.ideal(world).nll(world.texts, Noise.of(0, len(world.texts)))
    if nll.kind == "exact":
        worst = float((nll.total + world.log_prob(world.texts)).abs().max())
        yield Check("nll(x) = -log p(x) for every x", worst, ROUNDING, "called exact, and is not")
    if nll.kind == "none":
        return
    silent = subject.silent(V)
    enumerable = isinstance(silent, (HasKernel, HasSignal))
    if enumerable:
        text = torch.tensor([[0]])
        nats = integrated_bound(silent, text) - prior_term(silent, text)
        tolerance = 1e-5 if isinstance(silent.space, Discrete) else 1e-3
    else:
        nats = silent.nll(torch.zeros(rows, 1, dtype=torch.long), Noise.of(0, rows)).total
        tolerance = max(4 * float(nats.std()) / rows**0.5, 1e-6)
    yield Check(
        "a head at zero scores log V a token",
        abs(float(nats.mean()) - math.log(V)),
        tolerance,
        "units: base of the logarithm, length, or a prediction that is not uniform when nothing is known",
    )
    text = world.draw(rows, seed=0)
    costs = [float(p.loss(text, Noise.of(0, rows)).double().mean()) for p in _models(subject, world)]
    yield Check(
        "the loss prefers the truth to wrong models",
        costs[0] - min(costs[1:]),
        0,
        f"the mean loss of the exact posterior is {costs[0]:.4g}, of wrong models {costs[1]:.4g} and {costs[2]:.4g}",
    )
    yield Check(
        "at the truth the loss has no slope",
        most(*(_slope(subject, world, text, seed) for seed in (None, 0, 1))),
        DEVIATIONS,
        "training ends beside the exact posterior: what the loss fits is not what the bound and the steps take it for",
    )
    sure = constant(V, L)
    nll = subject.ideal(sure).nll(sure.texts[sure.p > 0].expand(rows, -1), Noise.of(0, rows))
    nats = (nll.total - nll.prior).abs().max()
    yield Check("a certain text costs nothing but the prior term", float(nats), 1e-4, "units: a constant in the bound")


def _slope(subject: Subject, world: Table, text: Tensor, seed: int | None) -> float:
    """How the mean loss changes along a short way through the exact posterior, in standard errors: to a wrong network,
    or (None) to one that is as right, but too sure."""
    noise, losses = Noise.of(1, len(text)), []
    for far in (-1e-3, 1e-3):
        process = subject.ideal(world) if seed is None else subject.wrong(world, seed, far)
        if seed is None:
            process = process.over(_scaled(process.network, 1 + far))
        losses.append(process.loss(text, noise).double())
    change = losses[1] - losses[0]
    return abs(float(change.mean())) * len(text) ** 0.5 / most(change.std(), 1e-12)


def _scaled(network: Network, factor: float) -> Network:
    """The network, its outputs multiplied."""
    return lambda *args, **kwargs: network(*args, **kwargs) * factor


def _models(subject: Subject, world: Table) -> list[Any]:
    """The right one, and two wrong ones."""
    return [subject.ideal(world), subject.wrong(world, 0), subject.wrong(world, 1)]


def _teaches(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all() and (gradient != 0).any())


def _networks(fields: dict[str, Any]) -> Iterator[TextNetwork]:
    """A small network of each body that a family with these fields can have; the transformer is the last."""
    for body in sorted(BODIES, reverse=True):
        try:
            config = TransformerConfig(**fields | {"body": body})
        except UserError:
            continue  # it cannot have that
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = network_of(config)
        yield network


def _untaught(process: Any, network: TextNetwork, x: Tensor) -> set[str]:
    """Parameters that three steps of gradient descent leave without a gradient."""
    untaught = {name for name, _ in network.named_parameters()}
    # The head starts at zero, and so do what writes to the residual stream and what modulates it: three steps wake all.
    for step in range(4):
        loss = process.loss(x, Noise.of(0, 8, step=step)).mean()
        if loss.requires_grad:
            loss.backward()
        untaught -= {n for n, p in network.named_parameters() if p.grad is not None and _teaches(p.grad)}
        with torch.no_grad():
            for p in network.parameters():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad.sign())
                    p.grad = None
    return untaught


def real_network(subject: Subject) -> Iterator[Check]:
    """Small networks, of every body that the family can have: gradients, sampling, infilling."""
    size = {"window": 4, "depth": 1, "width": 16, "heads": 2}
    x = torch.randint(0, V, (8, 4), generator=torch.Generator().manual_seed(0))
    processes, untaught = [], set()
    for network in _networks(size | subject.family.network_fields(subject.config, V)):
        processes.append(subject.over(network, V))
        untaught |= _untaught(processes[-1], network, x)
    process = processes[-1]
    yield Check(
        "after three steps a gradient reaches every parameter",
        len(untaught),
        0,
        f"no gradient reaches {', '.join(sorted(untaught)) or 'them'}",
    )
    given = torch.tensor([[False, True, True, False] if process.infills else [True, True, False, False]]).expand(8, -1)
    wrong = 0
    every = random_table(V, L).texts
    said = process.nll(every, Noise.of(0, len(every)))
    if said.kind == "exact":
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for p in network.parameters():
                p.normal_(std=0.5)
            law = process.nll(every, Noise.of(0, len(every))).total.neg().exp().double()
        off = abs(float(law.sum()) - 1)
        yield Check("a real network's likelihoods sum to one", off, 1e-4, "it reads what it has to predict")
        *_, last = sample(process, Noise.of(11, DRAWS), L, L, sampler=said.sampler)
        drawn = torch.bincount(random_table(V, L).index(last.tokens), minlength=V**L).double()
        yield Check(
            "a real network's samples have its likelihood",
            misfit(drawn, law / law.sum(), DRAWS),
            IMPROBABLE,
            "sampling reads other than scoring does: a cache, or the places of what is read",
        )
    if isinstance(subject.silent(V), HasPatterns):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for p in network.parameters():
                p.normal_(std=0.5)
            draws = torch.stack(
                [process.nll(every, Noise.of(0, len(every), step=k)).total.double() for k in range(200)]
            )
            bound = pattern_bound(process, every, None)
        error = (draws.std(0) / len(draws) ** 0.5).clamp(min=1e-5)
        yield Check(
            "a real network's bound is that of its predictions",
            most(((draws.mean(0) - bound).abs() / error).max()),
            DEVIATIONS,
            "it reads what it has to predict: the clean text beside the noisy one",
        )
    if isinstance(process, HasCandidates):
        yield _order_of_slots(process, network)
    for each in processes:
        for sampler in each.steps:
            *_, free = sample(each, Noise.of(0, 8), 4, 3, sampler=sampler)
            *_, filled = sample(each, Noise.of(0, 8), 4, 3, sampler=sampler, tokens=x, given=given)
            wrong += int((free.tokens < 0).sum() + (filled.tokens < 0).sum() + (filled.tokens != x)[given].sum())
    yield Check("a real network writes, and keeps what is given", wrong, 0, "tokens are unwritten, or were changed")


@torch.no_grad()
def _order_of_slots(process: Any, network: TextNetwork) -> Check:
    """Slots of positions in another order, before the first call and after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for p in network.parameters():
            p.normal_(std=0.5)
    prior = process.prior_sample(8, 4, Noise.of(0, 8))
    worst, slots = 0.0, process.first(prior.x)
    for _ in range(2):
        said = process.answer(prior.x, slots, None)
        turned = Slots(slots.symbols.flip(-1), slots.log_p.flip(-1))
        off = (process.answer(prior.x, turned, None) - said).abs().max()
        worst = most(worst, off / said.abs().max())
        slots = process.best(prior.x, said.flatten(0, 1))
    return Check("the order of the candidates changes nothing", worst, 1e-5, "a slot is known by its number")
