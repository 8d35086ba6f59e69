"""The run that comes with the package: there the minute after installing, small, and what its card says of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import textdiffusion as td
from textdiffusion.commands.cli import main
from textdiffusion.config import SHIPPED, SHIPPED_INSTEAD
from textdiffusion.evaluation.measures import evaluate
from textdiffusion.run import build
from textdiffusion.text.data import tokenize
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.training.preparation import prepare

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_minutes.ipynb"
PLAIN = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "metrics.jsonl",
    "grid.json",
    "README.md",
}


@pytest.fixture(scope="module")
def model():
    return td.load(td.SHIPPED, "cpu", "fp32")


def test_it_is_small_and_plain():
    assert {path.name for path in SHIPPED.iterdir()} == PLAIN
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_400_000
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["data"]["source"] == "pydoc" and config["training"]["steps"] is not None


def test_its_card_says_how_it_was_made_and_what_it_reaches(model):
    card = (SHIPPED / "README.md").read_text()
    assert "examples/shipped_run.py" in card and "half precision" in card
    bound = float(re.search(r"likelihood      <= ([\d.]+) \+- ([\d.]+) bits/char", card)[1])
    # Measured again on a part of the held-out text of this Python, which may have another release of the reference.
    corpus, _, _ = prepare(_unbound(model.config), model.tokenizer)
    held_out = tokenize(corpus, model.tokenizer)["validation"]
    windows = evaluation_windows(held_out, model.window, limit=4096)
    figure = evaluate(model.process, windows, model.tokenizer.characters, draws=2, device="cpu").figure
    assert abs(figure.bits_per_char - bound) < max(6 * figure.standard_error, 0.15)


def _unbound(config):
    """The config without the mark of the very text: another Python has another release of it."""
    return replace(config, text="")


def test_it_writes_words_as_chance_does_not(model):
    corpus, _, _ = prepare(_unbound(model.config), model.tokenizer)
    known = set(re.findall(r"[a-z]{4,}", " ".join(corpus.train).lower()))

    def share(model) -> float:
        words = re.findall(r"[a-z]{4,}", " ".join(model.sample(8, calls=32, seed=1)).lower())
        return sum(word in known for word in words) / len(words)

    untrained = td.Model(build(model.config), model.tokenizer, model.config, "cpu", "fp32")
    assert share(model) > 2 * share(untrained)


def test_it_is_used_where_there_is_no_run_and_a_line_says_so(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "-n", "1", "--json", "--seed", "1", "--device", "cpu", "--precision", "fp32"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["samples"][0]["text"] == model.sample(1, seed=1)[0]
    assert out.err.count("\n") == 1 and SHIPPED_INSTEAD in out.err
    with pytest.warns(UserWarning, match="no run under runs/"):
        td.load(device="cpu")
    assert main(["train", "--resume"]) == 2  # never gone on with
    assert "no run under runs/" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_as_shown(tmp_path):
    """Its cells in one process; a kernel runs them among the slow tests."""
    body = "\n".join(code_cells()).replace("minutes=1", "steps=2, depth=1")
    body = re.sub(r"seconds=\d", "seconds=0", body)
    where = os.environ | {"PYTHONPATH": str(ROOT / "src")}  # the very code beside the notebook
    result = subprocess.run([sys.executable, "-c", body], cwd=tmp_path, capture_output=True, text=True, env=where,
                            check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "░" in result.stdout and (tmp_path / "replay.html").exists()


def test_the_notebook_holds_what_came_out():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    shown = [out for cell in cells for out in cell["outputs"] if "text/html" in out.get("data", {})]
    assert len(shown) >= 2 and all("td-panel" in "".join(out["data"]["text/html"]) for out in shown)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text


@pytest.mark.slow
def test_a_kernel_runs_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("minutes=1", "steps=20, depth=1")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", []) if "text/html" in out.get("data", {})]
    assert len(shown) >= 2 and (tmp_path / "replay.html").exists()
