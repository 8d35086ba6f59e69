"""Gaussian noise against closed forms: schedules, conversions, posteriors, and how fast solvers come to the flow."""

import itertools

import numpy as np
import pytest
import torch

from textdiffusion.diffusion.coded import Said
from textdiffusion.errors import UserError
from textdiffusion.evaluation.dead_codes import dead_codes
from textdiffusion.families.analog_bits import AnalogBits, AnalogBitsConfig, code_book
from textdiffusion.mathematics.categorical import reshape_law
from textdiffusion.mathematics.gaussian import (
    HIGHEST,
    LOG_SNRS,
    LOWEST,
    alpha_sigma,
    deterministic,
    from_x_0,
    learned_clock,
    noised,
    posterior,
    prior_divergence,
    table,
    to_x_0,
)
from textdiffusion.mathematics.grids import GRIDS, Grid
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import Table, random_table
from textdiffusion.presets import configure
from textdiffusion.process import State
from textdiffusion.run import build
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification import Subject, parts, verify
from textdiffusion.verification.reals import signal_call_bound, signal_law

F64 = torch.float64
TOLD = ("process.input=reals", "process.schedule=cosine")  # what real targets ask for
LEARNED = {
    "table": table(torch.tensor([9.0, 3.0, 1.0, -8.0])),
    "learned": learned_clock(torch.tensor([0.0, 0.0, 0.5, 0.4, 3.0, 3.1])),
}


@pytest.mark.parametrize("schedule", list((LOG_SNRS | LEARNED).values()), ids=list(LOG_SNRS | LEARNED))
def test_a_schedule_falls_is_finite_and_has_its_derivative(schedule):
    t = torch.linspace(0, 1, 1001, dtype=F64)
    level = schedule.at(t)
    assert level.isfinite().all() and bool((level.diff() < 0).all())
    # Between knots, where tables have a derivative; central differences.
    inner, h = torch.linspace(0.003, 0.997, 83, dtype=F64), 1e-6
    numeric = (schedule.at(inner + h) - schedule.at(inner - h)) / (2 * h)
    off = ((numeric - schedule.derivative(inner)) / numeric).abs()
    assert off.sort().values[-4] < 1e-6  # up to three may straddle a knot
    # Noise at t = 1 leaves less than 0.001 of a nat of text a real: none of the schedules ends before the prior.
    assert float(prior_divergence(torch.ones(1, dtype=F64), schedule.at(t[-1:]))) < 1e-3


def test_schedules_are_what_their_papers_say():
    t = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    alpha, _ = alpha_sigma(LOG_SNRS["cosine"].at(t))
    assert torch.allclose(alpha, torch.cos(torch.pi * t / 2), atol=4e-3)  # the ends are moved by 0.0025 of an angle
    alpha, _ = alpha_sigma(LOG_SNRS["linear"].at(t))
    assert torch.allclose(alpha.square(), torch.exp(-(1e-4 + 10 * t.square())))
    alpha, sigma = alpha_sigma(LOG_SNRS["rectified"].at(t))
    assert torch.allclose(sigma / (alpha + sigma), t, atol=3e-3)
    alpha, _ = alpha_sigma(LOG_SNRS["sqrt"].at(t))
    assert torch.allclose(alpha.square(), 1 - (t + 1e-4).sqrt(), atol=1e-4)


def test_a_learned_clock_makes_costs_linear_in_time():
    edges = torch.linspace(HIGHEST, LOWEST, 49, dtype=F64)
    middles = (edges[1:] + edges[:-1]) / 2
    clock = learned_clock(3 * torch.sigmoid(-middles))
    t = torch.linspace(0, 1, 21, dtype=F64)
    level = clock.at(t)
    # But for the tenth of the time that is spread evenly over the log-SNR.
    wanted = (t - 0.1 * (HIGHEST - level) / (HIGHEST - LOWEST)) / 0.9
    assert torch.allclose(torch.sigmoid(-level), wanted, atol=0.005)


