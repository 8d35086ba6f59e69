"""Gaussian noise held to a pattern: the laws of its steps and particles, by sums over grids of reals."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

import textdiffusion as td
from textdiffusion.diffusion.drafts import Mixture
from textdiffusion.errors import UserError
from textdiffusion.families import family
from textdiffusion.families.analog_bits import AnalogBitsConfig
from textdiffusion.families.gaussian_embedding import GaussianEmbeddingConfig
from textdiffusion.mathematics.automaton import Automaton
from textdiffusion.mathematics.gaussian import posterior
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.process import State
from textdiffusion.sampling.constraints import Hold, reshape_uncut
from textdiffusion.sampling.particles import Particles
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.patterns import expression
from textdiffusion.verification.enumeration import misfit
from textdiffusion.verification.reals import GRID_ERROR, signal_law
from textdiffusion.verification.subject import IMPROBABLE, Subject

F64 = torch.float64
PAIR, THREE = random_table(2, 2, seed=3), random_table(3, 1)
TOLD = {"input": "reals", "schedule": "cosine"}  # what real targets ask for
BITS, REALS = {"self_conditioning": 0.0, "output": "bits"}, {"self_conditioning": 0.0, "width": 2}
# Two tokens of one real, or one token of two; what the network says, its outputs at zero where there is no posterior.
CASES = {
    "bits, right": (lambda: Subject(family("analog_bits")).ideal(PAIR), PAIR, "ab|ba"),
    "bits, wrong": (lambda: Subject(family("analog_bits")).wrong(PAIR, 0), PAIR, "ab|ba|bb"),
    "embeddings": (lambda: Subject(family("gaussian_embedding")).wrong(THREE, 0), THREE, "a|c"),
    "independent bits": (lambda: spoken("analog_bits", AnalogBitsConfig(**BITS), PAIR), PAIR, "ab|ba"),
    "bits, one code is no token": (lambda: spoken("analog_bits", AnalogBitsConfig(**BITS), THREE), THREE, "b|c"),
    "velocity": (
        lambda: spoken("gaussian_embedding", GaussianEmbeddingConfig(target="v", **TOLD, **REALS), THREE), THREE, "b|c"
    ),
}  # fmt: skip
ANY = list(CASES)


def spoken(name, config, world):
    """A process of which there is no exact posterior, with a network that says something of all that it reads."""
    process = Subject(family(name), config).silent(world.vocabulary)
    weights = torch.randn(16, 8, generator=torch.Generator().manual_seed(2), dtype=F64)

    def network(x, *_, positions=None, **__):
        out = 2 * torch.tanh(x.double().flatten(1) @ weights[: x[0].numel()])
        out = out[:, : x.shape[1] * process.width].view(len(x), x.shape[1], process.width)
        return out if positions is None else out[positions]

    return process.over(network)


@cache
def case(name):
    """A process, its world, a pattern, and the law of three calls that are not held, [V^L]."""
    make, world, pattern = CASES[name]
    process = make()
    return process, world, pattern, signal_law(process, world.length, 3, "bridge")


def automaton(pattern: str, vocabulary: int) -> Automaton:
    return Automaton(expression(pattern), [c.encode() for c in "abc"[:vocabulary]])


def matching(pattern: str, world) -> torch.Tensor:
    return torch.from_numpy(automaton(pattern, world.vocabulary).matches(world.texts.numpy()))


def grid(process, length: int, number: int = 45) -> tuple[torch.Tensor, float]:
    """States [n L W], and the volume of a cell."""
    size, line = length * process.width, np.linspace(-6.5, 6.5, number)
    points = torch.tensor(list(itertools.product(line, repeat=size)), dtype=F64) + 0.03
    return points.view(len(points), length, -1), float(line[1] - line[0]) ** size


def prior(points: torch.Tensor, cell: float) -> torch.Tensor:
    return cell * torch.exp(-0.5 * points.flatten(1).square().sum(-1) - points[0].numel() / 2 * math.log(2 * math.pi))


def predicted(process, points: torch.Tensor, t: float, world) -> torch.Tensor:
    """The product of the predicted laws, of every text of the world [n V^L]."""
    log_p = process.predict(State(points, torch.full((len(points),), t, dtype=F64))).log_p.double()
    return sum(log_p[:, i][:, world.texts[:, i]] for i in range(world.length)).exp()


def bridge_density(process, points: torch.Tensor, text: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """q(z_s | z_t, text) at all points, from all points [n n]."""
    levels = [process.log_snr(torch.tensor(u, dtype=F64)) for u in (t, s)]
    mean, deviation = posterior(points, process.codes().double()[text], *levels)
    square = torch.cdist(mean.flatten(1), points.flatten(1)).square() / deviation.square()
    return torch.exp(-0.5 * square) / (math.sqrt(2 * math.pi) * deviation) ** points[0].numel()


def held_law(process, world, pattern: str, calls: int) -> torch.Tensor:
    """Law of the texts of the held sampler, [V^L], from its definition: every text listed, every point followed."""
    points, cell = grid(process, world.length)
    fits, chance = matching(pattern, world), prior(points, cell)
    for t, s in itertools.pairwise(process.plan(torch.ones(world.length, dtype=torch.bool), calls, "bridge")):
        weight = predicted(process, points, t, world) * fits
        weight = chance.unsqueeze(-1) * weight / weight.sum(-1, keepdim=True)
        if s == 0:
            return weight.sum(0)
        chance = torch.zeros_like(chance)
        for text, share in zip(world.texts[fits], weight.T[fits]):
            chance += cell * (share @ bridge_density(process, points, text, t, s))
    raise AssertionError("the last step ends at 0")


def drawn(process, world, pattern: str, calls: int, rows: int, particles: int = 1, **how):
    """Numbers of the texts that came out [rows], and the estimates of the pattern's chance."""
    hold = Hold(automaton(pattern, world.vocabulary), particles)
    *_, last = sample(process, Noise.of(3, rows), world.length, calls, sampler="bridge", hold=hold, **how)
    return world.index(last.tokens), torch.from_numpy(np.exp(hold.log_chance)) if particles > 1 else None


