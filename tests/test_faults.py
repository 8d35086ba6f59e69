"""Negative controls: every known fault is caught, by the check that is for it, and no check is without a fault.

A fault is a slip that someone who writes a family makes, put into a family that is right.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import textdiffusion.verification
from textdiffusion.diffusion.absorbing import carry_over
from textdiffusion.diffusion.renewing import Renewal, Renewing
from textdiffusion.diffusion.replacing import Outlook
from textdiffusion.diffusion.unmasking import Ancestral, RandomOrder, Remasking, unmasking_steps
from textdiffusion.errors import UserError
from textdiffusion.families import load_family
from textdiffusion.families.analog_bits import AnalogBits, AnalogBitsConfig
from textdiffusion.families.autoregressive import Autoregressive
from textdiffusion.families.block import BlockDiffusion
from textdiffusion.families.masked import Masked
from textdiffusion.families.score_entropy import ScoreEntropy, ScoreEntropyConfig
from textdiffusion.families.sparse_distribution import SparseDistribution
from textdiffusion.families.uniform import Uniform
from textdiffusion.mathematics.categorical import draw
from textdiffusion.mathematics.gaussian import posterior
from textdiffusion.mathematics.schedules import SCHEDULES, Schedule
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.networks.candidates import Slots
from textdiffusion.process import Categorical, Nll, Prediction, State
from textdiffusion.verification import Subject, parts, verify
from textdiffusion.verification.enumeration import integrated_bound

HERE = Path(__file__).parent
V, L = 3, 3
WORLD = random_table(V, L)
Codes = load_family(str(HERE / "subjects/gaussian_codes.py"))
Fading = load_family(str(HERE / "../examples/fading_noise.py"))


# -- faults that were seen -----------------------------------------------------------------------------------------


class ScheduleDividedTwice(Masked):
    """A schedule of times in [0, T] fed with times that were divided by T already: almost no noise at t = 1."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        right = SCHEDULES["linear"]
        self.schedule = Schedule(
            "linear", lambda t: right.alpha(t / 50), lambda t: right.derivative(t / 50) / 50, right.inverse
        )
        self.steps = unmasking_steps(self.mask, self.schedule)


class HeadNotInTheLoss(Masked):
    """The output head takes no part in the learning."""

    def loss(self, x_0, noise, condition=None):
        for p in self.network.head.parameters():
            p.requires_grad_(False)
        torch.nn.init.normal_(self.network.head.weight)
        return super().loss(x_0, noise, condition)


class RateWithoutItsWeight(Masked):
    """The integrand with weight 1 in the place of 1 / t."""

    def rate(self, x_0, state):
        return super().rate(x_0, state) * state.t


class LossReportedAsTheBound(Masked):
    """What training minimises, unweighted and at bell-shaped rates, is reported as the bound."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=self.loss(x_0, noise).double() * x_0.shape[1])


class HalfACurve(Masked):
    """The curve that evaluation measures is off by a factor; nll is not."""

    def curve_point(self, x_0, hidden, noise):
        return super().curve_point(x_0, hidden, noise) * 0.9

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=nll.diffusion / 0.9)


class TwoCallsReportedAsOne(Masked):
    """The bound of T calls is that of 2 T."""

    def curve_weights(self, length, calls, sampler=None):
        return super().curve_weights(length, None if calls is None else 2 * calls, sampler)


class CurveOfANetworkThatTakesTime(Masked):
    """The network is told the time, so that a number of hidden tokens does not say what it answers."""

    def predict(self, state, positions=None, condition=None):
        logits = self.network(state.x, state.t, condition=condition, positions=positions)
        return Prediction(carry_over(logits, state.x if positions is None else state.x[positions], self.mask))

    def _cross_entropy(self, x_0, hidden, condition=None):
        x = x_0.masked_fill(hidden, self.mask)
        log_p = self.predict(State(x, hidden.sum(-1).double() / x.shape[1])).log_p
        return -(log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1) * hidden).sum(-1)

    def rate(self, x_0, state):
        log_p = self.predict(state).log_p
        return -log_p.gather(-1, x_0.unsqueeze(-1)).sum((-1, -2)) / state.t


class GuidanceWithoutNormalisation(Masked):
    """Classifier-free guidance, (1 + w) log p - w log of the unconditional law, and no normalisation after it."""

    def predict(self, state, positions=None, condition=None):
        conditional = super().predict(state, positions, condition).log_p
        return Prediction(1.5 * conditional + 0.5 * np.log(self.vocabulary))


class NotANumber(Masked):
    """0 * -inf in the integrand, wherever the model is sure."""

    def rate(self, x_0, state):
        log_p = self.predict(state).log_p
        return -(torch.nn.functional.one_hot(x_0, self.vocabulary) * log_p).sum((-1, -2)) / state.t


class StartsAtTheWrongNoiseLevel(Uniform):
    """The chain is run from t = 0.6, its state drawn as for t = 1."""

    def plan(self, free, calls, sampler):
        return [0.6 * t for t in super().plan(free, calls, sampler)]

    def prior_sample(self, rows, length, noise):
        state = super().prior_sample(rows, length, noise)
        return State(state.x, 0.6 * state.t)


class DenoiserForTheContext(Uniform):
    """The denoiser p(x | z) where the leave-one-out posterior belongs: the token's own evidence counts twice."""

    def outlook(self, state, positions, condition=None):
        right = super().outlook(state, positions, condition)
        own = self.evidence(state.x[positions].unsqueeze(-1), self.noise_times(state)[positions]).squeeze(1)
        denoiser = (right.context + own).log_softmax(-1)
        return Outlook(denoiser, self.marginal(denoiser.exp(), self.alpha(state.t)[positions.nonzero()[:, 0]]))

    def predict(self, state, positions=None, condition=None):
        wrong = super().predict(state, positions, condition).native
        return Prediction(wrong.context if positions is not None else wrong.context.view(*state.x.shape, -1), wrong)


