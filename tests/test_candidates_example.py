"""examples/candidates.py: every part is there, runs on networks of nothing, and is not run twice."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import candidates
import pytest
import rows

import textdiffusion as td
from textdiffusion.commands.cli import main

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """Its command line, with a tiny text; commands run in this process."""
    (tmp_path / "my.txt").write_text(TEXT * 40)
    monkeypatch.setattr(candidates, "made", made := [], raising=False)

    def verb(*words):
        made.append(words)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main([*words, "--json"]) == 0
        return json.loads(said.getvalue().strip().splitlines()[-1])

    monkeypatch.setattr(rows, "verb", verb)
    monkeypatch.setattr(candidates, "verb", verb)
    how = "--depths 1 --steps 2 --length 12 --samples 2 --calls 4 --eval-tokens 120 --set training.batch=2"
    return [str(tmp_path / "OUT"), "--data", str(tmp_path / "my.txt"), *how.split()]


def run(monkeypatch, words: list[str]) -> dict[tuple[str, str], dict[str, object]]:
    monkeypatch.setattr(sys, "argv", ["candidates", *words])
    candidates.main()
    return {(r["part"], r["name"]): r for r in rows.Rows(candidates.Path(words[0]) / "rows.jsonl").found}


def test_every_part_is_measured_once(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "CANDIDATES", {"as it is": [], "k = 2": ["process.candidates=2"]})
    monkeypatch.setattr(candidates, "NOISE", {"candidates": (candidates.SPARSE, []), "swapped": ("uniform", [])})
    monkeypatch.setattr(candidates, "WRITING", [{"sampler": "random", "temperature": 0.7}, {"sampler": "carried"}])
    found = run(monkeypatch, words)
    assert [part for part, _ in found] == [
        *["candidates"] * 2, *["passes"] * 5, *["noise"] * 2, *["sizes"] * 3, *["writing"] * 7
    ]  # fmt: skip
    assert td.load(tmp_path / "OUT/sparse_distribution-process.candidates=2-1-2").process.k == 2
    # One run is in three parts, and is trained once.
    same = [found[key] for key in (("candidates", "as it is"), ("noise", "candidates"), ("sizes", candidates.SPARSE))]
    assert len({row["bits_per_char"] for row in same}) == 1
    runs = [
        words[words.index("--out") + 1] for words in candidates.made if words[0] == "train" and "--resume" not in words
    ]
    assert len(runs) == len(set(runs)) == 5
    assert found["sizes", "autoregressive"]["kind"] == "exact" and "at_8" in found["sizes", "masked"]
    assert found["writing", "held-out text"]["valid_words"] == 1
    assert found["writing", "random, temperature 0.7"]["text"] != found["writing", "carried"]["text"]
    assert "## writing" in capsys.readouterr().out
    assert run(monkeypatch, words) == found and "## sizes" not in capsys.readouterr().err


def test_passes_are_what_the_bound_is_of(words, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "CANDIDATES", {"as it is": []})
    found = run(monkeypatch, [*words, "--set", "training.rate=0.05", "--only", "candidates", "passes"])
    found = {name: row for (part, name), row in found.items() if part == "passes"}
    assert list(found) == ["1 passes", "2 passes", "3 passes", "4 passes", "carried"]
    assert found["2 passes"]["more"] == 0 and found["2 passes"]["standard_error"] > 0
    for name in ("1 passes", "3 passes", "carried"):
        assert found[name]["more"] != 0, name


def test_rows_of_other_options_are_refused(words, tmp_path, monkeypatch, capsys):
    rows.Rows(tmp_path / "rows.jsonl", {"data": "a", "out": 1, "steps": [1]}, ("steps",))
    rows.Rows(tmp_path / "rows.jsonl", {"data": "a", "out": 2, "steps": [2]}, ("steps",))
    with pytest.raises(td.UserError, match="rows of another --data; choose another folder"):
        rows.Rows(tmp_path / "rows.jsonl", {"data": "b", "out": 1, "steps": [1]}, ("steps",))
