"""The truth suite: every family is proven on worlds that can be enumerated, and every known fault is caught.

A new file in families/ is found and tested with no test written for it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from textdiffusion.absorbing import carry_over, count_weights
from textdiffusion.categorical import draw
from textdiffusion.errors import UserError
from textdiffusion.families import family, load_family, names
from textdiffusion.families.autoregressive import Autoregressive
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.families.score_entropy import ScoreEntropy, ScoreEntropyConfig
from textdiffusion.families.uniform import Uniform, UniformConfig
from textdiffusion.noise import Noise
from textdiffusion.process import Categorical, HasKernel, Nll, Prediction, State
from textdiffusion.replacing import Outlook
from textdiffusion.sampling import sample
from textdiffusion.schedules import SCHEDULES, Schedule
from textdiffusion.steps.unmasking import Ancestral, unmasking_steps
from textdiffusion.verification import Subject, verify
from textdiffusion.verification.enumeration import (
    enumerated_law,
    exact_curve,
    integrated_bound,
    misfit,
    noisy_states,
)
from textdiffusion.worlds import Table, chain, chain_entropy, copy, hidden_chain, random_table

HERE = Path(__file__).parent
V, L = 3, 3
WORLD = random_table(V, L)


def faults(subject, config=None) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in verify(subject, config) if not check.passed]


# -- every family is right ----------------------------------------------------------------------------------------


# More than 15 seconds each: their bounds, laws and equalities have quicker tests of their own below.
LONG = ("uniform", "score_entropy")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in names()]
)
def test_every_family_passes_every_check(name):
    checks = list(verify(family(name)))
    assert [c for c in checks if not c.passed] == []
    assert len(checks) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "linear"])
def test_the_masked_family_is_right_under_every_schedule(schedule):
    assert faults(Masked, MaskedConfig(schedule=schedule)) == []


@pytest.mark.parametrize("file", ["../examples/fading_noise.py", "subjects/gaussian_codes.py"])
def test_families_in_files_of_their_own_pass(file):
    assert faults(load_family(str(HERE / file))) == []


@pytest.mark.parametrize(
    ("config", "known"),
    [
        pytest.param(ScoreEntropyConfig(graph="uniform"), [], marks=pytest.mark.slow),
        pytest.param(ScoreEntropyConfig(noise="geometric"), [], marks=pytest.mark.slow),
        pytest.param(
            ScoreEntropyConfig(graph="uniform", noise="geometric"),
            # Noise that grows to sigma = 20: 64 steps even in t are far from the limit, and 16 of Euler's further.
            ["the bound of T calls goes to the continuous one, wrong model",
             "euler: infilling comes close to the exact conditional"],
            marks=pytest.mark.slow,
        ),
        pytest.param(UniformConfig(mask_share=1.0), [], marks=pytest.mark.slow),
        pytest.param(UniformConfig(mask_share=0.4, schedule="cosine"), [], marks=pytest.mark.slow),
    ],
    ids=["ratios-uniform", "ratios-geometric", "ratios-uniform-geometric", "masks-alone", "hybrid"],
)  # fmt: skip
def test_noise_that_replaces_tokens_is_right_in_all_its_forms(config, known):
    cls = Uniform if isinstance(config, UniformConfig) else ScoreEntropy
    assert faults(cls, config) == known


def test_the_example_is_one_short_file():
    assert len((HERE / "../examples/fading_noise.py").read_text().splitlines()) < 100


def test_the_continuous_bound_does_not_depend_on_the_schedule():
    """With the exact posterior, and with wrong networks (which take no time)."""
    for seed in (None, 0, 1):
        bounds = []
        for schedule in SCHEDULES:
            subject = Subject(Masked, MaskedConfig(schedule=schedule))
            process = subject.ideal(WORLD) if seed is None else subject.wrong(WORLD, seed)
            bounds.append(integrated_bound(process, WORLD.texts))
            counted = exact_curve(process, WORLD.texts) @ process.curve_weights(L, None)[0]
            assert (bounds[-1] - torch.from_numpy(counted)).abs().max() < 1e-6
        assert all((b - bounds[0]).abs().max() < 1e-6 for b in bounds)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("length", [8, 64])
def test_on_a_hidden_markov_model_as_long_as_real_windows_the_bound_is_the_likelihood(name, length):
    world = hidden_chain(length=length)
    process = Subject(family(name)).ideal(world)
    x = world.draw(2, seed=0)
    for text in x:
        draws = process.nll(text.expand(600, -1), Noise.of(0, 600)).total
        error = 4 * float(draws.std()) / 600**0.5 + 1e-9
        assert abs(float(draws.mean()) + float(world.log_prob(text.unsqueeze(0)))) < error


def test_worlds_know_themselves():
    """Messages against enumeration, and the entropy of a chain against its own texts."""
    world = hidden_chain(3, 2, 4)
    texts = torch.tensor(list(itertools.product(range(2), repeat=4)))
    p = world.log_prob(texts).exp()
    assert float(p.sum()) == pytest.approx(1)
    evidence = torch.randn(5, 4, 2, dtype=torch.float64)
    assert (Table(p.view(2, 2, 2, 2)).context(evidence) - world.context(evidence)).abs().max() < 1e-9
    small = chain(3, 4)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    log_p = small.log_prob(every)
    assert float(-torch.special.xlogy(log_p.exp(), log_p.exp()).sum()) == pytest.approx(chain_entropy(small))
    observed = torch.bincount((small.draw(20_000, 0) * 3 ** torch.arange(3, -1, -1)).sum(-1), minlength=81).double()
    assert misfit(observed, log_p.exp(), 20_000) < 6


# -- what belongs to one family -----------------------------------------------------------------------------------


def test_expected_kl_of_random_groups_is_the_riemann_sum():
    """E KL = sum_k m_k curve(n_k) - sum_n curve(n) (2510.25544), against the mean of the enumerated KLs by order."""
    process = Subject(Masked).ideal(WORLD)
    curve = WORLD.p.numpy() @ exact_curve(process, WORLD.texts)
    for counts in ([3], [2, 1], [1, 2]):
        cuts = [0, *itertools.accumulate(counts)]
        kls = []
        for order in itertools.permutations(range(L)):
            log_law, shown = torch.zeros(V**L, dtype=torch.float64), torch.zeros(L, dtype=torch.bool)
            for a, b in itertools.pairwise(cuts):
                x = WORLD.texts.masked_fill(~shown, V)
                log_p = process.predict(State(x, torch.ones(len(x)))).log_p
                group = list(order[a:b])
                log_law += log_p.gather(-1, WORLD.texts.unsqueeze(-1)).squeeze(-1)[:, group].sum(-1)
                shown[group] = True
            kls.append(float((WORLD.p * (WORLD.log_p - log_law)).sum()))
        formula = curve @ (count_weights(L, counts) - process.curve_weights(L, None)[0])
        assert abs(np.mean(kls) - formula) < 1e-9


def test_one_position_a_call_samples_the_world_exactly():
    process = Subject(Masked).ideal(WORLD)
    for sampler in ("random", "margin", "confidence"):
        assert (enumerated_law(process, L, L, sampler) - WORLD.p).abs().max() < 1e-12


@pytest.mark.parametrize("sampler", ["margin", "confidence"])
def test_ordered_samplers_reveal_where_their_score_is_highest(sampler):
    process = Subject(Masked).ideal(WORLD)
    step = process.steps[sampler]
    for symbols in itertools.product(range(V + 1), repeat=L):
        x = torch.tensor([symbols])
        hidden = x == V
        if int(hidden.sum()) < 2:
            continue
        state, s = State(x, torch.ones(1).double()), torch.tensor([(float(hidden.sum()) - 1) / L], dtype=torch.float64)
        log_p = process.predict(state, hidden).log_p
        chosen = step.law(state, hidden, Prediction(log_p), s, lambda log_p: log_p).positions[hidden]
        best = log_p.exp().sort(-1, descending=True).values
        score = best[:, 0] - best[:, 1] if sampler == "margin" else best[:, 0]
        assert int(chosen.sum()) == 1 and float(score[chosen]) >= float(score.max()) - 1e-12


def test_score_entropy_is_masked_diffusion_plus_a_penalty_for_its_rate():
    """The same network in both (absorbing noise): the integrands differ by (u - 1 - log u) beta alpha / (1 - alpha)."""
    masked = Subject(Masked).wrong(WORLD, 0)
    timeless = masked.network
    free = Subject(ScoreEntropy).over(lambda x, t, **how: timeless(x, **how) + 0.3, V)
    for t in (0.1, 0.5, 0.9):
        state = masked.q_sample(WORLD.texts, torch.full((V**L,), t, dtype=torch.float64), Noise.of(1, V**L))
        penalty = free.rate_penalty(WORLD.texts, state)
        assert (penalty >= 0).all() and float(penalty.max()) > 0.01
        whole = masked.rate(WORLD.texts, state) + penalty
        assert torch.allclose(free.rate(WORLD.texts, state), whole, rtol=1e-9)


def test_uniform_noise_of_masks_alone_is_masked_diffusion():
    masked = Subject(Masked).wrong(WORLD, 1)
    timeless = masked.network
    hybrid = Subject(Uniform, UniformConfig(mask_share=1.0)).over(lambda x, t, **how: timeless(x, **how), V)
    assert (integrated_bound(masked, WORLD.texts) - integrated_bound(hybrid, WORLD.texts)).abs().max() < 1e-9
    laws = [enumerated_law(process, L, 3, name) for process, name in ((masked, "ancestral"), (hybrid, "bridge"))]
    assert (laws[0] - laws[1]).abs().max() < 1e-12


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_score_entropy_in_closed_form_is_the_sum_over_symbols(graph):
    process = Subject(ScoreEntropy, ScoreEntropyConfig(graph=graph)).wrong(WORLD, 0)
    t = torch.full((V**L,), 0.4, dtype=torch.float64)
    state = process.q_sample(WORLD.texts, t, Noise.of(2, V**L))
    moves = process.movable(state)
    row, here = moves.nonzero()[:, 0], state.x[moves]
    log_model = process.log_ratios(process.network(state.x, state.t, positions=moves), here, t[row])
    nats = process.score_entropy(log_model, here, WORLD.texts[moves], t[row])
    summed = torch.zeros(V**L, dtype=torch.float64).index_add(0, row, nats) / 0.6  # beta of the linear schedule
    assert torch.allclose(summed, process.rate(WORLD.texts, state), rtol=1e-9)
    assert (nats > -1e-12).all()


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_at_the_true_ratios_score_entropy_is_the_entropy_that_is_left(graph):
    """One token of law (.7, .3): the integral of the score entropy at the exact ratios is .6109 nat, not 0."""
    world = Table(torch.tensor([0.7, 0.3], dtype=torch.float64))
    process = Subject(ScoreEntropy, ScoreEntropyConfig(graph=graph)).ideal(world)
    assert float(world.p @ integrated_bound(process, world.texts)) == pytest.approx(0.6109, abs=1e-4)


@pytest.mark.parametrize("mask_share", [0.0, 0.4, 1.0])
def test_context_denoiser_and_ratios_say_the_same(mask_share):
    """Round trips through the world: denoiser = context and own evidence; ratios = those of the enumerated marginal."""
    process = Subject(Uniform, UniformConfig(mask_share=mask_share)).ideal(WORLD)
    t, size = 0.35, process.space.size
    states = torch.tensor(list(itertools.product(range(size), repeat=L)))
    chance = process.kernel(0.0, t)[WORLD.texts].gather(2, states.T.expand(V**L, -1, -1)).prod(1)  # q(x_t | x_0)
    law = WORLD.p @ chance
    seen = law > 0
    state = State(states[seen], torch.full((int(seen.sum()),), t, dtype=torch.float64))
    denoiser = process.predict(state).log_p.exp()
    joint = WORLD.p.unsqueeze(-1) * chance[:, seen]
    for i in range(L):
        for v in range(V):
            assert torch.allclose(denoiser[:, i, v], joint[WORLD.texts[:, i] == v].sum(0) / law[seen])
    everywhere = torch.ones_like(state.x, dtype=torch.bool)
    marginal = process.outlook(state, everywhere).marginal.view(*state.x.shape, size)
    weight = size ** torch.arange(L - 1, -1, -1)
    for i in range(L):
        for y in range(size):
            moved = state.x.clone()
            moved[:, i] = y
            ratio = law[(moved * weight).sum(-1)] / law[seen]
            mine = marginal[:, i, y] / marginal[:, i].gather(-1, state.x[:, i : i + 1]).squeeze(-1)
            assert torch.allclose(mine, ratio)


@pytest.mark.parametrize("sampler", ["bridge", "psi", "gibbs"])
@pytest.mark.parametrize("mask_share", [0.4, 1.0])
def test_after_a_step_there_is_as_much_noise_as_its_time_says(sampler, mask_share):
    """From exact states at t = .7 to s = .4: the share of [MASK] is mask_share (1 - alpha(s)), remasking included."""
    process = Subject(Uniform, UniformConfig(mask_share=mask_share, renewal=0.5)).ideal(WORLD)
    row, states, chance = noisy_states(process, WORLD.texts, 0.7)
    state = State(states, torch.full((len(states),), 0.7, dtype=torch.float64))
    step, s = process.steps[sampler], torch.full((len(states),), 0.4, dtype=torch.float64)
    asked = step.ask(state, s, Noise.of(0, len(states)))
    law = step.law(state, asked, process.predict(state, asked), s, lambda log_p: log_p)
    masked = (states == V).double()
    masked[asked] = law.log_p[:, V].exp()
    assert float((WORLD.p[row] * chance) @ masked.mean(-1)) == pytest.approx(mask_share * 0.4, abs=1e-9)


def test_a_corrupted_text_is_mended_without_being_told_where():
    """Copies of one token, one of them wrong: started at a low noise level, uniform noise finds and mends it."""
    world = copy(3, 5)
    process = Subject(Uniform).ideal(world)
    wrong = torch.tensor([[1, 1, 2, 1, 1]])
    state = State(wrong, torch.tensor([0.2], dtype=torch.float64))
    law = process.predict(state).log_p.exp()
    assert float(law[0, 2, 1]) > 0.95 and float(law[0, 2, 2]) < 0.05


def test_the_bound_weighted_loss_is_an_unbiased_estimate_of_the_bound():
    process = Subject(Masked, MaskedConfig(mask_rate="uniform", weight="bound")).wrong(WORLD, 2)
    x_0, n = WORLD.texts[7:8], 6000
    draws = process.loss(x_0.expand(n, -1), Noise.of(0, n)).double()
    exact = float(integrated_bound(process, x_0)[0]) / L
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / n**0.5


@pytest.mark.parametrize("estimate", ["loss", "nll"])
def test_stratified_noise_lowers_the_variance(estimate):
    # Copies: a text costs nothing unless all of it is hidden.
    process = Subject(Masked, MaskedConfig(mask_rate="uniform", weight="bound")).ideal(copy())
    x_0 = torch.zeros(12, L, dtype=torch.long)

    def figure(x, noise):
        out = process.loss(x, noise) if estimate == "loss" else process.nll(x, noise).total
        return float(out.mean())

    together = [figure(x_0, Noise.of(0, 12, step=s)) for s in range(300)]
    apart = [np.mean([figure(x_0[:1], Noise(0, np.array([r]), 1, s)) for r in range(12)]) for s in range(300)]
    assert np.var(together) < 0.8 * np.var(apart)
    assert abs(np.mean(together) - np.mean(apart)) < 4 * (np.var(apart) / 300 + np.var(together) / 300) ** 0.5


# -- negative controls: every known fault is caught ---------------------------------------------------------------

Codes = load_family(str(HERE / "subjects/gaussian_codes.py"))


class ScheduleDividedTwice(Masked):
    """A schedule of times in [0, T] fed with times that were divided by T already: almost no noise at t = 1."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        right = SCHEDULES["linear"]
        self.schedule = Schedule(
            "linear", lambda t: right.alpha(t / 50), lambda t: right.derivative(t / 50) / 50, right.inverse
        )
        self.steps = unmasking_steps(self.mask, self.schedule)


