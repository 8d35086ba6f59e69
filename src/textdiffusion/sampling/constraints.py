"""Sampling held to a pattern: every text matches, and with particles its law is that of the model given the pattern.

A step that can be held (drafts.HasDraft) is two draws: a text, each token on its own from the model's law p, then the
state at s given that text. Held to an automaton A, the first is a joint draw from

    P(x_0) = prod_i p_i(x_0,i) [x_0 in A] / Z,

by forward-backward (automaton.py), and nothing else changes. What is drawn matches, so that after every step a match
remains possible (the text that was drawn is one), and after the last one, which writes the text itself, there is one.
Where noise replaces tokens, or is Gaussian, p is the denoiser's law: the context, reshaped by temperature and top-p,
times the evidence of the position's own symbol or reals. Families from left to right know nothing of what comes after
their block, or their token: there, it counts only whether what remains of the length can complete a match.

That is not yet the model's law given A: steps look at each position on its own, so that the first ones choose by a
chance of a match, Z, that is not the true one. Weights mend this. A held step from x_t to x_s has a chance that is

    h(x_s) / Z(x_t)    times the model's own,      h(x_s) = P(x_0 in A | x_s) under the same product of p_i

(among reals that is a density), so that particles with weights Z / h, resampled when they become too uneven, tend to
the law of the sampler's texts given A as their number grows (sequential Monte Carlo with a twisted proposal; 2505.22524
and 2507.08390 steer by rewards that way), and the product of their mean weights is an unbiased estimate of the chance
of A. For the sampler of T calls it is *its* law given A, which at one token a call, and with the exact posterior, is
the world's (tests/test_constraints.py, test_held_gaussian.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from textdiffusion.diffusion.drafts import Draft, HasDraft
from textdiffusion.errors import UserError
from textdiffusion.mathematics.automaton import Automaton
from textdiffusion.mathematics.categorical import draw, reshape_law
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Process, Step
from textdiffusion.sampling.particles import Particles
from textdiffusion.text.template import Template

# Both beyond what the evidence of reals with hardly any noise comes to: 2 e^12 nats a real, 2e10 of the widest codes.
COLDEST = 1e-12  # stands for temperature 0: the likeliest text that matches
CUT = 1e12  # nats that a token costs which top-p leaves out
IMPOSSIBLE = -1e5  # log-probability of what the model has at zero


class Hold:
    """Holds the texts of one run to an automaton.

    Args:
        automaton: over the run's tokens.
        particles: for each text; 1 for texts that match, without regard to how probable the match was.
    """

    def __init__(self, automaton: Automaton, particles: int = 1):
        self.automaton, self.particles = automaton, particles

    def begin(self, process: Process, step: Step, written: Tensor, fixed: Tensor, crowd: Particles) -> None:
        """Set out with rows of particles; written, fixed [B L] as in sampling/reverse.py.

        Raises:
            UserError: a step that cannot be held, or no match of what is fixed.
        """
        if not isinstance(step, HasDraft):
            able = [name for name, other in process.steps.items() if isinstance(other, HasDraft)]
            if not able:
                raise UserError("this family cannot be held to a pattern; use a run of another, such as masked")
            raise UserError(f"this sampler cannot be held to a pattern; use another: {', '.join(able)}")
        if self.automaton.vocabulary != process.vocabulary:
            raise ValueError("the automaton is of another vocabulary")
        tokens = written.masked_fill(~fixed, -1).cpu().numpy()
        nothing, none = np.zeros(tokens.shape, dtype=bool), np.zeros((0, process.vocabulary))
        if not np.isfinite(self.automaton.log_chance(none, nothing, tokens)).all():
            raise UserError("no text of this length matches the pattern, with what is given of it")
        self.crowd, self.foreseen = crowd, crowd.carry()

    @property
    def log_chance(self) -> np.ndarray:
        """For each text, log of an unbiased estimate of the chance that the model gives the pattern; of particles, of
        which there must be several, since one alone is not weighed."""
        if self.particles == 1:
            raise ValueError("one particle is not weighed: take several")
        return self.crowd.log_chance

    def text(self, draft: Draft, written: Tensor, noise: Noise, rows: Tensor) -> Tensor:
        """A joint draw of the draft's tokens int64 [N]; ``rows`` are the numbers of the B rows at hand."""
        positions, length = draft.positions, written.shape[1]
        self.written = written.cpu().numpy()
        log_p = draft.log_p.double().cpu().numpy()
        log_z, sets = self.automaton.draw(
            log_p, positions.cpu().numpy(), self.written, noise.uniform("path", length).cpu().numpy()
        )
        index = rows.cpu().numpy()
        self.crowd.log_weight[index] += log_z - self.foreseen[index]
        self.foreseen[index] = log_z
        allowed = torch.from_numpy(sets).to(draft.log_p.device)
        return draw(draft.log_p.masked_fill(~allowed, -torch.inf), noise.uniform("text", length)[positions])

    def weigh(self, draft: Draft, x: Tensor, rows: Tensor) -> None:
        """Take note of how far the state x, to which the step of the latest `text` came, foresees a match: h."""
        if self.particles == 1:
            return
        log_p = (draft.log_p.double() + draft.evidence(x)).log_softmax(-1)
        self.foreseen[rows.cpu().numpy()] = self.automaton.log_chance(
            log_p.cpu().numpy(), draft.positions.cpu().numpy(), self.written
        )


