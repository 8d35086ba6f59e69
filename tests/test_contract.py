"""What every family must do. A new file in families/ is found and tested; nobody adds it here."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from textdiffusion.diffusion.coded import Coded
from textdiffusion.diffusion.replacing import Replacing
from textdiffusion.families import family, names
from textdiffusion.families.autoregressive import Autoregressive
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.network import TextNetwork
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.process import Discrete, Process, State
from textdiffusion.run import RunConfig, build
from textdiffusion.sampling.reverse import sample
from textdiffusion.training.learning import Learner, TrainingConfig

V, L, B = 11, 8, 6
FAMILIES = names()
KINDS = [*FAMILIES, "analog_bits+unet"]  # and the network, where that is not a transformer


def make(name: str, seed: int = 0, **process_fields) -> Process:
    name, _, body = name.partition("+")
    config = RunConfig(
        family=name,
        network={"depth": 2, "width": 32, "heads": 2, "window": L, "body": body or "transformer"},
        process=process_fields,
        training=TrainingConfig(steps=1, seed=seed),
        vocabulary=V,
        start=V - 1,
    )
    return build(config)


def texts(n: int = B, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, V, (n, L)))


def shaken(name: str, **process_fields) -> Process:
    """A process whose head is not at zero."""
    process = make(name, **process_fields)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(process.network.named_parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    process.network.eval()
    return process


@pytest.fixture(params=KINDS)
def name(request) -> str:
    return request.param


def test_clean_text_decodes_to_itself(name):
    x_0 = texts()
    state = make(name).q_sample(x_0, torch.zeros(B), Noise.of(0, B))
    assert torch.equal(make(name).decode(state), x_0)


def test_full_noise_is_the_prior(name):
    n = 4000
    process = make(name)
    noisy = process.q_sample(texts(1).expand(n, -1), torch.ones(n), Noise.of(0, n))
    prior = process.prior_sample(n, L, Noise.of(1, n))
    assert noisy.x.shape == prior.x.shape and (prior.t == 1).all()
    if not isinstance(process.space, Discrete):
        moments = [torch.stack((s.x.mean(0), s.x.square().mean(0))) for s in (noisy, prior)]
        assert (moments[0] - moments[1]).abs().max() < 5 * (2 * 2 / n) ** 0.5
        return
    for i in range(L):
        a, b = (torch.bincount(s.x[:, i], minlength=process.space.size).double() for s in (noisy, prior))
        # Two-sample chi-square over symbols that occur.
        live = (a + b) > 0
        chi_square = float(((a - b)[live] ** 2 / (a + b)[live]).sum())
        assert chi_square < int(live.sum()) + 3.72 * (2 * int(live.sum())) ** 0.5 + 10


def test_predictions_are_normalised_and_keep_shape(name):
    process = shaken(name)
    state = process.q_sample(texts(), torch.full((B,), 0.6), Noise.of(0, B))
    with torch.no_grad():
        log_p = process.predict(state).log_p
        assert log_p.shape == (B, L, V)
        assert (log_p.exp().sum(-1) - 1).abs().max() < 1e-5
        asked = torch.rand(B, L) < 0.5
        some = process.predict(State(state.x, state.t), asked).log_p
    assert some.shape == (int(asked.sum()), V)
    assert torch.allclose(some, log_p[asked], atol=1e-5)


def test_every_parameter_learns(name):
    process = make(name)
    network = process.network
    assert isinstance(network, TextNetwork)
    learner = Learner(network, TrainingConfig(steps=10, warmup=0, batch=B, micro_batch=4))
    before = {k: v.clone() for k, v in network.named_parameters()}
    # The head starts at zero, then what writes to the residual stream, then what modulates it.
    for step in range(5):
        learner.learn(process, texts(), Noise.of(0, B, step=step))
    process.loss(texts(64), Noise.of(0, 64)).mean().backward()
    still = [
        k
        for k, p in network.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0 or torch.equal(p, before[k])
    ]
    assert not still, f"no gradient reaches {still}"


def test_same_noise_same_loss_and_same_text(name):
    process = shaken(name)
    for function in (process.loss, lambda x, n: process.nll(x, n).total):
        assert torch.equal(function(texts(), Noise.of(4, B)), function(texts(), Noise.of(4, B)))
    first, second = ([f.tokens for f in sample(process, Noise.of(4, 3), L, L)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    *_, other = sample(process, Noise.of(5, 3), L, L)
    assert not torch.equal(first[-1], other.tokens)


def test_micro_batches_and_row_order_change_nothing(name):
    process = shaken(name)
    x_0, noise = texts(12), Noise.of(2, 12)
    whole = process.loss(x_0, noise)
    parts = torch.cat([process.loss(x_0[a : a + 5], noise.select(slice(a, a + 5))) for a in range(0, 12, 5)])
    assert torch.allclose(whole, parts, atol=1e-5)
    *_, together = sample(process, noise, L, L)
    *_, alone = sample(process, noise.select([7]), L, L)
    assert torch.equal(together.tokens[7], alone.tokens[0])


def fewest(process: Process) -> int:
    """Calls that it takes at least: a token each, or two where the network first says what it is then to read."""
    if isinstance(process, Autoregressive):
        return L
    return 2 if getattr(process.config, "self_conditioning", 0) > 0 else 1


def test_every_step_writes_whole_texts_and_counts_its_calls(name):
    process = shaken(name)
    seen = {"rows": torch.zeros(5, dtype=torch.long)}

    class Spy:
        def __call__(self, x, *args, **kwargs):
            seen["calls"] = seen.get("calls", 0) + 1
            return process.network(x, *args, **kwargs)

        def __getattr__(self, key):
            return getattr(process.network, key)

    for sampler in process.steps:
        for calls in (1, 3, L, 2 * L):
            seen["calls"] = 0
            frames = list(sample(process.over(Spy()), Noise.of(1, 5), L, calls, sampler=sampler))
            prior = process.decode(process.prior_sample(5, L, Noise.of(1, 5)))
            assert torch.equal(frames[0].tokens, prior) and (frames[-1].tokens >= 0).all()
            assert (frames[-1].tokens < V).all()
            assert frames[-1].step == frames[-1].of == len(frames) - 1 and frames[-1].t == 0
            passes = getattr(process.by(sampler), "passes", 1)
            # Some samplers write one position a call, however few are asked for.
            least = max(fewest(process), passes * (L if process.steps[sampler].pace == "each" else 1))
            assert int(frames[-1].calls.max()) <= seen["calls"] <= max(calls, least)
            assert all((b.calls >= a.calls).all() for a, b in itertools.pairwise(frames))
            assert ((frames[-1].confidence > 0) & (frames[-1].confidence <= 1 + 1e-6)).all()


def test_positions_worked_out_a_few_at_a_time_get_the_same_draws(name, monkeypatch):
    """Every sampler, with and without given positions: the same numbers, from as many network calls."""
    process = shaken(name)
    given = torch.arange(L) < torch.tensor([[0], [0], [2], [5], [L]])
    for sampler in process.steps:
        for how in ({}, {"tokens": texts(5), "given": given, "temperature": 0.7}):
            frames = {}
            for together in (2**40, 3 * V):
                monkeypatch.setattr("textdiffusion.sampling.reverse.TOGETHER", together)
                frames[together] = list(sample(process, Noise.of(1, 5), L, 3, sampler=sampler, **how))
            for whole, parted in zip(*frames.values(), strict=True):
                assert torch.equal(whole.tokens, parted.tokens) and torch.equal(whole.calls, parted.calls)
                assert torch.equal(whole.confidence, parted.confidence)


def test_a_second_network_call_is_not_answered_from_the_first(monkeypatch):
    monkeypatch.setattr("textdiffusion.sampling.reverse.TOGETHER", V)
    process = shaken("masked")
    predict = type(process).predict

    def twice(self, state, positions=None, condition=None):
        predict(self, state, positions, condition)
        return predict(self, dataclasses.replace(state, x=state.x.roll(1, 1)), positions, condition)

    monkeypatch.setattr(type(process), "predict", twice)
    with pytest.raises(ValueError, match="apart"):
        list(sample(process, Noise.of(1, 2), L, 2))


def test_a_single_row_counts_every_evaluation(name):
    process = shaken(name)
    for sampler in process.steps:
        made = []

        def spy(*args, made=made, **kwargs):
            made.append(1)
            return process.network(*args, **kwargs)

        *_, last = sample(process.over(spy), Noise.of(1, 1), L, 5, sampler=sampler)
        assert int(last.calls[0]) == len(made)


def test_a_prompt_is_kept(name):
    process = shaken(name)
    given = torch.tensor([True] * 3 + [False] * (L - 3)).expand(4, -1)
    tokens = texts(4)
    for sampler in process.steps:
        frames = list(sample(process, Noise.of(1, 4), L, L, sampler=sampler, tokens=tokens, given=given))
        assert all(torch.equal(f.tokens[:, :3], tokens[:, :3]) for f in frames)
        # What is drawn anew, or predicted twice, takes more calls than there are gaps.
        passes = getattr(process.by(sampler), "passes", 1)
        more = isinstance(process, Replacing | Coded) or sampler in ("remask", "psi")
        most = passes * (L - 3) if process.steps[sampler].pace == "each" or (not more and passes == 1) else L
        assert int(frames[-1].calls.max()) <= most


@torch.no_grad()
def test_bfloat16_scores_texts_as_float32_does(name):
    """The fast path against the exact one: within 0.02 nat a token on average, 0.2 for any text of 8."""
    process, x = shaken(name), texts(64)
    exact = process.nll(x, Noise.of(3, 64)).total / L
    process.network.compute_dtype = torch.bfloat16
    fast = process.nll(x, Noise.of(3, 64)).total / L
    assert not torch.equal(exact, fast)
    assert abs(float((fast - exact).mean())) < 0.02 and float((fast - exact).abs().max()) < 0.2


@pytest.mark.parametrize("calls", [3, 100])
def test_a_text_does_not_depend_on_the_templates_that_share_its_batch(name, calls):
    if "+" in name and calls > L:
        pytest.skip("the steps are those of its family with a transformer")
    process, x = shaken(name), texts(4)
    given = torch.arange(L) < torch.tensor([[0], [3], [6], [8]])
    for sampler in process.steps:
        *_, together = sample(process, Noise.of(2, 4), L, calls, sampler=sampler, tokens=x, given=given)
        for i in range(4):
            row = slice(i, i + 1)
            *_, alone = sample(
                process, Noise.of(2, 4).select(row), L, calls, sampler=sampler, tokens=x[row], given=given[row]
            )
            assert torch.equal(alone.tokens[0], together.tokens[i])
            assert int(alone.calls[0]) == int(together.calls[i])


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("analog_bits+unet", marks=pytest.mark.slow)])
def test_overfits_one_batch(name):
    process = make(name)
    x_0 = texts(4)
    learner = Learner(process.network, TrainingConfig(steps=150, batch=32, micro_batch=32, warmup=0.05, rate=1e-2))
    for step in range(150):
        learner.learn(process, x_0.repeat(8, 1), Noise.of(0, 32, step=step))
    process.network.eval()
    with torch.no_grad():
        per_token = process.nll(x_0.repeat(8, 1), Noise.of(9, 32)).total.mean() / L
    # Four texts hold log(4) nats, which no model can do without.
    assert per_token < np.log(4) / L + 0.12


def test_no_config_field_is_dead(name):
    """Each field of a family's config changes the loss or a sample."""
    if "+" in name:
        pytest.skip("the fields are those of its family with a transformer")
    cls = family(name.partition("+")[0])
    other = {
        "schedule": "cosine", "mask_rate": "uniform", "weight": "bound", "mask_share": 0.5, "given": 1.0,
        "conditioning": "replacement", "renewal": 0.9, "graph": "uniform", "noise": "geometric", "sigma_min": 0.1,
        "sigma_max": 1.0, "block_length": 3, "input": "reals", "self_conditioning": 0.0, "churn": 0.0, "delta": 1.0,
        "output": "bits", "book": "gray", "bits": 9, "width": 5, "target": "v", "times": 2,
        "candidates": 3, "attention": "slots", "passes": 1, "refined": 0.0,
    }  # fmt: skip
    needs = {"sigma_min": {"noise": "geometric"}, "sigma_max": {"noise": "geometric"}, "conditioning": {"given": 1.0}}
    if issubclass(cls, Coded):
        needs["conditioning"] |= {"self_conditioning": 0.0}
        needs["target"] = {"input": "reals", "schedule": "cosine"}
    if name == "score_entropy":
        needs["given"] = {"graph": "uniform"}
    for f in dataclasses.fields(cls.Config):
        assert f.name in other or f.type == "bool", f"give a second value of {f.name} in this test"
        value, results = other.get(f.name, not f.default), []
        if issubclass(cls, Coded) and f.name == "schedule":
            value = "rectified"
        for fields in ({}, {f.name: value}):
            process = shaken(name, **needs.get(f.name, {}) | fields)
            given = torch.tensor([True] * 3 + [False] * (L - 3)).expand(4, -1)
            texts_of = [
                list(sample(process, Noise.of(1, 4), L, 3, sampler=sampler, tokens=texts(4), given=given))[-1].tokens
                for sampler in process.steps
            ]
            results.append((process.loss(texts(), Noise.of(0, B)), *texts_of))
        assert not all(torch.equal(a, b) for a, b in zip(*results, strict=True)), f"{name}: {f.name} does nothing"