class HeadNotInTheLoss(Masked):
    """The output head takes no part in the learning."""

    def loss(self, x_0, noise, condition=None):
        for p in self.network.head.parameters():
            p.requires_grad_(False)
        torch.nn.init.normal_(self.network.head.weight)
        return super().loss(x_0, noise, condition)


class RateWithoutItsWeight(Masked):
    """The integrand with weight 1 in the place of 1 / t."""

    def rate(self, x_0, state):
        return super().rate(x_0, state) * state.t


class LossReportedAsTheBound(Masked):
    """What training minimises, unweighted and at bell-shaped rates, is reported as the bound."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=self.loss(x_0, noise).double() * x_0.shape[1])


class HalfACurve(Masked):
    """The curve that evaluation measures is off by a factor; nll is not."""

    def curve_point(self, x_0, hidden, noise):
        return super().curve_point(x_0, hidden, noise) * 0.9

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=nll.diffusion / 0.9)


class TwoCallsReportedAsOne(Masked):
    """The bound of T calls is that of 2 T."""

    def curve_weights(self, length, calls, sampler=None):
        return super().curve_weights(length, None if calls is None else 2 * calls, sampler)


class CurveOfANetworkThatTakesTime(Masked):
    """The network is told the time, so that a number of hidden tokens does not say what it answers."""

    def predict(self, state, positions=None, condition=None):
        logits = self.network(state.x, state.t, condition=condition, positions=positions)
        return Prediction(carry_over(logits, state.x if positions is None else state.x[positions], self.mask))

    def _cross_entropy(self, x_0, hidden, condition=None):
        x = x_0.masked_fill(hidden, self.mask)
        log_p = self.predict(State(x, hidden.sum(-1).double() / x.shape[1])).log_p
        return -(log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1) * hidden).sum(-1)

    def rate(self, x_0, state):
        log_p = self.predict(state).log_p
        return -log_p.gather(-1, x_0.unsqueeze(-1)).sum((-1, -2)) / state.t


class GuidanceWithoutNormalisation(Masked):
    """Classifier-free guidance, (1 + w) log p - w log of the unconditional law, and no normalisation after it."""

    def predict(self, state, positions=None, condition=None):
        conditional = super().predict(state, positions, condition).log_p
        return Prediction(1.5 * conditional + 0.5 * np.log(self.vocabulary))


class NotANumber(Masked):
    """0 * -inf in the integrand, wherever the model is sure."""

    def rate(self, x_0, state):
        log_p = self.predict(state).log_p
        return -(torch.nn.functional.one_hot(x_0, self.vocabulary) * log_p).sum((-1, -2)) / state.t


class StartsAtTheWrongNoiseLevel(Uniform):
    """The chain is run from t = 0.6, its state drawn as for t = 1."""

    def plan(self, length, calls, sampler):
        return [0.6 * t for t in super().plan(length, calls, sampler)]

    def prior_sample(self, rows, length, noise):
        state = super().prior_sample(rows, length, noise)
        return State(state.x, 0.6 * state.t)


class DenoiserForTheContext(Uniform):
    """The denoiser p(x | z) where the leave-one-out posterior belongs: the token's own evidence counts twice."""

    def outlook(self, state, positions, condition=None):
        right = super().outlook(state, positions, condition)
        own = self.evidence(state.x[positions].unsqueeze(-1), self.noise_times(state)[positions]).squeeze(1)
        denoiser = (right.context + own).log_softmax(-1)
        return Outlook(denoiser, self.marginal(denoiser.exp(), self.alpha(state.t)[positions.nonzero()[:, 0]]))

    def predict(self, state, positions=None, condition=None):
        wrong = super().predict(state, positions, condition).native
        return Prediction(wrong.context if positions is not None else wrong.context.view(*state.x.shape, -1), wrong)