@pytest.mark.parametrize("target", ["x_0", "eps", "v", "flow"])
def test_conversions_are_inverse_and_say_what_they_are(target):
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(64, 3, generator=generator, dtype=F64) for _ in range(2))
    level = torch.linspace(HIGHEST, LOWEST, 64, dtype=F64).unsqueeze(-1)
    alpha, sigma = alpha_sigma(level)
    z = alpha * x + sigma * eps
    said = {"x_0": x, "eps": eps, "v": alpha * eps - sigma * x, "flow": eps - x}[target]
    assert torch.allclose(from_x_0(x, z, level, target), said, atol=1e-8)
    assert torch.allclose(to_x_0(said, z, level, target), x, atol=1e-8)


def test_the_posterior_is_that_of_the_joint_normal_law():
    now, then = torch.tensor(-1.0, dtype=F64), torch.tensor(0.7, dtype=F64)
    (a_t, s_t), (a_s, s_s) = alpha_sigma(now), alpha_sigma(then)
    x, z = torch.tensor(0.3, dtype=F64), torch.tensor(-1.1, dtype=F64)
    # z_t given z_s is N(gain z_s, wide), so that variances add up to s_t^2.
    gain, wide = a_t / a_s, (s_t.square() - (a_t / a_s * s_s).square()).sqrt()
    precision = 1 / s_s.square() + (gain / wide).square()
    mean = (a_s * x / s_s.square() + gain * z / wide.square()) / precision
    found = posterior(z, x, now, then)
    assert torch.allclose(torch.stack(found), torch.stack((mean, precision**-0.5)))
    assert torch.allclose(torch.stack(noised(x, then, now)), torch.stack((gain * x, wide)))


def test_ddim_is_an_euler_step_of_the_flow_in_either_clock():
    generator = torch.Generator().manual_seed(0)
    z, x_0 = (torch.randn(50, 2, generator=generator, dtype=F64) for _ in range(2))
    now, then = torch.tensor(-0.8, dtype=F64), torch.tensor(0.4, dtype=F64)
    (a_t, s_t), (a_s, s_s) = alpha_sigma(now), alpha_sigma(then)
    step = deterministic(z, x_0, now, then)
    # Clock sigma / alpha, state z / alpha, velocity eps.
    eps = from_x_0(x_0, z, now, "eps")
    assert torch.allclose(step / a_s, z / a_t + (s_s / a_s - s_t / a_t) * eps)
    # Clock u = sigma / (alpha + sigma), state z / (alpha + sigma), velocity eps - x_0: rectified flow.
    flow = from_x_0(x_0, z, now, "flow")
    u_t, u_s = s_t / (a_t + s_t), s_s / (a_s + s_s)
    assert torch.allclose(step / (a_s + s_s), z / (a_t + s_t) + (u_s - u_t) * flow)


def chance(z, level):
    """Cumulative chance of a coin's noisy real: what the flow, which keeps order, must keep."""
    alpha, sigma = alpha_sigma(level)
    return sum(p * torch.special.ndtr((z - alpha * x) / sigma) for p, x in ((0.3, -1.0), (0.7, 1.0)))


def along_the_flow(z, first, last):
    """Where the flow takes z from one log-SNR to another, by bisection."""
    low, high = torch.full_like(z, -9), torch.full_like(z, 9)
    for _ in range(60):
        middle = (low + high) / 2
        below = chance(middle, last) < chance(z, first)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm", 2)])
