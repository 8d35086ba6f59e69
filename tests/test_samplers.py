"""Samplers: the positions they choose, what they make of temperature, the likelihood of those that follow a rule."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from small_runs import small_run
from textdiffusion.commands.cli import main
from textdiffusion.evaluation.measures import BITS, evaluate
from textdiffusion.families import family
from textdiffusion.families.block import BlockConfig, BlockDiffusion
from textdiffusion.families.masked import Masked
from textdiffusion.families.uniform import Uniform, UniformConfig
from textdiffusion.mathematics.grids import GRIDS
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.process import Prediction, State
from textdiffusion.sampling import recommendation
from textdiffusion.sampling.deterministic_order import order_nll
from textdiffusion.sampling.recommendation import recommend
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification import Subject
from textdiffusion.verification.enumeration import enumerated_law

V, L = 3, 3
WORLD = random_table(V, L)
ONE = np.ones(V, dtype=np.int64)
BY_RULE = ("margin", "confidence", "entropy", "threshold", "dilated", "spread")


# -- the likelihood of an order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", BY_RULE)
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_the_likelihood_of_an_order_is_that_of_what_it_writes(sampler, calls):
    """For a wrong network, text by text against the enumerated law; so likelihoods sum to one."""
    process = Subject(Masked).wrong(WORLD, 1)
    said = order_nll(process, WORLD.texts, calls, sampler)
    law = enumerated_law(process, L, calls, sampler)
    assert (said.total + law.log()).abs().max() < 1e-9 and float(said.total.neg().exp().sum()) == pytest.approx(1)
    assert said.kind == "exact" and said.sampler == sampler and said.calls == calls


def test_blocks_that_are_written_by_a_rule_have_a_likelihood_too():
    process = Subject(BlockDiffusion, BlockConfig(block_length=2)).wrong(WORLD, 0)
    for calls in (2, 3):
        law = enumerated_law(process, L, calls, "margin")
        assert (order_nll(process, WORLD.texts, calls, "margin").total + law.log()).abs().max() < 1e-9


def test_an_order_that_is_left_to_chance_has_no_such_likelihood():
    with pytest.raises(ValueError, match="by chance"):
        order_nll(Subject(Masked).ideal(WORLD), WORLD.texts, 2, "random")


@pytest.mark.parametrize("sampler", ["confidence", "entropy"])
def test_eval_gives_the_exact_figure_of_an_order(sampler):
    process = Subject(Masked).wrong(WORLD, 0)
    x = WORLD.draw(40, 0)
    report = evaluate(process, list(x.numpy()), ONE, calls=[1, 3], sampler=sampler)
    assert report.figure.kind == "upper" and report.figure.sampler == "random"
    for figure, calls in zip(report.by_calls, (1, 3), strict=True):
        nats = -enumerated_law(process, L, calls, sampler).log()[WORLD.index(x)]
        assert (figure.kind, figure.sampler, figure.calls) == ("exact", sampler, calls)
        assert figure.bits_per_char == pytest.approx(float(nats.mean()) / L * BITS, abs=1e-9)
        assert figure.standard_error == pytest.approx(float(nats.std()) / L * BITS / math.sqrt(40), rel=1e-6)


# -- how many positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["entropy", "threshold"])
@pytest.mark.parametrize("calls", [1, 2, 3, 5, 40])
def test_adaptive_orders_make_the_calls_that_they_are_asked_for(sampler, calls):
    """A network that is surer at some positions than at others, of a template too; never more calls than gaps."""
    sureness = torch.linspace(0, 6, 10, dtype=torch.float64)

    def network(x, positions=None, **_):
        out = sureness.view(1, -1, 1) * torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64) + 0 * x.unsqueeze(-1)
        return out if positions is None else out[positions]

    process = Masked(network, Masked.Config(), V)
    given = torch.zeros(6, 10, dtype=torch.bool)
    given[3:, ::3] = True
    *_, last = sample(
        process, Noise.of(0, 6), 10, calls, sampler=sampler, tokens=torch.zeros(6, 10, dtype=torch.long), given=given
    )
    free = (~given).sum(-1)
    assert torch.equal(last.calls, free.clamp(max=calls)) and bool((last.tokens >= 0).all())


def chosen(sampler: str, log_p: list[list[float]], calls_left: int) -> list[bool]:
    """What a sampler reveals of hidden positions of such laws, with so many calls left."""
    process = Subject(Masked).silent(V)
    step, size = process.steps[sampler], len(log_p)
    state = State(torch.full((1, size), V), torch.ones(1, dtype=torch.float64))
    s = torch.tensor([1 - 1 / calls_left], dtype=torch.float64)
    prediction = Prediction(torch.tensor(log_p, dtype=torch.float64).log())
    asked = step.ask(state, s, Noise.of(0, 1))
    assert bool(asked.all())
    return step.law(state, asked, prediction, s, lambda law: law).positions[0].tolist()


def test_the_limits_are_those_of_the_papers():
    sure, unsure, even = [0.98, 0.01, 0.01], [0.6, 0.3, 0.1], [1 / 3] * 3

    def entropy(p):
        return -sum(x * math.log(x) for x in p)

    # Entropies .11, .11, .90, 1.10: half of their sum is 1.11, and the surest three but for the largest have .22.
    laws = [even, sure, unsure, sure]
    limit = sum(map(entropy, laws)) / 2
    assert 2 * entropy(sure) + entropy(unsure) > limit > 2 * entropy(sure)
    assert chosen("entropy", laws, 2) == [False, True, True, True]
    assert chosen("entropy", laws, 1) == [True] * 4 and sum(chosen("entropy", laws, 4)) == 1
    # Doubts .02, .02, .4, .67, their sum 1.11: (2 + 1) .02 < .55 < (3 + 1) .4.
    assert chosen("threshold", laws, 2) == [False, True, False, True]
    assert chosen("threshold", laws, 1) == [True] * 4


def reveals(sampler: str, calls: int, size: int, log_p=None) -> list[list[int]]:
    """The positions that each call of a sampler reveals."""
    process = Subject(Masked).silent(V)
    step, x, out = process.steps[sampler], torch.full((1, size), V), []
    for t, s in itertools.pairwise(process.plan(torch.ones(size, dtype=torch.bool), calls, sampler)):
        state, s = State(x, torch.tensor([t], dtype=torch.float64)), torch.tensor([s], dtype=torch.float64)
        asked = step.ask(state, s, Noise.of(0, 1))
        law = torch.full((int(asked.sum()), V), 1 / V).double().log() if log_p is None else log_p[asked[0]]
        shown = step.law(state, asked, Prediction(law), s, lambda law: law).positions
        out.append(shown[0].nonzero().squeeze(-1).tolist())
        x = x.masked_fill(shown, 0)
    return out


def test_dilated_positions_are_evenly_spaced_where_numbers_are_powers_of_two():
    assert reveals("dilated", 4, 8) == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert reveals("dilated", 2, 8) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert sorted(itertools.chain(*reveals("dilated", 5, 11))) == list(range(11))


def test_spread_positions_are_the_surest_that_are_not_near():
    """Sureness falls from left to right; with two of eight a call, near is less than 2 away, while there are others."""
    sureness = torch.linspace(4, 1, 8, dtype=torch.float64).view(-1, 1) * torch.tensor([1.0, 0.0, 0.0]).double()
    found = reveals("spread", 4, 8, sureness.log_softmax(-1))
    assert found[0] == [0, 2] and sorted(itertools.chain(*found)) == list(range(8))
    assert reveals("spread", 1, 8, sureness.log_softmax(-1)) == [list(range(8))]
    assert reveals("spread", 8, 8, sureness.log_softmax(-1)) == [[i] for i in range(8)]


def test_first_hitting_always_takes_a_call_for_each_position():
    process = Subject(Masked).ideal(WORLD)
    *_, last = sample(process, Noise.of(0, 5), L, 1, sampler="first_hitting")
    assert last.calls.tolist() == [L] * 5
    assert (enumerated_law(process, L, 1, "first_hitting") - WORLD.p).abs().max() < 1e-12


# -- one remasking ------------------------------------------------------------------------------------------------


def test_psi_hides_again_what_it_renews_where_all_noise_is_masks():
    """The sampler of the masked family, and that of noise that replaces, with masks alone: the same law."""
    masked = Subject(Masked).wrong(WORLD, 1)
    timeless = masked.network
    hybrid = Subject(Uniform, UniformConfig(mask_share=1.0)).over(lambda x, t, **how: timeless(x, **how), V)
    laws = [enumerated_law(process, L, 3, "psi") for process in (masked, hybrid)]
    assert (laws[0] - laws[1]).abs().max() < 1e-12
    assert (laws[0] - enumerated_law(masked, L, 3, "ancestral")).abs().max() > 1e-4


# -- temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_share", [0.0, 0.4])
def test_temperature_acts_on_what_the_others_say_of_a_token(mask_share):
    """The law of the last step is that of the reshaped leave-one-out posterior times the token's own evidence."""
    process = Subject(Uniform, UniformConfig(mask_share=mask_share)).ideal(WORLD)
    state = State(WORLD.texts, torch.full((V**L,), 0.6, dtype=torch.float64))
    everywhere = torch.ones_like(state.x, dtype=torch.bool)
    prediction = process.predict(state, everywhere)

    def reshape(law):
        return (2 * law).log_softmax(-1)  # temperature 1/2

    law = process.steps["bridge"].law(state, everywhere, prediction, torch.zeros(V**L).double(), reshape)
    context = process.ideal_context(WORLD.context, state.x, state.t).view(-1, V)
    evidence = process.evidence(state.x, state.t).view(-1, V)
    asked = law.positions[everywhere.view(state.x.shape)]
    expected = (reshape(context) + evidence).softmax(-1)[asked]
    assert torch.allclose(law.log_p.exp()[:, :V], expected, atol=1e-9)
    wrong = reshape((context + evidence).log_softmax(-1)).exp()[asked]
    assert (law.log_p.exp()[:, :V] - wrong).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "sampler"), [("sparse_distribution", "carried"), ("analog_bits", "ddim"), ("gaussian_embedding", "dpm")]
)
def test_what_is_remembered_is_as_it_was_predicted(name, sampler, tmp_path):
    """Candidates and self-conditioning of the second call are those of the first, whatever the temperature."""
    process = small_run(tmp_path / name, name, 8).model.process
    process.config.self_conditioning = getattr(process.config, "self_conditioning", 0)
    seen = {}
    for temperature, top_k in ((1.0, None), (0.0, None), (0.5, 2)):
        memories: list[object] = []
        cls = type(process)

        class Spy(cls):  # type: ignore[misc, valid-type]
            def predict(self, state, positions=None, condition=None):
                memories.append(state.memory)  # noqa: B023
                return super().predict(state, positions, condition)

        spied = process.over(process.network)
        spied.__class__ = Spy
        list(sample(spied, Noise.of(0, 3), 8, 4, sampler=sampler, temperature=temperature, top_k=top_k))
        after = next(memory for memory in memories if memory is not None)
        seen[temperature, top_k] = [part for part in vars(after).values() if isinstance(part, torch.Tensor)]
    plain, *others = seen.values()
    assert plain
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_top_k_cuts_the_law_that_is_drawn_from():
    process = Subject(Masked).silent(V)
    *_, last = sample(process, Noise.of(0, 200), L, L, top_k=1)
    assert len(last.tokens.unique()) == 1
    *_, free = sample(process, Noise.of(0, 200), L, L, top_k=V)
    assert len(free.tokens.unique()) == V