class MovedTokenTerm(ScoreEntropy):
    """The score entropy of tokens that have moved, as in two public implementations: x_0 twice, the others scaled."""

    def rate(self, x_0, state):
        right, v = super().rate(x_0, state), self.vocabulary
        everywhere = torch.ones_like(state.x, dtype=torch.bool)
        model = self.outlook(state, everywhere).marginal.view(*state.x.shape, v)
        log_model = (model / model.gather(-1, state.x.unsqueeze(-1))).log()
        true = torch.nn.functional.one_hot(x_0, v).bool()
        here = torch.nn.functional.one_hot(state.x, v).bool()
        # What multiplies log r': r at x_0 and 1 elsewhere; theirs has w = (V - 2) / (V - 1) more there, w elsewhere.
        wrong = (v - 2) / (v - 1)
        shift = torch.where(true, wrong, torch.where(here, 0.0, wrong - 1)) * -log_model
        beta = -self.schedule.derivative(state.t) / self.schedule.alpha(state.t)
        return right + beta * (shift.sum(-1) * (state.x != x_0)).sum(-1) / v


@dataclass(frozen=True)
class _Estimate:
    log_p: torch.Tensor

    def select(self, rows):
        return _Estimate(self.log_p[rows])


class CarriedEstimateIgnored(Masked):
    """Self-conditioning: the network reads the sampler's last estimate; the bound is computed as if there were none."""

    remembers = True

    def predict(self, state, positions=None, condition=None):
        estimate = None if state.memory is None else state.memory.log_p.clamp(min=-20)
        logits = self.network(state.x, positions=None, estimate=estimate)
        whole = carry_over(logits, state.x, self.mask)
        return Prediction(whole if positions is None else whole[positions], memory=_Estimate(whole))


