"""A small family of uniform noise, for the tests' negative controls: faults that absorbing noise cannot have.

q           Every token is replaced by a uniformly drawn one with probability t.
predict     softmax of context logits plus the token's own evidence; the context law alone is the leave-one-out
            posterior, which the bound and the step are made of (2605.22765).
bound       integral of E (1 / (a V)) sum over y other than the token of [r log(r / r') - r + r'], a = 1 - t, r the
            ratio q_t(y | x) / q_t(token | x) and r' the same of the context law (2310.16834).
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from textdiffusion.errors import UserError
from textdiffusion.process import Categorical, Discrete, Nll, Prediction, Process, State, Step, as_network


class Bridge(Step):
    note = "the reversed chain, each position on its own"
    reverses = True

    def __init__(self, process):
        self.process = process

    def open(self, state):
        return torch.ones_like(state.x, dtype=torch.bool) if state.given is None else ~state.given

    def ask(self, state, s, noise):
        return self.open(state)

    def asks(self, state, s):
        yield 1.0, self.open(state)

    def law(self, state, asked, prediction, s, reshape):
        size = self.process.vocabulary
        row = asked.nonzero()[:, 0]
        a_s, a_t = (1 - s)[row].unsqueeze(-1), (1 - state.t)[row].unsqueeze(-1)
        at_s = a_s * reshape(prediction.native).exp() + (1 - a_s) / size
        stay = a_t / a_s
        there = stay * one_hot(state.x[asked], size) + (1 - stay) / size
        return Categorical(asked, (at_s * there).log().log_softmax(-1))


@dataclass
class UniformConfig:
    pass


class Uniform(Process):
    Config, summary, paper = UniformConfig, "tokens are replaced by uniformly drawn ones", "2310.16834, 2605.22765"
    bounded, infills = True, True

    def __init__(self, network, config, vocabulary, *, start=0):
        super().__init__(network, config, vocabulary, start=start)
        self.space = Discrete(vocabulary)
        self.steps = {"bridge": Bridge(self)}

    @classmethod
    def network_fields(cls, config, vocabulary):
        return {"inputs": vocabulary, "outputs": vocabulary, "attention": "bidirectional", "time": True}

    def kernel(self, s, t):
        stay = (1 - t) / (1 - s) if s < 1 else 1.0
        size = self.vocabulary
        return stay * torch.eye(size, dtype=torch.float64) + (1 - stay) / size

    def prior_law(self):
        return torch.full((self.vocabulary,), 1 / self.vocabulary, dtype=torch.float64)

    def prior_sample(self, rows, length, noise):
        x = (noise.uniform("prior", length) * self.vocabulary).long()
        return State(x, torch.ones(rows, dtype=torch.float64))

    def q_sample(self, x_0, t, noise):
        other = (noise.uniform("other", x_0.shape[1]) * self.vocabulary).long()
        return State(torch.where(noise.uniform("replace", x_0.shape[1]) < t.unsqueeze(-1), other, x_0), t.double())

    def evidence(self, x, t):
        a = (1 - t).unsqueeze(-1) if t.dim() == 2 else (1 - t).view(-1, 1, 1)
        return (a * one_hot(x, self.vocabulary) + (1 - a) / self.vocabulary).log()

    def predict(self, state, positions=None, condition=None):
        # Given positions have no noise, and the network is told so.
        t = state.t if state.given is None else state.t.unsqueeze(-1).masked_fill(state.given, 0.0)
        context = self.network(state.x, t, positions=positions).double().log_softmax(-1)
        own = self.evidence(state.x, t)[slice(None) if positions is None else positions]
        return Prediction((context + own).log_softmax(-1), native=context)

    def ratios(self, context, state):
        """q(y) / q(token) for each y, [B L V], of a law of x_0 in place of x_0."""
        a = (1 - state.t).view(-1, 1, 1)
        q = a * context + (1 - a) / self.vocabulary
        return q / q.gather(-1, state.x.unsqueeze(-1))

    def rate(self, x_0, state):
        r = self.ratios(one_hot(x_0, self.vocabulary), state)
        model = self.ratios(self.predict(state).native.exp(), state)
        return self.divergence(r, model, state, x_0).sum((-1, -2)) / ((1 - state.t) * self.vocabulary)

    def divergence(self, r, model, state, x_0):
        return torch.special.xlogy(r, r / model) - r + model

    def nll(self, x_0, noise, calls=None):
        if calls is not None:
            raise UserError("this bound is for continuous time only")
        # Times of density 1 / (2 sqrt t): the rate is about 1 / t where a token has moved, with chance t, so that times
        # drawn evenly would give an estimate of infinite variance.
        root = noise.stratified("time").clamp(1e-6, 1 - 1e-9)
        nats = 2 * root * self.rate(x_0, self.q_sample(x_0, root.square(), noise))
        return Nll(nats, 0 * nats, 0 * nats, "upper", "bridge")

    def loss(self, x_0, noise, condition=None):
        return self.nll(x_0, noise).diffusion / x_0.shape[1]

    def ideal(self, context):
        return as_network(lambda x, t: context(self.evidence(x, t)))

    def plan(self, length, calls, sampler):
        return [1 - k / calls for k in range(calls)] + [0.0]

    def template(self, tokens, given, noise):
        prior = self.prior_sample(len(tokens), tokens.shape[1], noise)
        return State(torch.where(given, tokens, prior.x), prior.t, given)

    def decode(self, state):
        return state.x
