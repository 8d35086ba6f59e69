"""Which family to take for a budget of network calls, and by how much: from the figures, by rules that are stated.

Each family makes as many calls as it can within the budget (no more than it has tokens, where more would change
nothing); the best of several budgets is not picked, which would favour whoever has the larger errors. Two questions are
asked apart, since their answers can differ:

- likelihood: bits per character of held-out text, exact or bounded, of the sampler that makes so many calls. A bound is
  a guarantee: a family ahead by its bound is ahead by at least what it is known to reach; one behind may have slack.
- samples: divergence of the n-grams that it writes from those of held-out text.

A lead below two standard errors of the difference is called level. Bits per character are read on the same windows, so
that the error of their difference is taken window by window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Place:
    """A family's figure at a budget: the lower the better."""

    family: str
    figure: float
    error: float
    calls: int
    kind: str  # exact, upper, none; or samples
    infills: bool
    seconds: float | None  # for a text
    influence: tuple[float, ...] = ()  # of each held-out window on the figure
    words: float | None = None  # share of a sample's words that occur in the training text


@dataclass(frozen=True)
class Ranking:
    """Families at one budget, best first; and those that cannot, with why."""

    budget: int
    places: list[Place]
    unable: dict[str, str]

    @property
    def tied(self) -> list[Place]:
        """The best, and all that are not clearly behind it."""
        best = self.places[0]
        return [p for p in self.places if p.figure - best.figure <= CLEAR * _both(p, best) or p is best]

    @property
    def lead(self) -> tuple[float, float] | None:
        """How far the second is behind, and the standard error of that."""
        if len(self.places) < 2:
            return None
        best, second = self.places[:2]
        return second.figure - best.figure, _both(best, second)

    @property
    def best_infilling(self) -> Place | None:
        """The first of those that fill gaps anywhere."""
        return next((p for p in self.places if p.infills), None)


def _both(a: Place, b: Place) -> float:
    """Standard error of a difference: window by window where both have read the same ones, whose being easy or hard
    is then no part of it."""
    if a.influence and len(a.influence) == len(b.influence):
        return float(sum((x - y) ** 2 for x, y in zip(a.influence, b.influence, strict=True)) ** 0.5)
    return float((a.error**2 + b.error**2) ** 0.5)


def by_likelihood(results: Mapping[str, Any], budget: int) -> Ranking:
    """Families by bits per character at up to ``budget`` calls."""
    places, unable = [], {}
    for name, row in results["rows"].items():
        body = row["likelihood"]
        found = [body, *body["by_calls"]] if body["kind"] == "exact" else body["by_calls"]
        able = [f for f in found if f["calls"] is not None and f["calls"] <= budget and f["kind"] != "none"]
        if not able:
            fewest = min((f["calls"] for f in found if f["calls"] is not None), default=None)
            unable[name] = "no bound is known" if fewest is None else f"needs {fewest} calls"
            continue
        best = max(able, key=lambda f: f["calls"])
        places.append(
            Place(
                name, best["bits_per_char"], best["standard_error"] or 0.0, best["calls"], best["kind"],
                _infills(row), _seconds(row, best["calls"]), tuple(best.get("influence", ())),
            )
        )  # fmt: skip
    return Ranking(budget, sorted(places, key=lambda p: p.figure), unable)


def by_samples(results: Mapping[str, Any], budget: int) -> Ranking:
    """Families by the divergence of their samples' n-grams at up to ``budget`` calls."""
    places, unable = [], {}
    for name, row in results["rows"].items():
        found = [body for key, body in row["samples"]["by_calls"].items() if body and int(key) <= budget]
        if not found:
            unable[name] = f"needs {row['samples']['fewest_calls']} calls"
            continue
        best = max(found, key=lambda b: b["calls"])
        integral, error = best["divergence"]["integral"], best["divergence"]["standard_error"] or 0.0
        seconds, words = best["seconds_a_text"], best.get("valid_words")
        kind, able = "samples", _infills(row)
        places.append(Place(name, integral, error, best["calls"], kind, able, seconds, words=words))
    return Ranking(budget, sorted(places, key=lambda p: p.figure), unable)


def _infills(row: Mapping[str, Any]) -> bool:
    return bool(row["control"]["infilling"]["seen"] == "both sides")


def _seconds(row: Mapping[str, Any], calls: int) -> float | None:
    """Of a text in a batch, where texts of so many calls were written."""
    for body in row["samples"]["by_calls"].values():
        if body and body["calls"] == calls:
            return float(body["seconds_a_text"])
    return None


def lead(ranking: Ranking, unit: str, digits: int = 3) -> str:
    """How far the best of a ranking is ahead, in words."""
    by = ranking.lead
    if by is None:
        return f"the only one: {ranking.places[0].figure:.{digits}f} {unit}"
    second, level = ranking.places[1], ranking.tied[1:]
    others = " and ".join(p.family for p in level)
    if second in level:
        return f"level with {others}: the lead of {by[0]:.{digits}f} {unit} over {second.family} is within its error"
    ahead = f"ahead of {second.family} by {by[0]:.{digits}f} ± {by[1]:.{digits}f} {unit}"
    # One further behind whose figure is less sharp.
    return f"{ahead}; the figure of {others} is too rough to tell" if level else ahead


def sentence(ranking: Ranking, unit: str, digits: int = 3) -> str:
    """The answer in words."""
    if not ranking.places:
        return f"no family can do with {ranking.budget} calls"
    return f"{ranking.places[0].family}, {lead(ranking, unit, digits)}"
