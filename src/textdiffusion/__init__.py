"""textdiffusion: diffusion language models of every kind, under one interface.

    import textdiffusion as td

    model = td.train(data="my.txt", minutes=5)     # or td.load("runs/...")
    model.sample(n=4)
    model.infill("The ____ sat")
    model.score("some text")                       # bits per character

Names are imported when they are first used, so that `textdiffusion --help` need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SHIPPED", "Model", "UserError", "load", "train"]

if TYPE_CHECKING:
    from textdiffusion.config import SHIPPED
    from textdiffusion.errors import UserError
    from textdiffusion.loading import load, train
    from textdiffusion.model import Model


def __getattr__(name: str) -> Any:
    if name in ("Model", "load", "train"):
        from textdiffusion import loading

        return getattr(loading, name)  # which has Model too
    if name == "SHIPPED":
        from textdiffusion.config import SHIPPED

        return SHIPPED
    if name == "UserError":
        from textdiffusion.errors import UserError

        return UserError
    raise AttributeError(f"module 'textdiffusion' has no attribute {name!r}")