class MovedTokenTerm(ScoreEntropy):
    """The score entropy of tokens that have moved, as in two public implementations: x_0 twice, the others scaled."""

    def rate(self, x_0, state):
        right, v = super().rate(x_0, state), self.vocabulary
        everywhere = torch.ones_like(state.x, dtype=torch.bool)
        model = self.outlook(state, everywhere).marginal.view(*state.x.shape, v)
        log_model = (model / model.gather(-1, state.x.unsqueeze(-1))).log()
        true = torch.nn.functional.one_hot(x_0, v).bool()
        here = torch.nn.functional.one_hot(state.x, v).bool()
        # What multiplies log r': r at x_0 and 1 elsewhere; theirs has w = (V - 2) / (V - 1) more there, w elsewhere.
        wrong = (v - 2) / (v - 1)
        shift = torch.where(true, wrong, torch.where(here, 0.0, wrong - 1)) * -log_model
        beta = -self.schedule.derivative(state.t) / self.schedule.alpha(state.t)
        return right + beta * (shift.sum(-1) * (state.x != x_0)).sum(-1) / v


@dataclass(frozen=True)
class _Estimate:
    log_p: torch.Tensor

    def select(self, rows):
        return _Estimate(self.log_p[rows])


class CarriedEstimateIgnored(Masked):
    """Self-conditioning: the network reads the sampler's last estimate; the bound is computed as if there were none."""

    remembers = True

    def predict(self, state, positions=None, condition=None):
        estimate = None if state.memory is None else state.memory.log_p.clamp(min=-20)
        logits = self.network(state.x, positions=None, estimate=estimate)
        whole = carry_over(logits, state.x, self.mask)
        return Prediction(whole if positions is None else whole[positions], memory=_Estimate(whole))


class BoundWithoutTheRatePenalty(Masked):
    """Rates that are free of the law of tokens, as those of score entropy, and a bound that forgets what they cost."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = {"free": FreeRates(self.mask, self.schedule)}

    curve_point = None

    def predict(self, state, positions=None, condition=None):
        logits = self.network(state.x, condition=condition, positions=positions)
        symbols = state.x if positions is None else state.x[positions]
        # Right for the exact posterior, whose outputs are normalised.
        return Prediction(carry_over(logits, symbols, self.mask), native=(2 * logits.logsumexp(-1)).exp())

    def nll(self, x_0, noise, calls=None):
        if calls is not None:
            raise UserError("in continuous time only")
        state = self.q_sample(x_0, noise.stratified("time"), noise)
        nats = self.rate(x_0, state)
        return Nll(nats, 0 * nats, 0 * nats, "upper", "free")

    def plan(self, free, calls, sampler):
        return [1 - k / calls for k in range(calls)] + [0.0]


class FreeRates(Ancestral):
    """Positions are revealed at rates of their own."""

    reverses = False

    def ask(self, state, s, noise):
        return state.x == self.mask

    def asks(self, state, s):
        yield 1.0, state.x == self.mask

    def law(self, state, asked, prediction, s, reshape):
        row = asked.nonzero()[:, 0]
        chance = self.probability(state.t, s)[row]
        chance = torch.where(s[row] == 0, 1.0, (chance * prediction.native).clamp(max=1))
        p = reshape(prediction.log_p).exp() * chance.unsqueeze(-1)
        return Categorical(asked, torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1).clamp(min=0).log())


class NoiseAtTheStart(Masked):
    """Time 0 hides something already."""

    def q_sample(self, x_0, t, noise):
        return super().q_sample(x_0, 0.1 + 0.9 * t, noise)


class KernelOfTheWrongTime(Masked):
    """kernel(s, t) that forgets what was hidden before s."""

    def kernel(self, s, t):
        return super().kernel(0.0, t)


class PositionsShareTheirNoise(Masked):
    """One draw hides all positions or none."""

    def q_sample(self, x_0, t, noise):
        hidden = noise.uniform("mask", 1) >= self.schedule.alpha(t.double()).unsqueeze(-1)
        return State(x_0.masked_fill(hidden, self.mask), t.double())


class PriorOfItsOwn(Uniform):
    """prior_sample prefers the first token."""

    def prior_sample(self, rows, length, noise):
        x = (noise.uniform("prior", length) ** 1.3 * self.vocabulary).long()
        return State(x, torch.ones(rows, dtype=torch.float64))


class Tempered(Uniform):
    """Every step is a little too sure."""

    def predict(self, state, positions=None, condition=None):
        right = Uniform(self.network, self.config, self.vocabulary).predict(state, positions, condition)
        return Prediction(right.log_p, self.outlook(state, positions, condition))

    def outlook(self, state, positions, condition=None):
        positions = torch.ones_like(state.x, dtype=torch.bool) if positions is None else positions
        sure = (1.2 * super().outlook(state, positions, condition).context).log_softmax(-1)
        return Outlook(sure, self.marginal(sure.exp(), self.alpha(state.t)[positions.nonzero()[:, 0]]))


class BitsForNats(Masked):
    """The bound in bits."""

    def rate(self, x_0, state):
        return super().rate(x_0, state) / np.log(2)

    def _cross_entropy(self, x_0, hidden, condition=None):
        return super()._cross_entropy(x_0, hidden, condition) / np.log(2)


class NeverFinished(Masked):
    """The plan stops before time 0."""

    def plan(self, free, calls, sampler):
        return [t * 0.8 + 0.2 for t in super().plan(free, calls, sampler)]


class TemplateForgotten(Masked):
    """The given tokens are hidden like all others."""

    def template(self, tokens, given, noise):
        return replace(super().template(tokens, given, noise), x=torch.full_like(tokens, self.mask), given=None)


class LastTokenFree(Autoregressive):
    """The last token of a text is not paid for."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=super().nll(x_0[:, :-1], noise).diffusion)


