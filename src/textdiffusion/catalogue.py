"""What the families are, read from their own files."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

from textdiffusion.families import family, names


def listing() -> list[dict[str, Any]]:
    """Name and one-line summary of every family."""
    return [{"name": name, "summary": family(name).summary, "paper": family(name).paper} for name in names()]


def describe(name: str) -> dict[str, Any]:
    """Summary, paper, config fields and samplers of a family.

    Raises:
        UserError: no such family.
    """
    cls = family(name)
    process = cls(torch.zeros_like, cls.Config(), 2)  # the network is never called
    source = inspect.getsource(cls.Config).splitlines()
    fields = {}
    for f in dataclasses.fields(cls.Config):
        line = next(line for line in source if line.strip().startswith(f"{f.name}:"))
        fields[f"process.{f.name} = {f.default}"] = line.partition("#")[2].strip()
    return {
        "name": name,
        "summary": cls.summary,
        "paper": cls.paper,
        "fields": fields,
        "samplers": {key: step.note for key, step in process.steps.items()},
    }
