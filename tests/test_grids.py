"""Grids: optimal counts against every way of counting, and the same laws and bounds on all of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import textdiffusion as td
from small_runs import small_run
from textdiffusion.commands.cli import main
from textdiffusion.diffusion.absorbing import count_weights
from textdiffusion.errors import UserError
from textdiffusion.families.analog_bits import AnalogBits, AnalogBitsConfig
from textdiffusion.families.block import BlockConfig, BlockDiffusion
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.families.score_entropy import ScoreEntropy, ScoreEntropyConfig
from textdiffusion.families.uniform import Uniform
from textdiffusion.mathematics.gaussian import LOWEST
from textdiffusion.mathematics.grids import (
    GRIDS,
    Grid,
    equal_entropy,
    expected_divergence,
    optimal_hidden,
    rising,
    smooth,
)
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import HiddenMarkov, parity, random_table
from textdiffusion.sampling.pacing import LEVELS, grid_of, measure_costs
from textdiffusion.sampling.reverse import sample
from textdiffusion.verification import Subject
from textdiffusion.verification.enumeration import call_bound, enumerated_law, exact_curve, misfit

ROOT = Path(__file__).parents[1]
V, L = 3, 3
WORLD = random_table(V, L)
COSTS = (0.3, 0.5, 1.2)


def grids(costs=COSTS):
    return [Grid(name, costs if name == "optimal" else ()) for name in GRIDS]


def ways(size: int, calls: int):
    """Every sequence of numbers hidden, from size to 0, that falls in each of so many calls."""
    for inner in itertools.combinations(range(size - 1, 0, -1), calls - 1):
        yield (size, *inner, 0)


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_finds_the_best_of_all_counts(seed):
    curve = np.sort(np.random.default_rng(seed).random(9)).tolist()
    for calls in range(1, 10):
        cost = {way: sum((a - b) * curve[a - 1] for a, b in itertools.pairwise(way)) for way in ways(9, calls)}
        found = optimal_hidden(tuple(curve), calls)
        assert found in cost and cost[found] <= min(cost.values()) + 1e-6


def test_on_a_flat_curve_counts_are_even():
    assert optimal_hidden((1.0,) * 12, 4) == (12, 9, 6, 3, 0)


def test_the_optimal_counts_lower_the_enumerated_divergence():
    """Of all ways to reveal three tokens in two calls; and the divergence is that of absorbing.py's weights."""
    for world in (WORLD, parity()):
        process = Subject(Masked).ideal(world)
        curve = world.p.numpy() @ np.nan_to_num(exact_curve(process, world.texts))
        divergences = {way: expected_divergence(curve[1:], way) for way in ways(world.length, 2)}
        best = optimal_hidden(tuple(rising(curve[1:])), 2)
        assert divergences[best] <= min(divergences.values()) + 1e-9
        for way, divergence in divergences.items():
            counts = (-np.diff(way)).tolist()
            formula = curve @ (count_weights(world.length, counts) - process.curve_weights(world.length, None)[0])
            assert divergence == pytest.approx(formula, abs=1e-9)


def test_the_optimal_grid_beats_the_even_one_where_the_curve_bends():
    """A chain of 16 tokens that hardly change: few shown tokens tell nearly all. Its exact curve, from draws."""
    stay = torch.tensor([[0.95, 0.05], [0.05, 0.95]], dtype=torch.float64)
    world = HiddenMarkov(torch.full((2,), 0.5).double(), stay, torch.eye(2, dtype=torch.float64), 16)
    process = Subject(Masked).ideal(world)
    costs = measure_costs(process, list(world.draw(512, 0).numpy()), examples=1024, seed=1)
    curve = smooth(costs)
    even, best = (Grid(*how).hidden(16, 16, 4) for how in (("time",), ("optimal", costs)))
    assert expected_divergence(curve, best) < 0.8 * expected_divergence(curve, even)


def test_a_falling_sequence_is_made_flat_and_a_rising_one_is_kept():
    assert rising([3.0, 2.0, 1.0]).tolist() == [2.0, 2.0, 2.0]
    assert rising([1.0, 2.0, 4.0]).tolist() == [1.0, 2.0, 4.0]
    assert np.allclose(smooth(COSTS), COSTS)
    noisy = np.linspace(0.5, 3, 64) + 0.1 * np.random.default_rng(0).standard_normal(64)
    assert np.abs(smooth(noisy) - np.linspace(0.5, 3, 64)).max() < 0.1