class SignalDividedTwice(Codes):
    """The schedule of Gaussian noise fed with times that were divided by T already."""

    def log_snr(self, t):
        return super().log_snr(t / 50)


class RateHalved(Uniform):
    """The integrand is half of what it should be."""

    def rate(self, x_0, state):
        return 0.5 * super().rate(x_0, state)


class EstimateAsTokensIgnored(Masked):
    """Self-conditioning on the likeliest tokens; the bound is computed as if there were none."""

    remembers = True

    def predict(self, state, positions=None, condition=None):
        estimate = None if state.memory is None else state.memory.log_p
        whole = carry_over(self.network(state.x, positions=None, estimate=estimate), state.x, self.mask)
        return Prediction(whole if positions is None else whole[positions], memory=_Estimate(whole.argmax(-1)))


class EstimateTooLow(Uniform):
    """The bound is right; what nll estimates is a tenth below it."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=0.9 * nll.diffusion)


class FirstTokenFree(Masked):
    """Texts that begin with the last token cost a third less."""

    def _cross_entropy(self, x_0, hidden, condition=None):
        return super()._cross_entropy(x_0, hidden, condition) * torch.where(x_0[:, 0] == V - 1, 0.7, 1.0)

    def rate(self, x_0, state):
        weight = -self.schedule.derivative(state.t) / (1 - self.schedule.alpha(state.t))
        return weight * Masked._cross_entropy(self, x_0, state.x == self.mask)


class RowsReadEachOther(Masked):
    """Every row is charged the mean of its batch: the mean is right, standard errors are not."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return replace(nll, diffusion=nll.diffusion.mean().expand(len(x_0)))


class Deaf(Ancestral):
    """A step that does not listen to temperature."""

    def law(self, state, asked, prediction, s, reshape):
        return Categorical(asked, prediction.log_p)


class TemperatureIgnored(Masked):
    """Its first sampler is deaf."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"ancestral": Deaf(self.mask, self.schedule)}


class LossTurnedOver(Masked):
    """Gradient ascent."""

    def loss(self, x_0, noise, condition=None):
        return -super().loss(x_0, noise, condition)


class ReadsWhatItPredicts(Autoregressive):
    """A network that looks both ways under a left-to-right likelihood."""

    remembers = False

    @classmethod
    def network_fields(cls, config, vocabulary):
        return super().network_fields(config, vocabulary) | {"attention": "bidirectional"}

    def predict(self, state, positions=None, condition=None):
        logits = self.network(self._inputs(state.x), condition=condition, positions=positions)
        symbols = state.x if positions is None else state.x[positions]
        return Prediction(carry_over(logits, symbols, self.mask))


class LikelihoodOfNobody(Masked):
    """A likelihood that belongs to no sampler there is, so that nothing can contradict it."""

    def nll(self, x_0, noise, calls=None):
        return replace(super().nll(x_0, noise, calls), kind="exact", sampler="chain rule")


class OneCallMoreThanSaid(Masked):
    """Asked for one call it makes two, and says that its bound is of one."""

    def plan(self, free, calls, sampler):
        return super().plan(free, max(calls, 2), sampler)

    def curve_weights(self, length, calls, sampler=None):
        weights, made = super().curve_weights(length, calls, sampler)
        return weights, calls if calls == 1 else made


class BlocksInOneCallMore(BlockDiffusion):
    """Asked for as few calls as blocks it makes one more, and does not say so."""

    def plan(self, free, calls, sampler):
        return super().plan(free, calls + 1, sampler)


class CleanTextMovedByOne(BlockDiffusion):
    """In training the clean text stands one place too far to the left: a block sees its first token."""

    def _logits(self, noisy, clean, asked, condition):
        return super()._logits(noisy, torch.cat((clean[:, 1:], clean[:, :1]), 1), asked, condition)


class HalfABlock(BlockDiffusion):
    """The last block is not paid for."""

    def patterns(self, length, calls, sampler=None):
        for weight, hidden, scored in super().patterns(length, calls, sampler):
            if not scored[-1]:
                yield weight, hidden, scored


class PromptForgotten(Masked):
    """What is given at the very beginning is hidden like all else."""

    def template(self, tokens, given, noise):
        state = super().template(tokens, given, noise)
        return replace(state, x=torch.cat((torch.full_like(tokens[:, :1], self.mask), state.x[:, 1:]), 1))


class TooSure(type(unmasking_steps(V, SCHEDULES["linear"])["margin"])):
    """An ordered step that sharpens what it draws from."""

    def law(self, state, asked, prediction, s, reshape):
        right = super().law(state, asked, prediction, s, reshape)
        return Categorical(right.positions, (1.15 * right.log_p).log_softmax(-1))


class TooSureInItsOrder(Masked):
    """The margin sampler is a little too sure."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        margin = self.steps["margin"]
        self.steps = self.steps | {"margin": TooSure(self.mask, self.schedule, margin.score, margin.note)}


