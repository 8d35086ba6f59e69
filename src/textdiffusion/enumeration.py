"""Exact laws and bounds of any family on a world small enough to enumerate; float64 throughout.

Everything goes through the one interface (process.py): the kernel or the signal of the noise, the integrand of the
bound, the law of each reverse step. Verification (verify.py) compares the results with each other and with the code.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.noise import Noise
from textdiffusion.process import HasCurve, HasKernel, HasSignal, Network, Process, State, Step
from textdiffusion.worlds import World

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
        weight = torch.tensor(list(itertools.product((weights / weights.sum()).tolist(), repeat=size))).prod(-1)
        z = mean.unsqueeze(1) + sigma * grid.view(1, -1, *mean.shape[1:])
        row = torch.arange(rows).repeat_interleave(len(grid))
        return row, z.flatten(0, 1), weight.double().repeat(rows)
    raise UserError(f"{type(process).__name__} gives neither a kernel nor a signal to enumerate")


def prior_term(process: Process, x_0: Tensor) -> Tensor:
    """KL(q(x_1 | x_0) || prior), nats [B]."""
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


def call_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> np.ndarray:
    """Bound of the T-call sampler for each text, nats [B].

    Raises:
        UserError: the family has none for this sampler, or none that can be enumerated.
    """
    if isinstance(process, HasCurve):
        return np.asarray(exact_curve(process, x_0) @ process.curve_weights(x_0.shape[1], calls, sampler)[0])
    nll = process.nll(x_0, Noise.of(0, len(x_0)))
    if nll.kind == "exact" and nll.sampler == sampler:
        return np.asarray(nll.total.double())
    if isinstance(process, HasKernel):
        return kernel_call_bound(process, x_0, calls, sampler)
    raise UserError(f"no bound is known for the sampler {sampler!r}")


def kernel_call_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> np.ndarray:
    """KL(q(x_1 | x_0) || prior) + sum over steps of E KL(q(x_s | x_t, x_0) || law of the step), nats [B].

    For samplers that ask about all positions that may change and whose law is that of one step of the reversed chain.

    Raises:
        UserError: a sampler that chooses positions.
    """
    step, length = process.steps[sampler], x_0.shape[1]
    total = prior_term(process, x_0)
    size = process.kernel(0.0, 1.0).shape[0]
    for t, s in itertools.pairwise(process.plan(length, calls, sampler)):
        row, states, chance = noisy_states(process, x_0, t)
        time = torch.tensor([s], dtype=torch.float64)
        to, at_s = process.kernel(s, t), process.kernel(0.0, s)
        bridge = at_s[x_0[row]] * to.T[states]  # [N L S], q(x_s | x_0) q(x_t | x_s)
        bridge = bridge / bridge.sum(-1, keepdim=True)
        unique, inverse = states.unique(dim=0, return_inverse=True)
        laws = torch.zeros(len(unique), length, size, dtype=torch.float64)
        for i, x in enumerate(unique):
            state = at_time(x.unsqueeze(0), t)
            asks = list(step.asks(state, time))
            if len(asks) != 1:
                raise UserError(f"no bound is known for the sampler {sampler!r}")
            law = laws[i] = torch.nn.functional.one_hot(x, size).double()
            if bool(asks[0][1].any()):
                found = step.law(state, asks[0][1], process.predict(state, asks[0][1]), time, lambda log_p: log_p)
                law[found.positions[0]] = torch.nn.functional.pad(
                    found.log_p.double().exp(), (0, size - found.log_p.shape[-1])
                )
            laws[i] = law
        kl = (torch.special.xlogy(bridge, bridge) - torch.special.xlogy(bridge, laws[inverse])).sum((-1, -2))
        total = total.index_add(0, row, chance * kl)
    return total.numpy()


@dataclass(frozen=True)
class _Ways:
    """Ways that a run can have gone: where each stands [n L], its probability [n], and what the family remembers of it
    (None for all, if it remembers nothing: then ways to the same symbols are one)."""

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
    step, noise = process.steps[sampler], Noise.of(0, 1)
    free = torch.ones(length, dtype=torch.bool) if given is None else ~given
    if tokens is not None and given is not None:
        first = process.template(tokens.unsqueeze(0), given.unsqueeze(0), noise)
    else:
        first = process.prior_sample(1, length, noise)
    ways = _Ways(first.x, torch.ones(1, dtype=torch.float64), None)
    if isinstance(process, HasKernel):
        prior = process.prior_law()
        symbols = torch.cartesian_prod(*[prior.nonzero().squeeze(-1)] * int(free.sum())).view(-1, int(free.sum()))
        x = first.x.repeat(len(symbols), 1)
        x[:, free] = symbols
        ways = _Ways(x, prior[symbols].prod(-1), None)
    times, now = process.plan(int(free.sum()), calls, sampler), first.t
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
        for probability, asked in step.asks(State(x.unsqueeze(0), t, given), s):
            if probability * float(ways.chance[i]) > 0:
                start.append(i)
                share.append(probability * float(ways.chance[i]))
                asks.append(asked)
    chance, asked = torch.tensor(share, dtype=torch.float64), torch.cat(asks)
    waits = ~asked.any(-1)
    x, row = [ways.x[start][waits]], [torch.arange(len(start))[waits]]
    p = [torch.ones(int(waits.sum()), dtype=torch.float64)]
    memory = [ways.memory[start[i]] for i in row[0]] if ways.memory is not None else []
    # Without a memory one network call serves all; with one, each way is a call of its own.
    moving = torch.arange(len(start))[~waits]
    for part in [moving] if ways.memory is None and len(moving) else moving.unsqueeze(-1):
        remembered = None if ways.memory is None else ways.memory[start[int(part[0])]]
        here = ways.x[[start[i] for i in part]]
        state = State(here, t.expand(len(part)), None if given is None else given.expand(len(part), -1), remembered)
        prediction = process.predict(state, asked[part])
        if prediction.memory is not None and len(part) > 1:
            # The first step of a family that remembers: from here on, way by way.
            alone = _Ways(ways.x, ways.chance, [None] * len(ways.x))
            return _after(process, step, alone, t, s, given)
        law = step.law(state, asked[part], prediction, s.expand(len(part)), lambda log_p: log_p)
        sizes = law.positions.sum(-1).tolist()
        for i, one, positions, log_p in zip(part, here, law.positions, law.log_p.split(sizes), strict=True):
            y, q = _outcomes(one, positions, log_p.double().exp())
            x.append(y)
            p.append(q)
            row.append(i.expand(len(y)))
            memory += [prediction.memory] * len(y)
    return _Ways(
        torch.cat(x), torch.cat(p) * chance[torch.cat(row)], None if all(m is None for m in memory) else memory
    )


def _outcomes(x: Tensor, positions: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Every text [K L] that independent draws from p [M S] at M positions of x [L] can lead to, and its chance [K]."""
    size = p.shape[-1]
    symbols = torch.cartesian_prod(*[torch.arange(size)] * len(p)).view(-1, len(p))
    chance = p.gather(1, symbols.T).prod(0)
    symbols, chance = symbols[chance > 0], chance[chance > 0]
    y = x.repeat(len(symbols), 1)
    y[:, positions] = symbols
    return y, chance


