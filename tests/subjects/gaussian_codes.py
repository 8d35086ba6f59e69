"""A small family of Gaussian noise on one real a token, to show that a ``Gaussian`` space is verified too.

q           z = alpha code(v) + sigma eps, alpha^2 + sigma^2 = 1, log-SNR linear in t from 12 to -12.
predict     softmax of context logits plus (alpha z code - alpha^2 code^2 / 2) / sigma^2, the token's own evidence.
bound       1/2 integral of E |code(x) - mean code|^2 d SNR, plus the prior's and the decoder's terms (2107.00630).
"""

import math
from dataclasses import dataclass

import torch

from textdiffusion.errors import UserError
from textdiffusion.process import Gaussian, Nll, Prediction, Process, State, as_network


@dataclass
class CodesConfig:
    pass


class Codes(Process):
    Config, summary, paper = CodesConfig, "one real a token, under Gaussian noise", "2107.00630"
    bounded, infills = True, False

    def __init__(self, network, config, vocabulary, *, start=0):
        super().__init__(network, config, vocabulary, start=start)
        self.space = Gaussian(1)
        self.steps = {}

    @classmethod
    def network_fields(cls, config, vocabulary):
        return {}

    def codes(self):
        return torch.linspace(-1, 1, self.vocabulary, dtype=torch.float64).unsqueeze(-1)

    def log_snr(self, t):
        return 12 - 24 * t

    def signal(self, t):
        share = 1 / (1 + math.exp(-self.log_snr(t)))
        return share**0.5, (1 - share) ** 0.5

    def q_sample(self, x_0, t, noise):
        share = self.log_snr(t).sigmoid().view(-1, 1, 1)
        eps = noise.normal("eps", x_0.shape[1], 1)
        return State(share.sqrt() * self.codes()[x_0] + (1 - share).sqrt() * eps, t)

    def prior_sample(self, rows, length, noise):
        return State(noise.normal("prior", length, 1), torch.ones(rows, dtype=torch.float64))

    def evidence(self, z, t):
        snr = self.log_snr(t).exp().view(-1, 1, 1)
        alpha = self.log_snr(t).sigmoid().sqrt().view(-1, 1, 1)
        code = self.codes().squeeze(-1)
        return snr * (z * code / alpha - code.square() / 2)

    def predict(self, state, positions=None, condition=None):
        return Prediction((self.network(state.x, state.t) + self.evidence(state.x, state.t)).log_softmax(-1))

    def rate(self, x_0, state):
        mean = self.predict(state).log_p.exp() @ self.codes()
        falling = 24 * self.log_snr(state.t).exp()  # -d SNR / dt
        return 0.5 * falling * (self.codes()[x_0] - mean).square().sum((-1, -2))

    def reconstruction(self, x_0, state):
        return -self.predict(state).log_p.gather(-1, x_0.unsqueeze(-1)).sum((-1, -2))

    def nll(self, x_0, noise, calls=None):
        if calls is not None:
            raise UserError("this bound is for continuous time only")
        from textdiffusion.verification.enumeration import prior_term

        nats = self.rate(x_0, self.q_sample(x_0, noise.stratified("time"), noise))
        last = self.reconstruction(x_0, self.q_sample(x_0, torch.zeros(len(x_0), dtype=torch.float64), noise))
        return Nll(nats, prior_term(self, x_0), last, "upper", "none")

    def loss(self, x_0, noise, condition=None):
        return self.nll(x_0, noise).total / x_0.shape[1]

    def ideal(self, context):
        return as_network(lambda z, t: context(self.evidence(z, t)))

    def plan(self, free, calls, sampler):
        return []

    def template(self, tokens, given, noise):
        raise NotImplementedError

    def decode(self, state):
        return (state.x - self.codes().squeeze(-1)).abs().argmin(-1)
