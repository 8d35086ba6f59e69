"""The networks that a config can name."""

from __future__ import annotations

from collections.abc import Callable

from textdiffusion.networks.network import TextNetwork
from textdiffusion.networks.shape import TransformerConfig
from textdiffusion.networks.transformer import Transformer
from textdiffusion.networks.unet import UNet, channels

BODIES: dict[str, Callable[[TransformerConfig], TextNetwork]] = {"transformer": Transformer, "unet": UNet}


def network_of(config: TransformerConfig) -> TextNetwork:
    """The network that ``config.body`` names, as it is before training; drawn from torch's own generator."""
    return BODIES[config.body](config)


def landmarks(config: TransformerConfig) -> dict[str, tuple[int, ...] | None]:
    """Names and shapes of tensors that tell how large a network is, before memory is taken for it; None: not there."""
    read, levels, each = config.width, config.levels, max(1, round(config.depth / 3))
    if config.body == "unet":
        read, *_, low = channels(config)
        named: dict[str, tuple[int, ...] | None] = {
            f"blocks.down.{levels * each - 1}.first.map.weight": (channels(config)[-2], 3 * channels(config)[-2]),
            f"blocks.down.{levels * each}.first.map.weight": None,
            f"blocks.middle.{2 * each - 1}.first.map.weight": (low, 3 * low),
            f"blocks.middle.{2 * each}.first.map.weight": None,
        }
    else:
        named = {
            f"blocks.{config.depth - 1}.up.weight": (int(config.width * config.expansion), config.width),
            f"blocks.{config.depth}.up.weight": None,
            "position": (config.window, config.width) if config.positions == "learned" else None,
            "counts.table": (config.slots,) if config.counts else None,
        }
    return named | {
        "embedding.weight": (read, config.inputs) if config.reals else (config.inputs, read),
        "head.weight": (config.outputs, read),
        "codes": (config.codes, config.code_width) if config.codes else None,
        "classes.weight": (config.classes + 1, read) if config.classes else None,
        "estimate.weight": (read, config.estimates) if config.estimates else None,
    }
