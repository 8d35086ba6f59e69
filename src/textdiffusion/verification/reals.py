"""Families whose positions hold reals: laws of their samplers, by following every point of a grid.

States are points of a grid with weights. A step without chance moves the points; one with chance spreads each of them
over the grid again. So the laws are as exact as the grid is fine for the densities that steps make (``GRID_ERROR``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textdiffusion.diffusion.drafts import Mixture
from textdiffusion.errors import UserError
from textdiffusion.mathematics.gaussian import posterior
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import Table, parity, random_table
from textdiffusion.process import Categorical, Normal, Prediction, State
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification.enumeration import at_time, misfit, noisy_states, prior_term
from textdiffusion.verification.subject import DRAWS, IMPROBABLE, Check, Subject, V, most

POINTS = {1: 601, 2: 61}  # of the grid, by reals in a text
COARSE = 81  # of one real, where every way to a point is followed by itself
FINE = {1: 1000, 2: 120}  # where no step spreads a point
REACH = 6.5
COIN = Table(torch.tensor([0.3, 0.7], dtype=torch.float64))
GRID_ERROR = 2e-3  # of laws, and nats of bounds
FOLLOWED = 0.8  # smallest deviation, in cells, of a normal whose sum over the grid is right (to 3e-6)


def fitting(subject: Subject) -> list[Table]:
    """Worlds whose texts hold at most two reals; one, where the network reads what it said before.

    Raises:
        UserError: there is none.
    """
    first = subject.ideal(COIN)
    most_reals = 1 if _reads(subject.wrong(COIN, 0), _start(first)) else 2
    worlds = [random_table(2, 2), parity(2), random_table(V, 1), COIN]
    worlds = [w for w in worlds if subject.silent(w.vocabulary).space.width * w.length <= most_reals]
    if not worlds:
        raise UserError("Gaussian noise can be enumerated for up to 2 reals a text; take a smaller config")
    return worlds


def _start(process: Any) -> State:
    state: State = process.prior_sample(2, 1, Noise.of(0, 2))
    return state


def _grid(size: int, number: int) -> tuple[Tensor, float]:
    """Points of a grid over ``size`` reals [n size], and the volume of a cell."""
    line = np.linspace(-REACH, REACH, number)
    points = torch.tensor(list(itertools.product(line.tolist(), repeat=size)), dtype=torch.float64)
    width = float(line[1] - line[0])
    # Aside, and in each direction otherwise: on an axis or a diagonal basins of a symmetric world meet.
    return points + width * torch.tensor([0.17, 0.43], dtype=torch.float64)[:size], width**size


@dataclass(frozen=True)
class _Ways:
    """Ways that a run can have gone: states (all at one time) and the chance of each [n]."""

    state: State
    chance: Tensor

    def spread(self, grid: Tensor, density: Tensor, s: float, memory: Any) -> _Ways:
        """After a step with chance: every way to every point of ``grid`` [m L W], of density [n m] times a cell; ways
        to a point are one where nothing is remembered."""
        rows, points = density.shape
        chance = self.chance.unsqueeze(1) * density
        if memory is None:
            chance, index = chance.sum(0), torch.zeros(points, dtype=torch.long)
            x = grid
        else:
            chance, index = chance.flatten(), torch.arange(rows).repeat_interleave(points)
            x, memory = grid.repeat(rows, *[1] * (grid.dim() - 1)), memory.select(index)
        given = None if self.state.given is None else self.state.given[index]
        return _Ways(State(x, torch.full((len(x),), s, dtype=torch.float64), given, memory), chance)


def _reads(process: Any, state: State) -> bool:
    """Whether predictions depend on what is carried from call to call."""
    free = torch.ones(state.x.shape[:2], dtype=torch.bool)
    few = State(state.x[:2], state.t[:2], None, None)
    first = process.predict(few, free[:2])
    if first.memory is None:
        return False
    return not torch.equal(process.predict(replace(few, memory=first.memory), free[:2]).log_p, first.log_p)


def signal_law(
    process: Any, length: int, calls: int, sampler: str, tokens: Tensor | None = None, given: Tensor | None = None
) -> Tensor:
    """Law of what ``sample`` returns, float64 [V^L]; with ``tokens`` and ``given`` [L], of the infilled template.

    Raises:
        UserError: a step too sharp for the grid.
    """
    step, noise = process.steps[sampler], Noise.of(0, 1)
    free = torch.ones(length, dtype=torch.bool) if given is None else ~given
    first = process.prior_sample(1, length, noise)
    if tokens is not None and given is not None:
        first = process.template(tokens.unsqueeze(0), given.unsqueeze(0), noise)
    size, width = int(free.sum()) * process.space.width, process.space.width
    still, carries = _still(process, sampler), _reads(process, _start(process))
    number = FINE[size] if still else min(POINTS[size], COARSE) if carries else POINTS[size]
    points, cell = _grid(size, number)
    n = len(points)

    def placed(free_reals: Tensor) -> Tensor:
        x = first.x.double().repeat(len(free_reals), 1, 1)
        x[:, free] = free_reals.view(len(free_reals), -1, width)
        return x

    fixed = None if first.given is None else first.given.expand(n, -1)
    memory = None if first.memory is None else first.memory.select(torch.zeros(n, dtype=torch.long))
    chance = torch.exp(-0.5 * points.square().sum(-1)) * cell / (2 * math.pi) ** (size / 2)
    ways = _Ways(State(placed(points), first.t.expand(n), fixed, memory), chance)
    for time in process.plan(free, calls, sampler)[1:]:
        s = torch.full((len(ways.chance),), time, dtype=torch.float64)
        asked = step.ask(ways.state, s, noise)
        prediction = process.predict(ways.state, asked)
        law = step.law(ways.state, asked, prediction, s, lambda log_p: log_p)
        if isinstance(law, Categorical):
            return _texts(process, law, ways.chance, free, tokens, length)
        if still:
            moved = placed(law.mean.view(-1, size))
            ways = replace(ways, state=State(moved, s, ways.state.given, prediction.memory))
            continue
        if float(law.deviation.min()) < FOLLOWED * cell ** (1 / size):
            raise UserError(f"a step with deviation {float(law.deviation.min()):.2g} is too sharp for the grid")
        density = cell * _density(law, points.view(n, -1, width), len(s))
        ways = ways.spread(placed(points), density, time, prediction.memory if carries else None)
    raise UserError("the last step draws no tokens")


def _density(law: Normal | Mixture, points: Tensor, rows: int) -> Tensor:
    """The density [rows m] of a step's law at points [m P W] of the P positions that each of the rows moves."""
    every, (_, positions, width) = torch.ones(rows, len(points), dtype=torch.float64), points.shape
    parts = []
    if isinstance(law, Normal):
        parts = [(torch.zeros((), dtype=torch.float64), law)]
    else:
        tokens = range(law.log_p.shape[-1])
        parts = [(law.log_p[:, v].double(), law.given(torch.full((len(law.log_p),), v))) for v in tokens]
    for i in range(positions):
        # Where a position can be; in a grid over several, each of its places occurs many times.
        places, which = points[:, i].unique(dim=0, return_inverse=True)
        found = torch.zeros(rows, len(places), dtype=torch.float64)
        for log_p, normal in parts:
            mean, deviation = (x.view(rows, positions, -1)[:, i] for x in (normal.mean, normal.deviation))
            share = log_p.exp().expand(rows * positions).view(rows, positions)[:, i : i + 1]
            square = torch.cdist(mean, places).square() / deviation.square()
            found += share * torch.exp(-0.5 * square) / (2 * math.pi) ** (width / 2) / deviation**width
        every *= found[:, which]
    return every


