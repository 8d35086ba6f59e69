"""The mathematics of the families against exact enumeration (science: 2406.07524, 2110.02037, 2409.02908)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from textdiffusion.absorbing import ancestral_weights, count_weights
from textdiffusion.families.autoregressive import Autoregressive, AutoregressiveConfig
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.noise import Noise
from textdiffusion.process import State
from textdiffusion.sampling import sample
from textdiffusion.schedules import SCHEDULES
from worlds import causal_oracle, masked_oracle, random_world, wrong_network

V, L = 3, 3
WORLD = random_world(V, L)


def masked(network=None, **fields) -> Masked:
    return Masked(network or masked_oracle(WORLD), MaskedConfig(**fields), V)


def exact_curve(process: Masked, x_0: torch.Tensor) -> np.ndarray:
    """curve(n) for each string, float64 [B, L + 1], by enumeration of all masks."""
    length = x_0.shape[1]
    curve = np.zeros((len(x_0), length + 1))
    for n in range(1, length + 1):
        sets = list(itertools.combinations(range(length), n))
        for chosen in sets:
            hidden = torch.zeros(length, dtype=torch.bool)
            hidden[list(chosen)] = True
            log_p = process.predict(State(x_0.masked_fill(hidden, V), torch.ones(len(x_0)))).log_p
            nats = -log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1)[:, hidden].mean(-1)
            curve[:, n] += nats.numpy() / len(sets)
    return curve


def law_of_reveals(process: Masked, blocks: list[frozenset[int]]) -> torch.Tensor:
    """Exact law over all strings when positions are revealed in these groups, float64 [V^L]."""
    law = torch.zeros(V**L, dtype=torch.float64)
    for k, x_0 in enumerate(WORLD.strings):
        shown: frozenset[int] = frozenset()
        log_p = 0.0
        for block in blocks:
            x = torch.tensor([[int(x_0[i]) if i in shown else V for i in range(L)]])
            p = process.predict(State(x, torch.ones(1))).log_p[0]
            log_p += sum(float(p[i, x_0[i]]) for i in block)
            shown |= block
        law[k] = math.exp(log_p)
    return law


def law_of_counts(process: Masked, counts: list[int]) -> torch.Tensor:
    """Exact law of the "random" sampler that reveals these numbers of positions."""
    orders = list(itertools.permutations(range(L)))
    cuts = [0, *itertools.accumulate(counts)]
    laws = [law_of_reveals(process, [frozenset(o[a:b]) for a, b in itertools.pairwise(cuts) if b > a]) for o in orders]
    return torch.stack(laws).mean(0)


def law_of_ancestral(process: Masked, times: list[float]) -> torch.Tensor:
    """Exact law of the ancestral sampler: a sum over the step at which each position is revealed."""
    alpha = process.schedule.alpha(torch.tensor(times, dtype=torch.float64))
    share = (alpha[1:] - alpha[:-1]).tolist()
    law = torch.zeros(V**L, dtype=torch.float64)
    for steps in itertools.product(range(len(share)), repeat=L):
        weight = math.prod(share[k] for k in steps)
        blocks = [frozenset(i for i in range(L) if steps[i] == k) for k in range(len(share))]
        law += weight * law_of_reveals(process, [b for b in blocks if b])
    return law


# -- bounds -------------------------------------------------------------------------------------------------------


def test_with_the_oracle_the_masked_bound_is_the_negative_log_likelihood_of_every_string():
    bound = exact_curve(masked(), WORLD.strings) @ masked().curve_weights(L, None)[0]
    assert np.abs(bound + WORLD.log_p.numpy()).max() < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_model_is_bounded_for_every_string_and_every_number_of_calls(seed):
    """bound_T(x) >= -log law_T(x), both enumerated, for both samplers that have a bound."""
    process = masked(wrong_network(V, L, seed))
    curve = exact_curve(process, WORLD.strings)
    for calls in (1, 2, 3):
        times = list(process.plan(L, calls, "ancestral"))
        counts = {1: [3], 2: [1, 2], 3: [1, 1, 1]}[calls]
        for weights, law in (
            (process.curve_weights(L, calls)[0], law_of_counts(process, counts)),
            (process.curve_weights(L, calls, "ancestral")[0], law_of_ancestral(process, times)),
        ):
            assert abs(float(law.sum()) - 1) < 1e-9
            assert (curve @ weights >= -law.log().numpy() - 1e-9).all()


def test_the_bound_of_t_calls_falls_to_the_entropy():
    p = WORLD.p.flatten().numpy()
    for schedule in SCHEDULES:
        process = masked(schedule=schedule)
        curve = p @ exact_curve(process, WORLD.strings)
        bounds = []
        for calls in (1, 2, 4, 8, 64):
            grid = [1 - k / calls for k in range(calls)] + [0.0]
            bounds.append(curve @ ancestral_weights(L, process.schedule, grid))
            law = law_of_ancestral(process, grid) if calls <= 4 else None
            if law is not None:
                kl = float((WORLD.p.flatten() * (WORLD.log_p - law.log())).sum())
                assert bounds[-1] >= WORLD.entropy + kl - 1e-9
        assert all(a > b for a, b in itertools.pairwise(bounds))
        assert abs(curve @ process.curve_weights(L, None)[0] - WORLD.entropy) < 1e-9
        assert bounds[-1] - WORLD.entropy < 0.05 * (bounds[0] - WORLD.entropy)


def test_expected_kl_of_random_groups_is_the_riemann_sum():
    """E KL = sum_k m_k curve(n_k) - sum_n curve(n) (2510.25544), against the mean of the enumerated KLs by order."""
    process = masked()
    p = WORLD.p.flatten()
    curve = p.numpy() @ exact_curve(process, WORLD.strings)
    for counts in ([3], [2, 1], [1, 2]):
        cuts = [0, *itertools.accumulate(counts)]
        kls = []
        for order in itertools.permutations(range(L)):
            law = law_of_reveals(process, [frozenset(order[a:b]) for a, b in itertools.pairwise(cuts)])
            kls.append(float((p * (WORLD.log_p - law.log())).sum()))
        formula = curve @ (count_weights(L, counts) - process.curve_weights(L, None)[0])
        assert abs(np.mean(kls) - formula) < 1e-9


def test_the_autoregressive_likelihood_is_exact():
    process = Autoregressive(causal_oracle(WORLD, 0), AutoregressiveConfig(), V)
    nll = process.nll(WORLD.strings, Noise.of(0, V**L))
    assert nll.kind == "exact"
    assert (nll.total + WORLD.log_p).abs().max() < 1e-9
    assert (process.loss(WORLD.strings, Noise.of(0, V**L)) * L + WORLD.log_p).abs().max() < 1e-9


# -- estimators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [None, 1, 2, 3])
def test_one_draw_estimates_of_the_bound_are_unbiased(calls):
    process = masked(wrong_network(V, L, 1))
    x_0 = WORLD.strings[5:6]
    exact = float((exact_curve(process, x_0) @ process.curve_weights(L, calls)[0])[0])
    n = 6000
    draws = process.nll(x_0.expand(n, -1), Noise.of(0, n), calls).total
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / n**0.5


def test_the_bound_weighted_loss_is_an_unbiased_estimate_of_the_bound():
    process = masked(wrong_network(V, L, 2), mask_rate="uniform", weight="bound")
    x_0 = WORLD.strings[7:8]
    exact = float((exact_curve(process, x_0) @ process.curve_weights(L, None)[0])[0]) / L
    n = 6000
    draws = process.loss(x_0.expand(n, -1), Noise.of(0, n)).double()
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / n**0.5


def test_stratified_counts_lower_the_variance():
    process = masked(wrong_network(V, L, 3), mask_rate="uniform", weight="bound")
    x_0 = WORLD.strings[4:5].expand(12, -1)
    together = [float(process.loss(x_0, Noise.of(0, 12, step=s)).mean()) for s in range(300)]
    apart = [
        float(np.mean([process.loss(x_0[:1], Noise(0, np.array([r]), 1, s)) for r in range(12)])) for s in range(300)
    ]
    assert np.var(together) < 0.8 * np.var(apart)
    assert abs(np.mean(together) - np.mean(apart)) < 4 * (np.var(apart) / 300 + np.var(together) / 300) ** 0.5


# -- kernels and samplers -----------------------------------------------------------------------------------------


def test_forward_marginal_and_prior():
    x_0 = WORLD.strings[10:11].expand(20_000, -1)
    process = masked(schedule="cosine")
    for t in (0.2, 0.7):
        hidden = process.q_sample(x_0, torch.full((20_000,), t), Noise.of(0, 20_000)).x == V
        rate = 1 - float(process.schedule.alpha(torch.tensor(t, dtype=torch.float64)))
        assert (hidden.double().mean(0) - rate).abs().max() < 4 * (rate * (1 - rate) / 20_000) ** 0.5
        # Positions are hidden independently of each other.
        assert abs(float((hidden[:, 0] & hidden[:, 1]).double().mean()) - rate**2) < 0.015


def test_the_ancestral_bridge_is_consistent():
    """Hiding to s, then from s to t, is hiding to t; and the reverse probability is Bayes' rule of the two."""
    for schedule in SCHEDULES.values():
        step = masked(schedule=schedule.name).steps["ancestral"]
        s, t = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
        a_s, a_t = schedule.alpha(s), schedule.alpha(t)
        joint = a_s * (1 - a_t / a_s)  # shown at s and hidden at t
        assert torch.isclose(step.probability(t, s), joint / (1 - a_t))


