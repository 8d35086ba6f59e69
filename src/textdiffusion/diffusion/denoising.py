"""Reverse steps under Gaussian noise. Each makes T - 1 moves among reals and draws the tokens in its T-th call.

ancestral   q(z_s | z_t, x) with the predicted mean for x (2006.11239; 2107.00630); has a T-call bound
bridge      sum over v of p(v | z_t) q(z_s | z_t, v), each position on its own: a token is drawn, and the noise's own
            bridge goes towards its code, as where noise replaces tokens (replacing.py). With the exact posterior a
            text of one token has the law of its time at any T, which the mean, having no spread, comes to only in the
            limit of many calls; there the two are one chain, for texts of any length. It draws a text, so it is the
            one that can be held to a pattern (drafts.py). No bound is reckoned for it
ddim        no chance after the start (2010.02502): Euler's step of the probability flow in the clock sigma / alpha.
            With ``process.delta`` the state is moved further than the network is then told, by so many steps:
            asymmetric time intervals (2208.04202)
dpm         DPM-Solver++(2M), second order by what the call before said (2211.01095)
churn       ddim to less noise than asked for, and noise added back up to it (2206.00364, after the move)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from textdiffusion.diffusion.drafts import Mixture
from textdiffusion.mathematics.gaussian import deterministic, noised, posterior
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Categorical, Normal, Prediction, Reshape, State, Step

if TYPE_CHECKING:
    from textdiffusion.diffusion.coded import Coded

# (z_t, x_0, lambda_t, lambda_s) to mean and standard deviation of z_s.
Move = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Everywhere(Step):
    """A step that moves all positions that are not given."""

    process: Coded

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        return self.process.free(state)

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, self.process.free(state)


@final
@dataclass
class Bridge(Everywhere):
    """A text, and the noise's bridge towards it; in the end the text itself."""

    note: ClassVar[str] = "the reversed chain, each position on its own; can be held to a pattern"
    reverses: ClassVar[bool] = True

    def law(
        self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape
    ) -> Categorical | Mixture:
        if bool((s == 0).all()):
            return Categorical(asked, prediction.native.posterior(reshape))
        return self.draft(state, asked, prediction, s, reshape)

    def foreseen(self, state: State) -> Tensor:
        return self.process.free(state)

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Mixture:
        process, row, z = self.process, asked.nonzero()[:, 0], state.x[asked].double()
        # A bridge to no noise at all is the text itself.
        ends = process.log_snr(s).masked_fill(s == 0, torch.inf)
        now, then = (log_snr[row].unsqueeze(-1) for log_snr in (process.log_snr(state.t), ends))
        none, one = torch.zeros_like(now), torch.ones_like(now)
        start, deviation = posterior(z, none, now, then)
        share, _ = posterior(none, one, now, then)
        codes = process.codes().to(z)
        return Mixture(asked, prediction.native.posterior(reshape), start, share, deviation, codes)


@final
@dataclass
class Denoising(Everywhere):
    """A move among reals, and tokens at the end."""

    note: str  # type: ignore[misc]
    move: Move
    second_order: bool = False
    delta: float = 0.0  # steps that the state is moved further than the network is told

    def law(
        self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape
    ) -> Categorical | Normal:
        guess = prediction.native
        log_p = guess.posterior(reshape)
        if bool((s == 0).all()):
            return Categorical(asked, log_p)
        row = asked.nonzero()[:, 0]
        # Asymmetric intervals: past s, but not past the text.
        to = (s - self.delta * (state.t - s)).clamp(min=0)
        now, then = (self.process.log_snr(t)[row].unsqueeze(-1) for t in (state.t, to))
        x_0 = guess.mean(log_p, self.process.codes()).double()
        earlier = state.memory.mean if self.second_order and state.memory is not None else None
        if earlier is not None:
            # What was said before is as it was said: beside a reshaped law it would be another's, so such a step is of
            # the first order. (Compared by the same way to a law, since rounding must not tell the two apart; and text
            # by text, since what one becomes must not depend on those beside it.)
            other = (log_p != guess.posterior(lambda context: context)).any(-1)
            plain = torch.ones(len(state.x), dtype=torch.bool, device=other.device).index_fill(0, row[other], False)
            before = self.process.log_snr(state.memory.t)[row].unsqueeze(-1)
            ahead = (0.5 * (then - now) / (now - before)).clamp(max=1.0)  # 1 / 2r, but no wild guess from a short step
            ahead = torch.where(plain[row].unsqueeze(-1), ahead, torch.zeros_like(ahead))
            x_0 = (1 + ahead) * x_0 - ahead * earlier[asked]
        mean, deviation = self.move(state.x[asked].double(), x_0, now, then)
        return Normal(asked, mean, deviation)


def denoising_steps(process: Coded, churn: float, delta: float) -> dict[str, Step]:
    """The steps of a family by name; the first is the default."""

    def flow(z: Tensor, x_0: Tensor, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        return deterministic(z, x_0, now, then), torch.zeros_like(then)

    def churned(z: Tensor, x_0: Tensor, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        low = then + churn * (then - now)  # a share of the step, so that many steps come to the same law
        return noised(deterministic(z, x_0, now, low), low, then)

    return {
        "ancestral": Denoising(process, "the reversed chain; has a T-call bound", posterior),
        "bridge": Bridge(process),
        "ddim": Denoising(process, "the flow, by Euler's steps; chance at the start only", flow, delta=delta),
        "dpm": Denoising(process, "the flow, to second order: DPM-Solver++(2M)", flow, second_order=True),
        "churn": Denoising(process, "the flow, with noise added after every step", churned),
    }
