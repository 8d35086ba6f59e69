"""Uniform noise, learnt through the leave-one-out posterior (D3PM 2107.03006; UDLM 2412.10193; 2605.22765).

q           Every token is replaced by a uniformly drawn one with probability 1 - alpha(t). ``mask_share`` above 0
            replaces some by [MASK] instead: a hybrid (XDLM 2602.01362).
network     Context logits f_i(v) from the noisy text, which says by itself how noisy it is (``time``: and from t): the
            leave-one-out law c_i = softmax f_i.
predict     softmax(f_i(v) + log q(x_t,i | v)): the token's own evidence is added, not learnt.
loss        Cross-entropy of that denoiser at every noisy position. At its minimum f is the leave-one-out law: training
            the denoiser and sampling with the context that it implies are consistent.
bound       replacing.py: in continuous time, or of the T-call sampler.
departs from the papers in: cross-entropy instead of the bound as the loss; on a share of the examples some positions
            are left clean and the network is told which, so that prompts and gaps are nothing new to it (plain
            replacement, ``conditioning = "replacement"``, calls them as noisy as the rest, and is biased); the network
            is not told the time (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from textdiffusion.diffusion.conditioning import random_given
from textdiffusion.diffusion.renewing import Renewal, Renewing
from textdiffusion.diffusion.replacing import Bridge, Outlook, Replacing
from textdiffusion.errors import UserError
from textdiffusion.mathematics.cross_entropy import token_nats
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import SCHEDULES, bell
from textdiffusion.process import Context, Network, State, as_network


@dataclass
class UniformConfig:
    """Fields of the uniform family."""

    schedule: str = "linear"  # how fast tokens are replaced: linear, cosine or quadratic
    mask_share: float = 0.0  # of the replaced tokens; 1 is absorbing noise
    given: float = 0.2  # share of the training examples in which some positions have no noise
    conditioning: Literal["clean", "replacement"] = "clean"  # what the network is told of given positions
    time: bool = False  # the network is told the noise level, at every layer: it learns later, or not at all
    renewal: float = 0.1  # share of the positions that the samplers psi and gibbs draw anew in a step

    # What may be set anew for each text, and the samplers that go by it.
    at_sampling: ClassVar[dict[str, tuple[str, ...]]] = {"renewal": ("psi", "gibbs")}

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"process.schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        for name in ("mask_share", "given", "renewal"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"process.{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.conditioning not in ("clean", "replacement"):
            raise UserError(f"process.conditioning must be clean or replacement, not {self.conditioning!r}")


@final
class Uniform(Replacing):
    """Uniform noise; see the head of the file."""

    Config: ClassVar[type] = UniformConfig
    summary: ClassVar[str] = "tokens are replaced at random and mended, any of them at any time; upper bound"
    paper: ClassVar[str] = "D3PM 2107.03006, UDLM 2412.10193, leave-one-out 2605.22765, hybrid 2602.01362"
    bounded: ClassVar[bool] = True
    infills: ClassVar[bool] = True

    def __init__(self, network: Network, config: UniformConfig, vocabulary: int, *, start: int = 0):
        schedule = SCHEDULES[config.schedule]
        super().__init__(network, config, vocabulary, schedule, config.mask_share, start=start)
        renewal = Renewal(config.renewal)
        self.steps = {
            "bridge": Bridge(self),
            "psi": Renewing(self, renewal, False, "the bridge, and some positions drawn anew from the denoiser; mends"),
            "gibbs": Renewing(self, renewal, True, "the bridge, and some positions drawn anew given all others; mends"),
        }

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        inputs = vocabulary + (config.mask_share > 0)
        fields = {"inputs": inputs, "outputs": vocabulary, "attention": "bidirectional", "time": config.time}
        return fields | {"clean": config.given > 0 and config.conditioning == "clean"}

    def times(self, state: State) -> Tensor:
        return state.t if self.config.conditioning == "replacement" else super().times(state)

    def outlook(self, state: State, positions: Tensor, condition: Tensor | None = None) -> Outlook:
        logits = self.network(state.x, self.times(state), condition=condition, positions=positions)
        context = logits.double().log_softmax(-1)
        row = positions.nonzero()[:, 0]
        return Outlook(context, self.marginal(context.exp(), self.alpha(state.t)[row]))

    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Cross-entropy of the denoiser at all positions that are not given, over L: nats [B]; times from a bell."""
        t = self.schedule.inverse(bell(noise.stratified("time")))
        state = self.q_sample(x_0, t, noise)
        # Replacement is for networks that have never seen a clean position among noisy ones.
        share = self.config.given if self.config.conditioning == "clean" else 0.0
        given = random_given(len(x_0), x_0.shape[1], noise, share)
        state = State(torch.where(given, x_0, state.x), t, given)
        logits = self.network(state.x, self.times(state), condition=condition, positions=~given)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        row = (~given).nonzero()[:, 0]
        logits = self.own_evidence(logits, state.x[~given], t[row])  # the name is used again: one table, not two
        nats = token_nats(logits, x_0[~given])
        return nats.new_zeros(len(x_0)).index_add(0, row, nats) / x_0.shape[1]

    def ideal(self, context: Context) -> Network:
        return as_network(lambda x, t: self.ideal_context(context, x, t))  # type: ignore[arg-type]