def draws(process, calls: int, n: int, sampler: str) -> torch.Tensor:
    """Counts over all strings of n samples, float64 [V^L]."""
    *_, last = sample(process, Noise.of(11, n), L, calls, sampler=sampler)
    assert (last.tokens >= 0).all()
    return torch.bincount((last.tokens * V ** torch.arange(L - 1, -1, -1)).sum(-1), minlength=V**L).double()


def fits(observed: torch.Tensor, law: torch.Tensor) -> bool:
    """Chi-square at p about 1e-4 over cells with an expectation of at least 5, the rest pooled."""
    expected = law * observed.sum()
    big = expected >= 5
    e = torch.cat((expected[big], expected[~big].sum().clamp(min=1e-9).unsqueeze(0)))
    o = torch.cat((observed[big], observed[~big].sum().unsqueeze(0)))
    degrees = max(len(e) - 1, 1)
    chi_square = float(((o - e) ** 2 / e).sum())
    return chi_square < degrees + 3.72 * (2 * degrees) ** 0.5 + 10


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("sampler", ["random", "ancestral"])
def test_samples_have_the_enumerated_law(sampler, calls):
    process = masked()
    if sampler == "random":
        law = law_of_counts(process, {1: [3], 2: [1, 2], 3: [1, 1, 1]}[calls])
    else:
        law = law_of_ancestral(process, list(process.plan(L, calls, "ancestral")))
    observed = draws(process, calls, 12_000, sampler)
    assert fits(observed, law)
    # The test has teeth: at one call the law is far from the world's.
    assert fits(observed, WORLD.p.flatten()) == (calls == 3 and sampler == "random")