@pytest.mark.parametrize("name", ANY)
def test_a_pattern_that_every_text_matches_changes_nothing(name):
    process, world, _, free = case(name)
    assert (held_law(process, world, "[abc]*", 3) - free).abs().max() < GRID_ERROR


@pytest.mark.parametrize("name", ANY)
def test_samples_have_the_law_that_is_defined_and_match(name):
    (process, world, pattern, _), rows = case(name), 3000
    for calls in (1, 3):
        law = held_law(process, world, pattern, calls)
        assert float(law.sum()) == pytest.approx(1.0, abs=GRID_ERROR)
        assert float(law[~matching(pattern, world)].sum()) == 0
        counts = torch.bincount(drawn(process, world, pattern, calls, rows)[0], minlength=len(law)).double()
        assert misfit(counts, law / law.sum(), rows) < IMPROBABLE


@pytest.mark.parametrize("name", ANY)
def test_weights_are_unbiased_for_every_text(name):
    """The mean of (estimate of the pattern's chance) x [the text is x] is the sampler's own chance of an x that
    matches."""
    (process, world, pattern, free), rows = case(name), 800
    law = free * matching(pattern, world)
    text, estimate = drawn(process, world, pattern, 3, rows, particles=4)
    found = one_hot(text, len(law)) * estimate.unsqueeze(-1)
    error = found.std(0) / rows**0.5
    assert ((found.mean(0) - law).abs() <= 5 * error + GRID_ERROR).all(), (found.mean(0), law, error)
    # A few particles of a wrong network weigh much, so this is a rough test; the sharp one is by quadrature, below.
    assert float(error.max()) < 0.1


def weighed_law(process, world, pattern: str, number: int) -> torch.Tensor:
    """Sum over all pairs of states, before and after the first of two held steps, of their chance under the held
    sampler times the weight that `Hold` gives them, and of the text that the second one writes: [V^L]."""
    length, step, fits = world.length, process.steps["bridge"], matching(pattern, world)
    points, cell = grid(process, length, number)
    n = len(points)
    first, second, _ = process.plan(torch.ones(length, dtype=torch.bool), 2, "bridge")
    before, after = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    every, rows = torch.ones(n * n, length, dtype=torch.bool), torch.arange(n * n)
    blank, noise = torch.full((n * n, length), -1), Noise.of(0, n * n)
    hold, crowd = Hold(automaton(pattern, world.vocabulary), 2), Particles(n * n + n % 2, 2)
    hold.crowd, hold.foreseen = crowd, crowd.carry()

    def draft(x: torch.Tensor, t: float, s: float):
        state = State(x, torch.full((n * n,), t, dtype=F64))
        return step.draft(
            state, every, process.predict(state, every), torch.full((n * n,), s, dtype=F64), lambda log_p: log_p
        )

    one = draft(points[before], first, second)
    hold.text(one, blank, noise, rows)
    hold.weigh(one, points[after], rows)
    hold.text(draft(points[after], second, 0.0), blank, noise, rows)
    weight = torch.from_numpy(np.exp(crowd.log_weight[: n * n])).view(n, n)
    held = [predicted(process, points, t, world) * fits for t in (first, second)]
    drawn, last = (p / p.sum(-1, keepdim=True) for p in held)
    moved = torch.zeros(n, n, dtype=F64)
    for text in fits.nonzero().flatten().tolist():
        moved += drawn[:, text : text + 1] * bridge_density(process, points, world.texts[text], first, second)
    return ((prior(points, cell).unsqueeze(-1) * cell * moved * weight) @ last).sum(0)


