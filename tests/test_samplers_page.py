"""docs/samplers.md and the table of `--sampler auto` hold what benchmarks/samplers.json says, and nothing typed in."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page():
    return load("samplers_page")


def row(sampler: str, judge: float, entropy: float = 8.0, calls: int = 8, grid: str = "time") -> dict:
    return {
        "run": "r", "family": "masked", "length": 64, "sampler": sampler, "grid": grid, "calls": calls, "made": calls,
        "texts": 32, "valid_words": 0.5, "valid_words_error": 0.01, "judge": judge, "judge_error": 0.02,
        "entropy": entropy, "real_entropy": 8.0, "divergence": 0.3, "seconds": 0.1,
    }  # fmt: skip


def found(*rows: dict) -> dict:
    real = {"r": {"valid_words": 1.0, "judge": 1.8, "entropy": 8.0, "divergence": 0.1, "texts": 32}}
    likes = {"r": {"random time 8": [2.5, 0.01, "upper"], "margin time 8": [2.4, 0.02, "exact"]}}
    return {
        "text": "a book",
        "judge": "autoregressive",
        "held_out": real,
        "steps": {"r": 100},
        "rows": list(rows),
        "likelihoods": likes,
    }


def test_the_page_and_the_table_are_made_from_what_was_measured(page):
    summary = ROOT / "benchmarks" / "samplers.json"
    if not summary.exists():
        pytest.skip("nothing has been measured")
    measured = json.loads(summary.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8") == page.write_up(measured)
    table = json.loads((ROOT / "src" / "textdiffusion" / "sampling" / "recommended.json").read_text(encoding="utf-8"))
    assert table["recommended"] == page.recommended(measured)


def test_auto_is_the_best_of_those_that_write_varied_text(page):
    rows = [row("random", 3.0), row("margin", 2.0, entropy=7.0), row("entropy", 2.5, entropy=7.9)]
    (best,) = page.recommended(found(*rows))["masked"]
    assert best["sampler"] == "entropy" and best["calls_a_token"] == 1 / 8
    (best,) = page.recommended(found(*(r | {"entropy": 7.0} for r in rows)))["masked"]
    assert best["sampler"] == "margin"
    # The run's own grid is called auto, for another run may not hold it; any other by its name.
    (best,) = page.recommended(found(row("random", 3.0), row("random", 2.0, grid="cosine")))["masked"]
    assert best["sampler"] == "random" and best["grid"] == "cosine"
    (best,) = page.recommended(found(row("random", 2.0), row("random", 3.0, grid="cosine")))["masked"]
    assert best["grid"] == "auto"
    assert page.recommended(found(row("random", 3.0))) == {}  # compared with nothing


def test_a_bound_is_told_from_an_exact_likelihood_and_from_none(page):
    lines = page.write_up(found(row("random", 3.0), row("margin", 2.0), row("remask", 2.5))).splitlines()
    by_name = {
        name: line for line in lines for name in ("random", "margin", "remask") if f"`{name}`" in line and "32" in line
    }
    assert by_name["random"].endswith("<= 2.500 +- 0.010 |") and by_name["remask"].endswith("| - |")
    assert by_name["margin"].endswith("| 2.400 +- 0.020 |") and "**`margin`**" in by_name["margin"]


def test_entropy_and_divergence_are_those_of_the_counts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    samplers = load("samplers")
    even, other = samplers.grams(["abab"], 1), samplers.grams(["cdcd"], 1)
    assert even == {"a": 2, "b": 2} and samplers.entropy(even) == pytest.approx(1)
    assert samplers.divergence(even, even) == pytest.approx(0) and samplers.divergence(even, other) == pytest.approx(1)