def test_one_position_a_call_samples_the_world_exactly():
    law = law_of_counts(masked(), [1, 1, 1])
    assert (law - WORLD.p.flatten()).abs().max() < 1e-12


@pytest.mark.parametrize("sampler", ["margin", "confidence"])
def test_ordered_samplers_choose_by_score_and_draw_from_the_law(sampler):
    process = masked()
    step = process.steps[sampler]

    def follow(x: torch.Tensor, p: float, law: torch.Tensor) -> None:
        if not (x == V).any():
            law[int((x * V ** torch.arange(L - 1, -1, -1)).sum())] += p
            return
        hidden = (x == V).sum()
        state = State(x.unsqueeze(0), torch.ones(1, dtype=torch.float64))
        asked = (x == V).unsqueeze(0)
        log_p = process.predict(state, asked).log_p
        s = torch.tensor([(float(hidden) - 1) / L], dtype=torch.float64)
        chosen = step.choose(state, asked, log_p, s)
        assert chosen.sum() == 1
        full = process.predict(state).log_p[0]
        score = full.exp().max(-1).values
        if sampler == "margin":
            best = full.exp().sort(-1, descending=True).values
            score = best[:, 0] - best[:, 1]
        i = int(chosen[0].nonzero())
        assert score[i] >= score[x == V].max() - 1e-12
        for v in range(V):
            y = x.clone()
            y[i] = v
            follow(y, p * float(full[i, v].exp()), law)

    law = torch.zeros(V**L, dtype=torch.float64)
    follow(torch.full((L,), V), 1.0, law)
    assert fits(draws(process, L, 12_000, sampler), law)


@pytest.mark.parametrize("given", [(0,), (1,), (0, 2)])
def test_infilling_samples_the_exact_conditional(given):
    process, n = masked(), 8000
    template = WORLD.strings[16]
    known = torch.tensor([i in given for i in range(L)])
    *_, last = sample(
        process, Noise.of(5, n), L, L, tokens=template.expand(n, -1), given=known.expand(n, -1), sampler="random"
    )
    assert (last.tokens[:, known] == template[known]).all()
    agrees = (WORLD.strings[:, known] == template[known]).all(-1)
    law = WORLD.p.flatten() * agrees
    observed = torch.bincount((last.tokens * V ** torch.arange(L - 1, -1, -1)).sum(-1), minlength=V**L).double()
    assert observed[~agrees].sum() == 0
    assert fits(observed, law / law.sum())


def test_left_to_right_samples_the_world_exactly():
    process = Autoregressive(causal_oracle(WORLD, 0), AutoregressiveConfig(), V)
    assert fits(draws(process, L, 12_000, "left-to-right"), WORLD.p.flatten())


# -- units --------------------------------------------------------------------------------------------------------


def test_an_untaught_model_scores_log_v_and_a_sure_one_zero():
    def silent(x, positions=None, **_):
        out = torch.zeros(*x.shape, 27, dtype=torch.float64)
        return out if positions is None else out[positions]

    def sure(x, positions=None, **_):
        out = torch.zeros(*x.shape, 27, dtype=torch.float64)
        out[..., 4] = 1000.0
        return out if positions is None else out[positions]

    x = torch.full((50, 16), 4)
    for cls in (Masked, Autoregressive):
        for network, expected in ((silent, 16 * math.log(27)), (sure, 0.0)):
            nll = cls(network, cls.Config(), 27).nll(x, Noise.of(0, 50)).total
            assert (nll - expected).abs().max() < 1e-9