# The grid's own error falls with the square of its mesh: of the wrong network, whose word turns sharply, it was 0.020,
# 0.011 and 0.005 with 15, 19 and 25 points a real; of embeddings 0.010, 0.003 and 0.0002.
@pytest.mark.parametrize(
    "name, number, error",
    [
        ("bits, right", 15, 1e-3),
        ("embeddings", 19, 5e-3),
        pytest.param("bits, wrong", 25, 7e-3, marks=pytest.mark.slow),
    ],
)
def test_weights_come_to_the_samplers_own_law_by_quadrature(name, number, error):
    """What `Hold` draws and weighs, summed over all states of two calls: the sampler's own chance of each text that
    matches."""
    process, world, pattern, _ = case(name)
    law = signal_law(process, world.length, 2, "bridge") * matching(pattern, world)
    assert float((weighed_law(process, world, pattern, number) - law).abs().max()) < error


@pytest.mark.parametrize("strength", [0.0, 1.3])
def test_the_quadrature_sees_evidence_that_is_not_that_of_the_step(strength, monkeypatch):
    process, world, pattern, _ = case("bits, right")
    right = Mixture.evidence
    monkeypatch.setattr(Mixture, "evidence", lambda self, x: strength * right(self, x))
    law = signal_law(process, world.length, 2, "bridge") * matching(pattern, world)
    assert float((weighed_law(process, world, pattern, 15) - law).abs().max()) > 0.02


def test_the_evidence_is_the_density_of_the_bridge_and_the_step_its_mixture():
    """log q(z_s | z_t, v) up to a constant, by torch's own normals; a last step is the text, and tells its tokens."""
    process = Subject(family("gaussian_embedding")).wrong(random_table(3, 2), 1)
    state = process.prior_sample(4, 2, Noise.of(1, 4))
    every, s = torch.ones(4, 2, dtype=torch.bool), torch.full((4,), 0.4, dtype=F64)
    said = process.predict(state, every)
    draft = process.steps["bridge"].draft(state, every, said, s, lambda log_p: log_p)
    x = process.prior_sample(4, 2, Noise.of(2, 4)).x
    levels = [process.log_snr(u)[0] for u in (state.t, s)]
    found, wanted = draft.evidence(x), []
    for v in range(3):
        mean, deviation = posterior(state.x, process.codes().double()[v], *levels)
        normal = torch.distributions.Normal(mean, deviation)
        wanted.append(normal.log_prob(x).sum(-1).flatten())
        given = draft.given(torch.full((8,), v))
        assert torch.allclose(given.mean, mean.flatten(0, 1)) and torch.allclose(given.deviation, deviation)
    wanted = torch.stack(wanted, -1)
    assert torch.allclose(found - found.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True), atol=1e-9)
    last = process.steps["bridge"].draft(state, every, said, torch.zeros(4, dtype=F64), lambda log_p: log_p)
    text = torch.arange(8) % 3
    given = last.given(text)
    assert torch.equal(given.mean, process.embed(text)) and not given.deviation.any()
    assert torch.equal(last.evidence(given.mean.view(4, 2, -1)).argmax(-1), text)
    assert (last.evidence(given.mean.view(4, 2, -1)).softmax(-1).amax(-1) == 1).all()


