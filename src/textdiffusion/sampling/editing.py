"""Rewriting a text: it is made noisy to some degree, and denoised from there.

At strength 1 nothing is left of it, and what is written is a sample; at 0 it is the text. Between them a text drawn
from the model's law comes out with that law again, if the sampler has it: noise and its reversal are one step of a
Markov chain whose law it is. Families from left to right noise a text from its end, so that its end is rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import Schedule
from textdiffusion.process import Process, State
from textdiffusion.settings import LONGEST


@dataclass(frozen=True)
class Edit:
    """Texts to rewrite.

    tokens: int64 [B L]. strength: the share of the noise, from 0 to 1: of tokens where noise acts on tokens, of what it
    costs to tell them where it is Gaussian and its clock is learnt.
    """

    tokens: Tensor
    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"--strength must be from 0 to 1, not {self.strength:g}")

    def time(self, process: Process) -> float:
        """The noise level t that the strength stands for."""
        schedule = getattr(process, "schedule", None)
        if not isinstance(schedule, Schedule) or not 0 < self.strength < 1:
            return self.strength
        most = 1 - float(schedule.alpha(torch.tensor(1.0, dtype=torch.float64)))
        return float(schedule.inverse(torch.tensor(self.strength * most, dtype=torch.float64)))

    def begin(self, process: Process, noise: Noise) -> State:
        """The noisy texts."""
        rows, length = self.tokens.shape
        if self.strength == 0:
            return process.template(self.tokens, torch.ones_like(self.tokens, dtype=torch.bool), noise)
        if self.strength == 1:
            return process.prior_sample(rows, length, noise)
        t = torch.full((rows,), self.time(process), dtype=torch.float64, device=self.tokens.device)
        return process.q_sample(self.tokens, t, noise)

    def plan(self, process: Process, free: Tensor, calls: int, sampler: str) -> list[float]:
        """Times from the noise level to 0, in no more steps than a whole run of so many calls takes."""
        t = self.time(process)
        whole: Sequence[float] = process.plan(free, calls, sampler)
        if t >= 1:
            return list(whole)
        # What is left of a longer run's times below t.
        total = int(calls / t) + 1
        while True:
            left = [s for s in process.plan(free, total, sampler) if s < t - 1e-9]
            if len(left) < len(whole) or total == 1:
                return [t, *left]
            total -= 1


@torch.inference_mode()
def mend(process: Process, tokens: Tensor, strength: float, calls: int, longest: int) -> Tensor:
    """A text int64 [L], mended: taken for one in which a share of the tokens has been replaced by others, with the
    likeliest token given all that is there put at every position, call by call, until nothing changes.

    Args:
        process: whose noise replaces tokens (``Process.time_of``).
        strength: the share of wrong tokens to expect.
        calls: network calls, at most.
        longest: tokens that the process was trained on.
    Raises:
        UserError: another kind of noise, an impossible strength, or a text that is too long.
    """
    if process.time_of(strength) is None:
        raise UserError(
            "the noise of this run's family never makes one token another, so it finds no wrong ones; "
            "train one with --family uniform"
        )
    if not 1 <= calls <= LONGEST:
        raise UserError(f"--calls must be from 1 to {LONGEST:,}, not {calls}")
    if not 1 <= len(tokens) <= longest:
        raise UserError(
            f"this run mends texts of 1 to {longest} tokens, not {len(tokens)}; hand it one piece after another"
        )
    t = torch.tensor([process.time_of(strength)], dtype=torch.float64, device=tokens.device)
    state = State(tokens.unsqueeze(0), t)
    for _ in range(calls):
        mended = process.predict(state).log_p.argmax(-1)
        if torch.equal(mended, state.x):
            break
        state = replace(state, x=mended)
    return state.x[0]
