"""Sampling held to a pattern: against enumeration on small worlds, for every family and sampler."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import torch
from held_law import main as show_particles
from torch.nn.functional import one_hot, pad

import textdiffusion as td
from textdiffusion.commands.cli import main
from textdiffusion.diffusion.drafts import HasDraft
from textdiffusion.diffusion.replacing import Outlook
from textdiffusion.errors import UserError
from textdiffusion.families import family, names
from textdiffusion.families.score_entropy import ScoreEntropyConfig
from textdiffusion.families.uniform import UniformConfig
from textdiffusion.mathematics.automaton import Automaton
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.process import Discrete, Prediction, State
from textdiffusion.sampling.constraints import CUT, Hold, hold_gaps, reshape_uncut
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.patterns import expression
from textdiffusion.text.template import Template
from textdiffusion.verification.enumeration import enumerated_law, misfit
from textdiffusion.verification.subject import IMPROBABLE, Subject

V, L, LETTERS = 2, 3, "ab"
WORLD = random_table(V, L, seed=1)
TEXTS = ["".join(LETTERS[v] for v in x) for x in WORLD.texts.tolist()]
PATTERN = "a.*b|b+a"
CONFIGS = [(name, None) for name in names()] + [
    ("uniform", UniformConfig(mask_share=0.5)),
    ("uniform", UniformConfig(mask_share=1.0)),
    ("score_entropy", ScoreEntropyConfig(graph="uniform")),
]
CASES = [
    (name, config, sampler)
    for name, config in CONFIGS
    for sampler, step in Subject(family(name), config).silent(V).steps.items()
    if isinstance(step, HasDraft) and isinstance(Subject(family(name)).silent(V).space, Discrete)
]


def label(value):
    return value if isinstance(value, str) else ""


def automaton(pattern: str) -> Automaton:
    return Automaton(expression(pattern), [c.encode() for c in LETTERS])


def matching(pattern: str) -> torch.Tensor:
    """Which texts of the world match, bool [V^L]: by Python's own regular expressions."""
    return torch.tensor([re.fullmatch(pattern, text) is not None for text in TEXTS])


def held_law(process, pattern: str, calls: int, sampler: str, tokens=None, given=None) -> torch.Tensor:
    """Law of the texts of a held sampler, [V^L], from its definition: every text listed, every outcome followed."""
    step, fits, size = process.steps[sampler], matching(pattern), process.space.size
    free = torch.ones(L, dtype=torch.bool) if given is None else ~given
    prior = process.prior_law() if hasattr(process, "prior_law") else torch.eye(V + 1, dtype=torch.float64)[V]
    states = torch.cartesian_prod(*[torch.arange(size)] * L)
    chance = prior[states[:, free]].prod(-1)
    if given is not None:
        chance = chance * (states[:, given] == tokens[given]).all(-1)
    for now, then in itertools.pairwise(process.plan(free, calls, sampler)):
        s, after = torch.tensor([then], dtype=torch.float64), torch.zeros_like(chance)
        for number in chance.nonzero().squeeze(-1).tolist():
            fixed = None if given is None else given.unsqueeze(0)
            state = State(states[number : number + 1], torch.tensor([now], dtype=torch.float64), fixed)
            for share, asked in step.asks(state, s):
                if not asked.any() or not share:
                    after[number] += chance[number] * share
                    continue
                foreseen, written = step.foreseen(state), process.decode(state)
                prediction = process.predict(state, foreseen)
                p = step.draft(state, asked, prediction, s, lambda log_p: log_p).log_p.double().exp()
                # 1. The texts of the foreseen positions, with the chance of each, that can be completed to a match.
                texts = torch.cartesian_prod(*[torch.arange(V)] * int(foreseen.sum())).view(-1, int(foreseen.sum()))
                settled = (written[0] >= 0) & ~foreseen[0]
                whole = written.repeat(len(texts), 1)
                whole[:, foreseen[0]] = texts
                known = settled | foreseen[0]
                possible = (whole[:, None, known] == WORLD.texts[None, :, known]).all(-1) & fits
                weight = p.gather(1, texts.T).prod(0) * possible.any(-1)
                weight = weight / weight.sum()
                # 2. The law of the state, given each of them.
                rows = torch.zeros(len(texts), dtype=torch.long)
                many = State(state.x[rows], state.t[rows], None if fixed is None else fixed[rows])
                again = Prediction(
                    prediction.log_p.repeat(len(texts), 1), None if prediction.native is None else
                    Outlook(*(x.repeat(len(texts), 1) for x in vars(prediction.native).values())),
                )  # fmt: skip
                draft = step.draft(many, asked[rows], again, s[rows], lambda log_p: log_p)
                law = draft.given(texts.flatten())
                q = one_hot(many.x, size).double()
                q[law.positions] = pad(law.log_p.double().exp(), (0, size - law.log_p.shape[-1]))
                outcome = q.gather(2, states.T.expand(len(texts), -1, -1)).prod(1)  # [texts states]
                after += chance[number] * share * (weight @ outcome)
        chance = after
    whole = (states < V).all(-1)
    assert float(chance[~whole].sum()) < 1e-12
    return torch.zeros(len(TEXTS), dtype=torch.float64).index_add(0, WORLD.index(states[whole]), chance[whole])