@pytest.mark.parametrize("schedule", ["even", "cosine"])
def test_solvers_come_to_the_flow_at_their_order(sampler, order, schedule):
    """On a mixture of two normals, whose flow is known: it keeps cumulative chances."""
    config = AnalogBitsConfig(schedule=schedule, self_conditioning=0.0)
    process = Subject(AnalogBits, config).ideal(Table(torch.tensor([0.3, 0.7], dtype=F64)))
    step, times = process.steps[sampler], (0.7, 0.4)
    first, last = (process.log_snr(torch.tensor(t, dtype=F64)) for t in times)
    start = torch.linspace(-1.9, 1.9, 9, dtype=F64).view(9, 1, 1)
    truth = along_the_flow(start, first, last)

    def end(steps):
        state = State(start, torch.full((9,), times[0], dtype=F64))
        for t in torch.linspace(*times, steps + 1, dtype=F64)[1:]:
            asked, s = torch.ones(9, 1, dtype=torch.bool), t.expand(9)
            prediction = process.predict(state, asked)
            law = step.law(state, asked, prediction, s, lambda log_p: log_p)
            state = State(law.mean.view(9, 1, 1), s, memory=prediction.memory)
        return state.x

    errors = [float((end(n) - truth).abs().max()) for n in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.3 < torch.log2(torch.tensor(coarse / fine)) < order + 0.6, errors


def test_asymmetric_intervals_move_further_than_the_network_is_told():
    world = random_table(2, 2)
    plain, further = (
        Subject(AnalogBits, AnalogBitsConfig(schedule="cosine", self_conditioning=0.0, delta=d)).ideal(world)
        for d in (0.0, 1.0)
    )
    state = plain.q_sample(world.texts, torch.full((4,), 0.8, dtype=F64), Noise.of(0, 4))
    asked, said = torch.ones(4, 2, dtype=torch.bool), plain.predict(state)
    said = plain.predict(state, asked)

    def mean(process, s):
        return process.steps["ddim"].law(state, asked, said, torch.full((4,), s, dtype=F64), lambda p: p).mean

    # Told 0.6, it goes to 0.4, which is a plain step to 0.4.
    assert torch.allclose(mean(further, 0.6), mean(plain, 0.4))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (AnalogBitsConfig(self_conditioning=0.0, schedule="sqrt", input="reals", book="gray"), "the units"),
        (AnalogBitsConfig(self_conditioning=0.0, schedule="rectified", evidence=False, book="random"), "the bound"),
    ],
)
def test_checks_hold_for_other_settings(config, wanted):
    found = parts(Subject(AnalogBits, config))
    for check in (*found["the signal"](), *found[wanted]()):
        assert check.passed, (check.name, check.figure, check.meaning)


@pytest.mark.slow
def test_self_conditioning_has_a_bound_of_whole_trajectories():
    seen = set()
    for check in verify(AnalogBits, AnalogBitsConfig()):
        seen.add(check.name)
        assert check.passed, (check.name, check.figure, check.meaning)
    assert "ancestral: bound_T(x) >= -log law_T(x) for every x" in seen
    assert "nll estimates the bound of 4 calls (wrong model 1)" in seen


class ForgetsOnTheWay(AnalogBits):
    """A bound of trajectories whose every call is a first one."""

    def predict(self, state, positions=None, condition=None):
        return super().predict(State(state.x, state.t, state.given), positions, condition)


class PaysForOneMove(AnalogBits):
    """A random move's cost for that of all moves."""

    def _move_divergence(self, x_0, prediction, t, s):
        return super()._move_divergence(x_0, prediction, t, s) / 3


def doubting(x, t=None, *, positions=None, estimate=None, **_):
    """A network that takes back what it said before."""
    out = torch.zeros(*x.shape[:2], 2, dtype=F64)
    out[..., 0] = torch.sin(5 * x[..., 0])
    if estimate is not None:
        out = out - 4 * estimate
    return out if positions is None else out[positions]