class KernelThatLosesMass(Masked):
    """Rows of the kernel sum to less than one."""

    def kernel(self, s, t):
        return super().kernel(s, t) * (1 - 0.01 * (t - s))


# -- one for each check that none of these makes fail --------------------------------------------------------------


class SpreadForDeviation(Codes):
    """Noise multiplied by sigma^2 in the place of sigma."""

    def q_sample(self, x_0, t, noise):
        alpha_squared = self.log_snr(t).sigmoid().view(-1, 1, 1)
        return State(
            alpha_squared.sqrt() * self.codes()[x_0] + (1 - alpha_squared) * noise.normal("eps", x_0.shape[1], 1), t
        )


class GivenTokensReplaced(AnalogBits):
    """Given tokens are noised like the rest, and the network is not told (as CONFIGS sets it): plain replacement."""


class NoiseTwiceAsWide(AnalogBits):
    """The ancestral step's noise with twice its deviation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        def move(z, x_0, now, then):
            mean, deviation = posterior(z, x_0, now, then)
            return mean, 2 * deviation

        self.steps["ancestral"] = replace(self.steps["ancestral"], move=move)


class MeanForTheDraw(AnalogBits):
    """The step bridge, which says that it reverses the chain, goes towards the predicted mean, not towards a draw."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps["bridge"] = replace(self.steps["ancestral"])
        self.steps["bridge"].reverses = True


class MovesAtHalfPrice(AnalogBits):
    """The bound of T calls with half of what its moves cost."""

    def _move_divergence(self, x_0, prediction, t, s):
        return 0.5 * super()._move_divergence(x_0, prediction, t, s)


class PriorOfUniformDraws(Codes):
    """Sampling starts from draws in [0, 1): rand where randn belongs."""

    def prior_sample(self, rows, length, noise):
        return State(noise.uniform("prior", length, 1), torch.ones(rows, dtype=torch.float64))


class TextHandedToTheNetwork(Codes):
    """The network is conditioned on the text whose bound it is asked for."""

    def rate(self, x_0, state):
        log_p = (self.network(state.x, state.t, condition=x_0) + self.evidence(state.x, state.t)).log_softmax(-1)
        falling = 24 * self.log_snr(state.t).exp()
        return 0.5 * falling * (self.codes()[x_0] - log_p.exp() @ self.codes()).square().sum((-1, -2))


class RoomForAStartToken(Masked):
    """A template as long as the network's window is moved one to the right, to make room for a start token."""

    def template(self, tokens, given, noise):
        config = getattr(self.network, "config", None)  # only real networks have a window
        if config is not None and tokens.shape[1] == config.window:
            tokens = tokens.roll(1, -1)
        return super().template(tokens, given, noise)


class CacheOneTokenBehind(Autoregressive):
    """With a cache, the token before the last one is read on from, not the last."""

    def _read_on(self, state, positions, condition):
        if state.memory is not None:
            at = positions.long().argmax(-1, keepdim=True)
            x = state.x.scatter(1, at - 1, state.x.gather(1, (at - 2).clamp(min=0)))
            state = replace(state, x=x)
        return super()._read_on(state, positions, condition)


class LossOfTheDenoiser(Uniform):
    """Trained by cross-entropy of the logits themselves: what is learnt is the denoiser, not the context."""

    def own_evidence(self, logits, x, t):
        return logits


class Smoothed(Masked):
    """Its cross-entropy is to targets of which a tenth goes to all tokens alike, as is usual for classifiers."""

    def _cross_entropy(self, x_0, hidden, condition=None):
        logits = self.network(x_0.masked_fill(hidden, self.mask), condition=condition, positions=hidden)
        nats = cross_entropy(logits, x_0[hidden], reduction="none", label_smoothing=0.1)
        return nats.new_zeros(len(x_0)).index_add(0, hidden.nonzero()[:, 0], nats)