def _texts(process: Any, law: Categorical, chance: Tensor, free: Tensor, tokens: Tensor | None, length: int) -> Tensor:
    """Law of texts [V^L] from that of the tokens at free positions, and the points' chances."""
    p = law.log_p.double().exp().view(len(chance), int(free.sum()), -1)
    joint = p[:, 0]
    for i in range(1, p.shape[1]):
        joint = (joint.unsqueeze(-1) * p[:, i].unsqueeze(1)).flatten(1)
    drawn = chance @ joint
    out = torch.zeros(process.vocabulary**length, dtype=torch.float64)
    symbols = torch.tensor(list(itertools.product(range(process.vocabulary), repeat=p.shape[1])))
    text = torch.zeros(len(symbols), length, dtype=torch.long) if tokens is None else tokens.repeat(len(symbols), 1)
    text[:, free] = symbols
    place = process.vocabulary ** torch.arange(length - 1, -1, -1)
    return out.index_add(0, (text * place).sum(-1), drawn)


def signal_call_bound(process: Any, x_0: Tensor, calls: int, sampler: str) -> Tensor:
    """KL(q(z_1 | x_0) || prior) + sum over moves of E KL(q(z_s | z_t, x_0) || law of the move) + E -log p(x_0 | z) in
    the last call, nats [B]; of moves each on its own, and with chance in each. Where the network reads what it said
    before, expectations are over whole trajectories of the noise.

    Raises:
        UserError: no bound is known for this sampler.
    """
    step, length = process.steps[sampler], x_0.shape[1]
    plan = process.plan(torch.ones_like(x_0[0], dtype=torch.bool), calls, sampler)
    if not _reads(process, _start(process)):
        total = prior_term(process, x_0)
        for t, s in itertools.pairwise(plan):
            row, states, chance = noisy_states(process, x_0, t)
            nats = _nats(process, step, at_time(states, t), x_0[row], t, s)[0]
            total = total.index_add(0, row, chance * nats)
        return total
    if length * process.space.width > 1:
        raise UserError("trajectories of more than one real cannot be enumerated")
    out = []
    for text in x_0:
        total = prior_term(process, text.unsqueeze(0))
        _, states, chance = noisy_states(process, text.unsqueeze(0), 1.0)
        points, cell = _grid(1, COARSE)
        ways = _Ways(at_time(states, 1.0), chance)
        for t, s in itertools.pairwise(plan):
            every = text.expand(len(ways.chance), -1)
            nats, prediction = _nats(process, step, ways.state, every, t, s)
            total = total + (ways.chance * nats).sum()
            if s > 0:
                mean, deviation = posterior(ways.state.x, process.codes().double()[every], *_levels(process, t, s))
                off = (points.view(1, -1) - mean.view(-1, 1)) / deviation
                density = torch.exp(-0.5 * off.square()) * cell / (2 * math.pi) ** 0.5 / deviation
                ways = ways.spread(points.view(-1, 1, 1), density, s, prediction.memory)
        out.append(total)
    return torch.cat(out)


