"""The families. A file here is a family, and its name is the family's name: nothing else needs to be registered."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from textdiffusion.errors import UserError

if TYPE_CHECKING:
    # Not at run time: names can be listed, and a wrong one refused, without torch.
    from textdiffusion.process import Process


def names() -> list[str]:
    """Names of all families."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check(name: str) -> None:
    """Refuse a name that is no family's.

    Raises:
        UserError: no such family; the line names those there are.
    """
    if name not in names():
        raise UserError(f"there is no family {name!r}; the families are: {', '.join(names())}")


def family(name: str) -> type[Process]:
    """The family's class: the one Process that its file defines.

    Raises:
        UserError: no such family.
    """
    check(name)
    return find_process(importlib.import_module(f"{__name__}.{name}"))


def load_family(name: str) -> type[Process]:
    """A family by its name, or the one in a user's own .py file, which is run.

    Raises:
        UserError: neither is there, or the file does not run or holds no family.
    """
    if not name.endswith(".py"):
        return family(name)
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no file {name}")
    # A name of its own: a user's random.py must not take the place of Python's.
    module_name = f"textdiffusion_family_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{name} does not run: {type(error).__name__}: {error}") from error
    return find_process(module)


def find_process(module: object) -> type[Process]:
    """The one Process class defined in a module."""
    from textdiffusion.process import Process

    here = getattr(module, "__name__", "")
    found = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Process) and value.__module__ == here
    }
    if len(found) != 1:
        names = f": {', '.join(sorted(cls.__name__ for cls in found))}" if found else ""
        place = getattr(module, "__file__", here)
        raise UserError(f"{place}: expected one Process class, found {len(found)}{names}; leave one in the file")
    return found.pop()
