"""What families share whose tokens are codes of W reals under Gaussian noise.

    q(z_t | x_0 = v) = N(alpha(t) e_v, sigma(t)^2), each real on its own; codes e_v of unit variance

network     logits f_i(v) from the noisy text: what all *other* positions say of token v. The position's own evidence,
            log q(z_i | v), is added: p(v | z) ~ exp(f_i(v)) q(z_i | v). So a network that says nothing is already the
            best that can be done for independent, equally likely tokens.
input       of a position: the belief softmax_v log q(z_i | v), which holds all that z_i says of its token; or z_i.
bound       -log p(x) <= KL(q(z_1 | x) || prior) + 1/2 integral of -dSNR/dt E|e_x - mean|^2 dt + E[-log p(x | z_0)],
            for whatever mean the moves use and law the last call draws from; with equality for the exact posterior
            (VDM 2107.00630; I-MMSE).
T calls     T - 1 moves among reals, and the tokens drawn from p(x | z) in the last call: KL + sum over the moves of
            1/2 (SNR(s) - SNR(t)) E|e_x - mean(z_t)|^2 + E[-log p(x | z)] at the last call's time. Proven for every T.
self-       The network may read what it said before (2208.04202). In sampling that is what the call before said; its
conditioning  bound is then of whole trajectories, calls in order. In continuous time, and where nothing was said
            before, a first call without it makes the estimate for the second: a function of z, so the bound holds, of
            a sampler of two passes a call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from textdiffusion.diffusion.conditioning import Conditioning, at_least_one, random_given
from textdiffusion.diffusion.denoising import denoising_steps
from textdiffusion.errors import UserError
from textdiffusion.mathematics.gaussian import (
    BINS,
    HIGHEST,
    LOG_SNRS,
    LOWEST,
    LogSnr,
    alpha_sigma,
    evidence,
    learned_clock,
    posterior,
    prior_divergence,
    time_of,
)
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Context, Gaussian, Network, Nll, Prediction, Process, Reshape, State


@dataclass
class CodedConfig:
    """Fields of every family of codes under Gaussian noise."""

    schedule: str = "adaptive"  # costs are linear in t, as measured; or cosine, linear, sqrt, rectified, even
    input: Literal["belief", "reals"] = "belief"  # what the network reads of a position
    evidence: bool = True  # a position's own evidence is added to what the network says of its token or bits
    times: int = 0  # noise levels that training draws from, as DDPM's 1,000; 0: all of them
    time: bool = False  # the network is told the noise level, at every layer; needed for reals, beliefs say it
    self_conditioning: float = 0.5  # share of the training examples that read what the network said before
    given: float = 0.2  # share of the training examples in which some positions have no noise
    conditioning: Conditioning = "clean"  # given tokens have no noise; or that of the rest, which is biased
    churn: float = 0.5  # of the sampler churn: share of a step that it goes too far, and comes back by noise
    delta: float = 0.0  # of the sampler ddim: steps that the state is moved further than the network is told

    # What may be set anew for each text, and the samplers that go by it.
    at_sampling: ClassVar[dict[str, tuple[str, ...]]] = {"churn": ("churn",), "delta": ("ddim",)}

    def __post_init__(self) -> None:
        known = (*LOG_SNRS, "adaptive")
        if self.schedule not in known:
            raise UserError(f"process.schedule must be one of {', '.join(known)}, not {self.schedule!r}")
        for name, high in (("self_conditioning", 1), ("given", 1), ("churn", 10), ("delta", 1000), ("times", 10**6)):
            if not 0 <= getattr(self, name) <= high:
                raise UserError(f"process.{name} must be from 0 to {high:,}, not {getattr(self, name)}")
        if self.input not in ("belief", "reals") or self.conditioning not in ("clean", "replacement"):
            raise UserError("process.input must be belief or reals, process.conditioning clean or replacement")
        if self.conditioning == "replacement" and self.self_conditioning > 0:
            raise UserError("process.conditioning=replacement goes with process.self_conditioning=0.0")


@dataclass(frozen=True)
class Said:
    """What a call said of N positions: outputs [N ...]; their noisy reals [N W], log-SNR [N 1], and own evidence [N V]
    or None."""

    outputs: Tensor
    z: Tensor
    log_snr: Tensor
    own: Tensor | None


@dataclass(frozen=True)
class Guess:
    """What a call says of N positions.

    context: logits of tokens [N V]; own: their own evidence [N V], or None; reals: the predicted mean of the code
    [N W], where the network says it itself, and None where it follows from the tokens' law.
    """

    context: Tensor
    own: Tensor | None
    reals: Tensor | None = None

    def posterior(self, reshape: Reshape | None = None) -> Tensor:
        """log p(v | z) [N V]. What is reshaped is the law that the other positions give: the evidence is no opinion."""
        context = self.context if reshape is None else reshape(self.context.log_softmax(-1))
        return (context if self.own is None else context + self.own).log_softmax(-1)

    def mean(self, log_p: Tensor, codes: Tensor) -> Tensor:
        """The predicted code [N W]. One that the network says itself is of no law, so reshaping does not touch it."""
        return log_p.exp() @ codes.to(log_p) if self.reals is None else self.reals


@dataclass(frozen=True)
class Thought:
    """What is carried from call to call: what the network said (as it reads it) [B L R], the code's mean [B L W],
    likeliest tokens [B L], the time [B]; and, for replacement, the noise of given positions [B L W]."""

    said: Tensor | None = None
    mean: Tensor | None = None
    tokens: Tensor | None = None
    t: Tensor | None = None
    eps: Tensor | None = None

    def select(self, rows: Tensor) -> Thought:
        parts = (self.said, self.mean, self.tokens, self.t, self.eps)
        return Thought(*(None if part is None else part[rows] for part in parts))


class Coded(Process):
    """A family whose noise is Gaussian, on codes."""

    bounded = True
    infills = True
    remembers = True

    def __init__(self, network: Network, config: Any, vocabulary: int, width: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
        self.width, self.space = width, Gaussian(width)
        self.steps = denoising_steps(self, config.churn, config.delta)

    @abstractmethod
    def codes(self) -> Tensor:
        """The reals that stand for each token, [V W], of mean square 1."""

    @abstractmethod
    def guess(self, said: Said) -> Guess:
        """From what the network said of N positions."""

    @abstractmethod
    def cost(self, said: Said, guess: Guess, x_0: Tensor) -> Tensor:
        """What training minimises, [N], for the tokens x_0 [N] of N positions."""

    @staticmethod
    def coded_fields(config: Any, width: int, vocabulary: int) -> dict[str, Any]:
        """Fields of the network that all such families decide."""
        read = vocabulary if config.input == "belief" else width
        return {
            "inputs": read,
            "reals": True,
            "attention": "bidirectional",
            "time": config.time or config.input == "reals",
            "clean": (config.time or config.input == "reals") and config.given > 0 and config.conditioning == "clean",
            "estimates": read if config.self_conditioning > 0 else 0,
            "clock": BINS if config.schedule == "adaptive" else 0,
        }

    # -- the clock ------------------------------------------------------------------------------------------------
    @property
    def schedule(self) -> LogSnr:
        """lambda(t)."""
        if self.config.schedule != "adaptive":
            return LOG_SNRS[self.config.schedule]
        clock = getattr(self.network, "clock", None)
        return LOG_SNRS["cosine"] if clock is None else learned_clock(clock.costs)

    def log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.at(t)

    def signal(self, t: float) -> tuple[float, float]:
        alpha, sigma = alpha_sigma(self.log_snr(torch.tensor(t, dtype=torch.float64)))
        return float(alpha), float(sigma)

    # -- forward --------------------------------------------------------------------------------------------------
    def q_sample(self, x_0: Tensor, t: Tensor, noise: Noise) -> State:
        alpha, sigma = (part.view(-1, 1, 1) for part in alpha_sigma(self.log_snr(t)))
        eps = noise.normal("reals", x_0.shape[1], self.width)
        return State(alpha * self.embed(x_0) + sigma * eps, t.double())

    def prior_sample(self, rows: int, length: int, noise: Noise) -> State:
        z = noise.normal("prior", length, self.width)
        return State(z, torch.ones(rows, dtype=torch.float64, device=noise.device))

    def embed(self, symbols: Tensor) -> Tensor:
        return self.codes().to(symbols.device).double()[symbols]

    # -- the network ----------------------------------------------------------------------------------------------
    def free(self, state: State) -> Tensor:
        """Positions that are not given, bool [B L]."""
        shape = state.x.shape[:2]
        return torch.ones(shape, dtype=torch.bool, device=state.x.device) if state.given is None else ~state.given

    def _levels(self, state: State) -> Tensor:
        """log-SNR of every position [B L], HIGHEST at given ones, which have no noise."""
        levels = self.log_snr(state.t).unsqueeze(-1).expand(state.x.shape[:2])
        if state.given is None or self.config.conditioning == "replacement":
            return levels
        return levels.masked_fill(state.given, HIGHEST)

    @property
    def _dtype(self) -> torch.dtype:
        """Laws are float64 for an oracle, and float32 for a network of less."""
        held = getattr(self.network, "compute_dtype", torch.float64)
        return torch.promote_types(held, torch.float32)

    def _call(self, state: State, asked: Tensor, estimate: Tensor | None, condition: Tensor | None) -> Said:
        """One network call, for the asked positions."""
        z = state.x
        replaced = self.config.conditioning == "replacement"
        if state.given is not None and replaced:
            # Given tokens are made as noisy as the rest, and no one is told.
            alpha, sigma = (part.view(-1, 1, 1) for part in alpha_sigma(self.log_snr(state.t)))
            eps = 0.0 if state.memory is None or state.memory.eps is None else state.memory.eps
            z = torch.where(state.given.unsqueeze(-1), alpha * z + sigma * eps, z)
        levels, z = self._levels(state), z.to(self._dtype)
        own = None
        if self.config.input == "belief":
            own = evidence(z, self.codes().to(z), levels.unsqueeze(-1).to(z.dtype))
        # Either way about of unit norm.
        read = z / self.width**0.5 if own is None else own.softmax(-1)
        times = None
        if self.config.time or self.config.input == "reals":
            # Told by the log-SNR, so that the clock may change while the network learns: 0 at HIGHEST, which is text.
            times = (HIGHEST - levels) / (HIGHEST - LOWEST)
            times = times[:, 0] if state.given is None or replaced else times
        extra = {} if estimate is None else {"estimate": estimate}
        outputs = self.network(read, times, condition=condition, positions=asked, **extra)
        z, level = z[asked], levels[asked].unsqueeze(-1)
        if not self.config.evidence:
            own = None
        elif own is None:
            own = evidence(z, self.codes().to(z), level.to(z.dtype))
        else:
            own = own[asked]
        return Said(outputs.to(z.dtype), z, level.to(z.dtype), own)

    def _estimate(self, state: State, guess: Guess, asked: Tensor) -> tuple[Tensor, Thought]:
        """What a guess is to the next call, and all that is remembered of it."""
        log_p = guess.posterior()
        codes = self.codes().detach()
        mean = state.x.detach().clone()
        likeliest = nearest(mean, codes.to(mean))
        mean[asked] = guess.mean(log_p, codes).to(mean.dtype)
        likeliest[asked] = log_p.argmax(-1)
        if self.config.input == "reals":
            said = mean / self.width**0.5
        else:
            said = one_hot(likeliest, self.vocabulary).to(log_p.dtype)
            said[asked] = log_p.exp()
        eps = None if state.memory is None else state.memory.eps
        return said, Thought(said if self.config.self_conditioning else None, mean, likeliest, state.t, eps)

    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        asked = torch.ones_like(self.free(state)) if positions is None else positions
        said = None
        if self.config.self_conditioning > 0:
            said = None if state.memory is None else state.memory.said
            if said is None:
                free = self.free(state)
                said = self._estimate(state, self.guess(self._call(state, free, None, condition)), free)[0]
        guess = self.guess(self._call(state, asked, said, condition))
        log_p = guess.posterior()
        if positions is None:
            log_p = log_p.view(*state.x.shape[:2], -1)
        return Prediction(log_p, native=guess, memory=self._estimate(state, guess, asked)[1])

    # -- learning -------------------------------------------------------------------------------------------------
    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Cross-entropy of p(v | z) (or what the family's outputs ask for) at all positions that are not given, over L,
        [B]; times uniform in the schedule's clock."""
        rows, length = x_0.shape
        clock = getattr(self.network, "clock", None) if getattr(self.network, "training", False) else None
        if clock is not None:
            clock.begin(noise.step)
        t = noise.stratified("time")
        if self.config.times:
            t = torch.floor(t * self.config.times + 1) / self.config.times  # 1/n ... 1
        state = self.q_sample(x_0, t, noise)
        given = random_given(rows, length, noise, self.config.given if self.config.conditioning == "clean" else 0.0)
        state = State(torch.where(given.unsqueeze(-1), self.embed(x_0), state.x), t, given)
        said = None
        if self.config.self_conditioning > 0:
            # A coin for each example (2208.04202; systems' public code tosses one for the whole run).
            reads = at_least_one(coin := noise.uniform("estimate", 1).squeeze(-1) < self.config.self_conditioning)
            with torch.no_grad():
                part, labels = state.select(reads), None if condition is None else condition[reads]
                free = self.free(part)
                estimate = self._estimate(part, self.guess(self._call(part, free, None, labels)), free)[0]
            estimate = estimate * coin[reads].view(-1, 1, 1)
            said = estimate.new_zeros(rows, *estimate.shape[1:]).index_copy(0, reads, estimate)
        call = self._call(state, ~given, said, condition)
        guess = self.guess(call)
        nats = self.cost(call, guess, x_0[~given])
        row = (~given).nonzero()[:, 0]
        if clock is not None:
            said_of = guess.posterior().detach().gather(-1, x_0[~given].unsqueeze(-1)).squeeze(-1)
            clock.note((HIGHEST - call.log_snr.squeeze(-1)) / (HIGHEST - LOWEST), -said_of)
        return nats.new_zeros(rows).index_add(0, row, nats) / length

    def rate(self, x_0: Tensor, state: State) -> Tensor:
        """Nats per unit of time [B]: the bound's integrand at the states' times."""
        guess = self.predict(state).native
        mean = guess.mean(guess.posterior(), self.codes()).view(state.x.shape).double()
        error = (self.embed(x_0) - mean).square().sum((-1, -2))
        falling = -self.schedule.derivative(state.t) * self.log_snr(state.t).exp()  # -dSNR / dt
        return 0.5 * falling * error

    def reconstruction(self, x_0: Tensor, state: State) -> Tensor:
        """-log p(x_0 | z), nats [B]."""
        log_p = self.predict(state).log_p
        return -log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1).double().sum(-1)

    def nll(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """One draw of the bound: in continuous time, or of the ancestral sampler at exactly ``calls`` calls."""
        ones = torch.ones(len(x_0), dtype=torch.float64, device=x_0.device)
        prior = prior_divergence(self.embed(x_0), self.log_snr(ones).view(-1, 1, 1)).sum((-1, -2))
        if calls is None:
            t = noise.stratified("time")
            diffusion = self.rate(x_0, self.q_sample(x_0, t, noise))
            last = self.reconstruction(x_0, self.q_sample(x_0, 0 * ones, noise.at(noise.step + 1)))
            passes = "ancestral" if self.config.self_conditioning == 0 else "ancestral, of two passes a call"
            return Nll(diffusion, prior, last, "upper", passes)
        times = torch.tensor(self.plan(x_0[0] >= 0, calls, "ancestral"), dtype=torch.float64, device=x_0.device)
        if self.config.self_conditioning > 0:
            diffusion, last = self._trajectory(x_0, times, noise)
            return Nll(diffusion, prior, last, "upper", "ancestral", len(times))
        moves = len(times) - 2
        last = self.reconstruction(x_0, self.q_sample(x_0, times[moves] * ones, noise.at(noise.step + 1)))
        diffusion = torch.zeros_like(ones)
        if moves:
            k = (noise.stratified("step") * moves).long().clamp(max=moves - 1)
            state = self.q_sample(x_0, times[k], noise)
            diffusion = moves * self._move_divergence(x_0, self.predict(state), times[k], times[k + 1])
        return Nll(diffusion, prior, last, "upper", "ancestral", calls)

    def _move_divergence(self, x_0: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """KL(q(z_s | z_t, x_0) || law of the ancestral move), nats [B]: 1/2 (SNR(s) - SNR(t)) |e_x - mean|^2."""
        guess = prediction.native
        mean = guess.mean(guess.posterior(), self.codes()).double()
        error = (self.embed(x_0).flatten(0, 1) - mean).square().sum(-1).view(x_0.shape).sum(-1)
        return 0.5 * (self.log_snr(s).exp() - self.log_snr(t).exp()) * error

    def _trajectory(self, x_0: Tensor, times: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Sum of the moves' divergences and the last call's cost, along one draw of the noise's whole trajectory."""
        code, zero = self.embed(x_0), torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
        # Backwards in noise: z_s given z_t and x_0 is a step of the true reversed chain.
        state = self.q_sample(x_0, zero + times[0], noise)
        diffusion, moves = zero.clone(), len(times) - 2
        for k in range(moves + 1):
            prediction = self.predict(state)
            if k == moves:
                break
            t, s = zero + times[k], zero + times[k + 1]
            diffusion = diffusion + self._move_divergence(x_0, prediction, t, s)
            now, then = (self.log_snr(u).view(-1, 1, 1) for u in (t, s))
            mean, deviation = posterior(state.x, code, now, then)
            eps = noise.normal(f"reals {k}", x_0.shape[1], self.width)
            state = State(mean + deviation * eps, s, memory=prediction.memory)
        last = -prediction.log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1).double().sum(-1)
        return diffusion, last

    def ideal(self, context: Context) -> Network:
        """For outputs that are logits of tokens."""

        def network(x: Tensor, t: Tensor | None = None, *, positions: Tensor | None = None, **_: object) -> Tensor:
            if self.config.input == "belief":
                own = x.double().clamp(min=1e-300).log()
            else:
                assert t is not None  # reals do not tell their noise level
                levels = HIGHEST - (HIGHEST - LOWEST) * t
                levels = levels.unsqueeze(-1) if t.dim() == 2 else levels.view(-1, 1, 1)
                own = evidence(x.double() * self.width**0.5, self.codes().double(), levels)
            out = context(own)
            out = out if self.config.evidence else out.log_softmax(-1) + own
            return out if positions is None else out[positions]

        return network

    # -- reverse --------------------------------------------------------------------------------------------------
    def plan(self, free: Tensor, calls: int, sampler: str) -> Sequence[float]:
        # The first call of a network that reads what it said before is two.
        steps = max(1, calls - 1) if self.config.self_conditioning > 0 else calls
        return self.grid.times(steps, lambda share: time_of(share, self.log_snr), -LOWEST)

    def template(self, tokens: Tensor, given: Tensor, noise: Noise) -> State:
        prior = self.prior_sample(len(tokens), tokens.shape[1], noise)
        memory = None
        if self.config.conditioning == "replacement":
            memory = Thought(eps=noise.normal("given", tokens.shape[1], self.width))
        x = torch.where(given.unsqueeze(-1), self.embed(tokens.clamp(min=0)), prior.x)
        return State(x, prior.t, given, memory)

    def decode(self, state: State) -> Tensor:
        """What the network thinks the tokens are, while there is noise; the nearest codes where it was not asked."""
        found = nearest(state.x, self.codes().to(state.x))
        memory = state.memory
        if memory is None or memory.tokens is None:
            return found
        return torch.where((state.t == 0).unsqueeze(-1), found, memory.tokens)


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Tokens int64 [B L] whose codes [V W] are nearest to reals [B L W]."""
    return (x @ codes.T - 0.5 * codes.square().sum(-1)).argmax(-1)
