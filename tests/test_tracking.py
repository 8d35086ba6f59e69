"""--track: none by default, and what is written down is what metrics.jsonl has."""

from __future__ import annotations

import json
import sys
import types

import pytest

import textdiffusion as td
from textdiffusion.commands.cli import main
from textdiffusion.training.tracking import check

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
SMALL = ["--steps", "6", "--length", "16", "--depth", "1", "--set", "network.width=16", "--set", "network.heads=1",
         "--set", "training.batch=4", "--set", "training.evaluations=2"]  # fmt: skip


def train(tmp_path, *more):
    (tmp_path / "my.txt").write_text(TEXT * 60)
    out = ["--out", str(tmp_path / "run")]
    return main(["train", "--data", str(tmp_path / "my.txt"), *out, *SMALL, "--json", *more])


def figures(tmp_path):
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["bits_per_char"] for line in map(json.loads, lines)}


def test_tensorboard_has_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path, "--track", "tensorboard") == 0
    found = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    curve = {e.step: e.value for e in found.Scalars("validation/bits_per_char")}
    assert curve == pytest.approx(figures(tmp_path))
    assert [e.step for e in found.Scalars("train/objective_nats")] == [1, 2, 3, 4, 5, 6]


def test_weights_and_biases_has_the_figures(tmp_path, monkeypatch):
    told, ended = {}, []
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace(name="wandb")

    def init(**how):
        assert how["config"]["family"] == "masked" and how["name"] == "run"
        log = lambda values, step: told.setdefault(step, {}).update(values)  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: ended.append(True))

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train(tmp_path, "--track", "wandb") == 0
    curve = {step: v["validation/bits_per_char"] for step, v in told.items() if "validation/bits_per_char" in v}
    assert curve == pytest.approx(figures(tmp_path)) and ended == [True] and len(told) == 6


def test_nothing_is_tracked_unless_asked(tmp_path):
    assert train(tmp_path) == 0
    assert not (tmp_path / "run/tensorboard").exists() and len(figures(tmp_path)) > 1


def test_a_missing_package_is_said_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("textdiffusion.training.tracking.find_spec", lambda name: None)
    assert train(tmp_path, "--track", "wandb") == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(td.UserError, match="tensorboard or wandb"):
        check("mlflow")
