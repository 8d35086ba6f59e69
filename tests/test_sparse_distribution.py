"""Sparse distribution diffusion: what positions hold, who may know what, and what its parts come down to."""

from __future__ import annotations

import itertools

import pytest
import reproduce_sdd
import torch
from torch.nn.functional import one_hot

from textdiffusion.errors import UserError
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.families.sparse_distribution import SparseDistribution, SparseDistributionConfig
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.networks.candidates import Candidates, Slots
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.process import State
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification import Subject, verify
from textdiffusion.verification.enumeration import call_bound, continuous_bound, enumerated_law, order_bound

V, L, K = 11, 8, 4


def make(vocabulary=V, length=L, **fields) -> SparseDistribution:
    """A process around a transformer at random."""
    config = SparseDistributionConfig(**{"candidates": K} | fields)
    size = {"window": length, "depth": 2, "width": 16, "heads": 2}
    torch.manual_seed(0)
    decided = SparseDistribution.network_fields(config, vocabulary)
    network = Transformer(TransformerConfig(**size | decided)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return SparseDistribution(network, config, vocabulary)


def texts(rows=6, seed=0) -> torch.Tensor:
    return torch.randint(0, V, (rows, L), generator=torch.Generator().manual_seed(seed))


def hidden(x, share=0.5, seed=1) -> torch.Tensor:
    return x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share, V)


