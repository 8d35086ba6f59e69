"""How far the law of held texts is from the model's law given the pattern, by the number of particles.

    python examples/held_law.py

On a world whose texts can be listed (all of three letters, a or b, each with a probability of its own), with the exact
posterior in the network's place, masked diffusion that writes one letter a call draws p(x) itself. Held to a pattern it
draws texts that match, but by a law of its own; weighted particles bring that to p(x | pattern). Total variation, of so
many draws; the last column is what as many draws from p(x | pattern) itself show on average.
"""

from __future__ import annotations

import re

import numpy as np
import torch

from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.mathematics.automaton import Automaton
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.sampling.constraints import Hold
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.patterns import expression

LETTERS, PATTERN = "ab", "ab.|b.a|aaa"
WORLD = random_table(len(LETTERS), 3, seed=1)


def given_the_pattern() -> torch.Tensor:
    """p(x | pattern) of each text of the world, float64 [texts]."""
    texts = ["".join(LETTERS[v] for v in x) for x in WORLD.texts.tolist()]
    p = WORLD.p * torch.tensor([re.fullmatch(PATTERN, text) is not None for text in texts])
    return p / p.sum()


def drawn(particles: int, draws: int) -> torch.Tensor:
    """Shares of each text among so many draws, float64 [texts]."""
    bare = Masked(lambda *_, **__: torch.zeros(()), MaskedConfig(), len(LETTERS))
    hold = Hold(Automaton(expression(PATTERN), [c.encode() for c in LETTERS]), particles)
    *_, last = sample(bare.over(bare.ideal(WORLD.context)), Noise.of(3, draws), 3, 3, hold=hold)
    return torch.bincount(WORLD.index(last.tokens), minlength=len(WORLD.p)).double() / draws


def main(draws: int = 2000) -> None:
    """Print the table."""
    target = given_the_pattern()
    own = np.random.default_rng(0).multinomial(draws, target.numpy(), size=200) / draws
    floor = 0.5 * np.abs(own - target.numpy()).sum(-1).mean()
    print("particles  total variation  of draws from p(x | pattern)")
    for particles in (1, 2, 4, 8, 16):
        apart = 0.5 * float((drawn(particles, draws) - target).abs().sum())
        print(f"{particles:>9}  {apart:>15.3f}  {floor:>26.3f}", flush=True)


if __name__ == "__main__":
    main()
