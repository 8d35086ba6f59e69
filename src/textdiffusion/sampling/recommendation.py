"""Which sampler and grid "auto" means: those that were measured to write best at about so many calls a token.

The measurements are those of benchmarks/samplers.py, kept beside this file; docs/samplers.md shows them, and says by
which criterion they were compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("recommended.json")


@cache
def _table() -> dict[str, list[tuple[float, str, str]]]:
    if not FILE.exists():
        return {}
    rows = json.loads(FILE.read_text(encoding="utf-8"))["recommended"]
    return {
        family: [(row["calls_a_token"], row["sampler"], row["grid"]) for row in found] for family, found in rows.items()
    }


def recommend(family: str, calls_a_token: float, able: Sequence[str]) -> tuple[str, str]:
    """The sampler for so many calls for each token that is to be written, and its grid: "auto" for the run's own.

    Args:
        able: the samplers that may be chosen, the family's default first; it is the answer where nothing was measured
            within a factor of two of so many calls, or what was found best is not among them.
    """
    found = [(abs(math.log2(at / calls_a_token)), sampler, grid) for at, sampler, grid in _table().get(family, [])]
    away, sampler, grid = min(found, default=(math.inf, "", ""))
    return (sampler, grid) if away < 1 and sampler in able else (able[0], "auto")
