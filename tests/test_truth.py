"""The truth suite: every family is proven on worlds that can be enumerated.

A new file in families/ is found and tested with no test written for it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from test_faults import controlled
from textdiffusion.diffusion.absorbing import count_weights
from textdiffusion.errors import UserError
from textdiffusion.families import family, load_family, names
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.families.score_entropy import ScoreEntropy, ScoreEntropyConfig
from textdiffusion.families.uniform import Uniform, UniformConfig
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import SCHEDULES
from textdiffusion.mathematics.worlds import Table, chain, chain_entropy, copy, hidden_chain, random_table
from textdiffusion.process import HasKernel, Prediction, State
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification import Subject, verify
from textdiffusion.verification.enumeration import (
    enumerated_law,
    exact_curve,
    integrated_bound,
    misfit,
    noisy_states,
)

HERE = Path(__file__).parent
V, L = 3, 3
WORLD = random_table(V, L)


def faults(subject, config=None) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in verify(subject, config) if not check.passed]


# -- every family is right ----------------------------------------------------------------------------------------


# More than 15 seconds each: their bounds, laws and equalities have quicker tests of their own, below or in a file.
LONG = ("uniform", "score_entropy", "sparse_distribution", "analog_bits", "gaussian_embedding")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in names()]
)
def test_every_family_passes_every_check(name):
    checks = list(verify(family(name)))
    assert [c for c in checks if not c.passed] == []
    assert len(checks) >= 10
    assert [c.name for c in checks if not controlled(c.name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "linear"])
def test_the_masked_family_is_right_under_every_schedule(schedule):
    assert faults(Masked, MaskedConfig(schedule=schedule)) == []


@pytest.mark.parametrize("file", ["../examples/fading_noise.py", "subjects/gaussian_codes.py"])
def test_families_in_files_of_their_own_pass(file):
    checks = list(verify(load_family(str(HERE / file))))
    assert [c for c in checks if not c.passed] == []
    assert [c.name for c in checks if not controlled(c.name)] == []


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
@pytest.mark.parametrize("mask_share", [0.0, 0.4, 1.0])
def test_after_a_step_each_position_has_the_law_of_its_time(sampler, mask_share):
    """From exact states at t = .7 to s = .4: alpha(s) of the world's law there, and noise, whatever is drawn anew.

    No check of verify's: samplers that choose positions have no such law."""
    process = Subject(Uniform, UniformConfig(mask_share=mask_share, renewal=0.5)).ideal(WORLD)
    row, states, chance = noisy_states(process, WORLD.texts, 0.7)
    state = State(states, torch.full((len(states),), 0.7, dtype=torch.float64))
    step, s = process.steps[sampler], torch.full((len(states),), 0.4, dtype=torch.float64)
    asked = step.ask(state, s, Noise.of(0, len(states)))
    law = one_hot(states, process.space.size).double()
    law[asked] = step.law(state, asked, process.predict(state, asked), s, lambda log_p: log_p).log_p.exp()
    after = torch.einsum("n,nls->ls", WORLD.p[row] * chance, law)
    token = torch.einsum("n,nlv->lv", WORLD.p, one_hot(WORLD.texts, V).double())
    assert torch.allclose(after, process.marginal(token, torch.tensor(0.6, dtype=torch.float64)), rtol=0, atol=1e-9)


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


def test_families_say_what_they_can_be_tested_on():
    assert isinstance(Subject(Masked).ideal(WORLD), HasKernel)
    assert not isinstance(Subject(family("autoregressive")).ideal(WORLD), HasKernel)