@pytest.mark.parametrize(("fault", "share"), [(ForgetsOnTheWay, 0.5), (PaysForOneMove, 0.0)])
def test_the_estimate_of_several_calls_is_of_that_trajectory(fault, share):
    """Means of nll's draws at 4 calls against enumeration: right as it is, and not with a fault."""
    config = AnalogBitsConfig(self_conditioning=share)
    world = Table(torch.tensor([0.3, 0.7], dtype=F64))
    right = AnalogBits(doubting, config, 2)
    exact = signal_call_bound(right, world.texts, 4, "ancestral")
    text = world.texts.repeat(2000, 1)
    off = []
    for process in (right, fault(doubting, config, 2)):
        draws = process.nll(text, Noise.of(0, len(text)), 4).total.view(2000, 2)
        off.append(float(((draws.mean(0) - exact).abs() / (draws.std(0) / 2000**0.5)).max()))
    assert off[0] < 4 and off[1] > 6, off


@pytest.mark.parametrize("book", ["binary", "gray", "random"])
def test_code_books_tell_tokens_apart(book):
    codes = code_book(100, 8, book)
    assert len(codes.unique(dim=0)) == 100 and set(codes.unique().tolist()) == {-1.0, 1.0}
    if book == "gray":
        assert bool(((codes[1:] != codes[:-1]).sum(-1) == 1).all())
    with pytest.raises(UserError, match="fewer codes than there are tokens"):
        code_book(100, 6, book)


def small_run(family, *settings):
    """A family over a small network of 11 tokens."""
    config = configure(family=family, length=8, steps=5, depth=1, settings=list(settings))
    config.vocabulary = 11
    return build(config)


def test_plain_bits_end_in_codes_that_stand_for_tokens():
    process = small_run("analog_bits", "process.output=bits")
    x, every = torch.randint(0, 11, (4, 8)), torch.ones(4, 8, dtype=torch.bool)
    process.loss(x, Noise.of(0, 4)).mean().backward()
    state = process.q_sample(x, torch.full((4,), 0.7, dtype=F64), Noise.of(0, 4))
    with torch.no_grad():
        said = process.predict(state, every)
        law = process.steps["ddim"].law(state, every, said, torch.zeros(4, dtype=F64), lambda p: p)
    # The law of independent bits, by enumeration of all 16 codes, of which 11 stand for tokens.
    codes = torch.tensor(list(itertools.product((-1, 1), repeat=4)), dtype=torch.float32)
    chance = ((1 + codes * said.native.reals.unsqueeze(1)) / 2).prod(-1)
    assert torch.allclose(chance.sum(-1), torch.ones(32))
    assert torch.allclose(law.log_p.exp(), chance[:, :11] / chance[:, :11].sum(-1, keepdim=True), atol=1e-5)
    assert torch.allclose(process.dead_share(said), chance[:, 11:].sum(-1), atol=1e-5)
    softmax = small_run("analog_bits")
    with torch.no_grad():
        assert softmax.dead_share(softmax.predict(state, every)) is None


def test_dead_codes_are_those_that_the_last_call_finds():
    """A network that says of every bit that it is a coin's toss: 5 of 16 codes stand for nothing."""
    process = small_run("analog_bits", "process.output=bits", "process.evidence=false", "process.self_conditioning=0.0")
    windows = [np.arange(8) % 11, np.arange(8)[::-1].copy(), np.arange(3)]
    assert abs(dead_codes(process, windows, 4) - 5 / 16) < 1e-6  # its head starts at zero
    seen = []
    found = process.predict
    process.predict = lambda state, positions: seen.append(state) or found(state, positions)
    dead_codes(process, windows, 4)
    assert seen[0].x.shape[:2] == (2, 8) and seen[0].t.unique().tolist() == [process.plan(torch.ones(8) > 0, 4, "")[-2]]
    # Of so little noise the bits themselves say which they are.
    knows = small_run("analog_bits", "process.output=bits", "process.self_conditioning=0.0")
    assert dead_codes(knows, windows, 1000) < 0.01
    assert (
        dead_codes(small_run("analog_bits"), windows, 4) is None and dead_codes(small_run("masked"), windows, 4) is None
    )