class LabelsSmoothed(Masked):
    """Trained on smoothed targets; the bound knows nothing of it."""

    def loss(self, x_0, noise, condition=None):
        return Smoothed(self.network, self.config, self.vocabulary).loss(x_0, noise, condition)


class RenewalDeaf(Renewing):
    """What is drawn anew is drawn from the law as it was before temperature."""

    def laws(self, state, asked, outlook, s, reshape):
        bridge = super(Renewing, self).laws(state, asked, outlook, s, reshape)
        whole = super().laws(state, asked, outlook, s, lambda log_p: log_p)
        alone = super(Renewing, self).laws(state, asked, outlook, s, lambda log_p: log_p)
        share = self.renewal.share
        return (1 - share) * bridge + whole - (1 - share) * alone


class TemperatureHalfHeard(Uniform):
    """Its sampler psi listens to temperature in the bridge, and not in what it renews."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"psi": RenewalDeaf(self, Renewal(self.config.renewal), False, "psi")}


class RenewalWithNoise(Renewing):
    """What is drawn anew is drawn from the noise, whatever the time."""

    def laws(self, state, asked, outlook, s, reshape):
        bridge = super(Renewing, self).laws(state, asked, outlook, s, reshape)
        return (1 - self.renewal.share) * bridge + self.renewal.share * self.process.base


class RenewsWithNoise(Uniform):
    """Its sampler psi leaves noise in the finished text."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"psi": RenewalWithNoise(self, Renewal(self.config.renewal), False, "psi")}


class GridShifted(Fading):
    """Times are shifted towards noise, the more so the more calls there are; by the square of what was meant."""

    def plan(self, free, calls, sampler):
        return [t * calls**2 / (1 + (calls**2 - 1) * t) for t in super().plan(free, calls, sampler)]


class GridInTenths(Fading):
    """Times are those of a table of ten noise levels, so that many calls stand at the same."""

    def plan(self, free, calls, sampler):
        return [round(t, 1) for t in super().plan(free, calls, sampler)]


class EveryCallPaysForAll(Masked):
    """Each call of the sampler random is charged for all that is hidden, not for what it reveals."""

    def curve_weights(self, length, calls, sampler=None):
        weights, made = super().curve_weights(length, calls, sampler)
        if calls is None or sampler == "ancestral":
            return weights, made
        return np.where(weights > 0, np.arange(length + 1.0), 0.0), made


class OrderFromTheTokensDraws(RandomOrder):
    """Positions are chosen by the same uniforms as the tokens that are drawn there."""

    def ask(self, state, s, noise):
        return super().ask(state, s, _Renamed(noise))


@dataclass(frozen=True)
class _Renamed:
    noise: object

    def uniform(self, tag, *shape):
        return self.noise.uniform("token", *shape)


class OrderTiedToTokens(Masked):
    """Its random order is not independent of what is drawn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"random": OrderFromTheTokensDraws(self.mask, self.schedule)}


class ByChanceCalledByRule(RandomOrder):
    """Positions chosen by chance, called a rule."""

    deterministic = True


class LikelihoodOfOneOrder(Masked):
    """The likelihood of one order is reported as that of texts which come about in many."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"random": ByChanceCalledByRule(self.mask, self.schedule)}


class OneTime(RandomOrder):
    """The first row's time stands for all."""

    def count(self, state, s):
        return super().count(state, s[:1].expand(len(s)))


class OneTimeForAllRows(Masked):
    """A step that takes one time for the whole batch: right until templates with other numbers of gaps share it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"random": OneTime(self.mask, self.schedule)}


class MeanOfTheCalls(Masked):
    """For T calls nll gives the mean of what they cost, not the sum."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return nll if calls is None else replace(nll, diffusion=nll.diffusion / calls)


class SamplerNamedByItsCalls(Masked):
    """The likelihood of T calls is said to be of "random-T", as in a table."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return nll if calls is None else replace(nll, sampler=f"{nll.sampler}-{calls}")


class BoundOfAnotherSampler(ScoreEntropy):
    """The bound of Tweedie's steps is said to be that of Euler's, which have none."""

    def nll(self, x_0, noise, calls=None):
        nll = super().nll(x_0, noise, calls)
        return nll if calls is None else replace(nll, sampler="euler")


class AnswerInSlotZero(SparseDistribution):
    """One candidate of every hidden position is its token, in training and in the bound."""

    def _cost(self, x_0, x, slots, condition):
        symbols = torch.cat((x_0.unsqueeze(-1), slots.symbols[..., 1:]), -1)
        return super()._cost(x_0, x, Slots(symbols, slots.log_p), condition)


class SlotsWithNumbers(SparseDistribution):
    """Slots are told apart by their place, as by a code of places over all L k of them."""

    def answer(self, x, slots, positions, condition=None):
        code = 0.1 * torch.arange(slots.log_p.shape[-1])
        return super().answer(x, Slots(slots.symbols, slots.log_p - code), positions, condition)


class CarriedCalledFresh(SparseDistribution):
    """The sampler carries its candidates; what nll scores is handed new ones in every call."""

    def nll(self, x_0, noise, calls=None):
        return super().nll(x_0, noise, calls) if not self.remembers else _Forgetful(self).nll(x_0, noise, calls)


class _Forgetful(SparseDistribution):
    """Carries nothing."""

    def __init__(self, process):
        self.__dict__.update(vars(process))

    def predict(self, state, positions=None, condition=None):
        return super().predict(replace(state, memory=None), positions, condition)


class CarriedBoundByCurve(SparseDistribution):
    """Where candidates are carried, the bound is that of candidates which mean nothing."""

    orders = None

    def curve_weights(self, length, calls, sampler=None):
        if sampler != "carried":
            return super().curve_weights(length, calls, sampler)
        steps = self.steps
        self.steps = steps | {"random": steps["carried"]}
        try:
            return super().curve_weights(length, calls, "random")
        finally:
            self.steps = steps


class HidesAnything(Remasking):
    """Hides again what is given, too."""

    def chances(self, state, s):
        return super().chances(replace(state, given=None), s)


class HidesWhatIsGiven(Masked):
    """Its remasking forgets the template."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = self.steps | {"remask": HidesAnything(self.mask, self.schedule, Renewal(most=0.5), "forgets")}