def _nats(process: Any, step: Any, state: State, x_0: Tensor, t: float, s: float) -> tuple[Tensor, Prediction]:
    """What a step costs texts [B L] in the states, [B]; and what was said."""
    time = torch.full((len(x_0),), s, dtype=torch.float64)
    asked = step.ask(state, time, Noise.of(0, 1))
    prediction = process.predict(state, asked)
    law = step.law(state, asked, prediction, time, lambda log_p: log_p)
    if isinstance(law, Categorical):
        return -law.log_p.gather(-1, x_0.reshape(-1, 1)).double().view(x_0.shape).sum(-1), prediction
    if isinstance(law, Mixture):
        raise UserError("no bound is known for a sampler that draws a text in every step")
    return _divergence(process, law, state.x, process.codes().double()[x_0], t, s), prediction


def _levels(process: Any, t: float, s: float) -> list[Tensor]:
    return [2 * torch.log(torch.tensor(a / b, dtype=torch.float64)) for a, b in map(process.signal, (t, s))]


def _divergence(process: Any, law: Normal, z: Tensor, code: Tensor, t: float, s: float) -> Tensor:
    """KL(q(z_s | z_t, x_0) || law), nats [B], of normals."""
    if not bool((law.deviation > 0).all()):
        raise UserError("no bound is known for a sampler without chance in its steps")
    mean, deviation = posterior(z, code, *_levels(process, t, s))
    wide = law.deviation.view(len(z), -1, 1)
    off = (mean - law.mean.view(z.shape)).square() + deviation.square()
    return ((wide / deviation).log() + off / (2 * wide.square()) - 0.5).sum((-1, -2))