def drawn(process, pattern, calls, sampler, rows, particles=1, seed=3, **how):
    """Counts over all texts of what the code samples, [V^L], and the estimates of the pattern's chance [rows]."""
    hold = Hold(automaton(pattern), particles)
    *_, last = sample(process, Noise.of(seed, rows), L, calls, sampler=sampler, hold=hold, **how)
    counts = torch.bincount(WORLD.index(last.tokens), minlength=len(TEXTS)).double()
    return counts, np.exp(hold.log_chance) if particles > 1 else None


def held(name, config, sampler):
    """A process with a wrong network, whose predictions are known to it alone; skips where the sampler is refused."""
    subject = Subject(family(name), config)
    # Wrong ratios of uniform noise ask for less than nothing, and then the step has no text behind it (replacing.py).
    free = isinstance(config, ScoreEntropyConfig)
    if free and sampler == "euler":
        pytest.skip("refused, as a test of its own says")
    return subject.ideal(WORLD) if free else subject.wrong(WORLD, 0)


@pytest.mark.parametrize("name, config, sampler", CASES, ids=label)
def test_a_pattern_that_every_text_matches_changes_nothing(name, config, sampler):
    process = held(name, config, sampler)
    for calls in (1, 2, 3):
        free = enumerated_law(process, L, calls, sampler)
        assert (held_law(process, ".*", calls, sampler) - free).abs().max() < 1e-9, calls


@pytest.mark.parametrize("name, config, sampler", CASES, ids=label)
def test_samples_have_the_enumerated_law_and_match(name, config, sampler):
    process = held(name, config, sampler)
    for calls in (1, 3):
        law = held_law(process, PATTERN, calls, sampler)
        assert float(law.sum()) == pytest.approx(1.0) and float(law[~matching(PATTERN)].sum()) == 0
        counts, _ = drawn(process, PATTERN, calls, sampler, 2000)
        assert misfit(counts, law, 2000) < IMPROBABLE


@pytest.mark.parametrize("name, config, sampler", CASES, ids=label)
def test_weights_are_unbiased_for_every_text(name, config, sampler):
    """The mean of (estimate of the pattern's chance) x [the text is x] is the sampler's own chance of an x that
    matches."""
    process, rows = held(name, config, sampler), 500
    law = enumerated_law(process, L, 3, sampler) * matching(PATTERN)
    hold = Hold(automaton(PATTERN), particles=4)
    *_, last = sample(process, Noise.of(5, rows), L, 3, sampler=sampler, hold=hold)
    estimate = torch.from_numpy(np.exp(hold.log_chance))
    found = one_hot(WORLD.index(last.tokens), len(TEXTS)) * estimate.unsqueeze(-1)
    error = found.std(0) / rows**0.5
    assert ((found.mean(0) - law).abs() <= 5 * error + 1e-9).all(), (found.mean(0), law, error)
    total = float(estimate.mean() - law.sum())
    assert abs(total) <= 5 * float(estimate.std()) / rows**0.5 + 1e-9