@pytest.mark.parametrize("grid", grids(), ids=lambda grid: grid.name)
def test_every_call_of_exact_counts_reveals_something(grid):
    for free, length, calls in itertools.product((1, 7, 64), (64, 100), (1, 3, 32, 64, 200)):
        hidden = grid.hidden(free, length, calls)
        assert hidden[0] == free and hidden[-1] == 0 and len(hidden) == min(calls, free) + 1
        assert all(a > b for a, b in itertools.pairwise(hidden))


def test_grids_are_what_their_names_say():
    u = np.arange(9) / 8
    rate = lambda share: share  # noqa: E731
    assert np.allclose(Grid("rate").times(8, rate), 1 - u) and np.allclose(Grid().times(8, rate), 1 - u)
    assert np.allclose(Grid("quadratic").times(8, rate), (1 - u) ** 2)
    assert np.allclose(Grid("cosine").times(8, rate), np.cos(np.pi / 2 * u))
    inner = np.array(Grid("log_snr").times(8, rate))[1:-1]
    assert np.allclose(np.diff(np.log((1 - inner) / inner)), 12 / 8)
    # What a token costs is 3 t^2: the calls' times are where that, and not t, falls by equal parts (but for a share).
    costs = tuple(3 * (k / 64) ** 2 for k in range(1, 65))
    t = equal_entropy(costs, 8)
    assert np.allclose(0.95 * t**2 + 0.05 * t, 1 - u, atol=2e-3)


def test_among_reals_the_grids_are_those_of_their_signal():
    process = Subject(AnalogBits, AnalogBitsConfig(schedule="cosine", self_conditioning=0.0)).silent(V)
    free = torch.ones(L, dtype=torch.bool)
    t = torch.tensor(process.on(Grid("log_snr")).plan(free, 8, "ddim")[1:-1], dtype=torch.float64)
    assert torch.allclose(process.log_snr(t).diff(), torch.tensor(-2 * LOWEST / 8, dtype=torch.float64), atol=1e-6)
    t = torch.tensor(process.on(Grid("rate")).plan(free, 8, "ddim")[1:-1], dtype=torch.float64)
    assert torch.allclose(torch.sigmoid(-process.log_snr(t)), 1 - torch.arange(1, 8).double() / 8, atol=1e-6)


