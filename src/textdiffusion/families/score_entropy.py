"""Score entropy discrete diffusion, SEDD (2310.16834), with absorbing or uniform noise.

q           replacing.py; graph = "absorb" puts [MASK], "uniform" any token. The total noise sigma(t) of the paper is
            -log alpha(t).
network     Log-ratios l_i(y), free of any normalisation: r'_i(y) = exp l_i(y) stands for q(y) / q(x_t,i). For absorbing
            noise they are scaled by sigma: r' = exp(l) / ((e^sigma - 1) V).
loss, bound The score entropy, beta base(x_t) sum_{y != x_t} [r' - r log r' + r (log r - 1)], integrated over time
            (equation 11): the bound of replacing.py with these ratios. Training divides out its weight in time.
steps       "tweedie", the analytic step of the paper, and "euler" (tau-leaping); both end by denoising what is open.
what it is  With absorbing noise, u = (e^sigma - 1) sum of the ratios and p = the ratios normalised, the integrand is
            that of masked diffusion plus a penalty for the rate: (CE + u - 1 - log u) times beta alpha / (1 - alpha).
            u is free to be wrong, and costs what it is wrong by (``rate_penalty``).
departs from the paper in: times reach 0 and 1, so that the bound lacks nothing: log-linear noise has alpha(1) = 0
            exactly; geometric noise is moved so that sigma(0) = 0, and what it leaves of text at t = 1 is in the
            prior. The network is not told the time unless asked to (``time``; docs/results.md). Draws and ratios of
            steps are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from textdiffusion.diffusion.conditioning import random_given
from textdiffusion.diffusion.guidance import guided_law
from textdiffusion.diffusion.replacing import SMALLEST, Bridge, Outlook, Replacing, Rewriting
from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import SCHEDULES, bell, geometric
from textdiffusion.process import Context, Network, Prediction, Reshape, State, as_network


@dataclass
class ScoreEntropyConfig:
    """Fields of the score-entropy family."""

    graph: Literal["absorb", "uniform"] = "absorb"  # noise puts [MASK], or any token
    noise: Literal["loglinear", "geometric"] = "loglinear"  # how fast
    sigma_min: float = 1e-4  # of geometric noise
    sigma_max: float = 20.0  # of geometric noise
    weight: Literal["bound", "flat"] = "flat"  # of times in training; bound: as in the bound
    time: bool = False  # the network is told the noise level, at every layer: it learns later
    given: float = 0.2  # share of the training examples in which some positions have no noise (uniform graph)

    def __post_init__(self) -> None:
        if self.graph not in ("absorb", "uniform") or self.noise not in ("loglinear", "geometric"):
            raise UserError("process.graph must be absorb or uniform, process.noise loglinear or geometric")
        if not 0 < self.sigma_min < self.sigma_max <= 100:
            raise UserError("process.sigma_min must be above 0 and below process.sigma_max, which is at most 100")
        if self.weight not in ("bound", "flat") or not 0 <= self.given <= 1:
            raise UserError("process.weight must be bound or flat, process.given from 0 to 1")


class Euler(Bridge):
    """Each position jumps to y with probability (t - s) beta(t) base r'(y); the last step denoises."""

    note = "tau-leaping: rates times the step, cut where they add up to more than one"
    reverses = False

    def laws(self, state: State, asked: Tensor, outlook: Outlook, s: Tensor, reshape: Reshape) -> Tensor:
        exact = super().laws(state, asked, outlook, s, reshape)
        process, row = self.process, asked.nonzero()[:, 0]
        here = state.x[asked]
        # Where alpha(1) = 0 beta is infinite at t = 1, and the ratios are 0: their product is neither.
        alpha = process.schedule.alpha(state.t).clamp(min=SMALLEST)
        grown = ((state.t - s) * -process.schedule.derivative(state.t) / alpha)[row].unsqueeze(-1)
        kept = outlook.marginal.gather(-1, here.unsqueeze(-1))
        text = outlook.marginal[:, : process.vocabulary].sum(-1, keepdim=True)
        law = outlook.marginal
        if process.mask < law.shape[-1]:
            law = pad(text * reshape(outlook.context).exp(), (0, 1))
        else:
            change = process.alpha(state.t)[row] * (reshape(outlook.context).exp() - outlook.context.exp())
            law = (law + change).clamp(min=0)
        jump = grown * process.base.to(row.device)[here].unsqueeze(-1) * law / kept
        jump = jump.scatter(-1, here.unsqueeze(-1), 0.0)
        total = jump.sum(-1, keepdim=True)
        jump = jump / total.clamp(min=1.0)
        stay = one_hot(here, law.shape[-1]) * (1 - jump.sum(-1, keepdim=True)).clamp(min=0)
        return torch.where((s[row] == 0).unsqueeze(-1), exact, jump + stay)

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Rewriting:
        if len(self.process.base) == self.process.vocabulary:
            raise UserError(
                "the sampler euler jumps by rates that no text decides, where noise is uniform; use tweedie"
            )
        return super().draft(state, asked, prediction, s, reshape)