def test_particles_tend_to_the_worlds_law_given_the_pattern_and_one_does_not():
    """With the exact posterior and a token a call: total variation to p(x | pattern) falls with their number."""
    process, pattern = Subject(family("masked")).ideal(WORLD), "ab.|b.a|aaa"
    target = WORLD.p * matching(pattern)
    target = target / target.sum()
    apart = [0.5 * float((held_law(process, pattern, L, "random") - target).abs().sum())]
    rows = 1000
    for particles in (2, 12):
        counts, _ = drawn(process, pattern, L, "random", rows, particles)
        apart.append(0.5 * float((counts / rows - target).abs().sum()))
    assert apart[0] > 0.08 and apart[0] > apart[1] > apart[2], apart
    assert apart[2] < 0.04, apart  # as many draws of the very law: 0.02


@pytest.mark.parametrize("name", ["autoregressive", "block"])
def test_gaps_of_families_from_left_to_right_come_to_the_exact_conditional(name):
    """They are held to what stands behind a gap: with one particle they do not foresee it, with many they do."""
    process, tokens = Subject(family(name)).ideal(WORLD), torch.tensor([0, 1, 0])
    given = torch.tensor([False, False, True])
    target = WORLD.p * (WORLD.texts[:, 2] == 0)
    target, rows, apart = target / target.sum(), 2000, []
    for particles in (1, 24):
        prefix, hold = hold_gaps(Template(tokens, given), V, particles)
        assert not prefix.given.any()
        *_, last = sample(process, Noise.of(4, rows), L, L, hold=hold)
        counts = torch.bincount(WORLD.index(last.tokens), minlength=len(TEXTS)).double()
        assert float(counts[WORLD.texts[:, 2] != 0].sum()) == 0
        apart.append(0.5 * float((counts / rows - target).abs().sum()))
    assert apart[1] < 0.06 and 3 * apart[1] < apart[0], apart  # as many draws of the very law: 0.015
    prefix, _ = hold_gaps(Template(tokens, torch.tensor([True, False, True])), V, 1)
    assert prefix.given.tolist() == [True, False, False]


def test_the_automaton_of_a_template_is_that_of_its_pattern():
    made = Automaton.of_template(np.array([0, 1, 0]), np.array([True, False, True]), V)
    texts = WORLD.texts.numpy()
    assert (made.matches(texts) == automaton("a.a").matches(texts)).all() and made.lengths(9) == [3]


@pytest.mark.parametrize("name", ["masked", "uniform", "score_entropy"])
def test_what_is_given_stays_and_the_whole_text_matches(name):
    subject = Subject(family(name))
    # Wrong networks do not read what is given at t = 1, where absorbing noise leaves no evidence of it.
    process = subject.ideal(WORLD) if name == "score_entropy" else subject.wrong(WORLD, 1)
    sampler = next(iter(process.steps))
    tokens, fixed = torch.tensor([0, 1, 0]), torch.tensor([False, True, False])
    law = held_law(process, "b.*|aba", 2, sampler, tokens, fixed)
    assert float(law.sum()) == pytest.approx(1.0)
    counts, _ = drawn(
        process, "b.*|aba", 2, sampler, 1500, tokens=tokens.expand(1500, -1), given=fixed.expand(1500, -1)
    )
    assert misfit(counts, law, 1500) < IMPROBABLE
    with pytest.raises(UserError, match="no text of this length"):
        drawn(process, "a{3}", 2, sampler, 2, tokens=tokens.expand(2, -1), given=fixed.expand(2, -1))