def wrong_network(process: Process, world: World, seed: int) -> Network:
    """A network that is wrong, differently for every noisy text: the ideal outputs, disturbed by what it reads.

    Its disturbance at a position is a function of the positions up to it, so that a causal family may use it too.
    """
    ideal = process.ideal(world.context)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reading = random(world.length, getattr(process.space, "size", 1) + 1, world.length, world.vocabulary)

    def network(x: Tensor, *args: Any, positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        places = torch.arange(x.shape[1])
        read = reading[places, x] if x.dim() == 2 else x.mean(-1)[..., None, None] * reading[places, 0]
        out = ideal(x, *args, **kwargs).clamp(min=-20)
        out = out + 2 * torch.sin(3 * read.cumsum(1))[:, places, places]
        return out if positions is None else out[positions]

    return network


def misfit(observed: Tensor, law: Tensor, rows: int) -> float:
    """How far counts over all outcomes are from a law of ``rows`` draws, in standard deviations of chi-square.

    Cells of expectation under 5 are pooled with draws that had no outcome; infinite where something was drawn that
    cannot be.
    """
    if float(observed[law <= 0].sum()) > 0:
        return math.inf
    expected = law * rows
    big = expected >= 5
    e = torch.cat((expected[big], (rows - expected[big].sum()).clamp(min=0).unsqueeze(0)))
    o = torch.cat((observed[big], (rows - observed[big].sum()).unsqueeze(0)))
    if float(e[-1]) < 1e-6 * rows:  # nothing to pool but rounding
        if float(o[-1]) > 0:
            return math.inf
        e, o = e[:-1], o[:-1]
    degrees = max(len(e) - 1, 1)
    return (float(((o - e) ** 2 / e).sum()) - degrees) / (2 * degrees) ** 0.5