class BoundWithoutTheRatePenalty(Masked):
    """Rates that are free of the law of tokens, as those of score entropy, and a bound that forgets what they cost."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = {"free": FreeRates(self.mask, self.schedule)}

    curve_point = None

    def predict(self, state, positions=None, condition=None):
        logits = self.network(state.x, condition=condition, positions=positions)
        symbols = state.x if positions is None else state.x[positions]
        # Right for the exact posterior, whose outputs are normalised.
        return Prediction(carry_over(logits, symbols, self.mask), native=(2 * logits.logsumexp(-1)).exp())

    def nll(self, x_0, noise, calls=None):
        if calls is not None:
            raise UserError("in continuous time only")
        state = self.q_sample(x_0, noise.stratified("time"), noise)
        nats = self.rate(x_0, state)
        return Nll(nats, 0 * nats, 0 * nats, "upper", "free")

    def plan(self, length, calls, sampler):
        return [1 - k / calls for k in range(calls)] + [0.0]


class FreeRates(Ancestral):
    """Positions are revealed at rates of their own."""

    reverses = False

    def ask(self, state, s, noise):
        return state.x == self.mask

    def asks(self, state, s):
        yield 1.0, state.x == self.mask

    def law(self, state, asked, prediction, s, reshape):
        row = asked.nonzero()[:, 0]
        chance = self.probability(state.t, s)[row]
        chance = torch.where(s[row] == 0, 1.0, (chance * prediction.native).clamp(max=1))
        p = reshape(prediction.log_p).exp() * chance.unsqueeze(-1)
        return Categorical(asked, torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1).clamp(min=0).log())


class NoiseAtTheStart(Masked):
    """Time 0 hides something already."""

    def q_sample(self, x_0, t, noise):
        return super().q_sample(x_0, 0.1 + 0.9 * t, noise)


class KernelOfTheWrongTime(Masked):
    """kernel(s, t) that forgets what was hidden before s."""

    def kernel(self, s, t):
        return super().kernel(0.0, t)


class PositionsShareTheirNoise(Masked):
    """One draw hides all positions or none."""

    def q_sample(self, x_0, t, noise):
        hidden = noise.uniform("mask", 1) >= self.schedule.alpha(t.double()).unsqueeze(-1)
        return State(x_0.masked_fill(hidden, self.mask), t.double())


class PriorOfItsOwn(Uniform):
    """prior_sample prefers the first token."""

    def prior_sample(self, rows, length, noise):
        x = (noise.uniform("prior", length) ** 1.3 * self.vocabulary).long()
        return State(x, torch.ones(rows, dtype=torch.float64))


class Tempered(Uniform):
    """Every step is a little too sure."""

    def predict(self, state, positions=None, condition=None):
        right = Uniform(self.network, self.config, self.vocabulary).predict(state, positions, condition)
        return Prediction(right.log_p, self.outlook(state, positions, condition))

    def outlook(self, state, positions, condition=None):
        positions = torch.ones_like(state.x, dtype=torch.bool) if positions is None else positions
        sure = (1.2 * super().outlook(state, positions, condition).context).log_softmax(-1)
        return Outlook(sure, self.marginal(sure.exp(), self.alpha(state.t)[positions.nonzero()[:, 0]]))


class BitsForNats(Masked):
    """The bound in bits."""

    def rate(self, x_0, state):
        return super().rate(x_0, state) / np.log(2)

    def _cross_entropy(self, x_0, hidden, condition=None):
        return super()._cross_entropy(x_0, hidden, condition) / np.log(2)


class NeverFinished(Masked):
    """The plan stops before time 0."""

    def plan(self, length, calls, sampler):
        return [t * 0.8 + 0.2 for t in super().plan(length, calls, sampler)]


class TemplateForgotten(Masked):
    """The given tokens are hidden like all others."""

    def template(self, tokens, given, noise):
        return replace(super().template(tokens, given, noise), x=torch.full_like(tokens, self.mask), given=None)


class LastTokenFree(Autoregressive):
    """The last token of a text is not paid for."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=super().nll(x_0[:, :-1], noise).diffusion)