class ExactCalledUpper(Autoregressive):
    """A likelihood called an upper bound, by a family whose noise nobody can enumerate."""

    def nll(self, x_0, noise, calls=None):
        return replace(super().nll(x_0, noise, calls), kind="upper")


# -- each fault, and the checks that are for it -------------------------------------------------------------------

TIGHT = "bound(x) = -log p(x) for every x, the posterior exact"
REVERSED = "bridge: its step is the reversed chain's, each position on its own"
BOUND_OF_CALLS = "random: bound_T(x) >= -log law_T(x) for every x"

# Part of verify -> names of checks that must fail in it.
CONTROLS = {
    BlocksInOneCallMore: {"the sampler random": ["random: it makes no more calls than its bound is for"]},
    CleanTextMovedByOne: {"a real network": ["a real network's bound is that of its predictions"]},
    HalfABlock: {
        "the bound": [
            "bound(x) = -log p(x) for every x, the posterior exact",
            "bound(x) >= -log of the law of many calls, wrong models",
            "bounds of a wrong model belong to a law",
            "nll estimates the bound (wrong model 1)",
        ],
        "the sampler random": ["random: bound_T(x) >= -log law_T(x) for every x"],
    },
    ScheduleDividedTwice: {"the kernel": ["the prior covers q(x_1 | x_0)"]},
    SignalDividedTwice: {"the signal": ["q(x_1 | x_0) is the prior, but for 0.01 nat"]},
    SpreadForDeviation: {"the signal": ["q_sample draws the signal, each real on its own"]},
    PriorOfUniformDraws: {"the signal": ["prior_sample is standard normal"]},
    NoiseAtTheStart: {
        "the contract": ["no noise at t = 0"],
        "the kernel": ["q_sample draws the kernel, each position on its own"],
    },
    PositionsShareTheirNoise: {"the kernel": ["q_sample draws the kernel, each position on its own"]},
    PriorOfItsOwn: {"the kernel": ["prior_sample draws prior_law"]},
    KernelThatLosesMass: {"the kernel": ["the kernel is a law"]},
    KernelOfTheWrongTime: {"the kernel": ["Chapman-Kolmogorov"]},
    StartsAtTheWrongNoiseLevel: {"the contract": ["the prior is at t = 1", "bridge: the plan falls from 1 to 0"]},
    GridInTenths: {"the contract": ["ancestral: the plan falls from 1 to 0"]},
    GuidanceWithoutNormalisation: {"the contract": ["predictions sum to one"]},
    RowsReadEachOther: {"the contract": ["the same row has the same draws in any batch"]},
    TemperatureIgnored: {"the contract": ["temperature and top-p reach every step"]},
    TemperatureHalfHeard: {"the contract": ["temperature and top-p reach every step"]},
    HeadNotInTheLoss: {"a real network": ["after three steps a gradient reaches every parameter"]},
    ReadsWhatItPredicts: {"a real network": ["a real network's likelihoods sum to one"]},
    CacheOneTokenBehind: {"a real network": ["a real network's samples have its likelihood"]},
    RoomForAStartToken: {"a real network": ["a real network writes, and keeps what is given"]},
    LossTurnedOver: {"the units": ["the loss prefers the truth to wrong models"]},
    LossOfTheDenoiser: {"the units": ["at the truth the loss has no slope"]},
    LabelsSmoothed: {"the units": ["at the truth the loss has no slope"]},
    RateWithoutItsWeight: {"the bound": [TIGHT]},
    NotANumber: {"the bound": [TIGHT]},
    BitsForNats: {"the bound": [TIGHT], "the units": ["a head at zero scores log V a token"]},
    DenoiserForTheContext: {"the bound": [TIGHT], "the sampler bridge": [REVERSED]},
    Tempered: {"the bound": [TIGHT], "the sampler bridge": [REVERSED]},
    MeanForTheDraw: {
        "the sampler bridge": ["bridge: texts of one token have the world's law at any number of calls"],
    },
    MovedTokenTerm: {"the bound": [TIGHT], "the units": ["a certain text costs nothing but the prior term"]},
    BoundWithoutTheRatePenalty: {"the bound": ["bound(x) >= -log of the law of many calls, wrong models"]},
    TextHandedToTheNetwork: {"the bound": ["bounds of a wrong model belong to a law"]},
    RateHalved: {"the bound": ["the bound of T calls goes to the continuous one, wrong model"]},
    HalfACurve: {"the bound": ["curve_point estimates the curve"]},
    CurveOfANetworkThatTakesTime: {"the bound": ["the curve's continuous bound is the integral, wrong model"]},
    LossReportedAsTheBound: {"the bound": ["nll estimates the bound (wrong model 1)"]},
    EstimateTooLow: {"the bound": ["nll estimates the bound (wrong model 1)"]},
    FirstTokenFree: {"the bound": ["nll estimates the bound (wrong model 1)", "curve_point estimates the curve"]},
    MeanOfTheCalls: {"the bound": ["nll estimates the bound of 2 calls (wrong model 1)"]},
    LikelihoodOfNobody: {"the bound": ["nll says whose likelihood the bound is"]},
    AnswerInSlotZero: {
        "the units": ["the loss prefers the truth to wrong models"],
        "the bound": ["bounds of a wrong model belong to a law"],
    },
    SlotsWithNumbers: {"a real network": ["the order of the candidates changes nothing"]},
    CarriedCalledFresh: {
        "the bound": [
            "nll estimates the bound of carried (wrong model 1)",
            "nll estimates the bound of 2 calls of carried (wrong model 1)",
        ]
    },
    CarriedBoundByCurve: {"the sampler carried": ["carried: bound_T(x) >= -log law_T(x) for every x"]},
    HidesWhatIsGiven: {"infilling by remask": ["remask: infilling keeps what is given"]},
    SamplerNamedByItsCalls: {"the bound": ["nll says whose likelihood the bound of 2 calls is"]},
    ExactCalledUpper: {"the bound": ["nll claims the bound, and it can be enumerated"]},
    BoundOfAnotherSampler: {"the bound": ["nll claims the bound of 2 calls, and it can be enumerated"]},
    LastTokenFree: {
        "the units": ["nll(x) = -log p(x) for every x"],
        "the sampler left-to-right": [
            "left-to-right: nll is -log of the law of the samples, right and wrong models"
        ],
    },
    TwoCallsReportedAsOne: {"the sampler random": [BOUND_OF_CALLS]},
    CarriedEstimateIgnored: {"the sampler random": [BOUND_OF_CALLS]},
    EstimateAsTokensIgnored: {"the sampler random": [BOUND_OF_CALLS]},
    OneCallMoreThanSaid: {"the sampler random": ["random: it makes no more calls than its bound is for"]},
    EveryCallPaysForAll: {"the sampler random": ["random: the bound falls along T, 2T, 4T, not below the entropy"]},
    GridShifted: {"the sampler ancestral": ["ancestral: total variation falls along T, 2T, 4T"]},
    RenewsWithNoise: {"the sampler psi": ["psi: many calls come close to the world"]},
    TooSureInItsOrder: {"the sampler margin": ["margin: one position a call samples the world"]},
    OrderTiedToTokens: {"the sampler random": ["random: samples have the enumerated law"]},
    NeverFinished: {
        "the contract": ["random: the plan falls from 1 to 0"],
        "the sampler random": ["random: every text is finished"],
    },
    PromptForgotten: {"infilling by random": ["random: infilling keeps what is given"]},
    TemplateForgotten: {
        "infilling by random": [
            "random: infilling keeps what is given",
            "random: infilling comes close to the exact conditional",
        ]
    },
    LikelihoodOfOneOrder: {
        "the sampler random": ["random: the likelihood of its order is -log of the law of its samples"]
    },
    OneTimeForAllRows: {"infilling by random": ["random: infilling draws the enumerated law"]},
    GivenTokensReplaced: {"infilling by ancestral": ["ancestral: infilling one gap in one call is exact"]},
    NoiseTwiceAsWide: {"the sampler ancestral": ["ancestral: many calls come close to the world"]},
    MovesAtHalfPrice: {"the bound": ["nll estimates the bound of 2 calls (wrong model 1)"]},
}  # fmt: skip
# No other check sees these.
ALONE = [
    PriorOfUniformDraws, TemperatureHalfHeard, CacheOneTokenBehind, RoomForAStartToken, LossOfTheDenoiser,
    LabelsSmoothed, SamplerNamedByItsCalls, ExactCalledUpper, BoundOfAnotherSampler, MeanOfTheCalls,
    EveryCallPaysForAll, OneTimeForAllRows,
]  # fmt: skip
CONFIGS = {
    MovedTokenTerm: ScoreEntropyConfig(graph="uniform"),
    GivenTokensReplaced: AnalogBitsConfig(self_conditioning=0.0, conditioning="replacement"),
}


