"""Labels and guidance, against laws that are listed text by text, for every family."""

from __future__ import annotations

import pytest
import torch

from labelled_worlds import Labels
from textdiffusion.diffusion.guidance import Guidance, Guided, guided_law, told
from textdiffusion.errors import UserError
from textdiffusion.families import family, names
from textdiffusion.families.analog_bits import AnalogBitsConfig
from textdiffusion.families.score_entropy import ScoreEntropyConfig
from textdiffusion.families.uniform import UniformConfig
from textdiffusion.mathematics.gaussian import evidence
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.process import HasKernel, HasSignal, State
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification.enumeration import enumerated_law, misfit
from textdiffusion.verification.subject import IMPROBABLE, Subject

V, L = 2, 3
WORLD = Labels(V, L, seed=3)
CONFIGS = [(name, None) for name in names()] + [
    ("uniform", UniformConfig(mask_share=0.5)),
    ("score_entropy", ScoreEntropyConfig(graph="uniform")),
]


def label(value):
    return value if isinstance(value, str) else ""


def evidence_of(process, state: State, t: float) -> torch.Tensor:
    """log q(x_t | v) of one noisy text, [L V], from what the family says of its noise alone."""
    if isinstance(process, HasKernel):
        return process.kernel(0.0, t)[:V, state.x[0]].T.log()
    alpha, sigma = process.signal(t)
    level = 2 * torch.log(torch.tensor(alpha / sigma, dtype=torch.float64))
    return evidence(state.x[0].double(), process.codes().double(), level)


@pytest.mark.parametrize("name, config", CONFIGS, ids=label)
def test_guided_predictions_are_the_law_that_is_defined(name, config):
    process = WORLD.process(Subject(family(name), config).silent(V))
    if not isinstance(process, (HasKernel, HasSignal)):
        pytest.skip("left to right: its samples are enumerated below")
    for number, (t, chosen, weight) in enumerate(((0.3, 0, 1.5), (0.8, 1, 0.7), (0.6, 1, -0.5), (0.9, 0, -1.0))):
        text, time = WORLD.texts[3 + number : 4 + number], torch.tensor([t], dtype=torch.float64)
        state = process.q_sample(text, time, Noise.of(number, 1))
        said = told(process, torch.tensor([chosen]), Guidance(weight), time).predict(state).log_p[0].double().exp()
        assert torch.allclose(said, WORLD.guided_token(evidence_of(process, state, t), chosen, weight), atol=1e-6)


def fixed(name, config, chosen: int, weight: float):
    """The process of a network that is guided in one way, whatever it is told: to be enumerated."""
    process = WORLD.process(Subject(family(name), config).silent(V))

    def network(x, t=None, **more):
        labels = torch.full((len(x),), chosen)
        guided = Guided(process, labels, torch.full((len(x),), weight, dtype=torch.float64))
        return guided(x, t, **{k: v for k, v in more.items() if k != "condition"})

    return process, process.over(network)


@pytest.mark.parametrize("name", [n for n in names() if n not in ("analog_bits", "gaussian_embedding")])
def test_guided_samples_have_the_enumerated_law_and_count_both_calls(name):
    process, guided = fixed(name, None, 1, 1.5)
    sampler, rows = next(iter(process.steps)), 1500
    law = enumerated_law(guided, L, 2, sampler)
    *_, last = sample(
        process, Noise.of(5, rows), L, 4, condition=torch.full((rows,), 1), guidance=Guidance(1.5), sampler=sampler
    )
    counts = torch.bincount(WORLD.mixture.index(last.tokens), minlength=V**L).double()
    assert misfit(counts, law, rows) < IMPROBABLE
    assert 0.5 * float((law - enumerated_law(fixed(name, None, 1, 0.0)[1], L, 2, sampler)).abs().sum()) > 0.05
    # Twice those of the label alone, in as many steps.
    *_, bare = sample(process, Noise.of(5, 4), L, 2, condition=torch.full((4,), 1), sampler=sampler)
    assert int(last.calls.max()) == 2 * int(bare.calls.max())


def test_texts_of_one_token_have_the_tilted_law_and_longer_ones_do_not():
    """What guidance is often taken for, p(x | label)^(1 + w) p(x)^(-w) / Z."""
    for length, exact in ((1, True), (L, False)):
        world = Labels(V, length, seed=3)
        tilted = world.law(1) ** 2.5 * world.law(-1) ** -1.5
        tilted = tilted / tilted.sum()
        for name in ("masked", "uniform", "analog_bits"):
            process, rows, calls = world.process(Subject(family(name)).silent(V)), 2000, 2 * length
            *_, last = sample(
                process, Noise.of(1, rows), length, calls, condition=torch.full((rows,), 1), guidance=Guidance(1.5)
            )
            counts = torch.bincount(world.mixture.index(last.tokens), minlength=V**length).double()
            assert (misfit(counts, tilted, rows) < IMPROBABLE) is exact, (name, length)


def test_weight_0_is_the_label_and_minus_1_none():
    process = WORLD.process(Subject(family("masked")).silent(V))
    for weight, wanted in ((0.0, WORLD.law(0)), (-1.0, WORLD.law(-1))):
        rows = 2000
        *_, last = sample(
            process, Noise.of(2, rows), L, 2 * L, condition=torch.zeros(rows, dtype=torch.long),
            guidance=Guidance(weight),
        )  # fmt: skip
        counts = torch.bincount(WORLD.mixture.index(last.tokens), minlength=V**L).double()
        assert misfit(counts, wanted, rows) < IMPROBABLE, weight


