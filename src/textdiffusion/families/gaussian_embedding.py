"""Gaussian diffusion in the space of token embeddings (Diffusion-LM 2205.14217, CDCD 2211.15089, Plaid 2305.18619).

q           coded.py: z = alpha e_v + sigma eps; the embeddings e_v are learnt, and kept at mean square 1, so that they
            cannot grow away from the noise.
network     target = "tokens": logits of tokens; x_0 is the mean of the embeddings under their law. Else W reals that
            are x_0, eps, v or the flow's velocity, one conversion away from x_0 (gaussian.py), and a token's law is
            read off how near its embedding is to that (``SHARPNESS``), and with little noise x_0 is their mean.
loss        Cross-entropy of p(v | z) at every noise level: it teaches the embeddings to stay apart, and the head that
            decodes. For real targets their mean squared error, and cross-entropy only where noise is so low that a real
            can be rounded to a token (from SHARPNESS on): above, the mean of several embeddings is near none of them,
            and the two would pull at the prediction from two sides.
bound       coded.py, whatever the target: the mean is what the move uses, the tokens' law what the last call draws.
departs from the second system in: the noise ends in the prior, the head that decodes is trained, embeddings cannot
            collapse, fewer calls than training steps start at the right noise, the state's scale is kept. The noise
            level is told at every layer only if asked for (``time``): beliefs say it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from textdiffusion.diffusion.coded import Coded, CodedConfig, Guess, Said
from textdiffusion.diffusion.guidance import guided_law
from textdiffusion.errors import UserError
from textdiffusion.mathematics.gaussian import from_x_0, to_x_0
from textdiffusion.process import Context, Network

# Log-SNR, a real, at which a real prediction of x_0 is taken for a noisy view of the token's embedding; with less noise
# than that it is taught to be one.
SHARPNESS = 2.0


@dataclass
class GaussianEmbeddingConfig(CodedConfig):
    """Fields of the gaussian_embedding family."""

    width: int = 32  # reals a token
    target: Literal["tokens", "x_0", "eps", "v", "flow"] = "tokens"  # what the network says

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.width <= 65536:  # one real of fixed size tells two tokens apart
            raise UserError(f"process.width must be from 2 to 65,536, not {self.width}")
        if self.target not in ("tokens", "x_0", "eps", "v", "flow"):
            raise UserError(f"process.target must be tokens, x_0, eps, v or flow, not {self.target!r}")
        # The learned clock goes by the law of tokens; and beliefs do not say where within its noise a position is.
        needs = {"schedule": "cosine"} if self.target != "tokens" and self.schedule == "adaptive" else {}
        if self.target in ("eps", "v", "flow") and self.input == "belief":
            needs["input"] = "reals"
        if needs:
            more = " ".join(f"--set process.{name}={value}" for name, value in needs.items())
            raise UserError(f"process.target={self.target} does not go with this; add {more}")


@final
class GaussianEmbedding(Coded):
    """Embedding-space Gaussian diffusion; see the head of the file."""

    Config: ClassVar[type] = GaussianEmbeddingConfig
    summary: ClassVar[str] = "learned token embeddings under Gaussian noise; upper bound"
    paper: ClassVar[str] = "Diffusion-LM 2205.14217, CDCD 2211.15089, Plaid 2305.18619"

    def __init__(self, network: Network, config: GaussianEmbeddingConfig, vocabulary: int, *, start: int = 0):
        generator = torch.Generator().manual_seed(0)
        # For callables that bring none, as the tests' do.
        self.fallback = torch.randn(vocabulary, config.width, generator=generator, dtype=torch.float64)
        super().__init__(network, config, vocabulary, config.width, start=start)

    @classmethod
    def small(cls) -> GaussianEmbeddingConfig:
        return GaussianEmbeddingConfig(width=2, self_conditioning=0.0)

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        outputs = vocabulary if config.target == "tokens" else config.width
        codes = {"outputs": outputs, "codes": vocabulary, "code_width": config.width}
        return cls.coded_fields(config, config.width, vocabulary) | codes

    def codes(self) -> Tensor:
        raw = getattr(self.network, "codes", None)
        raw = self.fallback if raw is None else raw.to(torch.promote_types(raw.dtype, torch.float32))
        return raw * (raw.shape[-1] ** 0.5 / raw.norm(dim=-1, keepdim=True))

    def guess(self, said: Said) -> Guess:
        if self.config.target == "tokens":
            return Guess(said.outputs, said.own)
        reals = to_x_0(said.outputs, said.z, said.log_snr, self.config.target)
        # A target far off at one end of the noise would throw x_0 far out; the embeddings' mean cannot be longer than
        # they are.
        reals = reals * (reals.square().mean(-1, keepdim=True).clamp(min=1.0) ** -0.5)
        codes = self.codes().to(reals.dtype)
        context = math.exp(SHARPNESS) * (reals @ codes.T)
        # Rounded where that is taught (the clamping of 2205.14217, softly): else any slip would cost its square times
        # the SNR, however certain the token.
        rounded = said.log_snr >= SHARPNESS
        return Guess(context, None, torch.where(rounded, context.softmax(-1) @ codes, reals))

    def guided(self, labelled: Tensor, bare: Tensor, weight: Tensor, x: Tensor, t: Tensor | None) -> Tensor:
        """Logits of tokens (guidance.py); or real targets, further from the unlabelled ones, as 2207.12598 has it."""
        if self.config.target == "tokens":
            return guided_law(labelled, bare, weight)
        return (1 + weight) * labelled - weight * bare

    def cost(self, said: Said, guess: Guess, x_0: Tensor) -> Tensor:
        nats = F.cross_entropy(guess.posterior(), x_0, reduction="none")
        if guess.reals is None:
            return nats
        rounded = said.log_snr.squeeze(-1) >= SHARPNESS
        wanted = from_x_0(self.codes().to(said.z.dtype)[x_0], said.z, said.log_snr, self.config.target)
        return nats * rounded + (said.outputs - wanted.detach()).square().mean(-1)

    def ideal(self, context: Context) -> Network:
        if self.config.target != "tokens":
            raise UserError("the exact posterior is put in as logits of tokens; verify process.target=tokens")
        return super().ideal(context)