def turned(slots: Slots, seed=3) -> Slots:
    """Slots of every position in an order of its own."""
    order = torch.rand(slots.symbols.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return Slots(slots.symbols.gather(-1, order), slots.log_p.gather(-1, order))


# -- what positions hold ------------------------------------------------------------------------------------------


def test_open_positions_hold_coarse_probabilities_and_committed_ones_their_token():
    process, x = make(), hidden(texts())
    for slots in (process.first(x), process.refine(x, process.first(x), 1)):
        p, open_ = slots.log_p.exp(), x == V
        assert torch.allclose(p.sum(-1), torch.ones_like(p[..., 0]), atol=1e-6)
        assert torch.equal(slots.symbols[~open_][:, 0], x[~open_])
        assert (p[~open_] == torch.tensor([1.0] + [0.0] * K)).all()
        candidates = slots.symbols[open_]
        assert (candidates[:, -1] == V).all() and (candidates[:, :-1] < V).all()
        assert all(len(row.unique()) == K for row in candidates[:, :-1])
    assert torch.allclose(process.first(x).log_p.exp()[open_][:, :-1], torch.tensor(1 / V, dtype=torch.float64))


def test_refined_candidates_are_true_softmax_values_and_not_renormalised():
    process, x = make(), hidden(texts())
    logits = process.answer(x, process.first(x), x == V)
    slots = process.refine(x, process.first(x), 1)
    p = logits.softmax(-1)
    best = p.sort(-1, descending=True)
    assert torch.equal(slots.symbols[x == V][:, :-1], best.indices[:, :K])
    assert torch.allclose(slots.log_p[x == V].exp()[:, :-1], best.values[:, :K])
    assert torch.allclose(slots.log_p[x == V].exp()[:, -1], best.values[:, K:].sum(-1), atol=1e-6)


def test_as_many_candidates_as_tokens_leave_nothing_elsewhere():
    process = make(candidates=100)
    slots = process.first(torch.full((2, L), V))
    assert process.k == V and torch.allclose(slots.log_p.exp()[..., :-1], torch.tensor(1 / V, dtype=torch.float64))
    assert (slots.log_p.exp()[..., -1] < 1e-6).all()
    assert (slots.symbols[..., :-1].sort(-1).values == torch.arange(V)).all()


def test_candidates_are_a_function_of_what_is_shown():
    """The hidden tokens change nothing; the state at t = 1 is the sampler's start."""
    process, x_0 = make(), texts()
    noise, t = Noise.of(0, 6), torch.full((6,), 0.6)
    noisy = process.q_sample(x_0, t, noise).x
    other = torch.where(noisy == V, (x_0 + 1 + texts(seed=5)) % V, x_0)
    again = process.q_sample(other, t, noise).x
    one, two = (process.refine(x, process.first(x), 1) for x in (noisy, again))
    assert torch.equal(one.symbols, two.symbols) and torch.equal(one.log_p, two.log_p)
    start, end = process.prior_sample(6, L, noise).x, process.q_sample(x_0, torch.ones(6), noise).x
    assert torch.equal(process.first(start).symbols, process.first(end).symbols)


def test_the_hidden_token_is_a_first_candidate_by_chance_alone():
    process, rows = make(), 4000
    x_0 = texts(rows)
    x = hidden(x_0)
    found = (process.first(x).symbols == x_0.unsqueeze(-1)).any(-1)[x == V].double()
    assert abs(float(found.mean()) - K / V) < 4 * (K / V * (1 - K / V) / len(found)) ** 0.5
    # Each token is one as often as another, whatever the position.
    seen = one_hot(process.first(x).symbols[..., :-1], V + 1)[..., :V].sum((0, 2)).double() * (1 / rows)
    shown = 1 - (x == V).double().mean(0, keepdim=True).T
    expected = (1 - shown) * K / V + shown * torch.bincount(x_0.flatten(), minlength=V) / x_0.numel() * K
    assert (seen - expected).abs().max() < 0.08


# -- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["pooled", "slots"])
def test_the_order_of_slots_changes_nothing(attention):
    process, x = make(attention=attention), hidden(texts())
    slots = process.refine(x, process.first(x), 1)
    said = process.answer(x, slots, None)
    assert torch.allclose(process.answer(x, turned(slots), None), said, atol=1e-5)
    swapped = Slots(slots.symbols, turned(slots).log_p)
    assert not torch.allclose(process.answer(x, swapped, None), said, atol=1e-3)


@pytest.mark.parametrize("attention", ["pooled", "slots"])
def test_empty_slots_are_not_there(attention):
    process, x = make(attention=attention), texts()
    slots = process.first(x)  # all committed
    other = Slots(torch.where(slots.log_p == 0, slots.symbols, (slots.symbols + 3) % V), slots.log_p)
    assert torch.equal(process.answer(x, slots, None), process.answer(x, other, None))


@pytest.mark.parametrize("attention", ["pooled", "slots"])
def test_rotary_positions_classes_and_bfloat16_take_slots(attention):
    config = SparseDistributionConfig(candidates=K, attention=attention)
    fields = SparseDistribution.network_fields(config, V) | {"positions": "rotary", "classes": 2}
    network = Transformer(TransformerConfig(window=L, depth=1, width=16, heads=2, **fields))
    with torch.no_grad():
        network.head.weight.normal_()
    process, x = SparseDistribution(network, config, V), hidden(texts())
    slots, label = process.first(x), torch.arange(6) % 2
    said = process.answer(x, slots, None, label)
    assert torch.allclose(process.answer(x, turned(slots), None, label), said, atol=1e-4)
    network.hold(torch.bfloat16)
    assert (process.answer(x, slots, None, label).float() - said).abs().max() < 0.1 * said.abs().max()


def test_a_certain_position_is_its_embedding_and_an_uncertain_one_the_mean():
    table = torch.randn(V + 1, 6)
    pooled = Candidates(6)
    symbols, p = torch.tensor([[[2, 5, V], [3, 4, V]]]), torch.tensor([[[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]])
    out = pooled(table, symbols, p.log(), torch.float32)
    assert torch.allclose(out[0, 0], 0.5 * table[2] + 0.3 * table[5] + 0.2 * table[V], atol=1e-6)
    assert torch.allclose(out[0, 1], table[3])
    assert torch.allclose(pooled.offsets(table, symbols, p.log(), torch.float32)[0, 0, 1], table[5] - out[0, 0])
    with torch.no_grad():
        pooled.doubt.normal_()
    assert torch.allclose(pooled(table, symbols, p.log(), torch.float32)[0, 1], table[3])


# -- the process ---------------------------------------------------------------------------------------------------


def test_with_all_tokens_as_candidates_the_slots_say_all_that_the_exact_denoiser_needs():
    """It reads nothing but slots; one position a step, candidates fresh or carried, samples the joint law."""
    world = random_table(3, 3)

    def network(x, *, condition=None, positions=None, candidates, log_p):
        share = one_hot(candidates, 4)[..., :3] * log_p.exp().unsqueeze(-1)
        belief = share.sum(-2)
        committed = (belief == 1).any(-1, keepdim=True)
        out = world.context(torch.where(committed, belief.log(), torch.zeros_like(belief)))
        return out if positions is None else out[positions]

    process = SparseDistribution(network, SparseDistributionConfig(candidates=3), 3)
    for sampler, calls in (("random", 6), ("confidence", 6), ("carried", 3)):
        assert (enumerated_law(process, 3, calls, sampler) - world.p).abs().max() < 1e-12
    assert (process.nll(world.texts[:4], Noise.of(0, 4), 6).calls, process.by("carried").passes) == (6, 1)


def test_candidates_without_a_meaning_and_a_network_that_ignores_them_are_masked_diffusion():
    world = random_table(3, 3)
    masked = Subject(Masked, MaskedConfig()).wrong(world, 0)

    def blind(x, candidates=None, log_p=None, **how):
        return masked.network(x, **how)

    for passes in (1, 2):
        process = SparseDistribution(blind, SparseDistributionConfig(passes=passes), 3)
        for act in ("nll", "loss"):
            mine, theirs = (getattr(p, act)(world.texts, Noise.of(0, 27)) for p in (process, masked))
            assert torch.allclose(*((x.total if act == "nll" else x) for x in (mine, theirs)))
        assert torch.allclose(
            enumerated_law(process, 3, 2 * passes, "random"), enumerated_law(masked, 3, 2, "random"), atol=1e-12
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_draws_of_carried_likelihoods_have_the_mean_over_orders(schedule):
    process = make(3, 3, candidates=2, schedule=schedule).by("carried")
    x = random_table(3, 3).texts[[4, 17]]
    with torch.no_grad():
        for calls in (2, 3):
            draws = process.nll(x.repeat(800, 1), Noise.of(0, 1600), calls)
            exact = order_bound(process, x, calls, "carried")
            mine, error = draws.total.view(800, 2).mean(0), draws.total.view(800, 2).std(0) / 800**0.5
            assert ((mine - exact).abs() < 4 * error + 1e-6).all() and (draws.calls, draws.kind) == (calls, "upper")
            assert sum(chance for chance, _ in process.orders(3, calls, "carried")) == pytest.approx(1)


@pytest.mark.parametrize("sampler", ["random", "carried"])
def test_bounds_are_above_the_law_of_wrong_networks_and_at_the_truth_are_the_truth(sampler):
    world, subject = random_table(3, 3), Subject(SparseDistribution)
    wrong, ideal = subject.wrong(world, 0), subject.ideal(world)
    for calls in (2, 3, 6):
        bound = torch.from_numpy(call_bound(wrong, world.texts, calls, sampler))
        assert (-enumerated_law(wrong, 3, calls, sampler).log() - bound).max() < 1e-8
    assert (torch.from_numpy(call_bound(ideal, world.texts, 6, sampler)) + world.log_p).min() > -1e-9
    assert (continuous_bound(ideal, world.texts) + world.log_p).abs().max() < 1e-6


def test_carried_candidates_are_those_of_the_call_before():
    process, x = make().by("carried"), torch.full((2, L), V)
    asked = torch.ones_like(x, dtype=torch.bool)
    with torch.no_grad():
        first = process.predict(State(x, torch.ones(2)), asked)
        x = x.scatter(1, torch.tensor([[3], [5]]), 7)
        second = process.predict(State(x, torch.ones(2), memory=first.memory), asked)
        slots = process.committed(x, first.memory)
        assert torch.equal(slots.symbols[0, 3], torch.tensor([7] * (K + 1))) and float(slots.log_p[0, 3, 0]) == 0
        logits = process.answer(x, slots, x == V)
    shown = second.log_p.view(2, L, V)
    assert torch.allclose(shown[x == V], logits.log_softmax(-1)) and float(shown[0, 3, 7]) == 0
    assert torch.equal(second.memory.select(torch.tensor([1])).symbols, process.best(x, logits).symbols[1:])


def test_half_of_the_examples_learn_from_their_own_candidates():
    seen = []

    def network(x, *, condition=None, positions=None, candidates, log_p):
        seen.append((len(x), torch.is_grad_enabled()))
        return torch.zeros(int(positions.sum()), V)

    process = SparseDistribution(network, SparseDistributionConfig(), V)
    process.loss(texts(400), Noise.of(0, 400))
    (rows, learns), last = seen
    assert 160 < rows < 240 and not learns and last == (400, True)
    seen.clear()
    SparseDistribution(network, SparseDistributionConfig(passes=1), V).loss(texts(), Noise.of(0, 6))
    assert seen == [(6, True)]


def test_a_step_counts_all_its_calls():
    process = make(passes=3)
    for sampler, calls, made in (("random", 12, 12), ("random", 1, 3), ("random", 100, 3 * L), ("carried", 5, 5)):
        *_, last = sample(process, Noise.of(0, 2), L, calls, sampler=sampler)
        assert last.calls.tolist() == [made, made]


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"candidates": 3}, {"passes": 3, "candidates": 1}, {"passes": 1}])
def test_every_form_of_it_is_right(config):
    failed = [check.name for check in verify(SparseDistribution, SparseDistributionConfig(**config))
              if not check.passed]  # fmt: skip
    assert failed == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"candidates": 0}, "candidates must be"),
        ({"passes": 0}, "passes from"),
        ({"refined": 2.0}, "refined from"),
        ({"attention": "full"}, "pooled or slots"),
        ({"schedule": "none"}, "schedule must be"),
        ({"mask_rate": "none"}, "mask_rate must be"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        SparseDistributionConfig(**fields)


def test_bounds_that_nobody_proved_are_refused():
    process = make()
    with pytest.raises(UserError, match="no bound is known"):
        process.curve_weights(L, 4, "carried")
    with pytest.raises(UserError, match="no bound over orders"):
        next(process.orders(L, 4, "margin"))
    with pytest.raises(UserError, match="ngrams"):
        TransformerConfig(inputs=3, outputs=2, candidates="pooled", ngrams=3)


def test_all_orders_of_a_run_are_there():
    process = make(3, 3).by("carried")
    for calls, number in ((1, 1), (2, 3), (3, 6)):
        ways = list(process.orders(3, calls, "carried"))
        assert len(ways) == number
        for _, groups in ways:
            assert torch.stack(list(groups)).sum(0).tolist() == [1, 1, 1]
    assert len(set(itertools.chain(*[[tuple(g.tolist()) for g in w] for _, w in ways]))) == 3


# -- the recipe that it is made from ------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_the_recipe_holds_the_answer_in_slot_0(swap):
    """Always, or where it is not swapped: n^2 of the positions, and the rest with a probability that gives it away."""
    network, x = reproduce_sdd.Recipe(20, swap), torch.randint(0, 20, (2000, reproduce_sdd.LENGTH))
    for t in (0.3, 1.0):
        generator = torch.Generator().manual_seed(0)
        p, tokens, _ = network.noisy(x, torch.full((2000,), t), generator)
        n = 1 - float(torch.cos(torch.tensor(torch.pi * t / 2)))
        gone = (n * n if swap else 0) * 19 / 20
        assert abs(float((tokens[..., 0] != x).double().mean()) - gone) < 0.02
        assert t < 1 or torch.allclose(p, torch.tensor(1 / 20))
        if swap and t < 1:
            assert (tokens[..., 0] == x)[p[..., 0] > 0.1].all()


def test_two_steps_learn_from_what_the_network_said_and_a_growing_k_begins_with_one_slot(monkeypatch):
    network, x = reproduce_sdd.Recipe(20, False), torch.randint(0, 20, (5, reproduce_sdd.LENGTH))
    seen, forward = [], network.forward
    monkeypatch.setattr(
        network, "forward", lambda p, tokens, *rest: seen.append((p, tokens)) or forward(p, tokens, *rest)
    )
    generator, t = torch.Generator().manual_seed(0), torch.zeros(5)  # at t = 0 noise changes nothing
    network.cost(x, t, generator, two_steps=True).backward()
    law = forward(*seen[0], t).softmax(-1).topk(reproduce_sdd.K, -1)
    assert torch.equal(seen[0][1][..., 0], x) and torch.equal(seen[1][1], law.indices)
    assert torch.allclose(seen[1][0], law.values)
    seen.clear()
    reproduce_sdd.train_recipe(network, [x] * 6, grows=True)
    assert [tokens.shape[-1] for _, tokens in seen] == [1, 1, 2, 2, 4, 4]