@pytest.mark.parametrize("target", ["x_0", "eps", "v", "flow"])
def test_every_target_learns_embeddings_and_head(target):
    process = small_run("gaussian_embedding", f"process.target={target}", *TOLD)
    x = torch.randint(0, 11, (8, 8))
    for _ in range(2):  # the head starts at zero, and with it the x_0 that codes are compared with
        process.loss(x, Noise.of(0, 8)).mean().backward()
        with torch.no_grad():
            process.network.head.weight -= 0.1 * process.network.head.weight.grad
    for name in ("codes", "head.weight"):
        grad = dict(process.network.named_parameters())[name].grad
        assert grad is not None and bool((grad != 0).any()), name
    with torch.no_grad():
        assert process.nll(x, Noise.of(0, 8)).total.isfinite().all()


@pytest.mark.parametrize("target", ["x_0", "eps", "v", "flow"])
def test_the_best_real_prediction_is_the_mean(target):
    """Of a position that is one of two tokens, at more noise than a token can be rounded at: cross-entropy there would
    draw the prediction towards the likelier one."""
    process = small_run("gaussian_embedding", f"process.target={target}", *TOLD)
    p, codes = torch.zeros(11, dtype=F64), process.codes().detach().double()
    p[:2] = torch.tensor([0.8, 0.2])
    level, z = torch.full((11, 1), -1.0, dtype=F64), torch.randn(process.width, dtype=F64).expand(11, -1)
    said = from_x_0((p @ codes).expand(11, -1), z, level, target)[:1].clone().requires_grad_()

    def cost(outputs):
        call = Said(outputs.expand(11, -1), z, level, None)
        return (p * process.cost(call, process.guess(call), torch.arange(11))).sum()

    least = cost(said)
    least.backward()
    assert float(said.grad.abs().max()) < 1e-6 * float(least)


def test_real_targets_say_what_they_need():
    for settings, wanted in (
        (["process.target=eps"], "process.schedule=cosine"),
        (["process.target=x_0"], "process.schedule=cosine"),
        (["process.target=v", "process.schedule=cosine"], "process.input=reals"),
    ):
        with pytest.raises(UserError, match=wanted):
            small_run("gaussian_embedding", *settings)
    small_run("gaussian_embedding", "process.target=x_0", "process.schedule=cosine")


@pytest.mark.parametrize("grid", [g for g in GRIDS if g != "optimal"])
@pytest.mark.parametrize("schedule", LOG_SNRS)
def test_plans_fall_and_hold_as_many_calls_as_are_stated(schedule, grid):
    """A schedule whose least noise is a hundredth has no times of less, on whatever grid; a plan that came to 0 early
    would draw its tokens there, and the bound be that of a longer chain."""
    process = small_run("gaussian_embedding", f"process.schedule={schedule}", "process.self_conditioning=0.0")
    process = process.on(Grid(grid))
    for calls in (1, 2, 8, 19, 64):
        plan = process.plan(torch.ones(8, dtype=torch.bool), calls, "ancestral")
        assert len(plan) == calls + 1 and plan[0] == 1 and plan[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(plan)), (calls, plan)
    x = torch.randint(0, 11, (2, 8))
    with torch.no_grad():
        found = process.nll(x, Noise.of(0, 2), calls=19)
        *_, last = sample(process, Noise.of(0, 2), 8, 19)
    assert found.calls == 19 and last.calls.tolist() == [19, 19] and found.total.isfinite().all()


def test_embeddings_keep_their_size():
    process = small_run("gaussian_embedding")
    with torch.no_grad():
        process.network.codes.mul_(torch.rand(11, 1) * 100 + 0.01)
    assert torch.allclose(process.codes().square().mean(-1), torch.ones(11))