def test_guidance_leaves_the_rate_of_reveals_alone_and_without_its_normalisation_it_would_not():
    """Score entropy, whose ratios are free: the chance to stay a [MASK] is the labelled network's (2507.08965)."""
    process = WORLD.process(Subject(family("score_entropy")).silent(V))
    state, s = process.prior_sample(2, L, Noise.of(0, 2)), torch.full((2,), 0.5, dtype=torch.float64)
    step, asked = process.steps["tweedie"], torch.ones(2, L, dtype=torch.bool)
    state = State(state.x, torch.full((2,), 0.7, dtype=torch.float64))

    class Unnormalised(Guided):  # what is easily written
        def __call__(self, x, t=None, *, positions=None, **more):
            labelled, bare = (
                self.network(x, t, positions=positions, **more | {"condition": c}) for c in (self.labels, None)
            )
            return 2.5 * labelled - 1.5 * bare

    labels, weight = torch.tensor([0, 1]), torch.full((2,), 1.5, dtype=torch.float64)
    stays = {}
    for name, network in (("label", None), ("guided", Guided), ("unnormalised", Unnormalised)):
        one = told(process, labels) if network is None else process.over(network(process, labels, weight))
        law = step.law(state, asked, one.predict(state, asked), s, lambda log_p: log_p)
        stays[name] = law.log_p[:, -1].exp()
    assert torch.allclose(stays["guided"], stays["label"])
    # c^2.5 u^-1.5 sums to more than one: tokens would come out too early.
    assert bool((stays["unnormalised"] < stays["label"]).all())


def test_what_is_impossible_stays_so_and_sums_are_kept():
    labelled = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]).log() + 3
    bare = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.25, 0.25]]).log()
    out = guided_law(labelled, bare, torch.tensor([[2.0], [0.5]]))
    assert (out[:, 2] == -torch.inf).all() and torch.allclose(out.logsumexp(-1), labelled.logsumexp(-1))
    wanted = torch.tensor([[0.5**3 / 0.2**2, 0.5**3 / 0.4**2, 0.0]])
    assert torch.allclose(out[:1].softmax(-1), wanted / wanted.sum())


def test_bits_and_real_targets_are_guided_each_as_what_it_is():
    bits = Subject(family("analog_bits"), AnalogBitsConfig(output="bits", self_conditioning=0.0)).silent(V)
    labelled, bare, weight = torch.tensor([[1.0]]), torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    assert float(bits.guided(labelled, bare, weight, labelled, None)) == 5.0
    config = family("gaussian_embedding").Config(target="v", width=2, input="reals", schedule="cosine")
    reals = Subject(family("gaussian_embedding"), config).silent(V)
    assert float(reals.guided(labelled, bare, weight, labelled, None)) == 5.0


def test_the_ramp_and_what_is_refused():
    t = torch.tensor([1.0, 0.75, 0.5, 0.0])
    assert Guidance(2.0).at(t).tolist() == [2.0] * 4
    assert Guidance(2.0, ramp=0.5).at(t).tolist() == [0.0, 1.0, 2.0, 2.0]
    for wrong in ({"weight": -2.0}, {"weight": 1e6}, {"weight": 1.0, "ramp": 2.0}):
        with pytest.raises(UserError, match="must be from"):
            Guidance(**wrong)


@pytest.mark.parametrize("name", ["masked", "autoregressive", "block"])
def test_a_real_network_starts_without_labels_and_its_caches_are_kept_apart(name):
    """At the start no label changes anything, and a run without labels has no place for them; with weights at random,
    guided predictions with caches are those without."""
    cls, config = family(name), family(name).small()
    fields = {"window": 4, "depth": 1, "width": 16, "heads": 2} | cls.network_fields(config, V)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = Transformer(TransformerConfig(**fields))
        torch.manual_seed(0)
        network = Transformer(TransformerConfig(**fields | {"classes": 2})).eval()
        assert plain.classes is None and not any("modulation" in key for key in plain.state_dict())
        x = torch.randint(0, V, (3, 4), generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(network.head.weight)
        process = cls(network, config, V)
        states, noise = process.prior_sample(3, 4, Noise.of(0, 3)), Noise.of(0, 3)
        labels = [torch.full((3,), k) for k in (0, 1)]
        assert torch.equal(*(told(process, k).loss(x, noise) for k in labels))
        for p in network.parameters():
            p.data.normal_(std=0.5)
    assert not torch.allclose(*(told(process, k).loss(x, noise) for k in labels))
    guided, weight = Guidance(1.5), torch.ones(3, dtype=torch.float64)
    speaker = told(process, torch.tensor([0, 1, 0]), guided, weight)
    state, step = states, next(iter(process.steps.values()))
    for k in range(4):  # as sampling goes on, token by token
        asked = step.ask(State(state.x, state.t), torch.full((3,), 1 - (k + 1) / 4, dtype=torch.float64), noise)
        said = speaker.predict(state, asked)
        whole = speaker.predict(State(state.x, state.t)).log_p[asked]
        assert torch.allclose(said.log_p, whole, atol=1e-4)
        state = State(torch.where(asked, x, state.x), state.t, memory=said.memory)