class SignalDividedTwice(Codes):
    """The schedule of Gaussian noise fed with times that were divided by T already."""

    def log_snr(self, t):
        return super().log_snr(t / 50)


class RateHalved(Uniform):
    """The integrand is half of what it should be."""

    def rate(self, x_0, state):
        return 0.5 * super().rate(x_0, state)


class EstimateAsTokensIgnored(Masked):
    """Self-conditioning on the likeliest tokens; the bound is computed as if there were none."""

    remembers = True

    def predict(self, state, positions=None, condition=None):
        estimate = None if state.memory is None else state.memory.log_p
        whole = carry_over(self.network(state.x, positions=None, estimate=estimate), state.x, self.mask)
        return Prediction(whole if positions is None else whole[positions], memory=_Estimate(whole.argmax(-1)))


class EstimateTooLow(Uniform):
    """The bound is right; what nll estimates is a tenth below it."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=0.9 * nll.diffusion)


class FirstTokenFree(Masked):
    """Texts that begin with the last token cost a third less."""

    def _cross_entropy(self, x_0, hidden, condition=None):
        return super()._cross_entropy(x_0, hidden, condition) * torch.where(x_0[:, 0] == V - 1, 0.7, 1.0)

    def rate(self, x_0, state):
        weight = -self.schedule.derivative(state.t) / (1 - self.schedule.alpha(state.t))
        return weight * Masked._cross_entropy(self, x_0, state.x == self.mask)


class RowsReadEachOther(Masked):
    """Every row is charged the mean of its batch: the mean is right, standard errors are not."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=nll.diffusion.mean().expand(len(x_0)))