def test_many_particles_have_the_samplers_law_given_the_pattern():
    """Two tokens that the first call takes for independent: which of the matches is likely shows only later."""
    process, pattern, rows = case("bits, right")[0], "aa|b.", 2000
    target = case("bits, right")[-1] * matching(pattern, PAIR)
    counts = torch.bincount(drawn(process, PAIR, pattern, 3, rows, 16)[0], minlength=4).double()
    assert misfit(counts, target / target.sum(), rows) < IMPROBABLE


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-3}, {"top_k": 1, "temperature": 0.1}])
def test_what_temperature_and_top_p_leave_out_no_evidence_brings_back(how):
    """Also of reals with hardly any noise, whose evidence is worth a hundred thousand nats."""
    process = Subject(family("analog_bits")).wrong(PAIR, 1)
    state = process.q_sample(PAIR.texts, torch.full((4,), 1e-3, dtype=F64), Noise.of(0, 4))
    every = torch.ones(4, 2, dtype=torch.bool)
    said = process.predict(state, every)
    own = said.native.own.diff(dim=-1).abs()
    assert float(own.min()) > 1e5
    best = said.native.context.argmax(-1)
    assert not torch.equal(best, PAIR.texts.flatten())
    draft = process.steps["bridge"].draft(
        state, every, said, torch.zeros(4, dtype=F64), lambda log_p: reshape_uncut(log_p, **how)
    )
    assert torch.equal(draft.log_p.argmax(-1), best) and (draft.log_p.exp().amax(-1) == 1).all()
    assert draft.log_p.isfinite().all()
    text, _ = drawn(process, PAIR, "ab|ba", 3, 200, **how)
    assert matching("ab|ba", PAIR)[text].all()


CONFIGS = [
    ("analog_bits", {"self_conditioning": 0.5}),
    ("analog_bits", {"self_conditioning": 0.5, "input": "reals", "schedule": "cosine"}),
    ("gaussian_embedding", {"self_conditioning": 0.0, "conditioning": "replacement"}),
    ("gaussian_embedding", {"target": "x_0", "schedule": "cosine", "self_conditioning": 0.5}),
    ("analog_bits", {"output": "bits", "book": "gray", "bits": 4, "evidence": False}),
]


@pytest.mark.parametrize("name, fields", CONFIGS)
def test_what_is_given_stays_and_every_text_matches(name, fields):
    process = Subject(family(name), family(name).Config(**fields)).silent(3)
    tokens, given = torch.tensor([0, 1, 2, 0]), torch.tensor([False, True, False, False])
    machine = automaton("[ac]b(ab|bc)|cbcc", 3)
    for particles in (1, 3):
        hold = Hold(machine, particles)
        *_, last = sample(
            process, Noise.of(0, 40), 4, 5, sampler="bridge", hold=hold, tokens=tokens.expand(40, -1),
            given=given.expand(40, -1), temperature=0.7, top_p=0.9,
        )  # fmt: skip
        assert machine.matches(last.tokens.numpy()).all() and (last.tokens[:, 1] == 1).all()
        assert len(last.tokens.unique(dim=0)) > 1


def test_weights_are_unbiased_where_the_network_reads_what_it_said():
    """Against as many free texts, for reals that are carried cannot be followed for two tokens."""
    process = Subject(family("analog_bits"), AnalogBitsConfig(self_conditioning=0.5)).wrong(PAIR, 0)
    rows = 3000
    text, estimate = drawn(process, PAIR, "ab|ba", 4, rows, particles=3)
    *_, free = sample(process, Noise.of(8, 2 * rows), 2, 4, sampler="bridge")
    found = one_hot(text, 4) * estimate.unsqueeze(-1)
    law = one_hot(PAIR.index(free.tokens), 4).double() * matching("ab|ba", PAIR).unsqueeze(0)
    error = (found.var(0) / rows + law.var(0) / (2 * rows)) ** 0.5
    assert ((found.mean(0) - law.mean(0)).abs() <= 5 * error).all(), (found.mean(0), law.mean(0), error)
    assert float(error.max()) < 0.02


def test_other_samplers_are_refused_by_name_and_auto_takes_the_one_that_can(tmp_path):
    settings = ["training.batch=8", "network.width=32", "network.heads=2"]
    model = td.train(tmp_path / "run", family="analog_bits", depth=1, steps=1, length=16, settings=settings)
    for sampler in ("ancestral", "ddim", "dpm", "churn"):
        with pytest.raises(UserError, match="cannot be held to a pattern; use another: bridge"):
            model.sample(1, 16, 3, regex="[a-z]*", sampler=sampler)
    for calls in (2, 4, 8, 16):
        assert model.recommended(calls, 16, held=True)[0] == "bridge"
    reward = model.sample(2, 16, 4, regex="[ab]*", particles=4, reward=lambda texts: [t.count("a") for t in texts])
    assert all(set(text) <= set("ab") for text in reward) and model.used[0] == "bridge"