CASES = [
    (Masked, MaskedConfig(), "random"), (Masked, MaskedConfig(schedule="cosine"), "ancestral"),
    (Uniform, None, "bridge"), (BlockDiffusion, BlockConfig(block_length=3), "random"),
    (ScoreEntropy, ScoreEntropyConfig(noise="geometric"), "tweedie"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config", "sampler"), CASES, ids=lambda case: getattr(case, "__name__", None))
@pytest.mark.parametrize("grid", grids()[1:], ids=lambda grid: grid.name)
def test_bounds_and_draws_follow_the_grid(family, config, sampler, grid):
    """bound_T(x) >= -log law_T(x) for a wrong network, and samples have the enumerated law, on every grid."""
    process = Subject(family, config).wrong(WORLD, 0).on(grid)
    law = enumerated_law(process, L, 2, sampler)
    assert float(law.sum()) == pytest.approx(1)
    assert (torch.from_numpy(call_bound(process, WORLD.texts, 2, sampler)) >= -law.log() - 1e-8).all()
    *_, last = sample(process, Noise.of(11, 2000), L, 2, sampler=sampler)
    assert misfit(torch.bincount(WORLD.index(last.tokens), minlength=V**L).double(), law, 2000) < 6
    assert int(last.calls.max()) <= 2


def test_costs_are_measured_where_they_are():
    """Against the enumerated curve, for exact counts; of a network that says nothing, log V at every level."""
    process = Subject(Masked).ideal(WORLD)
    windows = list(WORLD.draw(3000, 0).numpy())
    curve = exact_curve(process, torch.from_numpy(np.stack(windows))).mean(0)[1:]
    assert np.allclose(measure_costs(process, windows, examples=9000), curve, atol=0.05)
    silent = measure_costs(Subject(BlockDiffusion).silent(V), windows, examples=64)
    assert np.allclose(silent, np.log(V)) and len(silent) == 2
    assert len(measure_costs(Subject(Uniform).ideal(WORLD), windows, examples=256)) == LEVELS
    assert measure_costs(process, windows, examples=3) == ()


def test_a_run_keeps_its_grid_and_goes_by_it(tmp_path, capsys):
    run = small_run(tmp_path / "run", "masked", 12).model
    assert run.process.grid.name == "time"
    with pytest.raises(UserError, match="--keep-grid"):
        run.sample(n=1, grid="optimal")
    with pytest.raises(UserError, match="--grid must be one of"):
        run.sample(n=1, grid="circular")
    (tmp_path / "run" / "grid.json").write_text(json.dumps({"costs": [0.1, 0.2, 2.0, 2.1]}))
    # The sampler is named: auto would bring the grid that it was measured best on.
    assert main(["sample", str(tmp_path / "run"), "--json", "--calls", "4", "-n", "1", "--sampler", "random"]) == 0
    assert json.loads(capsys.readouterr().out)["grid"] == "optimal"
    assert main(["sample", str(tmp_path / "run"), "--json", "--grid", "cosine", "--top-k", "3", "-n", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["grid"] == "cosine"
    (tmp_path / "run" / "grid.json").write_text("{}")
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(UserError):
        grid_of(tmp_path / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of 60 steps on one text, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 400)
    for name in ("masked", "autoregressive"):
        settings = ["network.width=32", "network.heads=2", "training.batch=32"]
        td.train(folder / name, "cpu", family=name, data=str(folder / "my.txt"), length=16, depth=1, steps=60,
                 settings=settings)  # fmt: skip
    return folder


def test_training_leaves_a_grid_where_there_is_one(trained):
    held = json.loads((trained / "masked" / "grid.json").read_text())
    assert len(held["costs"]) == 16 and held["examples"] == 60 * 32 // 25
    assert td.load(trained / "masked", "cpu").process.grid == Grid("optimal", tuple(held["costs"]))
    assert not (trained / "autoregressive" / "grid.json").exists()


def test_the_commands_of_the_page_of_samplers_run(trained, capsys):
    run = str(trained / "masked")
    (trained / "masked" / "grid.json").unlink()
    assert main(["eval", run, "--samples", "0", "--calls", "4", "--json", "--grid", "optimal"]) == 2
    assert "--keep-grid" in capsys.readouterr().err
    assert main(["eval", run, "--samples", "0", "--calls", "4", "--json", "--keep-grid"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["grid"] == "optimal" and [figure["calls"] for figure in said["by_calls"]] == [4]
    assert main(["eval", run, "--samples", "0", "--sampler", "margin", "--calls", "4,16", "--eval-tokens", "640"]) == 0
    shown = capsys.readouterr().out
    assert "at    4 calls  " in shown and "(exact; sampler: margin, grid: optimal)" in shown
    figures = [line for line in shown.splitlines() if "sampler: margin" in line]
    assert len(figures) == 2 and not any("<=" in line for line in figures)  # exact
    assert main(["eval", str(trained / "autoregressive"), "--samples", "0", "--keep-grid"]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert main(["eval", run, "--keep-grid", "--data", "my.txt"]) == 2


def test_the_benchmark_of_samplers_goes_on_where_it_was_stopped(trained, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import samplers

    summary, texts = trained / "summary.json", trained / "texts.jsonl"
    monkeypatch.setattr(samplers, "PART", 4)
    runs = ["samplers.py", str(trained / "masked"), "--judge", str(trained / "autoregressive"), "--texts", str(texts)]
    monkeypatch.setattr("sys.argv", [*runs, "--calls", "2,4", "--parts", "1", "--summary", str(summary)])
    samplers.main()
    lines = texts.read_text().splitlines()
    found = json.loads(summary.read_text())
    assert {r["sampler"] for r in found["rows"]} == set(Subject(Masked).silent(V).steps)
    kinds = {name.split()[0]: like[2] for name, like in found["likelihoods"]["masked"].items()}
    assert kinds["random"] == "upper" and kinds["margin"] == "exact" and "remask" not in kinds
    assert all(r["made"] <= r["calls"] or r["sampler"] == "first_hitting" for r in found["rows"])
    samplers.main()
    assert texts.read_text().splitlines() == lines  # nothing was missing


def test_a_grid_that_there_is_not_is_refused_before_anything_is_loaded(tmp_path, capsys):
    for verb in ("sample", "eval"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        help_text = capsys.readouterr().out
        assert all(name in help_text for name in GRIDS)
        assert main([verb, str(tmp_path / "none"), "--grid", "circular"]) == 2
        assert "--grid must be one of" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "none"), "--top-k", "0"]) == 2
    assert "--top-k must be from 1" in capsys.readouterr().err