@final
class ScoreEntropy(Replacing):
    """Score entropy; see the head of the file."""

    Config: ClassVar[type] = ScoreEntropyConfig
    summary: ClassVar[str] = "ratios of probabilities are learnt (SEDD), by absorbing or uniform noise; upper bound"
    paper: ClassVar[str] = "SEDD 2310.16834"
    bounded: ClassVar[bool] = True
    infills: ClassVar[bool] = True

    def __init__(self, network: Network, config: ScoreEntropyConfig, vocabulary: int, *, start: int = 0):
        schedule = SCHEDULES["linear"] if config.noise == "loglinear" else geometric(config.sigma_min, config.sigma_max)
        super().__init__(network, config, vocabulary, schedule, float(config.graph == "absorb"), start=start)
        self.steps = {"tweedie": Bridge(self), "euler": Euler(self)}

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        absorb = config.graph == "absorb"
        fields = {"inputs": vocabulary + absorb, "outputs": vocabulary, "attention": "bidirectional"}
        return fields | {"time": config.time, "clean": not absorb and config.given > 0}

    def times(self, state: State) -> Tensor:
        # A [MASK] says of itself that it is noise; nothing need be said of the given tokens.
        return state.t if self.config.graph == "absorb" else super().times(state)

    # -- ratios ---------------------------------------------------------------------------------------------------
    def log_ratios(self, logits: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """log of r'(y) for every symbol y [N S], 0 at the symbols x [N] themselves; times t [N]."""
        if self.config.graph == "absorb":
            alpha = self.schedule.alpha(t.double()).clamp(min=SMALLEST)
            scale = alpha.log() - torch.log1p(-alpha).clamp(min=-700) - math.log(self.vocabulary)
            logits = pad(logits + scale.to(logits.dtype).unsqueeze(-1), (0, 1))
        return logits.scatter(-1, x.unsqueeze(-1), 0.0)

    def outlook(self, state: State, positions: Tensor, condition: Tensor | None = None) -> Outlook:
        logits = self.network(state.x, self.times(state), condition=condition, positions=positions).double()
        row, here = positions.nonzero()[:, 0], state.x[positions]
        ratios = self.log_ratios(logits, here, state.t[row])
        marginal = ratios.softmax(-1)  # m(y) = r'(y) / sum of r'
        if self.config.graph == "absorb":
            return Outlook(logits.log_softmax(-1), marginal)
        return Outlook(self.context(marginal, self.alpha(state.t)[row]).log(), marginal)

    def guided(self, labelled: Tensor, bare: Tensor, weight: Tensor, x: Tensor, t: Tensor | None) -> Tensor:
        """Log-ratios of the guided law of tokens (guidance.py): with absorbing noise the rate stays that of the
        labelled ones, with uniform noise the ratios are those of the marginal that follows."""
        if self.config.graph == "absorb" or t is None:
            return guided_law(labelled, bare, weight)
        alpha = self.schedule.alpha(t.double()).unsqueeze(-1)
        ratios = (self.log_ratios(out.double(), x, t) for out in (labelled, bare))
        with_label, without = (self.context(r.softmax(-1), alpha).log() for r in ratios)
        marginal = self.marginal(guided_law(with_label, without, weight).softmax(-1), alpha)
        return (marginal / marginal.gather(-1, x.unsqueeze(-1))).log()

    def context(self, marginal: Tensor, alpha: Tensor) -> Tensor:
        """The law of a token [N V] behind a marginal [N V] of uniform noise, alpha [N 1]; free ratios can ask for less
        than nothing."""
        context = ((marginal - (1 - alpha) * self.base.to(alpha.device)) / alpha.clamp(min=1e-12)).clamp(min=1e-30)
        context = torch.where(alpha > 1e-12, context, marginal)
        return context / context.sum(-1, keepdim=True)

    def rate_penalty(self, x_0: Tensor, state: State) -> Tensor:
        """What of the integrand is due to the rate of reveals being wrong, nats per unit of time [B] (absorb)."""
        hidden = state.x == self.mask
        row = hidden.nonzero()[:, 0]
        marginal = self.outlook(state, hidden).marginal
        alpha = self.alpha(state.t)[row].squeeze(-1)
        u = (1 - alpha) / alpha * (1 - marginal[:, -1]) / marginal[:, -1]
        beta = -self.schedule.derivative(state.t) / self.schedule.alpha(state.t)
        nats = (beta[row] * alpha / (1 - alpha)) * (u - 1 - u.log())
        return nats.new_zeros(len(x_0)).index_add(0, row, nats)

    # -- learning -------------------------------------------------------------------------------------------------
    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Score entropy, nats per token [B]; with weight = bound and given = 0, one draw of the bound over L, but for
        its prior term."""
        t = noise.stratified("time").clamp(1e-6, 1 - 1e-6)
        if self.config.weight == "flat":
            # A bell over the share of replaced tokens, as in the masked family, whatever the schedule.
            whole = 1 - float(self.schedule.alpha(torch.tensor(1.0, dtype=torch.float64)))
            t = self.schedule.inverse(bell(t) * whole)
        state = self.q_sample(x_0, t, noise)
        given = None
        if self.config.graph == "uniform":
            given = random_given(len(x_0), x_0.shape[1], noise, self.config.given)
            state = State(torch.where(given, x_0, state.x), t, given)
        moves = self.movable(state)
        logits = self.network(state.x, self.times(state), condition=condition, positions=moves)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        row, here = moves.nonzero()[:, 0], state.x[moves]
        nats = self.score_entropy(self.log_ratios(logits, here, t[row]), here, x_0[moves], t[row])
        if self.config.weight == "flat":
            alpha = self.schedule.alpha(t)[row]
            weight = 2 * (1 - alpha) / alpha
        else:
            weight = (-self.schedule.derivative(t) / self.schedule.alpha(t))[row]
        total = nats.new_zeros(len(x_0)).index_add(0, row, nats * weight.to(nats.dtype))
        return total / x_0.shape[1]

    def score_entropy(self, log_model: Tensor, here: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """base(x_t) sum_{y != x_t} [r' - r log r' + r (log r - 1)] [N], in closed form.

        The true ratio r is one number at y = x_0 and another at all other tokens, so that nothing of size V but the
        model's log-ratios [N S] is made. Args are those of the N positions that can move: x_t, x_0 and times.
        """
        alpha, moved = self.schedule.alpha(t), here != x_0
        noise, other = (1 - alpha) * self.base.to(here.device)[here], (1 - alpha) * self.base[0].to(here.device)
        q_here = noise + alpha * ~moved
        r, r_0 = other / q_here, torch.where(moved, (alpha + other) / q_here, 0.0)
        count = self.vocabulary - 1.0 - (moved & (here < self.vocabulary)).double()
        constant = count * (torch.special.xlogy(r, r) - r) + torch.special.xlogy(r_0, r_0) - r_0
        # The sums run over the symbol itself too, whose log-ratio is 0 and whose ratio, 1, is taken off.
        tokens = log_model[:, : self.vocabulary]
        linear = r * tokens.sum(-1) + torch.where(moved, r_0 - r, 0.0) * tokens.gather(-1, x_0.unsqueeze(-1)).squeeze(
            -1
        )
        return self.base.to(here.device)[here] * (log_model.exp().sum(-1) - 1 - linear + constant)

    def ideal(self, context: Context) -> Network:
        def outputs(x: Tensor, t: Tensor | None) -> Tensor:
            assert t is not None
            log_c = self.ideal_context(context, x, t)
            if self.config.graph == "absorb":
                return log_c + math.log(self.vocabulary)
            alpha = self.schedule.alpha(t.double())
            m = self.marginal(log_c.exp(), alpha.unsqueeze(-1) if t.dim() == 2 else alpha.view(-1, 1, 1))
            return (m / m.gather(-1, x.unsqueeze(-1))).log()

        return as_network(outputs)
