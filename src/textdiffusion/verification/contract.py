"""The contract of the interface, the units of likelihoods, and a real network in the family's hands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.noise import Noise
from textdiffusion.process import Discrete, HasKernel, HasSignal
from textdiffusion.sampling import sample
from textdiffusion.verification.enumeration import integrated_bound, prior_term
from textdiffusion.verification.subject import DRAWS, ROUNDING, Check, L, Subject, V, most
from textdiffusion.worlds import constant, random_table


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
        times = list(process.plan(L, 2, name))
        falls = all(a > b for a, b in itertools.pairwise(times))
        ok = falls and times[0] == 1 and times[-1] == 0
        yield Check(f"{name}: the plan falls from 1 to 0", 0 if ok else 1, 0, f"plan({L}, 2) is {times}")
    worst = 0.0
    for t in (0.3, 0.7, 1.0):
        for model in (process, subject.wrong(world, 0)):
            state = model.q_sample(text, torch.full((len(text),), t, dtype=torch.float64), noise)
            worst = most(worst, (model.predict(state).log_p.exp().sum(-1) - 1).abs().max())
    yield Check("predictions sum to one", worst, 1e-6, "log_p is not normalised: guidance or reshaping without it?")


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
    sure = constant(V, L)
    nll = subject.ideal(sure).nll(sure.texts[sure.p > 0].expand(rows, -1), Noise.of(0, rows))
    nats = (nll.total - nll.prior).abs().max()
    yield Check("a certain text costs nothing but the prior term", float(nats), 1e-4, "units: a constant in the bound")


def real_network(subject: Subject) -> Iterator[Check]:
    """A small transformer: gradients, sampling, infilling."""
    size = {"window": 4, "depth": 1, "width": 16, "heads": 2}
    fields = size | subject.family.network_fields(subject.config, V)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Transformer(TransformerConfig(**fields))
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
    given = torch.tensor([[False, True, True, False] if process.infills else [True, True, False, False]]).expand(8, -1)
    wrong = 0
    for sampler in process.steps:
        *_, free = sample(process, Noise.of(0, 8), 4, 3, sampler=sampler)
        *_, filled = sample(process, Noise.of(0, 8), 4, 3, sampler=sampler, tokens=x, given=given)
        wrong += int((free.tokens < 0).sum() + (filled.tokens < 0).sum() + (filled.tokens != x)[given].sum())
    yield Check("a real network writes, and keeps what is given", wrong, 0, "tokens are unwritten, or were changed")