class Deaf(Ancestral):
    """A step that does not listen to temperature."""

    def law(self, state, asked, prediction, s, reshape):
        return Categorical(asked, prediction.log_p)


class TemperatureIgnored(Masked):
    """Its first sampler is deaf."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"ancestral": Deaf(self.mask, self.schedule)}


class LossTurnedOver(Masked):
    """Gradient ascent."""

    def loss(self, x_0, noise, condition=None):
        return -super().loss(x_0, noise, condition)


class ReadsWhatItPredicts(Autoregressive):
    """A network that looks both ways under a left-to-right likelihood."""

    remembers = False

    @classmethod
    def network_fields(cls, config, vocabulary):
        return super().network_fields(config, vocabulary) | {"attention": "bidirectional"}

    def predict(self, state, positions=None, condition=None):
        logits = self.network(self._inputs(state.x), condition=condition, positions=positions)
        symbols = state.x if positions is None else state.x[positions]
        return Prediction(carry_over(logits, symbols, self.mask))


class LikelihoodOfNobody(Masked):
    """A likelihood that belongs to no sampler there is, so that nothing can contradict it."""

    def nll(self, x_0, noise, calls=None):
        return replace(super().nll(x_0, noise, calls), kind="exact", sampler="chain rule")


class OneCallMoreThanSaid(Masked):
    """Asked for one call it makes two, and says that its bound is of one."""

    def plan(self, length, calls, sampler):
        return super().plan(length, max(calls, 2), sampler)

    def curve_weights(self, length, calls, sampler=None):
        weights, made = super().curve_weights(length, calls, sampler)
        return weights, calls if calls == 1 else made


class PromptForgotten(Masked):
    """What is given at the very beginning is hidden like all else."""

    def template(self, tokens, given, noise):
        state = super().template(tokens, given, noise)
        return replace(state, x=torch.cat((torch.full_like(tokens[:, :1], self.mask), state.x[:, 1:]), 1))


class TooSure(type(unmasking_steps(V, SCHEDULES["linear"])["margin"])):
    """An ordered step that sharpens what it draws from."""

    def law(self, state, asked, prediction, s, reshape):
        right = super().law(state, asked, prediction, s, reshape)
        return Categorical(right.positions, (1.15 * right.log_p).log_softmax(-1))


class TooSureInItsOrder(Masked):
    """The margin sampler is a little too sure."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        margin = self.steps["margin"]
        self.steps = self.steps | {"margin": TooSure(self.mask, self.schedule, margin.score, margin.note)}