def uncaught(fault) -> list[str]:
    """Names of the checks that are for a fault and pass all the same."""
    every, missing = parts(Subject(fault, CONFIGS.get(fault))), []
    for part, names in CONTROLS[fault].items():
        left = set(names)
        for check in every[part]():
            if not check.passed:
                left.discard(check.name)
            if not left:
                break
        missing += sorted(left)
    return missing


def controlled(check: str) -> bool:
    """Whether there is a fault that a check of this name must catch: by any sampler, in any model, at any calls."""
    return _kind(check) in {
        _kind(name) for controls in CONTROLS.values() for names in controls.values() for name in names
    }


def _kind(check: str) -> str:
    return re.sub(r"\d+ calls", "T calls", re.sub(r"^[\w-]+: | \(wrong model \d\)$", "", check))


def names_in_the_source() -> list[str]:
    """What verify can name its checks, as regular expressions; also those that it names only when they fail."""
    found = []
    for path in sorted(Path(textdiffusion.verification.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Check":
                name = node.args[0]
                pieces = name.values if isinstance(name, ast.JoinedStr) else [name]
                said = [re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in pieces]
                assert any(piece != ".+" for piece in said), f"{path.name}, line {node.lineno}: a check without a name"
                found.append("".join(said))
    return found


@pytest.mark.parametrize("fault", CONTROLS, ids=lambda fault: fault.__name__)
def test_every_known_fault_is_caught_by_the_check_that_is_for_it(fault):
    assert uncaught(fault) == []


def test_no_check_is_without_a_fault_that_it_catches():
    named = [name for controls in CONTROLS.values() for names in controls.values() for name in names]
    named += ["checking it gets through"]  # whose faults are below
    patterns = names_in_the_source()
    assert len(patterns) > 30
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in named)] == []
    assert [name for name in named if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ALONE, ids=lambda fault: fault.__name__)
