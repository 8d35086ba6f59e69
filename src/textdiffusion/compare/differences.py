"""What differs between two results: plans, machines and versions in words, figures with how much that is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textdiffusion.errors import UserError

# Times differ from run to run; what training logs on its way, and what each window adds to an error, say nothing more.
OF_TIME = ("seconds", "seconds_a_text")
LEARNING = ("learning", "influence")


@dataclass(frozen=True)
class Difference:
    """One place in results.json where two of them differ; ``errors``: by how many standard errors, where it has one."""

    place: str
    before: Any
    after: Any
    errors: float | None = None

    def __str__(self) -> str:
        line = f"{self.place}: {_short(self.before)} before, {_short(self.after)} now"
        return line if self.errors is None else f"{line} ({self.errors:.1f} standard errors)"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """All that differs but times and how learning went; figures with their standard errors, once a table of them."""
    return list(_walk(before, after, ""))


def _walk(before: Any, after: Any, place: str) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(k for k in after if k not in before)]:
            if key in (*OF_TIME, *LEARNING, "standard_error"):
                continue
            inner = f"{place}.{key}".lstrip(".")
            if key not in before or key not in after:
                yield Difference(inner, before.get(key), after.get(key))
            elif _is_figure(before[key]) and _is_figure(after[key]):
                if before[key] != after[key]:
                    yield Difference(inner, before[key], after[key], _errors(before, after, key))
            else:
                yield from _walk(before[key], after[key], inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and _long(before):
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _walk(one, other, f"{place}[{i}]")
    elif before != after:
        yield Difference(place, before, after)


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _long(values: list[Any]) -> bool:
    """Lists of tables are looked into; lists of numbers or texts are one thing."""
    return any(isinstance(value, Mapping) for value in values)


# The figure that a "standard_error" beside it belongs to.
MAIN = ("bits_per_char", "integral", "accuracy", "nats_a_token", "exact")


def _errors(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> float | None:
    pair = (before.get("standard_error"), after.get("standard_error"))
    if key not in MAIN or not all(_is_figure(e) for e in pair):
        return None
    one, two = before.get("influence"), after.get("influence")
    if key == "bits_per_char" and one and two and len(one) == len(two):
        # On the same windows: what they have in common is no part of the difference.
        error = sum((x - y) ** 2 for x, y in zip(one, two, strict=True)) ** 0.5
    else:
        error = (pair[0] ** 2 + pair[1] ** 2) ** 0.5  # type: ignore[operator]
    return abs(after[key] - before[key]) / error if error else None


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a comparison.

    Raises:
        UserError: there is none, or it is another kind of file.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"there is no {file}; give the results.json that `textdiffusion compare` wrote") from None
    except ValueError:
        body = None
    if not isinstance(body, dict) or not {"plan", "protocol", "rows"} <= body.keys():
        raise UserError(f"{file} is no results.json of a comparison; give one that `textdiffusion compare` wrote")
    return body
