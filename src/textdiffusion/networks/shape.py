"""The shape of a network: what a config may say of it. Without torch, so that a wrong value is refused at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from textdiffusion.errors import UserError

Attention = Literal["bidirectional", "causal", "block"]


@dataclass
class TransformerConfig:
    """Shape of a transformer, or of a U-Net in its place.

    ``inputs`` S, ``outputs`` V and ``attention`` are set by the family; the rest is free. Of a U-Net, ``depth`` and
    ``width`` say what it costs (networks/unet.py).
    """

    inputs: int
    outputs: int
    body: Literal["transformer", "unet"] = "transformer"  # unet: halves the text, and reads any length
    window: int = 64  # longest text, in tokens; of a U-Net, that it is trained on
    depth: int = 4
    width: int = 256
    heads: int = 4
    attention: Attention = "bidirectional"
    block_length: int = 8  # for attention = "block"
    positions: Literal["learned", "rotary"] = "learned"
    ngrams: int = 0  # hashed embeddings of the symbols up to a position, 2 .. so many of them; 0 leaves them out
    counts: int = 0  # a prior of what followed the last 0 .. so many symbols in the training text; 0 leaves it out
    slots: int = 2**16  # of the table of counts: a power of two, some times the tokens of the text
    convolution: int = 5  # taps of the depthwise convolutions; 0 leaves them out
    expansion: float = 4.0  # width of the feed-forward part over the width
    dropout: float = 0.0
    bias: bool = False
    levels: int = 2  # of a U-Net: how often the text is halved
    time: bool = False  # condition on t in [0, 1]
    clean: bool = False  # with time: positions at t = 0 among noisy ones are marked
    reals: bool = False  # a position holds ``inputs`` reals, not one of so many symbols
    estimates: int = 0  # reals a position of what the network said before; 0 for networks that do not read it
    codes: int = 0  # tokens that have a learned code, of ``code_width`` reals
    code_width: int = 0
    clock: int = 0  # noise levels at which costs are taken down in training
    classes: int = 0  # number of class labels; one more is kept for "no label"
    candidates: Literal["none", "pooled", "slots"] = "none"  # weighted symbols at a position; slots: each is a key

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "window", "depth", "width", "heads", "block_length"):
            if not 1 <= getattr(self, name) <= 10**7:
                raise UserError(f"network.{name} must be at least 1, not {getattr(self, name)}")
        if self.body == "unet":
            self._check_unet()
        if not 0 <= self.dropout < 1 or not 0 < self.expansion <= 64 or self.classes < 0:
            raise UserError(
                "network.dropout must be in [0, 1), network.expansion in (0, 64], network.classes 0 or more"
            )
        if self.reals and self.ngrams:
            raise UserError("network.ngrams are of symbols, and this family's positions hold reals; leave them at 0")
        if not (self.ngrams == 0 or 2 <= self.ngrams <= 8):
            raise UserError(f"network.ngrams must be 0, or from 2 to 8, not {self.ngrams}")
        if not 0 <= self.counts <= 8:
            raise UserError(f"network.counts must be from 0 to 8, not {self.counts}")
        if not 1 <= self.slots <= 2**26 or self.slots & self.slots - 1:
            raise UserError(f"network.slots must be a power of two, at most 2^26, not {self.slots}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise UserError("rotary positions need an even network.width / network.heads")
        if self.attention == "block" and self.block_length > self.window:
            raise UserError(
                f"process.block_length {self.block_length} is longer than the window of {self.window} tokens; "
                "lower it or raise --length"
            )
        if self.candidates != "none" and self.ngrams:
            raise UserError("network.ngrams must be 0 for a family whose positions hold several candidates")
        if self.width % self.heads:
            raise UserError(f"network.width {self.width} is no multiple of network.heads {self.heads}; change one")
        if self.convolution < 0 or (
            self.attention == "bidirectional" and self.convolution and not self.convolution % 2
        ):
            raise UserError(f"network.convolution must be 0 or an odd number of taps, not {self.convolution}")

    def _check_unet(self) -> None:
        """Refuse what only a transformer can do."""
        if not 1 <= self.levels <= 8:
            raise UserError(f"network.levels must be from 1 to 8, not {self.levels}")
        if self.attention != "bidirectional" or self.candidates != "none":
            raise UserError(
                "network.body=unet reads whole texts of one symbol a position; "
                "this family needs network.body=transformer"
            )
        own = {"positions": "learned", "ngrams": 0, "counts": 0, "convolution": 5, "expansion": 4.0, "bias": False}
        for name, default in own.items():
            if getattr(self, name) != default:
                raise UserError(f"network.{name} is of the transformer; leave it out with network.body=unet")


@dataclass
class PretrainedShape:
    """A model of transformers as a network (networks/pretrained.py). ``inputs``, ``outputs``, ``attention`` and
    ``block_length`` are set by the family."""

    inputs: int
    outputs: int
    model: dict[str, Any]  # its own config, with model_type
    causal: bool  # it was made to predict the next token, from the left
    window: int = 64  # longest text, in tokens
    width: int = 0  # of its residual stream
    attention: Attention = "bidirectional"
    block_length: int = 8  # for attention = "block"
    mask: int = -1  # the id that stands for a hidden token; -1: an embedding of our own, which is learnt
    start: int = 0  # what a causal one reads before the first token
    prefix: list[int] = field(default_factory=list)  # what stands before every text, such as [CLS]
    suffix: list[int] = field(default_factory=list)  # and behind it
    sees_hidden: bool = True  # of a causal one: a hidden token is seen from other positions, as any other is
    lora: int = 0  # rank of low-rank adapters, which are trained in the place of the weights; 0: the weights are

    def __post_init__(self) -> None:
        if not 1 <= self.window <= 10**7 or not 1 <= self.block_length <= 10**7:
            raise UserError("network.window and process.block_length must be at least 1")
        if not 0 <= self.lora <= 10**5:
            raise UserError(f"network.lora is a rank, 0 for none, not {self.lora}")
        if self.attention != "bidirectional" and not self.causal:
            raise UserError("a masked language model reads both sides: it can begin a masked run only")
        if self.mask >= 0 and self.attention == "causal":
            raise UserError("a causal network hides no token: network.mask must be -1")