def test_bounds_of_samplers_that_have_none_are_refused(name):
    from textdiffusion.errors import UserError
    from textdiffusion.evaluation.measures import evaluate

    process, windows = make(name), list(texts(6).numpy())
    counted = {"random", "first_hitting", "ancestral"}
    proven = {"masked": counted, "sparse_distribution": counted | {"carried"}}.get(name, {next(iter(process.steps))})
    for sampler in process.steps:
        if sampler in proven:
            figures = evaluate(process, windows, np.ones(V, dtype=int), calls=[L], sampler=sampler).by_calls
            # An exact likelihood is of one number of calls only.
            assert [f.sampler for f in figures] == ([] if name == "autoregressive" else [sampler])
        elif process.steps[sampler].deterministic:
            (figure,) = evaluate(process, windows, np.ones(V, dtype=int), calls=[L], sampler=sampler).by_calls
            assert (figure.kind, figure.sampler) == ("exact", sampler)
        else:
            with pytest.raises(UserError, match="no bound is known"):
                evaluate(process, windows, np.ones(V, dtype=int), calls=[L], sampler=sampler)


@pytest.mark.parametrize("bad", ["nowhere", ""])
def test_unknown_names_are_refused_in_one_line(name, bad):
    from textdiffusion.errors import UserError

    with pytest.raises(UserError, match="there is no family"):
        family(bad)
    with pytest.raises(UserError, match="has no sampler"):
        list(sample(make(name), Noise.of(0, 1), L, 2, sampler=bad))