# -- auto ---------------------------------------------------------------------------------------------------------


def test_auto_is_what_was_measured_nearest(monkeypatch):
    rows = {"masked": [(0.25, "entropy", "quadratic"), (1.0, "random", "auto")]}
    monkeypatch.setattr(recommendation, "_table", lambda: rows)
    able = ("random", "entropy", "margin")
    assert recommend("masked", 0.2, able) == recommend("masked", 0.3, able) == ("entropy", "quadratic")
    assert recommend("masked", 0.9, able) == recommend("masked", 0.2, ("random", "margin")) == ("random", "auto")
    # Far from what was measured nothing is known.
    assert recommend("masked", 0.1, ("margin", "entropy")) == ("margin", "auto")
    assert recommend("masked", 20.0, ("margin", "random")) == ("margin", "auto")
    assert recommend("uniform", 0.5, ("bridge", "psi")) == ("bridge", "auto")


def test_every_sampler_that_is_recommended_exists():
    if not recommendation.FILE.exists():
        pytest.skip("nothing has been measured")
    for name, rows in json.loads(recommendation.FILE.read_text(encoding="utf-8"))["recommended"].items():
        process = Subject(family(name)).silent(V)
        assert rows and {row["sampler"] for row in rows} <= set(process.steps)
        assert {row["grid"] for row in rows} <= {"auto", *GRIDS} - {"optimal"}  # which a run may not hold
        assert all(a["calls_a_token"] < b["calls_a_token"] for a, b in itertools.pairwise(rows))


def test_the_command_says_what_auto_came_to(tmp_path, capsys, monkeypatch):
    small_run(tmp_path / "run", "masked", 12)
    monkeypatch.setattr(
        recommendation, "_table", lambda: {"masked": [(0.25, "entropy", "auto"), (1.0, "random", "cosine")]}
    )
    for calls, sampler, grid in ((3, "entropy", "time"), (12, "random", "cosine")):
        assert main(["sample", str(tmp_path / "run"), "--json", "--calls", str(calls), "-n", "1"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["sampler"] == sampler and said["grid"] == grid and said["calls"] == calls
    # A grid that is asked for is taken, whatever was measured.
    assert main(["sample", str(tmp_path / "run"), "--json", "--calls", "12", "-n", "1", "--grid", "rate"]) == 0
    assert json.loads(capsys.readouterr().out)["grid"] == "rate"
