"""Every right-hand side of docs/from-the-five.md runs."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import textdiffusion as td
from published_checkpoints import ddlm, sedd
from textdiffusion.commands.cli import main
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.schedules import geometric
from textdiffusion.process import State

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/from-the-five.md").read_text(encoding="utf-8")
ROWS = [line.strip("| \n").split(" | ") for line in PAGE.splitlines() if line.startswith("|")]
ROWS = [row for row in ROWS if row[0] not in ("there", "---|---")]
CODE = list(dict.fromkeys(code for row in ROWS for code in re.findall(r"`([^`]+)`", row[1])))
NAMES = {"td": td, "torch": torch, "Noise": Noise, "State": State, "geometric": geometric}
SMALL = ["--steps", "2", "--length", "24", "--set", "training.batch=4", "--set", "network.width=16"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text and a run, as the page has them."""
    home = tmp_path_factory.mktemp("five")
    (home / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 60)
    settings = ["training.batch=4", "process.graph=uniform"]
    td.train(home / "runs/ratios", family="score_entropy", data=str(home / "my.txt"), depth=1, steps=3, length=32,
             settings=settings)  # fmt: skip
    td.train(home / "runs/blocks", family="block", data=str(home / "my.txt"), depth=1, steps=3, length=32,
             settings=settings[:1])  # fmt: skip
    (home / "books").mkdir()
    for label in ("war", "peace"):
        (home / "books" / f"{label}.txt").write_text(f"It was a day of {label}, as days of {label} are. " * 60)
    td.train(home / "runs/labelled-bits", family="analog_bits", data=str(home / "books"), label="file", depth=1,
             steps=3, length=32, settings=settings[:1])  # fmt: skip
    for name, family in (("bits", "analog_bits"), ("vectors", "gaussian_embedding"), ("sparse", "sparse_distribution")):
        td.train(home / "runs" / name, family=family, data=str(home / "my.txt"), depth=1, steps=3, length=32,
                 settings=settings[:1])  # fmt: skip
    sedd(home / "sedd-model")
    ddlm(home / "ddlm-model")
    return home


@pytest.mark.parametrize("code", CODE)
def test_what_the_page_shows_runs(code, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    if code.startswith("textdiffusion "):
        words = shlex.split(code)[1:]
        if words[0] == "train" and "--resume" not in words:
            depth = [] if "--preset" in words else ["--depth", "1"]
            heads = ["--set", "network.heads=1", "--set", "network.depth=1"]
            words += [*SMALL, *heads, *depth, "--out", f"runs/{abs(hash(code))}"]
        assert main(words) == 0, capsys.readouterr().err
    elif code.startswith("python "):
        _, script, *words = shlex.split(code)
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        assert len(capsys.readouterr().out.splitlines()) > 5
    elif code.startswith(("td.", "list(td.", "geometric(")):
        assert eval(code, NAMES) is not None
    else:
        parts = ("--", ">", "wandb", "runs/", "checkpoints/", "training.", "metrics.jsonl", "examples/", "torchrun")
        assert code.startswith((*parts, "srun")), f"{code} is neither run nor part of what is"


def test_the_page_is_a_page_of_code():
    assert len(ROWS) > 30 and len(CODE) > 30


@pytest.mark.slow
def test_the_experiments_go_on_where_they_were_stopped(home):
    words = [sys.executable, str(ROOT / "examples/continuous.py"), str(home / "OUT"), "--data", str(home / "my.txt")]
    words += ["--steps", "2", "--length", "16", "--samples", "2", "--eval-tokens", "200", "--only", "speed"]
    first = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "| autoregressive | exact |" in first and (home / "OUT/table.md").read_text() in first
    again = subprocess.run(words, capture_output=True, text=True, check=True)
    assert again.stderr == "" and again.stdout.strip() == (home / "OUT/table.md").read_text().strip()