def reals_sampler(subject: Subject, name: str) -> Iterator[Check]:
    """The law of a sampler's texts, the code's draws, and the bound of T calls, where reals can be followed."""
    unfinished, worst, below, shown, far, alone = 0.0, 0.0, -math.inf, [], -math.inf, -math.inf
    for world in fitting(subject):
        ideal, apart = subject.ideal(world), []
        # Many small steps with chance can be followed on the line alone, and where nothing is carried.
        followed = _still(ideal, name) or (ideal.space.width * world.length == 1 and not _reads(ideal, _start(ideal)))
        for calls in (2, 3, 8, 32) if followed else (2, 3):
            law = signal_law(ideal, world.length, calls, name)
            unfinished = most(unfinished, abs(float(law.sum()) - 1))
            apart.append(0.5 * float((law - world.p).abs().sum()))
            if calls in (2, 3):
                worst = most(worst, _unlike(ideal, world, calls, name, law))
        if subject.silent(V).steps[name].reverses and world.length == 1:
            alone = most(alone, *apart)
        if followed:
            shown.append(f"{apart[2]:.4f}, {apart[3]:.4f}")
            far = most(far, apart[3] - max(apart[2] / 2, 3 * GRID_ERROR))
        for model in (ideal, subject.wrong(world, 0)):
            for calls in (1, 2, 3):
                try:
                    bound = signal_call_bound(model, world.texts, calls, name)
                except UserError:
                    continue
                below = most(below, (-signal_law(model, world.length, calls, name).log() - bound).max())
    yield Check(f"{name}: every text is finished", unfinished, GRID_ERROR, "the law of the samples does not sum to one")
    yield Check(f"{name}: samples have the enumerated law", worst, IMPROBABLE, "the code draws from another law")
    if alone > -math.inf:
        yield Check(
            f"{name}: texts of one token have the world's law at any number of calls",
            alone,
            GRID_ERROR,
            "its step is not the reversed chain's, sum over v of p(v | z_t) q(z_s | z_t, v)",
        )
    if shown:
        yield Check(
            f"{name}: many calls come close to the world",
            far,
            0,
            f"total variation at 8 and 32 calls, by world: {'; '.join(shown)} (figure: what is beyond a half)",
        )
    if below > -math.inf:
        yield Check(
            f"{name}: bound_T(x) >= -log law_T(x) for every x",
            below,
            GRID_ERROR,
            "for the exact or a wrong model, what is called the bound of T calls is below what they give",
        )


def _still(process: Any, name: str) -> bool:
    """Whether the steps of a sampler are without chance, so that any number of them can be followed."""
    text = torch.zeros(1, 1, dtype=torch.long)
    state = process.q_sample(text, torch.full((1,), 0.8, dtype=torch.float64), Noise.of(0, 1))
    asked, s = torch.ones(1, 1, dtype=torch.bool), torch.full((1,), 0.4, dtype=torch.float64)
    law = process.steps[name].law(state, asked, process.predict(state, asked), s, lambda log_p: log_p)
    return isinstance(law, Normal) and not bool((law.deviation > 0).any())


def _unlike(process: Any, world: Table, calls: int, name: str, law: Tensor, **template: Any) -> float:
    *_, last = sample(process, Noise.of(11, DRAWS), world.length, calls, sampler=name, **template)
    counts = torch.bincount(world.index(last.tokens), minlength=len(world.p)).double()
    return misfit(counts, law / law.sum(), DRAWS)


def reals_infilling(subject: Subject, name: str) -> Iterator[Check]:
    """Infilled templates of two tokens: what is given is kept, and the law is the enumerated one."""
    worlds = [w for w in fitting(subject) if w.length > 1]
    changed, worst, far, shown = 0.0, 0.0, -math.inf, []
    for world in worlds:
        ideal, tokens = subject.ideal(world), world.texts[1]
        for pattern in ((True, False), (False, True)):
            given = torch.tensor(pattern)
            law = signal_law(ideal, world.length, 3, name, tokens, given)
            template = {"tokens": tokens.expand(DRAWS, -1), "given": given.expand(DRAWS, -1)}
            worst = most(worst, _unlike(ideal, world, 3, name, law, **template))
            *_, last = sample(ideal, Noise.of(11, 64), world.length, 3, sampler=name,
                              tokens=tokens.expand(64, -1), given=given.expand(64, -1))  # fmt: skip
            agrees = (world.texts[:, given] == tokens[given]).all(-1)
            changed += float((last.tokens != tokens)[:, given].sum())
            conditional = world.p * agrees / (world.p * agrees).sum()
            # One position is free: its law given the other is known to the network from the first call on.
            apart = 0.5 * float((signal_law(ideal, world.length, 1, name, tokens, given) - conditional).abs().sum())
            far = most(far, apart)
            shown.append(f"{apart:.4f}")
    if worlds:
        yield Check(f"{name}: infilling keeps what is given", changed, 0, "given positions were changed")
        yield Check(f"{name}: infilling draws the enumerated law", worst, IMPROBABLE, "another law is drawn")
        yield Check(
            f"{name}: infilling one gap in one call is exact",
            far,
            GRID_ERROR,
            f"total variation by pattern: {', '.join(shown)}",
        )
