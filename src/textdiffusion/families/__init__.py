"""The families. A file here is a family, and its name is the family's name: nothing else needs to be registered."""

from __future__ import annotations

import importlib
import pkgutil

from textdiffusion.errors import UserError
from textdiffusion.process import Process


def names() -> list[str]:
    """Names of all families."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family(name: str) -> type[Process]:
    """The family's class: the one Process that its file defines.

    Raises:
        UserError: no such family; the line names those there are.
    """
    if name not in names():
        raise UserError(f"there is no family {name!r}; the families are: {', '.join(names())}")
    return find_process(importlib.import_module(f"{__name__}.{name}"))


def find_process(module: object) -> type[Process]:
    """The one Process class defined in a module."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Process)
        and value.__module__ == getattr(module, "__name__", "")
    ]
    if len(found) != 1:
        raise UserError(f"{getattr(module, '__name__', module)}: expected one Process class, found {len(found)}")
    return found[0]
