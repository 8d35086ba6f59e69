"""Exact laws and bounds of any family on a world small enough to enumerate; float64 throughout.

Everything goes through the one interface (process.py): the kernel or the signal of the noise, the integrand of the
bound, the law of each reverse step. The other files here compare the results with each other and with the code.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import Table
from textdiffusion.process import (
    Categorical,
    HasCurve,
    HasKernel,
    HasOrders,
    HasPatterns,
    HasSignal,
    Process,
    State,
    Step,
)

NODES = 80  # of the quadrature over time
NORMAL_NODES = 41  # of the quadrature over each real of a Gaussian state


def at_time(x: Tensor, t: float) -> State:
    """States that all stand at time t."""
    return State(x, torch.full((len(x),), t, dtype=torch.float64))


def time_nodes() -> list[tuple[float, float]]:
    """Nodes and weights on (0, 1), close together at both ends, where integrands may have logarithms."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    u, w = (nodes + 1) / 2, weights / 2
    return list(zip((u * u * (3 - 2 * u)).tolist(), (w * 6 * u * (1 - u)).tolist(), strict=True))


def noisy_states(process: Process, x_0: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every state that texts [B L] can be in at time t: row of the text [N], state [N L ...], probability [N]."""
    rows, length = x_0.shape
    if isinstance(process, HasKernel):
        q = process.kernel(0.0, t)[x_0]  # [B L S]
        states = torch.tensor(list(itertools.product(range(q.shape[-1]), repeat=length)))
        chance = q.gather(2, states.T.expand(rows, -1, -1)).prod(1)  # [B S^L]
        row, state = (chance > 0).nonzero(as_tuple=True)
        return row, states[state], chance[row, state]
    if isinstance(process, HasSignal):
        alpha, sigma = process.signal(t)
        mean = alpha * process.codes().double()[x_0]  # [B L W]
        # Equal steps: where codes are told apart, far out on the normal's tail, Gauss-Hermite has hardly a node.
        nodes = np.linspace(-6, 6, NORMAL_NODES)
        weights = np.exp(-(nodes**2) / 2)
        size = length * mean.shape[-1]
        grid = torch.tensor(list(itertools.product(nodes.tolist(), repeat=size)), dtype=torch.float64)
        weight = torch.tensor(
            list(itertools.product((weights / weights.sum()).tolist(), repeat=size)), dtype=torch.float64
        ).prod(-1)
        z = mean.unsqueeze(1) + sigma * grid.view(1, -1, *mean.shape[1:])
        row = torch.arange(rows).repeat_interleave(len(grid))
        return row, z.flatten(0, 1), weight.repeat(rows)
    raise UserError(f"{type(process).__name__} gives neither a kernel nor a signal to enumerate")


def prior_term(process: Process, x_0: Tensor) -> Tensor:
    """KL(q(x_1 | x_0) || prior), nats [B]; none where bounds are of patterns: all is hidden at t = 1."""
    if isinstance(process, HasPatterns):
        return torch.zeros(len(x_0), dtype=torch.float64)
    if isinstance(process, HasKernel):
        end = process.kernel(0.0, 1.0)[x_0]
        return (torch.special.xlogy(end, end) - torch.special.xlogy(end, process.prior_law())).sum((-1, -2))
    assert isinstance(process, HasSignal)
    alpha, sigma = process.signal(1.0)
    square = (alpha * process.codes().double()[x_0]).square()
    return 0.5 * (square + sigma**2 - 1 - 2 * math.log(sigma)).sum((-1, -2))


def integrated_bound(process: Any, x_0: Tensor) -> Tensor:
    """KL(q(x_1 | x_0) || prior) + integral over time of E rate + E reconstruction, nats [B]."""
    total = prior_term(process, x_0)
    for t, weight in time_nodes():
        row, states, chance = noisy_states(process, x_0, t)
        total = total.index_add(0, row, weight * chance * process.rate(x_0[row], at_time(states, t)).double())
    if hasattr(process, "reconstruction"):
        row, states, chance = noisy_states(process, x_0, 0.0)
        total = total.index_add(0, row, chance * process.reconstruction(x_0[row], at_time(states, 0.0)).double())
    return total


def exact_curve(process: Any, x_0: Tensor) -> np.ndarray:
    """curve(n) of each text (process.HasCurve), float64 [B, L + 1], by enumeration of the hidden positions."""
    length = x_0.shape[1]
    curve = np.zeros((len(x_0), length + 1))
    for n in range(1, length + 1):
        sets = list(itertools.combinations(range(length), n))
        for chosen in sets:
            hidden = torch.zeros(x_0.shape, dtype=torch.bool)
            hidden[:, list(chosen)] = True
            log_p = process.predict(at_time(x_0.masked_fill(hidden, process.mask), n / length)).log_p
            nats = -log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1)[:, list(chosen)].mean(-1)
            curve[:, n] += nats.numpy() / len(sets)
    return curve


def pattern_bound(process: Any, x_0: Tensor, calls: int | None, sampler: str | None = None) -> Tensor:
    """The bound of a process that gives its patterns (process.HasPatterns), nats [B]."""
    total = torch.zeros(len(x_0), dtype=torch.float64)
    for weight, hidden, scored in process.patterns(x_0.shape[1], calls, sampler):
        log_p = process.predict(at_time(x_0.masked_fill(hidden, process.mask), float(hidden.double().mean()))).log_p
        total -= weight * log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1)[:, scored].double().sum(-1)
    return total


def by_orders(process: Any) -> bool:
    """Whether the bound of a process, as it is run, is a mean over orders."""
    return isinstance(process, HasOrders) and bool(process.remembers)  # type: ignore[attr-defined]


def order_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> Tensor:
    """The bound of a process that gives its orders (process.HasOrders), nats [B], each way gone from noise to text."""
    total, noise = torch.zeros(len(x_0), dtype=torch.float64), Noise.of(0, len(x_0))
    for chance, groups in process.orders(x_0.shape[1], calls, sampler):
        state = process.prior_sample(*x_0.shape, noise)
        for group in groups:
            asked = group.expand(x_0.shape)
            said = process.predict(state, asked)
            cost = -said.log_p.gather(-1, x_0[asked].unsqueeze(-1)).double()
            total += chance * cost.view(len(x_0), -1).sum(-1)
            state = State(torch.where(asked, x_0, state.x), state.t, memory=said.memory)
    return total


def continuous_bound(process: Any, x_0: Tensor) -> Tensor:
    """The bound in the limit of many calls, nats [B]."""
    return pattern_bound(process, x_0, None) if isinstance(process, HasPatterns) else integrated_bound(process, x_0)


def call_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> np.ndarray:
    """Bound of the T-call sampler for each text, nats [B].

    Raises:
        UserError: the family has none for this sampler, or none that can be enumerated.
    """
    process = process.by(sampler)
    if by_orders(process):
        return order_bound(process, x_0, calls, sampler).numpy()
    if isinstance(process, HasCurve):
        return np.asarray(exact_curve(process, x_0) @ process.curve_weights(x_0.shape[1], calls, sampler)[0])
    if isinstance(process, HasPatterns):
        return pattern_bound(process, x_0, calls, sampler).numpy()
    nll = process.nll(x_0, Noise.of(0, len(x_0)))
    if nll.kind == "exact" and nll.sampler == sampler:
        return np.asarray(nll.total.double())
    alone = process.steps[sampler].reverses and not process.remembers
    if alone and isinstance(process, HasKernel):
        return kernel_call_bound(process, x_0, calls, sampler)
    raise UserError(f"no bound is known for the sampler {sampler!r}")


def calls_of_bound(process: Any, length: int, calls: int, sampler: str) -> int | None:
    """Of how many network calls the bound for ``calls`` says that it is; None if it does not say."""
    process = process.by(sampler)
    if isinstance(process, HasCurve) and not by_orders(process):
        return process.curve_weights(length, calls, sampler)[1]
    text, noise = torch.zeros(1, length, dtype=torch.long), Noise.of(0, 1)
    try:
        said = process.nll(text, noise, calls)
    except UserError:  # a likelihood of one number of calls only
        said = process.nll(text, noise)
    if said.kind == "exact" or (said.sampler == sampler and said.calls is not None):
        return said.calls
    return len(process.plan(torch.ones(length, dtype=torch.bool), calls, sampler)) - 1


def _step_laws(process: Any, states: Tensor, t: float, s: float, sampler: str) -> Tensor:
    """Law of each position after the step from t to s, float64 [N L S], whatever the step asks about."""
    step, size = process.steps[sampler], process.kernel(0.0, 1.0).shape[0]
    time = torch.tensor([s], dtype=torch.float64)
    which, share, asks = [], [], []
    for i, x in enumerate(states):
        for probability, asked in step.asks(at_time(x.unsqueeze(0), t), time):
            which.append(i)
            share.append(probability)
            asks.append(asked)
    asked = torch.cat(asks)
    state = at_time(states[which], t)
    found = step.law(state, asked, process.predict(state, asked), time.expand(len(which)), lambda log_p: log_p)
    laws = one_hot(state.x, size).double()
    laws[found.positions] = pad(found.log_p.double().exp(), (0, size - found.log_p.shape[-1]))
    weight = torch.tensor(share, dtype=torch.float64).view(-1, 1, 1)
    return torch.zeros(*states.shape, size, dtype=torch.float64).index_add(0, torch.tensor(which), weight * laws)


def kernel_call_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> np.ndarray:
    """KL(q(x_1 | x_0) || prior) + sum over steps of E KL(q(x_s | x_t, x_0) || law of the step), nats [B].

    For samplers whose step moves each position on its own.
    """
    total = prior_term(process, x_0)
    for t, s in itertools.pairwise(process.plan(torch.ones_like(x_0[0], dtype=torch.bool), calls, sampler)):
        row, states, chance = noisy_states(process, x_0, t)
        bridge = process.kernel(0.0, s)[x_0[row]] * process.kernel(s, t).T[states]  # q(x_s | x_0) q(x_t | x_s)
        bridge = bridge / bridge.sum(-1, keepdim=True)
        unique, which = states.unique(dim=0, return_inverse=True)
        laws = _step_laws(process, unique, t, s, sampler)[which]
        kl = (torch.special.xlogy(bridge, bridge) - torch.special.xlogy(bridge, laws)).sum((-1, -2))
        total = total.index_add(0, row, chance * kl)
    return total.numpy()


def reversed_chain_error(process: Any, world: Table, sampler: str) -> float:
    """Largest difference, over all states of a run of 3 calls, of a position's law after a step from what the reversed
    chain gives it: sum over v of p(v | x_t) q(x_s | x_t, v)."""
    worst = 0.0
    for t, s in itertools.pairwise(process.plan(torch.ones(world.length, dtype=torch.bool), 3, sampler)):
        states = noisy_states(process, world.texts, t)[1].unique(dim=0)
        p = process.predict(at_time(states, t)).log_p.double().exp()  # [N L V]
        from_v, at_t = process.kernel(0.0, s)[: world.vocabulary], process.kernel(0.0, t)[: world.vocabulary]
        joint = from_v[:, :, None] * process.kernel(s, t)[None]  # [V, symbol at s, symbol at t]
        bridge = (joint / at_t[:, None].clamp(min=1e-300)).permute(2, 0, 1)  # [symbol at t, V, symbol at s]
        expected = torch.einsum("nlv,nlvs->nls", p, bridge[states])
        error = float((_step_laws(process, states, t, s, sampler) - expected).abs().max())
        worst = error if not error <= worst else worst
    return worst


@dataclass(frozen=True)
class _Ways:
    """Ways that a run can have gone: where each stands [n L], its probability [n], and what the family remembers of it.

    Where nothing is remembered, ways to the same symbols are one.
    """

    x: Tensor
    chance: Tensor
    memory: list[Any] | None

    def merged(self) -> _Ways:
        if self.memory is not None:
            return self
        x, which = self.x.unique(dim=0, return_inverse=True)
        return _Ways(x, torch.zeros(len(x), dtype=torch.float64).index_add(0, which, self.chance), None)


def enumerated_law(
    process: Process, length: int, calls: int, sampler: str, tokens: Tensor | None = None, given: Tensor | None = None
) -> Tensor:
    """Exact law of what ``sample`` returns, float64 [V^L], by following every outcome of every step.

    With ``tokens`` and ``given`` [L], of the infilled template. Texts that stay unwritten are missing from its sum.
    """
    process, noise = process.by(sampler), Noise.of(0, 1)
    step = process.steps[sampler]
    free = torch.ones(length, dtype=torch.bool) if given is None else ~given
    if tokens is not None and given is not None:
        first = process.template(tokens.unsqueeze(0), given.unsqueeze(0), noise)
    else:
        first = process.prior_sample(1, length, noise)
    x, chance = first.x, torch.ones(1, dtype=torch.float64)
    if isinstance(process, HasKernel):
        prior = process.prior_law()
        symbols = torch.cartesian_prod(*[prior.nonzero().squeeze(-1)] * int(free.sum())).view(-1, int(free.sum()))
        x, chance = first.x.repeat(len(symbols), 1), prior[symbols].prod(-1)
        x[:, free] = symbols
    ways = _Ways(x, chance, None)
    times, now = process.plan(free, calls, sampler), first.t
    for time in times[1:]:
        s = torch.tensor([time], dtype=torch.float64)
        ways = _after(process, step, ways, now, s, first.given).merged()
        now = s
    out = torch.zeros(process.vocabulary**length, dtype=torch.float64)
    text = process.decode(State(ways.x, now.expand(len(ways.x))))
    place = process.vocabulary ** torch.arange(length - 1, -1, -1)
    whole = (text >= 0).all(-1)
    return out.index_add(0, (text[whole] * place).sum(-1), ways.chance[whole])


def _after(process: Process, step: Step, ways: _Ways, t: Tensor, s: Tensor, given: Tensor | None) -> _Ways:
    """All ways after one step."""
    start, share, asks = [], [], []
    for i, x in enumerate(ways.x):
        memory = None if ways.memory is None else ways.memory[i]
        for probability, asked in step.asks(State(x.unsqueeze(0), t, given, memory), s):
            if probability * float(ways.chance[i]) > 0:
                start.append(i)
                share.append(probability * float(ways.chance[i]))
                asks.append(asked)
    asked, here = torch.cat(asks), ways.x[start]
    stands: list[Tensor] = []
    chance: list[Tensor] = []
    after: list[Any] = []
    # A family that remembers is called in every step, so that what it remembers goes on (sampling/reverse.py).
    moving = asked.any(-1) | process.remembers
    for i in (~moving).nonzero().squeeze(-1).tolist():
        stands.append(here[i : i + 1])
        chance.append(torch.tensor([share[i]], dtype=torch.float64))
        after.append(None if ways.memory is None else ways.memory[start[i]])
    # Without a memory one network call serves all; with one, each way is a call of its own.
    index = moving.nonzero().squeeze(-1)
    apart = ways.memory is not None or (process.remembers and carries(process, here[:1], t, given))
    for part in (index.unsqueeze(-1) if apart else [index]) if len(index) else []:
        remembered = None if ways.memory is None else ways.memory[start[int(part[0])]]
        state = State(
            here[part], t.expand(len(part)), None if given is None else given.expand(len(part), -1), remembered
        )
        prediction = process.predict(state, asked[part])
        law = step.law(state, asked[part], prediction, s.expand(len(part)), lambda log_p: log_p)
        assert isinstance(law, Categorical)
        sizes = law.positions.sum(-1).tolist()
        for i, positions, log_p in zip(part.tolist(), law.positions, law.log_p.split(sizes), strict=True):
            y, q = _outcomes(here[i], positions, log_p.double().exp())
            stands.append(y)
            chance.append(share[i] * q)
            after += [prediction.memory] * len(y)
    return _Ways(torch.cat(stands), torch.cat(chance), after if apart else None)


def carries(process: Process, x: Tensor, t: Tensor, given: Tensor | None = None) -> bool:
    """Whether something is remembered of a call for x [1 L]: a network without a cache leaves some families nothing
    to remember."""
    if not process.remembers:
        return False
    return process.predict(State(x, t, given), torch.ones_like(x, dtype=torch.bool)).memory is not None


def _outcomes(x: Tensor, positions: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Every text [K L] that independent draws from p [M S] at M positions of x [L] can lead to, and its chance [K]."""
    if not len(p):
        return x.unsqueeze(0), torch.ones(1, dtype=torch.float64)
    size = p.shape[-1]
    symbols = torch.cartesian_prod(*[torch.arange(size)] * len(p)).view(-1, len(p))
    chance = p.gather(1, symbols.T).prod(0)
    symbols, chance = symbols[chance > 0], chance[chance > 0]
    y = x.repeat(len(symbols), 1)
    y[:, positions] = symbols
    return y, chance


def misfit(observed: Tensor, law: Tensor, rows: int) -> float:
    """How improbable counts over all outcomes are, were the law right: -log10 of chi-square's tail.

    Draws that had no outcome are a cell of their own, of what the law lacks to one; cells of small expectation are
    pooled. Infinite where something was drawn that cannot be.
    """
    lost, lacking = rows - float(observed.sum()), 1 - float(law.sum())
    if float(observed[law <= 0].sum()) > 0 or (lost > 0 and lacking < 1e-9):
        return math.inf
    e = torch.cat((law[law > 0] * rows, torch.tensor([max(lacking, 0.0) * rows], dtype=torch.float64)))
    o = torch.cat((observed[law > 0], torch.tensor([lost], dtype=torch.float64)))
    order = e.argsort()
    e, o = e[order], o[order]
    pooled = int((e.cumsum(0) < 5).sum()) + 1
    e = torch.cat((e[:pooled].sum().unsqueeze(0), e[pooled:]))
    o = torch.cat((o[:pooled].sum().unsqueeze(0), o[pooled:]))
    if len(e) < 2:
        return 0.0
    chi_square = ((o - e) ** 2 / e).sum()
    degrees = torch.tensor((len(e) - 1) / 2, dtype=torch.float64)
    return -math.log10(max(float(torch.special.gammaincc(degrees, chi_square / 2)), 1e-300))
