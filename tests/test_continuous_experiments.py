"""The experiments of the continuous families, with tiny settings: every row is there, runs, and is not run twice."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from textdiffusion.commands.cli import main
from textdiffusion.mathematics.gaussian import LOG_SNRS
from textdiffusion.mathematics.noise import Noise
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification import Subject

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "my.txt").write_text(TEXT * 60)
    return str(tmp_path / "my.txt")


@pytest.fixture
def continuous(monkeypatch):
    """The script, its commands run in this process and with a network of nothing."""
    module = example("continuous")

    def verb(*words):
        small = ["--depth", "1", "--set", "training.batch=2"] if words[0] == "train" and "--resume" not in words else []
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main([*words, *small, "--json"]) == 0
        return json.loads(said.getvalue().strip().splitlines()[-1])

    monkeypatch.setattr(sys.modules["rows"], "verb", verb)
    monkeypatch.setattr(module, "verb", verb)
    return module


def run(module, monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def test_what_was_asked_for_is_in_the_list(tmp_path):
    module = example("continuous")
    options = type("Options", (), {"delta_calls": 2000, "deltas": module.DELTAS})
    every = [(group, name) for group, name, _ in module.jobs(tmp_path, options)]
    assert len(set(every)) == len(every)
    groups = {group: [name for g, name in every if g == group] for group, _ in every}
    assert groups["schedule"] == ["adaptive", "cosine", "linear", "rectified", "sqrt"]
    assert groups["times"] == ["100", "500", "1000", "all"] and groups["depth"] == ["4", "8", "12", "16"]
    assert groups["target"] == ["tokens", "x_0", "eps", "v", "flow"]
    assert {"without the evidence", "cosine for the learned clock", "without self-conditioning"} <= {*groups["parts"]}
    for sampler in ("ancestral", "ddim", "dpm", "churn"):
        assert {f"{sampler}, {n}" for n in (10, 25, 50, 100, 250, 500)} <= {*groups["calls"]}
    for share in (0.0, 0.5):
        assert {f"self-conditioning {share}, {n}" for n in range(11)} <= {*groups["delta"]}
    assert {"estimate", "codes", "network", "given", "bias", "speed"} <= groups.keys()


def test_deltas_are_measured_drawn_and_not_measured_twice(continuous, text, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = [tmp_path / "OUT", "--data", text, "--steps", 2, "--length", 12, "--samples", 2, "--eval-tokens", 60,
             "--delta-calls", 12, "--only", "delta", "--deltas", 0, 3, 5, 10]  # fmt: skip
    run(continuous, monkeypatch, *words)
    rows = [json.loads(line) for line in (tmp_path / "OUT/rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows[:3]] == [f"self-conditioning 0.0, {n}" for n in (0, 3, 5)]
    assert len(rows) == 2 * 4 and len(list((tmp_path / "OUT").glob("*/config.json"))) == 2
    assert len({row["entropy"] for row in rows[:4]}) > 2  # other deltas, other texts
    assert (tmp_path / "OUT/delta.svg").read_text().startswith("<?xml")
    assert "self-conditioning 0.5, 10" in (tmp_path / "OUT/table.md").read_text()
    # Stopped and started: the last row is made again, to the same figures, and no other.
    (tmp_path / "OUT/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    capsys.readouterr()
    run(continuous, monkeypatch, *words)
    assert capsys.readouterr().err.splitlines() == [f"delta, {rows[-1]['name']}"]
    assert [json.loads(line) for line in (tmp_path / "OUT/rows.jsonl").read_text().splitlines()] == rows


def test_a_run_trained_at_levels_is_bounded_as_their_chain(continuous, text, tmp_path, monkeypatch):
    monkeypatch.setattr(continuous, "ROWS", [
        ("times", n, "gaussian_embedding", ["process.schedule=cosine", "process.self_conditioning=0.0",
                                            f"process.times={n}"]) for n in ("7", "0")
    ])  # fmt: skip
    words = [tmp_path / "OUT", "--data", text, "--steps", 2, "--length", 12, "--samples", 2, "--eval-tokens", 60]
    run(continuous, monkeypatch, *words, "--only", "times")
    levels, every = (json.loads(line) for line in (tmp_path / "OUT/rows.jsonl").read_text().splitlines())
    assert levels["calls"] == 7 and every["calls"] is None


@pytest.mark.parametrize("group", ["given", pytest.param("network", marks=pytest.mark.slow)])
def test_networks_and_gaps(continuous, group, text, tmp_path, monkeypatch):
    words = [tmp_path / "OUT", "--data", text, "--steps", 2, "--length", 12, "--samples", 2, "--eval-tokens", 60]
    run(continuous, monkeypatch, *words, "--only", group)
    rows = [json.loads(line) for line in (tmp_path / "OUT/rows.jsonl").read_text().splitlines()]
    assert len(rows) == {"given": 2, "network": 3}[group]
    runs = [json.loads(path.read_text()) for path in (tmp_path / "OUT").glob("*/config.json")]
    assert len(rows) == len(runs)  # a training each
    if group == "given":
        assert {run["process"].get("conditioning", "clean") for run in runs} == {"clean", "replacement"}
    for row in rows:
        assert 0 <= row["as_it_was"] <= 1 if group == "given" else row["tokens_a_second"] > 0 and row["kind"] == "upper"


def test_plain_replacement_is_biased_and_what_is_trained_for_is_not(continuous):
    """Nine of ten, by draws: in one call exactly, in 16 but for what so few leave over; replaced, in neither."""
    for calls, left_over in ((1, 0.0), (16, 0.02)):
        clean, replaced = (continuous.bias(how, calls, 4000) for how in ("clean", "replacement"))
        assert abs(clean["alike"] - 0.9) < 4 * clean["standard_error"] + left_over < 0.05
        assert replaced["alike"] < 0.8


@pytest.fixture
def system():
    return example("second_system")


def test_each_mend_taken_out_does_what_it_did_there(system, text, tmp_path, monkeypatch, capsys):
    words = [tmp_path / "OUT", "--data", text, "--steps", 3, "--length", 12, "--samples", 3, "--eval-tokens", 60]
    words += ["--calls", 4]
    for setting in ("network.depth=1", "network.width=16", "training.batch=4", "process.width=4"):
        words += ["--set", setting]
    run(system, monkeypatch, *words)
    rows = {r["name"]: r for r in map(json.loads, (tmp_path / "OUT/rows.jsonl").read_text().splitlines())}
    assert list(rows) == [row.name for row in system.ROWS]
    # Token 0 for ever, whatever is learnt.
    for name in ("as published", "without: a head that is taught"):
        assert rows[name]["token_0"] == rows[name]["commonest"] == 1 and rows[name]["entropy"] == 0, rows[name]
    assert rows["mended"]["entropy"] > 2 and rows["mended"]["commonest"] < 0.6
    # The text is all there at the end of the noise, which the bound charges for: five nats for each of four reals.
    assert rows["without: the schedule's end"]["bits_per_char"] > 20 > rows["mended"]["bits_per_char"]
    capsys.readouterr()
    run(system, monkeypatch, *words)
    said = capsys.readouterr()
    assert said.err == "" and "| as published |" in said.out and "| without: a rate for each part |" in said.out


def test_what_is_sampled_wrongly_is_sampled_so(system):
    """Where the first moves of four calls begin and end, in log-SNR, and what is left there of the state."""

    def first_move(fault):
        config = fault.Config(width=4, schedule="cosine", times=1000, self_conditioning=0.0)
        process, seen = Subject(fault, config).silent(5), []
        for step in process.steps.values():

            def watched(z, x_0, now, then, move=step.move):
                seen.append((float(now[0]), float(then[0]), move(z, x_0, now, then)[0], z))
                return move(z, x_0, now, then)

            step.move = watched
            break
        list(sample(process, Noise.of(0, 1), 6, 4))
        return seen[0]

    right = system.GaussianEmbedding
    now, then, mean, z = first_move(right)

    def level(t):
        return float(LOG_SNRS["cosine"].at(torch.tensor(t)))

    assert now == pytest.approx(level(1.0)) and then == pytest.approx(level(0.75), abs=1e-4)
    # The last four of a thousand levels: pure noise is taken for a text that is nearly clean.
    now, then, mean, z = first_move(system.BeginsInTheMiddle)
    assert now == pytest.approx(level(0.004)) and then == pytest.approx(level(0.003))
    assert torch.corrcoef(torch.stack((mean.flatten(), z.flatten())))[0, 1] > 0.8
    # A step of the reversed chain goes on from the state; here it does not.
    x_0, z, now, then = torch.ones(2, 4), torch.randn(2, 4), torch.tensor([[-1.0]]), torch.tensor([[0.5]])
    for fault, forgets in ((system.NoiseDrawnAnew, True), (right, False)):
        process = Subject(fault, fault.Config(width=4, self_conditioning=0.0)).silent(5)
        means = [process.steps["ancestral"].move(state, x_0, now, then)[0] for state in (z, 2 * z)]
        assert torch.equal(*means) == forgets


def test_a_root_of_less_than_nothing_is_no_number(system, text, tmp_path, monkeypatch):
    """One noise level in two is the last: as soon as it is drawn the loss is no number, and is said to be none."""
    words = ["--data", text, "--steps", 3, "--length", 12, "--samples", 2, "--calls", 2, "--eval-tokens", 60]
    for setting in ("network.depth=1", "network.width=16", "training.batch=4", "process.width=4", "process.times=2"):
        words += ["--set", setting]
    run(system, monkeypatch, tmp_path / "OUT", *words, "--only", "without: a sqrt schedule above zero (first system)")
    (row,) = map(json.loads, (tmp_path / "OUT/rows.jsonl").read_text().splitlines())
    assert row["stopped"] == "no number, step 1" and row["bits_per_char"] is None


@pytest.mark.slow
def test_embeddings_collapse_where_nothing_holds_them_apart(system, text, tmp_path, monkeypatch):
    words = ["--data", text, "--steps", 300, "--length", 8, "--samples", 2, "--calls", 2, "--eval-tokens", 60]
    small = ("network.depth=1", "network.width=16", "training.batch=16", "process.width=4", "training.rate=0.03")
    for setting in small:
        words += ["--set", setting]
    words += ["--only", "without: embeddings held apart", "--only", "mended, predicting eps"]
    run(system, monkeypatch, tmp_path / "OUT", *words)
    held, free = map(json.loads, (tmp_path / "OUT/rows.jsonl").read_text().splitlines())
    assert held["embeddings_apart"] > 1 > 0.5 > free["embeddings_apart"], (held, free)
    assert held["embeddings_length"] == pytest.approx(1, abs=1e-3) and free["embeddings_length"] < 0.5, (held, free)


@torch.no_grad()
def test_the_schedules_are_those_of_the_system(system):
    """Figures of its documents: what is left of the text at the end of the noise."""
    kept = {}
    for fault in (system.TimesDividedTwice, system.LinearNotRescaled):
        process = fault(lambda x, **_: x, fault.Config(self_conditioning=0.0), 5)
        kept[fault] = process.signal(1.0)[0] ** 2
    assert kept[system.TimesDividedTwice] == pytest.approx(0.999959, abs=2e-6)
    assert kept[system.LinearNotRescaled] == pytest.approx(0.364, abs=4e-3)
