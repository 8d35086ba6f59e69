"""examples/candidates.py: every part is there, runs on networks of nothing, and is not run twice."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import candidates
import pytest
import rows
import torch

import textdiffusion as td
from textdiffusion.commands.cli import main
from textdiffusion.mathematics.noise import Noise

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """Its command line, with a tiny text; commands run in this process."""
    (tmp_path / "my.txt").write_text(TEXT * 40)

    def verb(*words):
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
        *["candidates"] * 2, *["passes"] * 5, *["noise"] * 2, *["sizes"] * 3, *["writing"] * 5
    ]  # fmt: skip
    assert td.load(tmp_path / "OUT/sparse_distribution-process.candidates=2-1-2").process.k == 2
    # One run is in three parts, and is trained once.
    same = [found[key] for key in (("candidates", "as it is"), ("noise", "candidates"), ("sizes", candidates.SPARSE))]
    assert len({row["cpu_seconds"] for row in same}) == len({row["bits_per_char"] for row in same}) == 1
    assert found["sizes", "autoregressive"]["kind"] == "exact" and "at_8" in found["sizes", "masked"]
    assert found["writing", "held-out text"]["valid_words"] == 1
    assert found["writing", "random, temperature 0.7"]["text"] != found["writing", "carried"]["text"]
    assert "## writing" in capsys.readouterr().out
    assert run(monkeypatch, words) == found and "## sizes" not in capsys.readouterr().err


def test_passes_are_what_the_bound_is_of(words, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "CANDIDATES", {"as it is": []})
    found = run(monkeypatch, [*words, "--only", "candidates", "passes"])
    process = td.load(tmp_path / "OUT/sparse_distribution-1-2").process
    assert process.passes == 2
    x = torch.zeros(1, 12, dtype=torch.long)
    for number in (1, 3):
        calls = []
        process.network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        process.passes = number
        process.nll(x, Noise.of(1, 1))
        made, process.passes = len(calls), 1
        calls.clear()
        process.nll(x, Noise.of(1, 1))
        assert made == number * len(calls)
    names = [name for part, name in found if part == "passes"]
    assert names == ["1 passes", "2 passes", "3 passes", "4 passes", "carried"]
