"""A family of one's own: noise under which some tokens fade sooner than others (after GenMD4, 2406.04329).

    textdiffusion verify examples/fading_noise.py

q           Token v is hidden at time t with probability h_v(t) = t^(1 + v / V): that it is hidden says something of v.
predict     Softmax of the context logits plus log h_v(t).
bound       Integral of E sum over hidden positions of [sum_v p(v) r_v - r_x - r_x log p(x)], r_v = h_v' / h_v.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from textdiffusion.diffusion.absorbing import Hiding, hidden_evidence
from textdiffusion.errors import UserError
from textdiffusion.process import Categorical, Nll, Prediction, State, Step, as_network


class Reveal(Step):
    """A hidden position becomes v with probability p(v) (1 - h_v(s) / h_v(t)), and else stays hidden."""

    note = "the reversed chain, each position on its own"
    reverses = True

    def __init__(self, process):
        self.hide, self.mask = process.hide, process.mask

    def ask(self, state, s, noise):
        return state.x == self.mask

    def asks(self, state, s):
        yield 1.0, state.x == self.mask

    def law(self, state, asked, prediction, s, reshape):
        row = asked.nonzero()[:, 0]
        p = reshape(prediction.log_p).exp() * (1 - self.hide(s)[row] / self.hide(state.t)[row])
        return Categorical(asked, torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1).clamp(min=0).log())


@dataclass
class FadingConfig: ...


class Fading(Hiding):
    Config, summary, paper = FadingConfig, "some tokens fade sooner than others", "GenMD4 2406.04329"
    bounded, infills = True, True

    def __init__(self, network, config, vocabulary, *, start=0):
        super().__init__(network, config, vocabulary, start=start)
        self.power = 1 + torch.arange(vocabulary).double() / vocabulary
        self.steps = {"ancestral": Reveal(self)}

    @classmethod
    def network_fields(cls, config, vocabulary):
        return {"inputs": vocabulary + 1, "outputs": vocabulary, "attention": "bidirectional", "time": True}

    def hide(self, t):  # h_v(t), [B V]
        return t.double().unsqueeze(-1) ** self.power

    def kernel(self, s, t):
        s, t = (self.hide(torch.tensor([u], dtype=torch.float64))[0] for u in (s, t))
        stay = ((1 - t) / (1 - s)).nan_to_num(1.0)  # at s = 1 nothing is left to fade
        go = F.pad(1 - stay, (0, 1)).unsqueeze(-1) * self.prior_law()
        return torch.diag(F.pad(stay, (0, 1), value=1.0)) + go

    def q_sample(self, x_0, t, noise):
        hidden = noise.uniform("mask", x_0.shape[1]) < self.hide(t).gather(1, x_0)
        return State(x_0.masked_fill(hidden, self.mask), t.double())

    def evidence(self, x, t):  # log q(x_t | v) up to a constant, [B L V]
        hidden = (x == self.mask).unsqueeze(-1)
        return torch.where(hidden, self.hide(t).log().unsqueeze(1), hidden_evidence(x, self.mask))

    def predict(self, state, positions=None, condition=None):
        logits = self.network(state.x, state.t, condition=condition, positions=positions)
        evidence = self.evidence(state.x, state.t)[slice(None) if positions is None else positions]
        return Prediction((logits + evidence).log_softmax(-1))

    def rate(self, x_0, state):
        r, log_p = self.power / state.t.unsqueeze(-1), self.predict(state).log_p
        back, r_x = (log_p.exp() * r.unsqueeze(1)).sum(-1), r.gather(1, x_0)
        nats = back - r_x - r_x * log_p.gather(-1, x_0.unsqueeze(-1)).squeeze(-1)
        return nats.masked_fill(state.x != self.mask, 0.0).sum(-1)

    def nll(self, x_0, noise, calls=None):
        if calls is not None:
            raise UserError("the bound of fading noise is for continuous time only")
        nats = self.rate(x_0, self.q_sample(x_0, noise.stratified("time"), noise))
        return Nll(nats, 0 * nats, 0 * nats, "upper", "ancestral")

    def loss(self, x_0, noise, condition=None):
        return self.nll(x_0, noise).diffusion / x_0.shape[1]

    def ideal(self, context):
        return as_network(lambda x, t: context(self.evidence(x, t)))

    def plan(self, free, calls, sampler):
        return [1 - k / calls for k in range(calls)] + [0.0]
