"""What families share whose noise replaces tokens by draws from a base law.

    q(x_t | x_s) = stay [x_t = x_s] + (1 - stay) base(x_t),     stay = alpha(t) / alpha(s)

The base law decides the kind: all mass on an extra symbol [MASK] is absorbing noise, the same mass on every token is
uniform noise (D3PM 2107.03006, SEDD 2310.16834), a mixture is a hybrid (a stationary one, as in XDLM 2602.01362; the
one of GIDD 2503.04482 depends on time). S = V + 1 symbols if there is a [MASK], the one after the tokens; else S = V.

Two laws of a position say all that a model knows of it (2605.22765):

    context   c(v) = p(x_0 = v | all *other* positions), [V]: the leave-one-out posterior
    marginal  m(y) = p(x_t = y | all other positions) = alpha c(y) + (1 - alpha) base(y), [S]

and everything follows, for every base law:

    denoiser    p(x_0 = v | x_t) ~ c(v) q(x_t | v)
    ratios      q(y) / q(x_t) = m(y) / m(x_t): the concrete score of SEDD
    step        p(x_s = y | x_t) ~ m_s(y) q(x_t | x_s = y),  m_s = (m - (1 - stay) base) / stay
                (Tweedie's step of SEDD and the plug-in bridge of D3PM are both this)
    bound       KL(q(x_1 | x_0) || prior) + integral of beta E sum over positions of
                base(x_t) sum_{y != x_t} [r log(r / r') - r + r'],   beta = -alpha' / alpha,
                r = q(y | x_0) / q(x_t | x_0), r' the model's ratio     (2310.16834, equation 11)

The denoiser in the context's place counts a token's own evidence twice: a wrong bound and a wrong step (truth.md).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import Schedule
from textdiffusion.process import (
    Categorical,
    Context,
    Discrete,
    Network,
    Nll,
    Prediction,
    Process,
    Reshape,
    State,
    Step,
)

SMALLEST = 1e-300  # so that the logarithm of nothing is finite where it is multiplied by nothing


@dataclass(frozen=True)
class Outlook:
    """What a model knows of N positions without looking at their own symbols; float64.

    context: log c [N V]; marginal: m at the state's time [N S].
    """

    context: Tensor
    marginal: Tensor


class Replacing(Process):
    """A family whose noise replaces tokens by draws from ``base`` (float64 [S]), under a schedule."""

    def __init__(
        self, network: Network, config: Any, vocabulary: int, schedule: Schedule, mask_share: float, *, start: int = 0
    ):
        super().__init__(network, config, vocabulary, start=start)
        self.schedule, self.mask = schedule, vocabulary
        self.base = torch.full((vocabulary,), (1 - mask_share) / vocabulary, dtype=torch.float64)
        if mask_share > 0:
            self.base = torch.cat((self.base, torch.tensor([mask_share], dtype=torch.float64)))
        self.space = Discrete(len(self.base))

    # -- forward --------------------------------------------------------------------------------------------------
    def alpha(self, t: Tensor) -> Tensor:
        """Chance that a token is still there, [B 1]."""
        return self.schedule.alpha(t.double()).unsqueeze(-1)

    def law_of_noise(self, uniform: Tensor) -> Tensor:
        """Draws from the base law by inverse CDF: uniforms of any shape to symbols."""
        cdf = self.base.cumsum(0).to(uniform.device)
        last = int((self.base > 0).nonzero().max())
        return torch.searchsorted(cdf, uniform, right=True).clamp(max=last)

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Noise) -> State:
        length = x_0.shape[1]
        replaced = noise.uniform("replace", length) >= self.alpha(t)
        return State(torch.where(replaced, self.law_of_noise(noise.uniform("other", length)), x_0), t.double())

    def prior_law(self) -> Tensor:
        """Law of a position at t = 1, float64 [S]; what is left of text there is taken to be any token."""
        left = float(self.schedule.alpha(torch.tensor(1.0, dtype=torch.float64)))
        token = torch.full((self.vocabulary,), 1 / self.vocabulary, dtype=torch.float64)
        return (1 - left) * self.base + left * pad(token, (0, len(self.base) - self.vocabulary))

    def prior_sample(self, rows: int, length: int, noise: Noise) -> State:
        cdf, uniform = self.prior_law().cumsum(0).to(noise.device), noise.uniform("prior", length)
        x = torch.searchsorted(cdf, uniform, right=True).clamp(max=len(self.base) - 1)
        return State(x, torch.ones(rows, dtype=torch.float64, device=noise.device))

    def kernel(self, s: float, t: float) -> Tensor:
        """q(x_t | x_s), float64 [S S]."""
        at_s, at_t = (float(self.schedule.alpha(torch.tensor(u, dtype=torch.float64))) for u in (s, t))
        stay = at_t / at_s if at_s else 1.0
        return stay * torch.eye(len(self.base), dtype=torch.float64) + (1 - stay) * self.base

    def marginal(self, token: Tensor, alpha: Tensor) -> Tensor:
        """alpha token + (1 - alpha) base [... S] for laws of a token [... V]."""
        return alpha * self.with_mask(token) + (1 - alpha) * self.base.to(token.device)

    def with_mask(self, token: Tensor) -> Tensor:
        """A law of a token [... V] as one of symbols [... S]; the same tensor if there is no [MASK]."""
        more = len(self.base) - self.vocabulary
        return pad(token, (0, more)) if more else token

    # -- the network ----------------------------------------------------------------------------------------------
    def times(self, state: State) -> Tensor:
        """What the network is told: the rows' times [B], or [B L] with 0 at given positions, which have no noise."""
        return state.t if state.given is None else self.noise_times(state)

    def noise_times(self, state: State) -> Tensor:
        """The time that each position's noise is of, [B L]: 0 at given ones, whatever the network is told."""
        times = state.t.unsqueeze(-1).expand(state.x.shape)
        return times if state.given is None else times.masked_fill(state.given, 0.0)

    def evidence(self, x: Tensor, t: Tensor) -> Tensor:
        """log q(x_t | v) for every token v, float64 [B L V]; t [B] or [B L]."""
        alpha = self.schedule.alpha(t.double())
        return self.likelihood(x, alpha.unsqueeze(-1) if t.dim() == 2 else alpha.view(-1, 1, 1)).log()

    def likelihood(self, x: Tensor, alpha: Tensor) -> Tensor:
        """q(x_t | v) for every token v, float64 [... V], for symbols x [...] and alpha of their times [... 1]."""
        here = one_hot(x, len(self.base))[..., : self.vocabulary]
        return alpha * here + (1 - alpha) * self.base.to(x.device)[x].unsqueeze(-1)

    def own_evidence(self, logits: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Context logits [N V] plus log q(x_t | v), up to a constant, for symbols x [N] at times t [N], 0 < t."""
        alpha, base = self.schedule.alpha(t.double()), self.base.to(x.device)[x]
        gain = torch.log1p(alpha / ((1 - alpha) * base).clamp(min=SMALLEST)) * (x < self.vocabulary)
        token = x.clamp(max=self.vocabulary - 1).unsqueeze(-1)
        return logits.scatter_add(-1, token, gain.to(logits.dtype).unsqueeze(-1))

    @abstractmethod
    def outlook(self, state: State, positions: Tensor, condition: Tensor | None = None) -> Outlook:
        """One network call for the asked positions (bool [B L])."""

    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        asked = torch.ones_like(state.x, dtype=torch.bool) if positions is None else positions
        outlook = self.outlook(state, asked, condition)
        log_p = self.denoiser(state, asked, outlook.context)
        return Prediction(log_p if positions is not None else log_p.view(*state.x.shape, -1), native=outlook)

    def denoiser(self, state: State, asked: Tensor, context: Tensor) -> Tensor:
        """log p(x_0 | x_t) [N V] from the log of context laws [N V]: the symbols' own evidence is added."""
        # The evidence speaks for one token, and of all others alike: a number each, not a table of logarithms.
        x, alpha = state.x[asked], self.schedule.alpha(self.noise_times(state)[asked].double())
        other = (1 - alpha) * self.base.to(x.device)[x]
        own = torch.where(x < self.vocabulary, alpha + other, other)
        token = x.clamp(max=self.vocabulary - 1).unsqueeze(-1)
        log_p = context + other.log().unsqueeze(-1)
        log_p.scatter_(-1, token, context.gather(-1, token) + own.log().unsqueeze(-1))
        return log_p.log_softmax(-1)

    def ideal_context(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """log c [B L V] of a world for what a network sees."""
        return context(self.evidence(x, t)).log_softmax(-1)

    # -- the bound ------------------------------------------------------------------------------------------------
    def rate(self, x_0: Tensor, state: State) -> Tensor:
        """Nats per unit of time [B]: the bound's integrand at the states' times, all in float64."""
        alpha = self.alpha(state.t).expand(state.x.shape)
        # Noise never leaves where the base law never leads: those positions cost nothing.
        moves = self.base.to(state.x.device)[state.x] > 0
        here, a = state.x[moves].unsqueeze(-1), alpha[moves].unsqueeze(-1)
        token = one_hot(x_0[moves], self.vocabulary).double()
        q, m = self.marginal(token, a), self.outlook(state, moves).marginal
        r, model = (law / law.gather(-1, here) for law in (q, m))
        nats = (torch.special.xlogy(r, r / model.clamp(min=SMALLEST)) - r + model).sum(-1)
        nats = nats * self.base.to(state.x.device)[state.x[moves]]
        row = torch.arange(len(x_0), device=x_0.device).unsqueeze(-1).expand(x_0.shape)[moves]
        beta = -self.schedule.derivative(state.t) / self.schedule.alpha(state.t)
        return beta * nats.new_zeros(len(x_0)).index_add(0, row, nats)

    def prior_term(self, x_0: Tensor) -> Tensor:
        """KL(q(x_1 | x_0) || prior), nats [B]; the same for every token."""
        end, prior = self.kernel(0.0, 1.0)[0], self.prior_law()
        kl = float((torch.special.xlogy(end, end) - torch.special.xlogy(end, prior)).sum())
        return torch.full((len(x_0),), kl * x_0.shape[1], dtype=torch.float64, device=x_0.device)

    def nll(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """One draw of the bound: in continuous time, or of the first sampler at exactly ``calls`` calls."""
        prior, sampler = self.prior_term(x_0), next(iter(self.steps))
        if calls is None:
            # Times of density 1 / (2 sqrt t): the rate of a replaced token is about 1 / t, with chance t, so that times
            # drawn evenly would give an estimate of infinite variance.
            root = noise.stratified("time").clamp(1e-6, 1 - 1e-9)
            diffusion = 2 * root * self.rate(x_0, self.q_sample(x_0, root.square(), noise))
            return Nll(diffusion, prior, torch.zeros_like(prior), "upper", sampler)
        plan = self.plan(torch.ones(x_0.shape[1], dtype=torch.bool), calls, sampler)
        times = torch.tensor(plan, dtype=torch.float64, device=x_0.device)
        number = len(times) - 1
        k = (noise.stratified("step") * number).long().clamp(max=number - 1)
        state = self.q_sample(x_0, times[k], noise)
        diffusion = number * self.step_divergence(x_0, state, times[k + 1], sampler)
        return Nll(diffusion, prior, torch.zeros_like(prior), "upper", sampler, number)

    def step_divergence(self, x_0: Tensor, state: State, s: Tensor, sampler: str) -> Tensor:
        """KL(q(x_s | x_t, x_0) || law of the step), nats [B]."""
        step = self.steps[sampler]
        asked = self.movable(state)
        law = step.law(state, asked, self.predict(state, asked), s, lambda log_p: log_p)
        assert isinstance(law, Categorical)
        row = torch.arange(len(x_0), device=x_0.device).unsqueeze(-1).expand(x_0.shape)[asked]
        at_s = self.marginal(one_hot(x_0[asked], self.vocabulary).double(), self.alpha(s)[row])
        bridge = self.bridge(at_s, state.x[asked], (self.alpha(state.t) / self.alpha(s))[row])
        kl = (torch.special.xlogy(bridge, bridge) - torch.special.xlogy(bridge, law.log_p.exp())).sum(-1)
        return kl.new_zeros(len(x_0)).index_add(0, row, kl)

    # -- reverse --------------------------------------------------------------------------------------------------
    def free(self, state: State) -> Tensor:
        """Positions that are not given, bool [B L]."""
        return torch.ones_like(state.x, dtype=torch.bool) if state.given is None else ~state.given

    def movable(self, state: State) -> Tensor:
        """Positions that the reversed chain may change, bool [B L]."""
        return self.free(state) & (self.base.to(state.x.device)[state.x] > 0)

    def bridge(self, at_s: Tensor, x_t: Tensor, stay: Tensor) -> Tensor:
        """p(x_s | x_t) ~ m_s(x_s) q(x_t | x_s), float64 [N S], for marginals at s [N S], symbols [N] and stay [N 1]."""
        here, other = x_t.unsqueeze(-1), (1 - stay) * self.base.to(x_t.device)[x_t].unsqueeze(-1)
        law = at_s.clamp(min=0)
        kept = law.gather(-1, here) * (stay + other)
        law = law.mul_(other).scatter_(-1, here, kept)
        return law / law.sum(-1, keepdim=True).clamp(min=SMALLEST)

    def plan(self, free: Tensor, calls: int, sampler: str) -> Sequence[float]:
        most = 1 - float(self.schedule.alpha(torch.tensor(1.0, dtype=torch.float64)))
        return self.grid.times(calls, lambda share: self.schedule.time_of(share * most))

    def time_of(self, changed: float) -> float | None:
        # Of the positions that hold a token, not [MASK], (1 - a) share other / (a + (1 - a) share) hold another one.
        share, other = float(self.base[: self.vocabulary].sum()), 1 - 1 / self.vocabulary
        if share * other <= 0:
            return None
        left = float(self.schedule.alpha(torch.tensor(1.0, dtype=torch.float64)))
        most = (1 - left) * share * other / (left + (1 - left) * share)
        if not 0 < changed < most:
            raise UserError(f"--strength must be above 0 and below {most:.2f} for this run, not {changed:g}")
        alpha = share * (other - changed) / (changed * (1 - share) + share * other)
        return float(self.schedule.inverse(torch.tensor(1 - alpha, dtype=torch.float64)))

    def template(self, tokens: Tensor, given: Tensor, noise: Noise) -> State:
        prior = self.prior_sample(len(tokens), tokens.shape[1], noise)
        return State(torch.where(given, tokens, prior.x), prior.t, given)

    def decode(self, state: State) -> Tensor:
        """The symbols themselves, noise included; -1 at a [MASK]."""
        return state.x.masked_fill(state.x >= self.vocabulary, -1)


@final
@dataclass(frozen=True)
class Rewriting:
    """A step that moves the state towards a text, each position on its own (drafts.Draft): given the token v there,

        K(y | v) = q_s(y | v) [(1 - w(v)) q(x_t | y) / q(x_t | v) + w(v)],

    the noise's own bridge, or, with chance w(v), the noise of time s anew. Summed over v with the tokens' law this is
    the law of Bridge and of Renewing.

    positions: bool [B L], N of them. log_p: [N V]. symbols: x_t [N]; back: q(x_t | y) [N S]; alpha_s, alpha_t: [N 1];
    renewed: w [N V]; kept: with noise that is all [MASK], the chance [N 1] of staying one, as ratios that are free say.
    """

    process: Replacing
    positions: Tensor
    log_p: Tensor
    symbols: Tensor
    back: Tensor
    alpha_s: Tensor
    alpha_t: Tensor
    renewed: Tensor
    kept: Tensor | None

    def given(self, text: Tensor) -> Categorical:
        own, size = one_hot(text, self.process.vocabulary).double(), len(self.process.base)
        if self.kept is not None:
            mask = one_hot(torch.tensor(self.process.mask, device=text.device), size)
            law = self.kept * mask + (1 - self.kept) * pad(own, (0, size - self.process.vocabulary))
            return Categorical(self.positions, law.log())
        before = self._before().gather(-1, text.unsqueeze(-1))
        renewed = self.renewed.gather(-1, text.unsqueeze(-1))
        law = self.process.marginal(own, self.alpha_s) * ((1 - renewed) * before * self.back + renewed)
        return Categorical(self.positions, law.log())

    def evidence(self, x: Tensor) -> Tensor:
        y = x[self.positions]
        back = self.back.gather(-1, y.unsqueeze(-1))
        at_s = self.process.likelihood(y, self.alpha_s)
        return (at_s * ((1 - self.renewed) * self._before() * back + self.renewed)).log()

    def _before(self) -> Tensor:
        """1 / q(x_t | v) [N V]; 0 where x_t cannot come of v."""
        chance = self.process.likelihood(self.symbols, self.alpha_t)
        return torch.where(chance > 0, 1 / chance.clamp(min=SMALLEST), 0.0)


class Bridge(Step):
    """The reversed chain, each position on its own."""

    note = "the reversed chain, each position on its own; has a T-call bound"
    reverses = True
    apart = True

    def __init__(self, process: Replacing):
        self.process = process

    def ask(self, state: State, s: Tensor, noise: Noise) -> Tensor:
        return self.process.movable(state)

    def asks(self, state: State, s: Tensor) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, self.ask(state, s, Noise.of(0, 1))

    def law(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Categorical:
        return Categorical(asked, self.laws(state, asked, prediction.native, s, reshape).log())

    def foreseen(self, state: State) -> Tensor:
        return self.process.movable(state)

    def draft(self, state: State, asked: Tensor, prediction: Prediction, s: Tensor, reshape: Reshape) -> Rewriting:
        log_p = self.process.denoiser(state, asked, reshape(prediction.native.context))
        kept = None
        if float(self.process.base[: self.process.vocabulary].sum()) == 0:
            kept = self.laws(state, asked, prediction.native, s, reshape)[:, self.process.mask :]
        return self.rewriting(state, asked, log_p, torch.zeros_like(log_p), s, kept)

    def rewriting(
        self, state: State, asked: Tensor, log_p: Tensor, renewed: Tensor, s: Tensor, kept: Tensor | None = None
    ) -> Rewriting:
        """The step as two draws, from the law of the text [N V] and the share that is drawn anew [N V]."""
        process, row, here = self.process, asked.nonzero()[:, 0], state.x[asked]
        alpha_s, alpha_t = process.alpha(s)[row], process.alpha(state.t)[row]
        stay = alpha_t / alpha_s
        back = stay * one_hot(here, len(process.base)) + (1 - stay) * process.base.to(here.device)[here].unsqueeze(-1)
        return Rewriting(process, asked, log_p, here, back, alpha_s, alpha_t, renewed, kept)

    def laws(self, state: State, asked: Tensor, outlook: Outlook, s: Tensor, reshape: Reshape) -> Tensor:
        """Laws of the symbols at s, [N S]."""
        process, row = self.process, asked.nonzero()[:, 0]
        alpha_s, alpha_t = process.alpha(s)[row], process.alpha(state.t)[row]
        stay, base = alpha_t / alpha_s, process.base.to(row.device)
        marginal, reshaped = outlook.marginal, reshape(outlook.context)
        if reshaped is not outlook.context:
            # What of the marginal is text is exchanged for its reshaped law; the rest, free rates included, is kept.
            text = (marginal - (1 - alpha_t) * base)[:, : process.vocabulary].clamp(min=0).sum(-1, keepdim=True)
            marginal = marginal + process.with_mask(text * (reshaped.exp() - outlook.context.exp()))
        at_s = (marginal - (1 - stay) * base).div_(stay.clamp(min=SMALLEST))
        if bool((lost := alpha_t <= 1e-6).any()):
            # Where hardly anything of the marginal is text, its digits are lost: the context itself says what to write.
            at_s = torch.where(lost, process.marginal(reshaped.exp(), alpha_s), at_s)
        if bool((less := at_s < -1e-12).any()):
            # Free ratios can ask for less than nothing; a law that gave such symbols no chance would have no finite
            # bound.
            at_s = torch.where(less, 1e-4 * alpha_s * base, at_s)
        if len(base) > process.vocabulary:
            # The last step leaves no position open, whatever the rates say.
            symbols = torch.arange(len(base), device=row.device)
            at_s = at_s.masked_fill((s[row] == 0).unsqueeze(-1) & (symbols == process.mask), 0.0)
        return process.bridge(at_s, state.x[asked], stay)
