"""What the families are, read from their own files."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from textdiffusion import families
from textdiffusion.families import family, names


def listing() -> list[dict[str, Any]]:
    """Name, one-line summary and paper of every family, from the text of its file: running it would need torch."""
    found = []
    for name in names():
        tree = ast.parse(Path(families.__path__[0], f"{name}.py").read_text(encoding="utf-8"))
        said = {
            node.target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        found.append({"name": name, "summary": said["summary"], "paper": said["paper"]})
    return found


def describe(name: str) -> dict[str, Any]:
    """Summary, paper, config fields and samplers of a family.

    Raises:
        UserError: no such family.
    """
    cls = family(name)
    process = cls(lambda x, **how: x, cls.Config(), 2)  # the network is never called
    # With the fields that families of one kind share.
    kinds = [kind for kind in cls.Config.__mro__ if dataclasses.is_dataclass(kind)]
    source = [line for kind in kinds for line in inspect.getsource(kind).splitlines()]
    fields, hints = {}, get_type_hints(cls.Config)
    for f in dataclasses.fields(cls.Config):
        line = next(line for line in source if line.strip().startswith(f"{f.name}:"))
        note = line.partition("#")[2].strip()
        if get_origin(hints[f.name]) is Literal:
            note += f"; one of {', '.join(map(str, get_args(hints[f.name])))}"
        if f.name in getattr(cls.Config, "at_sampling", {}):
            note += "; `sample --set` changes it too"
        fields[f"process.{f.name} = {f.default}"] = note
    return {
        "name": name,
        "summary": cls.summary,
        "paper": cls.paper,
        "fields": fields,
        "samplers": {key: step.note for key, step in process.steps.items()},
    }