def test_the_clock_of_a_step_does_not_depend_on_how_it_is_cut():
    whole, cut = small_run("analog_bits"), small_run("analog_bits")
    x = torch.randint(0, 11, (8, 8), generator=torch.Generator().manual_seed(0))
    for step in range(3):
        noise = Noise.of(0, 8, step=step)
        whole.loss(x, noise)
        for rows in (slice(0, 3), slice(3, 8)):
            cut.loss(x[rows], noise.select(rows))
    clocks = [process.network.clock for process in (whole, cut)]
    assert bool((clocks[0].costs > 0).any()) and torch.allclose(clocks[0].costs, clocks[1].costs, atol=1e-6)
    assert torch.allclose(clocks[0].pending, clocks[1].pending, atol=1e-5)
    # No text is learnt from while it is only measured.
    whole.network.eval()
    before = clocks[0].costs.clone()
    whole.loss(x, Noise.of(0, 8, step=9))
    assert torch.equal(clocks[0].costs, before) and int(clocks[0].step) == 2


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_the_bound_of_plain_bits_is_one(calls):
    """Three tokens, two bits: a move needs a mean alone, whatever law of tokens the last call draws from."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 2, generator=generator, dtype=F64)

    def network(x, t=None, *, positions=None, **_):
        out = torch.sin(3 * x @ weights)
        return out if positions is None else out[positions]

    config = AnalogBitsConfig(output="bits", self_conditioning=0.0, schedule="cosine")
    process, texts = AnalogBits(network, config, 3), torch.arange(3).unsqueeze(-1)
    bound = signal_call_bound(process, texts, calls, "ancestral")
    law = signal_law(process, 1, calls, "ancestral")
    assert float((-law.log() - bound).max()) < 2e-3 and float(law.sum()) == pytest.approx(1, abs=1e-3)


def test_a_plain_run_of_a_real_network_is_of_second_order():
    """A law that is not reshaped is taken for plain, however its context is rounded on the way."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 7, generator=generator)

    def network(x, t=None, *, positions=None, **_):
        out = 3 * torch.sin(3 * x.float() @ weights.new_ones(x.shape[-1], 2) @ weights) + 0.3
        return out if positions is None else out[positions]

    process = AnalogBits(network, AnalogBitsConfig(schedule="cosine", self_conditioning=0.0), 7)
    ways = {}
    for sampler in ("ddim", "dpm"):
        asked, state = torch.ones(32, 5, dtype=torch.bool), process.prior_sample(32, 5, Noise.of(0, 32))
        for s in (0.9, 0.8, 0.7):
            said, then = process.predict(state, asked), torch.full((32,), s, dtype=F64)
            law = process.steps[sampler].law(state, asked, said, then, lambda p: reshape_law(p, temperature=1.0))
            state = State(law.mean.view(state.x.shape), then, memory=said.memory)
        ways[sampler] = state.x
    assert bool(((ways["ddim"] - ways["dpm"]).abs().flatten(1).amax(-1) > 1e-4).all())


def test_temperature_reaches_the_second_order_solver():
    """A mean said before is of the law as it was; beside a reshaped one the solver goes by the first order."""
    world = random_table(2, 2)
    process = Subject(AnalogBits, AnalogBitsConfig(schedule="cosine", self_conditioning=0.0)).ideal(world)
    first = process.q_sample(world.texts, torch.full((4,), 0.9, dtype=F64), Noise.of(0, 4))
    asked = torch.ones(4, 2, dtype=torch.bool)
    state = State(first.x, torch.full((4,), 0.8, dtype=F64), memory=process.predict(first, asked).memory)
    said, s = process.predict(state, asked), torch.full((4,), 0.6, dtype=F64)
    reshapes = {False: lambda p: p, True: lambda p: (3 * p).log_softmax(-1)}
    means = {
        (name, cold): process.steps[name].law(state, asked, said, s, reshape).mean
        for name in ("ddim", "dpm")
        for cold, reshape in reshapes.items()
    }
    assert torch.allclose(means["ddim", True], means["dpm", True])
    assert not torch.allclose(means["ddim", False], means["dpm", False])
