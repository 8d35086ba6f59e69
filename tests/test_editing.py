"""Rewriting a text: its law, from the text itself at strength 0 to a sample at 1, against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch

from textdiffusion.errors import UserError
from textdiffusion.families import family, names
from textdiffusion.families.masked import MaskedConfig
from textdiffusion.families.score_entropy import ScoreEntropyConfig
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.process import HasKernel, State
from textdiffusion.sampling.editing import Edit
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification.enumeration import _after, _Ways, misfit
from textdiffusion.verification.subject import IMPROBABLE, Subject

V, L = 2, 3
WORLD = random_table(V, L, seed=1)
CASES = [
    ("masked", None, "random"), ("masked", MaskedConfig(schedule="cosine"), "ancestral"), ("masked", None, "remask"),
    ("uniform", None, "bridge"), ("uniform", None, "psi"), ("score_entropy", None, "tweedie"),
    ("score_entropy", ScoreEntropyConfig(noise="geometric"), "tweedie"), ("sparse_distribution", None, "random"),
]  # fmt: skip


def label(value):
    return value if isinstance(value, str) else ""


def edited_law(process, text: torch.Tensor, strength: float, calls: int, sampler: str) -> torch.Tensor:
    """Law of what comes of one text [L], [V^L]: every noisy state of it, and every outcome of every step from there."""
    edit = Edit(text.unsqueeze(0), strength)
    t, states = edit.time(process), torch.cartesian_prod(*[torch.arange(process.space.size)] * L)
    chance = process.kernel(0.0, t)[text, states].prod(-1)
    ways = _Ways(states[chance > 0], chance[chance > 0], None)
    for now, then in itertools.pairwise(edit.plan(process, torch.ones(L, dtype=torch.bool), calls, sampler)):
        times = (torch.tensor([u], dtype=torch.float64) for u in (now, then))
        ways = _after(process, process.steps[sampler], ways, *times, None).merged()
    return torch.zeros(V**L, dtype=torch.float64).index_add(0, WORLD.index(ways.x), ways.chance)


def drawn(process, texts: torch.Tensor, strength: float, calls: int, sampler: str | None = None):
    """What comes of texts [B L]: numbers of the new ones, and the last frame."""
    *_, last = sample(process, Noise.of(4, len(texts)), L, calls, sampler=sampler, edit=Edit(texts, strength))
    return WORLD.index(last.tokens), last


@pytest.mark.parametrize("name, config, sampler", CASES, ids=label)
def test_edited_texts_have_the_enumerated_law(name, config, sampler):
    process, rows = Subject(family(name), config).wrong(WORLD, 0), 1500
    for strength, calls in ((0.5, 3), (0.8, 6)):
        law = edited_law(process, WORLD.texts[5], strength, calls, sampler)
        assert float(law.sum()) == pytest.approx(1.0)
        texts, last = drawn(process, WORLD.texts[5].expand(rows, -1), strength, calls, sampler)
        assert misfit(torch.bincount(texts, minlength=V**L).double(), law, rows) < IMPROBABLE, strength
        assert int(last.calls.max()) <= calls


@pytest.mark.parametrize("name", names())
def test_strength_0_is_the_text_and_1_a_sample(name):
    process = Subject(family(name)).wrong(WORLD, 0)
    texts = WORLD.texts.repeat(20, 1)
    same, last = drawn(process, texts, 0.0, 3)
    assert torch.equal(same, WORLD.index(texts)) and int(last.calls.sum()) == 0
    new, _ = drawn(process, texts, 1.0, 3)
    *_, free = sample(process, Noise.of(4, len(texts)), L, 3)
    assert torch.equal(new, WORLD.index(free.tokens))


@pytest.mark.parametrize("name, calls", [("masked", 3), ("uniform", 16), ("analog_bits", 16)])
def test_texts_of_the_worlds_law_come_out_with_that_law(name, calls):
    """Noise and its exact reversal leave the law as it is, though not the texts."""
    process, rows = Subject(family(name)).ideal(WORLD), 2000
    texts = WORLD.draw(rows, seed=0)
    new, _ = drawn(process, texts, 0.6, calls)
    counts = torch.bincount(new, minlength=V**L).double()
    assert 0.5 * float((counts / rows - WORLD.p).abs().sum()) < 0.05
    changed = float((new != WORLD.index(texts)).double().mean())
    fewer = float((drawn(process, texts, 0.2, calls)[0] != WORLD.index(texts)).double().mean())
    assert changed > 0.1 and changed > 2 * fewer


def test_left_to_right_families_rewrite_the_end():
    process = Subject(family("autoregressive")).ideal(random_table(V, 5, seed=2))
    texts = torch.tensor([[1, 0, 1, 1, 0]]).expand(50, -1)
    *_, last = sample(process, Noise.of(0, 50), 5, 5, edit=Edit(texts, 0.4))
    assert torch.equal(last.tokens[:, :3], texts[:, :3]) and int(last.calls.max()) == 2
    assert not torch.equal(last.tokens[:, 3:], texts[:, 3:])


def test_strength_is_the_share_of_tokens_that_are_noise_whatever_the_schedule():
    for name, config in (("masked", MaskedConfig(schedule="cosine")), ("score_entropy", ScoreEntropyConfig())):
        process = Subject(family(name), config).silent(V)
        assert isinstance(process, HasKernel)
        t = Edit(WORLD.texts[:1], 0.3).time(process)
        assert float(process.kernel(0.0, t)[0, V]) == pytest.approx(0.3)
        state = process.q_sample(WORLD.texts[:1], torch.tensor([t], dtype=torch.float64), Noise.of(0, 1))
        assert isinstance(state, State)
    with pytest.raises(UserError, match="--strength must be from 0 to 1"):
        Edit(WORLD.texts[:1], 1.5)