def able(process) -> list[str]:
    """The samplers that can be held."""
    return [name for name, step in process.steps.items() if isinstance(step, HasDraft)]


def test_every_family_can_be_held():
    for name in names():
        process = Subject(family(name)).silent(V)
        # What hides again, or remembers, or moves by a mean, is no draw of a text and a state given that text.
        free = set(process.steps) - set(able(process))
        if isinstance(process.space, Discrete):
            assert free <= {"remask", "psi", "carried"} if name != "uniform" else not free, name
        else:
            assert able(process) == ["bridge"], name


def test_the_example_shows_the_particles_at_work(capsys):
    show_particles(draws=100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].split()[0] == "16"


@pytest.mark.parametrize("name", names())
def test_a_text_does_not_depend_on_its_batch(name):
    process = Subject(family(name)).wrong(WORLD, 2)
    how = {"sampler": able(process)[0]}
    for particles in (1, 5):
        noise = Noise.of(7, 12)
        *_, many = sample(process, noise, L, 3, hold=Hold(automaton(PATTERN), particles), **how)
        *_, few = sample(process, noise.select([3, 8, 9]), L, 3, hold=Hold(automaton(PATTERN), particles), **how)
        assert torch.equal(many.tokens[[3, 8, 9]], few.tokens)
        assert torch.equal(many.calls[[3, 8, 9]], few.calls) and int(few.calls.max()) <= 3 * particles


def test_temperature_and_top_p_never_cost_the_match():
    """At temperature 0 the likeliest text that matches; what top-p cuts off comes back where nothing else matches."""
    process = Subject(family("masked")).wrong(WORLD, 3)
    state = process.prior_sample(1, L, Noise.of(0, 1))
    log_p = process.predict(state).log_p[0].double()
    best = max((float(log_p[range(L), list(x)].sum()), i) for i, x in enumerate(WORLD.texts.tolist())
               if matching(PATTERN)[i])[1]  # fmt: skip
    counts = [drawn(process, PATTERN, 1, "random", 50, temperature=t)[0] for t in (0.0, 1e-45)]
    assert all(int(c[best]) == 50 for c in counts)
    for how in ({"top_p": 0.01}, {"top_p": 0.01, "temperature": 0.1}, {"top_k": 1}):
        counts, _ = drawn(process, PATTERN, 3, "random", 200, **how)
        assert float(counts[~matching(PATTERN)].sum()) == 0 and float(counts.sum()) == 200
    cut = reshape_uncut(torch.tensor([[0.7, 0.2, 0.1]]).log(), top_p=0.5)
    assert cut[0, 0] == 0 and -2 * CUT < float(cut[0, 2]) < float(cut[0, 1]) < -0.9 * CUT


def test_a_chance_below_all_floats_is_kept_to_all_the_same():
    """400 tokens that the model puts at e^-30 each: more than 10,000 nats."""
    machine = Automaton(expression("a{200}[ab]*"), [b"a", b"b"])
    log_p = np.log(np.array([[1e-13, 1 - 1e-13]])).repeat(400, 0)
    drafted, nothing = np.ones((1, 400), dtype=bool), np.full((1, 400), -1)
    chance, sets = machine.draw(log_p, drafted, nothing, np.full((1, 400), 0.5))
    assert chance[0] == pytest.approx(200 * np.log(1e-13)) and (sets[:200] == [True, False]).all()
    assert sets[200:].all()


SETTINGS = ["training.batch=8", "network.width=32", "network.heads=2"]


@pytest.fixture(scope="module", params=[*names(), "pieces"])
def model(request, tmp_path_factory) -> td.Model:
    out, pieces = tmp_path_factory.mktemp("held") / "run", request.param == "pieces"
    how = {"family": "masked", "tokenizer": "bpe:300"} if pieces else {"family": request.param}
    return td.train(out, depth=1, steps=2, length=24, settings=SETTINGS, **how)