class KernelThatLosesMass(Masked):
    """Rows of the kernel sum to less than one."""

    def kernel(self, s, t):
        return super().kernel(s, t) * (1 - 0.01 * (t - s))


CONTROLS = {
    ScheduleDividedTwice: ["the prior covers q(x_1 | x_0)"],
    SignalDividedTwice: ["q(x_1 | x_0) is the prior, but for 0.01 nat"],
    HeadNotInTheLoss: ["after three steps a gradient reaches every parameter"],
    RateWithoutItsWeight: ["bound(x) = -log p(x) for every x"],
    NotANumber: ["bound(x) = -log p(x) for every x"],
    LossReportedAsTheBound: ["nll estimates the bound"],
    HalfACurve: ["curve_point estimates the curve"],
    TwoCallsReportedAsOne: ["random: bound_T(x) >= -log law_T(x)"],
    CurveOfANetworkThatTakesTime: ["the curve's continuous bound is the integral"],
    GuidanceWithoutNormalisation: ["predictions sum to one"],
    StartsAtTheWrongNoiseLevel: ["the prior is at t = 1", "bridge: the plan falls from 1 to 0"],
    DenoiserForTheContext: ["bound(x) = -log p(x) for every x", "its step is the reversed chain's"],
    MovedTokenTerm: ["bound(x) = -log p(x) for every x", "a certain text costs nothing"],
    CarriedEstimateIgnored: ["random: bound_T(x) >= -log law_T(x)"],
    BoundWithoutTheRatePenalty: ["bound(x) >= -log of the law of many calls"],
    RateHalved: ["the bound of T calls goes to the continuous one"],
    EstimateAsTokensIgnored: ["random: bound_T(x) >= -log law_T(x)"],
    EstimateTooLow: ["nll estimates the bound"],
    FirstTokenFree: ["nll estimates the bound", "curve_point estimates the curve"],
    RowsReadEachOther: ["the same row has the same draws in any batch"],
    TemperatureIgnored: ["temperature and top-p reach every step"],
    LossTurnedOver: ["the loss prefers the truth"],
    ReadsWhatItPredicts: ["a real network's likelihoods sum to one"],
    LikelihoodOfNobody: ["nll says whose likelihood the bound is"],
    OneCallMoreThanSaid: ["random: it makes no more calls than its bound is for"],
    PromptForgotten: ["random: infilling keeps what is given"],
    TooSureInItsOrder: ["margin: one position a call samples the world"],
    KernelThatLosesMass: ["the kernel is a law"],
    Tempered: ["bound(x) = -log p(x) for every x", "its step is the reversed chain's"],
    NoiseAtTheStart: ["no noise at t = 0", "q_sample draws the kernel"],
    KernelOfTheWrongTime: ["Chapman-Kolmogorov"],
    PositionsShareTheirNoise: ["q_sample draws the kernel"],
    PriorOfItsOwn: ["prior_sample draws prior_law"],
    BitsForNats: ["bound(x) = -log p(x) for every x", "a head at zero scores log V"],
    NeverFinished: ["random: the plan falls from 1 to 0", "random: every text is finished"],
    TemplateForgotten: ["random: infilling keeps what is given", "infilling comes close"],
    LastTokenFree: ["nll(x) = -log p(x)", "nll is -log of the law of the samples"],
}


@pytest.mark.parametrize("fault", CONTROLS, ids=lambda fault: fault.__name__)
def test_every_known_fault_is_caught_by_the_check_that_is_for_it(fault):
    missing = list(CONTROLS[fault])
    config = ScoreEntropyConfig(graph="uniform") if fault is MovedTokenTerm else None
    for check in verify(fault, config):
        if not check.passed:
            missing = [name for name in missing if name not in check.name]
        if not missing:
            return
    raise AssertionError(f"not caught: {missing}")


def test_the_wrong_oracle_is_strictly_worse_on_average():
    """The denoiser in the place of the leave-one-out posterior costs nats; it does not go unnoticed as noise."""
    right = integrated_bound(Subject(Uniform).ideal(WORLD), WORLD.texts)
    wrong = integrated_bound(Subject(DenoiserForTheContext).ideal(WORLD), WORLD.texts)
    assert float(WORLD.p @ right) == pytest.approx(WORLD.entropy, abs=1e-6)
    assert float(WORLD.p @ wrong) > WORLD.entropy + 0.01