def test_faults_that_no_other_check_sees(fault):
    failing = {_kind(check.name) for check in verify(fault, CONFIGS.get(fault)) if not check.passed}
    assert failing == {_kind(name) for names in CONTROLS[fault].values() for name in names}


def test_the_wrong_oracle_is_strictly_worse_on_average():
    """The denoiser in the place of the leave-one-out posterior costs nats; it does not go unnoticed as noise."""
    right = integrated_bound(Subject(Uniform).ideal(WORLD), WORLD.texts)
    wrong = integrated_bound(Subject(DenoiserForTheContext).ideal(WORLD), WORLD.texts)
    assert float(WORLD.p @ right) == pytest.approx(WORLD.entropy, abs=1e-6)
    assert float(WORLD.p @ wrong) > WORLD.entropy + 0.01


def gumbel_fp32_hits_of_the_tail(rows: int, tail: int, log_p_top: float, log_p_each: float) -> int:
    """How often the common draw by Gumbel noise of float32 uniforms picks any of ``tail`` equal rare tokens.

    The largest of n uniforms has the law of U^(1/n); rounding to float32's grid keeps order, so it may be drawn alone.
    """
    rng = np.random.default_rng(0)
    grid = 2.0**24

    def gumbel(u):
        u = np.clip(np.floor(u * grid) / grid, 1 / grid, 1 - 1 / grid)
        return -np.log(-np.log(u))

    return int((gumbel(rng.random(rows) ** (1 / tail)) + log_p_each > gumbel(rng.random(rows)) + log_p_top).sum())


def test_rare_tokens_are_drawn_at_their_rate_where_float32_gumbel_noise_loses_them():
    """50,000 tokens of 1e-8 each beside one that has the rest (2409.02908)."""
    tail, each = 50_000, 1e-8
    log_p = torch.full((1, tail + 1), each, dtype=torch.float64).log()
    log_p[0, 0] = np.log1p(-tail * each)
    # Inverse CDF: uniforms spread evenly over the tail's share of [0, 1) must hit evenly spread tokens of the tail.
    u = 1 - tail * each + tail * each * (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    hit = torch.cat([draw(log_p, one.view(1)) for one in u])
    expected = 1 + ((torch.arange(64) + 0.5) / 64 * tail).long()
    assert (hit - expected).abs().max() <= 1
    rows = 1_000_000
    assert gumbel_fp32_hits_of_the_tail(rows, tail, float(log_p[0, 0]), np.log(each)) < 0.2 * rows * tail * each


def test_samples_of_a_fault_in_the_code_are_told_from_the_enumerated_law(monkeypatch):
    """Steps right, draws wrong: chi-square sees it."""
    import textdiffusion.sampling.reverse

    monkeypatch.setattr(textdiffusion.sampling.reverse, "draw", lambda log_p, u: draw(log_p * 1.15, u))
    assert any("samples have the enumerated law" in check.name for check in verify(Masked) if not check.passed)


@pytest.mark.parametrize(
    "fault",
    [
        {"Config": dataclass(type("NeedsA", (), {"__annotations__": {"a": int}}))},
        {"steps": property(lambda self: 1 / 0)},
        {"__init__": lambda self, *args, **kwargs: (_ for _ in ()).throw(SystemExit(0))},
        {"kernel": lambda self, s, t: (_ for _ in ()).throw(SystemExit(0))},
    ],
)
def test_a_family_that_cannot_be_built_or_called_fails_a_check_that_says_so(fault):
    broken = type("Broken", (Uniform,), fault)
    assert any("gets through" in check.name and not check.passed for check in verify(broken))
