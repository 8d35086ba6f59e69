"""Rewards by particles: the law of the texts is the sampler's times exp(reward), for every family and sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from textdiffusion.errors import UserError
from textdiffusion.families import family, names
from textdiffusion.mathematics.automaton import Automaton
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.sampling.constraints import Hold
from textdiffusion.sampling.reverse import sample
from textdiffusion.sampling.steering import Steer
from textdiffusion.text.patterns import expression
from textdiffusion.verification.enumeration import enumerated_law
from textdiffusion.verification.subject import Subject

V, L = 2, 3
WORLD = random_table(V, L, seed=1)
# Of whole texts in nats: far from a sum over positions, so that early tokens have to be judged by what may follow.
REWARD = torch.tensor([1.5, -1.0, -0.5, 1.0, -1.5, 0.5, 1.0, -1.0], dtype=torch.float64)
GAUSSIAN = ("analog_bits", "gaussian_embedding")
CASES = [(name, sampler) for name in names() for sampler in Subject(family(name)).silent(V).steps]


def reward(tokens: torch.Tensor) -> np.ndarray:
    """Of texts, and of beginnings: the mean over what may follow."""
    fits = ((tokens[:, None] == WORLD.texts) | (tokens[:, None] < 0)).all(-1).double()
    return (fits @ REWARD / fits.sum(-1)).numpy()


def run(process, rows: int, particles: int, sampler: str, calls: int = 3, hold=None, scale: float = 1.0):
    """Numbers of the texts that came out, [rows], and the estimates of the normaliser."""
    steer = Steer(lambda tokens: scale * reward(tokens), particles)
    *_, last = sample(process, Noise.of(5, rows), L, calls, sampler=sampler, steer=steer, hold=hold)
    return WORLD.index(last.tokens), torch.from_numpy(np.exp(steer.crowd.log_chance))


@pytest.mark.parametrize("name, sampler", CASES)
def test_weights_are_unbiased_for_every_text(name, sampler):
    """The mean of (estimate of the normaliser) x [the text is x] is the sampler's chance of x times exp(reward)."""
    process, rows = Subject(family(name)).wrong(WORLD, 0), 400
    text, estimate = run(process, rows, 4, sampler)
    found = one_hot(text, V**L) * estimate.unsqueeze(-1)
    spread = found.var(0)
    if name in GAUSSIAN:  # as many texts without a reward stand for the law
        *_, free = sample(process, Noise.of(6, 4 * rows), L, 3, sampler=sampler)
        drawn = one_hot(WORLD.index(free.tokens), V**L) * REWARD.exp()
        law, spread = drawn.mean(0), spread + drawn.var(0) / 4
    else:
        law = enumerated_law(process, L, 3, sampler) * REWARD.exp()
    # Of texts so rare that none may have been drawn the spread is known all the same.
    error = spread.maximum(law * estimate.mean()) ** 0.5 / rows**0.5
    assert ((found.mean(0) - law).abs() <= 5 * error).all(), (found.mean(0), law, error)


def test_the_law_tends_to_the_worlds_times_the_reward_and_one_particle_does_not():
    """With the exact posterior and a token a call: total variation to p(x) exp(r(x)) / Z falls with their number."""
    process, rows = Subject(family("masked")).ideal(WORLD), 600
    target = WORLD.p * (0.5 * REWARD).exp()
    target = target / target.sum()
    apart = []
    for particles in (1, 2, 16):
        counts = torch.bincount(run(process, rows, particles, "random", scale=0.5)[0], minlength=V**L)
        apart.append(0.5 * float((counts / rows - target).abs().sum()))
    assert apart[0] > 0.15 and apart[0] > apart[1] > apart[2] and apart[2] < 0.06, apart


def test_a_pattern_and_a_reward_multiply():
    process, rows, held = Subject(family("masked")).wrong(WORLD, 0), 600, torch.tensor([0, 1, 1, 1, 0, 1, 1, 0])
    automaton = Automaton(expression("a.*b|b+a|aba|bab"), [b"a", b"b"])
    fits = torch.from_numpy(automaton.matches(WORLD.texts.numpy()))
    assert torch.equal(fits.long(), held)
    text, estimate = run(process, rows, 4, "random", hold=Hold(automaton, 4))
    found = one_hot(text, V**L) * estimate.unsqueeze(-1)
    law = enumerated_law(process, L, 3, "random") * REWARD.exp() * fits
    error = found.var(0).maximum(law * estimate.mean()) ** 0.5 / rows**0.5
    assert ((found.mean(0) - law).abs() <= 5 * error).all() and float(found[:, ~fits].sum()) == 0


def test_an_even_reward_changes_no_text_and_a_text_not_its_batch():
    process = Subject(family("masked")).wrong(WORLD, 0)
    even = Steer(lambda tokens: np.full(len(tokens), 7.0), 1)
    *_, plain = sample(process, Noise.of(3, 20), L, 3)
    *_, same = sample(process, Noise.of(3, 20), L, 3, steer=even)
    assert torch.equal(plain.tokens, same.tokens) and np.allclose(even.crowd.log_chance, 7.0)
    *_, many = sample(process, Noise.of(3, 12), L, 3, steer=Steer(reward, 4))
    *_, few = sample(process, Noise.of(3, 12).select([3, 8]), L, 3, steer=Steer(reward, 4))
    assert torch.equal(many.tokens[[3, 8]], few.tokens)


@pytest.mark.parametrize("wrong", [lambda x: np.full(len(x), np.nan), lambda x: np.zeros(len(x) + 1)])
def test_a_reward_that_is_no_number_for_each_text_is_refused(wrong):
    process = Subject(family("masked")).ideal(WORLD)
    with pytest.raises(UserError, match="a reward must give a finite number for each text"):
        list(sample(process, Noise.of(0, 2), L, 2, steer=Steer(wrong, 4)))