def test_every_text_of_every_family_satisfies_every_pattern(model):
    texts = model.sample(4, 24, 6, regex=r"The [a-z ]+ of [a-z]+\.", seed=1)
    assert all(re.fullmatch(r"The [a-z ]+ of [a-z]+\.", text) for text in texts)
    texts = model.sample(3, 24, 6, must_contain=["x = 1", "if"], prompt="a")
    assert all("x = 1" in text and "if" in text and text.startswith("a") for text in texts)
    for text in model.sample(3, 20, 5, words=["The", "cat", "sat"]):
        assert set(re.findall("[A-Za-z]+", text)) <= {"The", "Cat", "Sat", "cat", "sat"}, text
    for text in model.sample(2, 24, 5, acrostic="abc", regex=r"[^0-9]*", particles=3):
        assert [line[0].lower() for line in text.split("\n")] == ["a", "b", "c"] and not re.search("[0-9]", text)
    for text in model.infill("The ___ of the __.", n=2):
        assert text.startswith("The ") and " of the " in text and text.endswith(".")
    one = model.sample(3, 20, 4, regex="[a-z ]*", particles=2, reproducible=True)
    assert model.sample(1, 20, 4, regex="[a-z ]*", particles=2, reproducible=True) == one[:1]


def test_what_cannot_be_satisfied_is_refused_with_lengths(tmp_path, capsys):
    model = td.train(tmp_path / "run", depth=1, steps=1, length=24, settings=SETTINGS)
    for how, line in (
        (
            {"regex": "(ab){2,3}|a{9}"},
            r"no text of 24 tokens satisfies --regex; there are some of 4, 6, 9 tokens: .*--length",
        ),
        ({"regex": "[a-z]{4,8}", "must_contain": "xyz"}, "--regex and --must-contain; there are some of 4 to 8 tokens"),
        ({"regex": "語+"}, "no text of up to 24 tokens satisfies --regex with this run's tokenizer"),
        ({"regex": "a*", "prompt": "ba"}, "no text of up to 24 tokens with this beginning satisfies --regex"),
        ({"regex": "abc[a-z]{4}", "prompt": "ab"}, "24 tokens with this beginning .* of 7 tokens"),
        ({"regex": "a*", "infill": "a__b"}, "nothing that fills these gaps satisfies --regex"),
        ({"particles": 4}, "--particles goes with a pattern"),
        ({"regex": "a*", "particles": 0}, "--particles must be from 1"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            model.sample(1, **how)
        assert "\n" not in str(caught.value)
    assert main(["sample", str(tmp_path / "run"), "--regex", "(a"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "not a regular expression" in error
    arguments = ["--regex", "[a-z ]{5}x.*", "--must-contain", "q", "--must-contain", "j", "--calls", "3", "-n", "2"]
    assert main(["sample", str(tmp_path / "run"), "--json", *arguments]) == 0
    for found in json.loads(capsys.readouterr().out)["samples"]:
        assert re.fullmatch("[a-z ]{5}x.*", found["text"]) and "q" in found["text"] and "j" in found["text"]
    recorder = td.train(tmp_path / "ar", family="autoregressive", depth=1, steps=1, length=24, settings=SETTINGS)
    with pytest.raises(UserError, match="leave out --stop"):
        recorder.sample(1, regex="a*", stop=True)
    with pytest.raises(UserError, match="leave one of them out"):
        recorder.sample(1, regex="a*", infill="a__a")


def test_euler_with_uniform_noise_is_refused_by_name():
    process = Subject(family("score_entropy"), ScoreEntropyConfig(graph="uniform")).ideal(WORLD)
    with pytest.raises(UserError, match="use tweedie"):
        drawn(process, PATTERN, 2, "euler", 2)