def hold_gaps(template: Template, vocabulary: int, particles: int) -> tuple[Template, Hold]:
    """Gaps for a family from left to right, which is given what stands before the first one, and held to the rest."""
    automaton = Automaton.of_template(template.tokens.numpy(), template.given.numpy(), vocabulary)
    return Template(template.tokens, template.given.cumprod(0).bool()), Hold(automaton, particles)


def refusal(automaton: Automaton, flags: str, tokens: Tensor, given: Tensor, longest: int) -> str | None:
    """Why no text can match, in one line that names lengths for which one can; None where one can.

    Args:
        flags: the pattern, as its user knows it.
        tokens, given: what is fixed of the text, int64 [L] and bool [L].
        longest: tokens up to which other lengths are looked for.
    """
    fixed = tokens.masked_fill(~given, -1).unsqueeze(0).numpy()
    nothing = np.zeros(fixed.shape, dtype=bool)
    if np.isfinite(automaton.log_chance(np.zeros((0, automaton.vocabulary)), nothing, fixed)[0]):
        return None
    length, prompt = len(tokens), int(given.sum())
    if not bool(given[:prompt].all()):
        return f"nothing that fills these gaps satisfies {flags}; change the gaps, or the pattern"
    state = automaton.walk(tokens[:prompt].numpy())
    lengths = [prompt + n for n in automaton.lengths(max(longest - prompt, 0), state)]
    after = " with this beginning" if prompt else ""
    if not lengths:
        listed = "; is all that it must contain among the words of --words?" if "--words" in flags else ""
        return (
            f"no text of up to {longest} tokens{after} satisfies {flags} with this run's tokenizer; change the pattern"
            + listed
        )
    named = ", ".join(_runs(lengths, length))
    return f"no text of {length} tokens{after} satisfies {flags}; there are some of {named} tokens: ask with --length"


def _runs(lengths: list[int], near: int) -> list[str]:
    """Up to four runs of numbers, those nearest to a number, in order."""
    runs: list[list[int]] = []
    for n in lengths:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    nearest = sorted(runs, key=lambda run: min(abs(n - near) for n in run))[:4]
    return [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in sorted(nearest)]


def reshape_uncut(
    log_p: Tensor, *, temperature: float = 1.0, top_p: float | None = None, top_k: int | None = None
) -> Tensor:
    """As categorical.reshape_law, but what is cut off there keeps a chance beyond reckoning, in float64: it is written
    only where nothing else would match. At temperature 0 a joint draw is the likeliest text that matches."""
    temperature = max(temperature, COLDEST)
    log_p = reshape_law(log_p.double().clamp(min=IMPOSSIBLE), temperature=temperature)
    if (top_p is None or top_p >= 1) and top_k is None:
        return log_p
    kept = reshape_law(log_p, top_p=top_p, top_k=top_k)
    return torch.where(kept == -torch.inf, log_p - CUT / temperature, kept)
