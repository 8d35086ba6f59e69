"""Analog bits: tokens as bits, bits as reals under Gaussian noise (Bit Diffusion, 2208.04202; CoBit 2605.07013).

q           coded.py: z = alpha code(v) + sigma eps, the code of token v being its number in bits, -1 or 1 each.
network     output = "softmax": logits of tokens; x_0 is the mean of the codes under their law (the paper's softmax
            factorisation). output = "bits": one logit a bit; the mean of bit j is tanh of half of it.
            To either is added what the noisy bits say themselves (``evidence``).
loss        Cross-entropy of p(v | z), at every noise level; for bits, their mean squared error.
bound       coded.py. The paper claims none for bits; that of a move needs only the mean that the move uses, and that of
            the last call a law of tokens, which is that of the codes that stand for one.
sampling    diffusion/denoising.py. Bits end in a draw among the codes that stand for tokens; how much of the law was
            on codes that do not is a line of `eval` (evaluation/dead_codes.py).
departs from the paper in: cross-entropy, evidence, a clock in which what tokens cost is linear, beliefs as
            inputs, tokens drawn and not thresholded in the last call. Self-conditioning tosses a coin an example.
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
from textdiffusion.process import Context, Network, Prediction


@dataclass
class AnalogBitsConfig(CodedConfig):
    """Fields of the analog_bits family."""

    output: Literal["softmax", "bits"] = "softmax"  # what the network says: a law of tokens, or one of each bit
    book: Literal["binary", "gray", "random"] = "binary"  # which number stands for a token
    bits: int | None = None  # bits a token; None: as few as will do

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output not in ("softmax", "bits") or self.book not in ("binary", "gray", "random"):
            raise UserError("process.output must be softmax or bits, process.book binary, gray or random")
        if self.bits is not None and not 1 <= self.bits <= 62:
            raise UserError(f"process.bits must be from 1 to 62, not {self.bits}")


def code_book(vocabulary: int, bits: int, book: str) -> Tensor:
    """The code of each token, -1 or 1 a bit, highest first, float64 [V bits].

    Raises:
        UserError: too few bits.
    """
    if 2**bits < vocabulary:
        raise UserError(f"process.bits={bits} makes fewer codes than there are tokens ({vocabulary}); raise it")
    number = torch.arange(vocabulary)
    if book == "gray":
        number = number ^ (number >> 1)
    elif book == "random":
        generator = torch.Generator().manual_seed(0)  # a part of the format, not of a run
        if bits <= 20:
            number = torch.randperm(2**bits, generator=generator)[:vocabulary]
        else:  # too many to list: drawn until all are different
            number = torch.randint(2**bits, (4 * vocabulary,), generator=generator).unique()
            number = number[torch.randperm(len(number), generator=generator)][:vocabulary]
    place = torch.arange(bits - 1, -1, -1)
    return ((number.unsqueeze(-1) >> place) & 1).double() * 2 - 1


def bits_for(vocabulary: int) -> int:
    """As few bits as tell ``vocabulary`` tokens apart."""
    return max(1, math.ceil(math.log2(vocabulary)))


@final
class AnalogBits(Coded):
    """Analog bits; see the head of the file."""

    Config: ClassVar[type] = AnalogBitsConfig
    summary: ClassVar[str] = "tokens as bits under Gaussian noise, denoised all at once; upper bound"
    paper: ClassVar[str] = "Bit Diffusion 2208.04202, VDM 2107.00630, CoBit 2605.07013"

    def __init__(self, network: Network, config: AnalogBitsConfig, vocabulary: int, *, start: int = 0):
        width = config.bits or bits_for(vocabulary)
        self.book = code_book(vocabulary, width, config.book)
        super().__init__(network, config, vocabulary, width, start=start)

    @classmethod
    def small(cls) -> AnalogBitsConfig:
        # Trajectories, which bounds with self-conditioning are of, can be followed for one real alone (tests).
        return AnalogBitsConfig(self_conditioning=0.0)

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        width = config.bits or bits_for(vocabulary)
        outputs = vocabulary if config.output == "softmax" else width
        return cls.coded_fields(config, width, vocabulary) | {"outputs": outputs}

    def codes(self) -> Tensor:
        return self.book

    def guess(self, said: Said) -> Guess:
        if self.config.output == "softmax":
            return Guess(said.outputs, said.own)
        bits = said.outputs
        if self.config.evidence:
            # log q(z | 1) - log q(z | -1)
            bits = bits + 2 * torch.sigmoid(said.log_snr).sqrt() / torch.sigmoid(-said.log_snr) * said.z
        # log p(v) = sum over bits of log sigmoid(code * logit), up to what is the same for all tokens.
        return Guess(0.5 * bits @ self.book.to(bits).T, None, torch.tanh(bits / 2))

    def guided(self, labelled: Tensor, bare: Tensor, weight: Tensor, x: Tensor, t: Tensor | None) -> Tensor:
        """Logits of tokens, or of bits, each of which is a law of its own (guidance.py)."""
        if self.config.output == "softmax":
            return guided_law(labelled, bare, weight)
        return (1 + weight) * labelled - weight * bare

    def cost(self, said: Said, guess: Guess, x_0: Tensor) -> Tensor:
        if guess.reals is None:
            return F.cross_entropy(guess.posterior(), x_0, reduction="none")
        return (guess.reals - self.book.to(guess.reals)[x_0]).square().mean(-1)

    def dead_share(self, prediction: Prediction) -> Tensor | None:
        """How likely a call thinks codes that stand for no token, [N]; None for softmax, which gives them no chance."""
        reals = prediction.native.reals
        if reals is None:
            return None
        chance = (1 + self.book.to(reals) * reals.unsqueeze(1)) / 2
        return 1 - chance.prod(-1).sum(-1)

    def ideal(self, context: Context) -> Network:
        if self.config.output == "bits":
            raise UserError("there is no exact posterior among independent bits; verify process.output=softmax")
        return super().ideal(context)
