"""docs/speed.md holds what benchmarks/results.json says, and nothing that was typed in."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def page():
    spec = importlib.util.spec_from_file_location("speed_page", ROOT / "benchmarks" / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_results():
    results, written = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "speed.md"
    assert results.exists() == written.exists()
    if results.exists():
        made = page().write_up(json.loads(results.read_text(encoding="utf-8")))
        assert written.read_text(encoding="utf-8") == made


def test_a_part_is_shown_with_what_it_was_measured_on():
    on = {"processor": "an abacus", "torch": "9.9", "python": "3.99", "commit": "abc", "load_average": 0.25}
    results = {
        "start-up": {"measured_on": on, "seconds": 7, "results": {"--help": 0.123}},
        "projection": {"measured_on": on, "seconds": 0, "results": {"1 G": {"tokens/s": 123456}}},
    }
    text = page().write_up(results)
    assert "| --help | 0.123 |" in text and "an abacus" in text and "load average at the start 0.25; 7 s" in text
    assert "| 1 G | 123,456 |" in text and "not measured" in text
    assert text.count("an abacus") == 1  # a projection is measured on nothing