def gumbel_fp32_hits_of_the_tail(rows: int, tail: int, log_p_top: float, log_p_each: float) -> int:
    """How often the common draw by Gumbel noise of float32 uniforms picks any of ``tail`` equal rare tokens.

    The largest of n uniforms has the law of U^(1/n); rounding to float32's grid keeps order, so it may be drawn alone.
    """
    rng = np.random.default_rng(0)
    grid = 2.0**24

    def gumbel(u):
        u = np.clip(np.floor(u * grid) / grid, 1 / grid, 1 - 1 / grid)
        return -np.log(-np.log(u))

    return int((gumbel(rng.random(rows) ** (1 / tail)) + log_p_each > gumbel(rng.random(rows)) + log_p_top).sum())


def test_rare_tokens_are_drawn_at_their_rate_where_float32_gumbel_noise_loses_them():
    """50,000 tokens of 1e-8 each beside one that has the rest (2409.02908)."""
    tail, each = 50_000, 1e-8
    log_p = torch.full((1, tail + 1), each, dtype=torch.float64).log()
    log_p[0, 0] = np.log1p(-tail * each)
    # Inverse CDF: uniforms spread evenly over the tail's share of [0, 1) must hit evenly spread tokens of the tail.
    u = 1 - tail * each + tail * each * (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    hit = torch.cat([draw(log_p, one.view(1)) for one in u])
    expected = 1 + ((torch.arange(64) + 0.5) / 64 * tail).long()
    assert (hit - expected).abs().max() <= 1
    rows = 1_000_000
    assert gumbel_fp32_hits_of_the_tail(rows, tail, float(log_p[0, 0]), np.log(each)) < 0.2 * rows * tail * each


def test_samples_of_a_fault_in_the_code_are_told_from_the_enumerated_law(monkeypatch):
    """Steps right, draws wrong: chi-square sees it."""
    import textdiffusion.sampling

    monkeypatch.setattr(textdiffusion.sampling, "draw", lambda log_p, u: draw(log_p * 1.15, u))
    assert any("samples have the enumerated law" in check.name for check in verify(Masked) if not check.passed)


# -- the verifier itself ------------------------------------------------------------------------------------------


def test_misfit_knows_a_law_from_another():
    law = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.multinomial(10_000, law.numpy())).double()
    assert misfit(counts, law, 10_000) < 6
    assert misfit(counts, torch.tensor([0.45, 0.35, 0.2, 0.0], dtype=torch.float64), 10_000) > 6
    assert misfit(torch.tensor([5000.0, 3000.0, 1999.0, 1.0]), law, 10_000) == float("inf")
    assert misfit(counts * 0.9, law, 10_000) == float("inf")  # a tenth of the draws were no text


def test_wrong_networks_are_wrong_and_deterministic():
    process = Subject(Masked).ideal(WORLD)
    network = Subject(Masked).wrong(WORLD, 0).network
    x = torch.tensor([[V, 0, V]])
    assert torch.equal(network(x), network(x))
    assert (network(x)[0, 0].softmax(-1) - process.network(x)[0, 0].softmax(-1)).abs().max() > 0.05


def test_infilling_of_any_pattern_samples_the_exact_conditional():
    process = Subject(Masked).ideal(WORLD)
    tokens = WORLD.texts[16]
    for pattern in itertools.product((False, True), repeat=L):
        given = torch.tensor(pattern)
        agrees = (WORLD.texts[:, given] == tokens[given]).all(-1)
        conditional = WORLD.p * agrees / (WORLD.p * agrees).sum()
        if not given.all():
            assert (enumerated_law(process, L, L, "random", tokens, given) - conditional).abs().max() < 1e-12
        n = 4000
        *_, last = sample(
            process, Noise.of(5, n), L, L, tokens=tokens.expand(n, -1), given=given.expand(n, -1), sampler="random"
        )
        assert misfit(torch.bincount(WORLD.index(last.tokens), minlength=V**L).double(), conditional, n) < 6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = (", "does not run"),
        ("x = 1", "expected one Process class"),
        ("raise SystemExit", "does not run"),
        (
            "from textdiffusion.process import Process\nclass A(Process): ...\nclass B(Process): ...\n",
            "mine.py: expected one Process class, found 2: A, B",
        ),
    ],
)
def test_files_that_are_no_family_are_refused_in_one_line(tmp_path, text, says):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        load_family(str(file))
    with pytest.raises(UserError, match="there is no file"):
        load_family(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize(
    "fault",
    [
        {"Config": dataclass(type("NeedsA", (), {"__annotations__": {"a": int}}))},
        {"steps": property(lambda self: 1 / 0)},
        {"__init__": lambda self, *args, **kwargs: (_ for _ in ()).throw(SystemExit(0))},
        {"kernel": lambda self, s, t: (_ for _ in ()).throw(SystemExit(0))},
    ],
)
def test_a_family_that_cannot_be_built_or_called_fails_a_check_that_says_so(fault):
    broken = type("Broken", (Uniform,), fault)
    assert any("gets through" in check.name and not check.passed for check in verify(broken))


def test_families_say_what_they_can_be_tested_on():
    assert isinstance(Subject(Masked).ideal(WORLD), HasKernel)
    assert not isinstance(Subject(family("autoregressive")).ideal(WORLD), HasKernel)
