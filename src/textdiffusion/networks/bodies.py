"""The networks that a config can name."""

from __future__ import annotations

from collections.abc import Callable

from textdiffusion.networks.network import TextNetwork
from textdiffusion.networks.shape import TransformerConfig
from textdiffusion.networks.transformer import Transformer
from textdiffusion.networks.unet import UNet

BODIES: dict[str, Callable[[TransformerConfig], TextNetwork]] = {"transformer": Transformer, "unet": UNet}


def network_of(config: TransformerConfig) -> TextNetwork:
    """The network that ``config.body`` names, as it is before training; drawn from torch's own generator."""
    return BODIES[config.body](config)
