"""Networks by their name in a run's config: the library's own (networks/bodies.py), or one that was made elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from textdiffusion.errors import UserError
from textdiffusion.networks.shape import PretrainedShape, TransformerConfig
from textdiffusion.settings import with_fields

if TYPE_CHECKING:
    import torch
    from torch import nn

    from textdiffusion.config import RunConfig

NAMES = ("own", "dit", "pretrained")


class Backbone(Protocol):
    """What training asks of a network, beyond being a torch module that a family can call."""

    config: Any  # with window and width
    compute_dtype: torch.dtype

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices that Muon teaches; AdamW teaches all else."""
        ...

    def compile_blocks(self) -> None:
        """Compile the blocks."""
        ...

    @property
    def products(self) -> float:
        """Weights that a position is multiplied by."""
        ...

    @property
    def symbols_a_token(self) -> int:
        """Symbols read in training for each token of a text."""
        ...


def check(name: str) -> None:
    """Refuse a name that is no network's.

    Raises:
        UserError: naming those there are.
    """
    if name not in NAMES:
        raise UserError(f"there is no network {name!r}; the networks are: {', '.join(NAMES)}")


def make(config: RunConfig, decided: dict[str, Any]) -> nn.Module:
    """A new network, drawn from torch's generator.

    Args:
        config: the run's; ``config.network`` are fields of the network's own config.
        decided: what the family decides (``Process.network_fields``).
    Raises:
        UserError: fields that do not fit, or a network that the family cannot have.
    """
    check(config.backbone)
    if config.backbone == "own":
        from textdiffusion.networks.bodies import network_of

        return network_of(with_fields(TransformerConfig, config.network | decided, "network"))
    if decided.get("classes"):
        raise UserError("a network that was made elsewhere knows no labels; leave out --label, or --init-from")
    kept = {k: v for k, v in decided.items() if k in ("inputs", "outputs", "attention", "block_length")}
    if decided.get("reals") or decided.get("candidates", "none") != "none":
        raise UserError(f"the {config.family} family needs a network of this library; it cannot begin with another")
    if config.backbone == "dit":
        from textdiffusion.networks.dit import DiT, DiTConfig

        return DiT(with_fields(DiTConfig, config.network | kept, "network"))
    from textdiffusion.networks.pretrained import Pretrained

    return Pretrained(with_fields(PretrainedShape, config.network | kept, "network"))