@pytest.mark.parametrize(
    ("family_name", "states", "length", "width", "batch", "steps"),
    [
        *(pytest.param(n, 3, 4, 32, 64, 300, id=n) for n in ("masked", "autoregressive")),
        *(pytest.param(n, 4, 8, 64, 128, 1500, marks=pytest.mark.slow, id=f"{n}-long") for n in FAMILIES),
    ],
)
def test_learns_a_chain_to_its_entropy(family_name, states, length, width, batch, steps):
    """Two layers on a Markov chain: within 0.02 nat per token of the entropy."""
    from textdiffusion.mathematics.worlds import chain, chain_entropy

    world = chain(states, length, seed=1)
    entropy = chain_entropy(world) / length
    cls = family(family_name)
    config = cls.small()
    torch.manual_seed(0)
    size = {"depth": 2, "width": width, "heads": 2, "window": length}
    network = Transformer(TransformerConfig(**size | cls.network_fields(config, states + 1)))
    process = cls(network, config, states + 1, start=states)
    learner = Learner(network, TrainingConfig(steps=steps, batch=batch, micro_batch=batch))
    for step in range(steps):
        learner.learn(process, world.draw(batch, seed=step), Noise.of(0, batch, step=step))
    process = process.over(learner.average.module.eval())
    with torch.no_grad():
        nats = process.nll(world.draw(64_000, seed=10**6), Noise.of(1, 64_000)).total / length
    error = float(nats.std()) / 64_000**0.5
    assert float(nats.mean()) < entropy + 0.02, (float(nats.mean()), entropy)
    assert float(nats.mean()) > entropy - 4 * error
