"""Sampling steered by a reward: texts are drawn from p(x) exp(r(x)) / Z as the number of particles grows.

r says how much oftener a text is wanted than the model gives it, in nats: a classifier's log p(label | x) makes
p(x | label) of p(x). Nothing is learnt, and r need not have a gradient. After every step each particle's text is
foreseen, drawn from the law of each token given the state as it is now, and the particle is weighed by
exp(r(text) - r(text foreseen before)); the last text is the one that was written, so that the weights of a whole run
come to exp(r(x)), whatever was foreseen on the way (Feynman-Kac steering 2501.06848; 2505.22524). What is foreseen only
says early which particles are worth going on with.

Where a step does not say what text it goes towards, a text is weighed as far as it is written: left to right its
beginning, and with Gaussian noise (but for the sampler bridge) what the network takes the tokens for. Texts with holes
wait for the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import numpy as np
from torch import Tensor

from textdiffusion.diffusion.drafts import HasDraft
from textdiffusion.errors import UserError
from textdiffusion.mathematics.categorical import draw
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Prediction, Process, Reshape, State, Step
from textdiffusion.sampling.particles import Particles

Reward = Callable[[list[str]], Sequence[float]]


@final
class Steer:
    """Steers the texts of one run.

    Args:
        reward: texts int64 [n L], -1 behind what is written of them, to nats [n].
        particles: for each text.
    """

    def __init__(self, reward: Callable[[Tensor], np.ndarray], particles: int):
        self.reward, self.particles = reward, particles

    def begin(self, crowd: Particles) -> None:
        """Set out with rows of particles."""
        self.crowd, self.value = crowd, crowd.carry()

    def weigh(self, text: Tensor, rows: Tensor) -> None:
        """Weigh the particles ``rows`` [n] by their texts int64 [n L] in the place of those before.

        Raises:
            UserError: a reward that is no finite number for each text.
        """
        holes = ((text[:, 1:] >= 0) & (text[:, :-1] < 0)).any(-1)
        whole, index = text[~holes], rows[~holes].cpu().numpy()
        if not len(whole):
            return
        value = np.asarray(self.reward(whole.cpu()), dtype=np.float64)
        if value.shape != (len(whole),) or not np.isfinite(value).all():
            raise UserError("a reward must give a finite number for each text that it is handed; mend the function")
        self.crowd.log_weight[index] += value - self.value[index]
        self.value[index] = value


def steer_by(reward: Reward, decode: Callable[[list[int]], str], particles: int) -> Steer:
    """A reward of texts as one of tokens.

    Raises:
        UserError: one particle, among which there is nothing to choose.
    """
    if particles == 1:
        raise UserError("a reward chooses among particles: ask for some, such as particles=8")
    return Steer(
        lambda tokens: np.asarray(reward([decode([t for t in row if t >= 0]) for row in tokens.tolist()])), particles
    )


def foreseen_text(
    process: Process,
    step: Step,
    state: State,
    asked: Tensor,
    prediction: Prediction,
    s: Tensor,
    reshape: Reshape,
    after: State,
    noise: Noise,
) -> Tensor:
    """The texts int64 [B L] that states ``after`` a step are on the way to, -1 where nothing is foreseen;
    ``prediction`` is for what the step foresees (drafts.py), of a step that can say so."""
    text = process.decode(after).clone()
    if not isinstance(step, HasDraft):
        return text
    try:
        draft = step.draft(state, asked, prediction, s, reshape)
    except UserError:
        return text  # a step that no text decides
    log_p = (draft.log_p.double() + draft.evidence(after.x)).log_softmax(-1)
    text[draft.positions] = draw(log_p, noise.uniform("foresight", text.shape[1])[draft.positions])
    return text
