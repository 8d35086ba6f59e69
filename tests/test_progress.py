"""What is told of long work while it is done: shares that rise to 1, to who watches, and a bar only in a terminal."""

from __future__ import annotations

import itertools
import os
import pty
import sys

import pytest

from small_runs import TEXT, small_run
from textdiffusion.commands.cli import main
from textdiffusion.progress import watched
from textdiffusion.report import report


def risen(told: list[tuple[str, float]]) -> dict[str, list[float]]:
    """The shares that were told, by what they are of; they may only rise, to 1."""
    shares = {what: [share for _, share in group] for what, group in itertools.groupby(told, lambda pair: pair[0])}
    for of in shares.values():
        assert of == sorted(of) and of[0] >= 0 and of[-1] == pytest.approx(1), of
    return shares


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("autoregressive", {}),  # exact: one reading, however many draws
        ("masked", {"calls": [2, 4]}),  # by a curve
        ("masked", {"calls": [2, 4], "sampler": "margin"}),  # and by an order
        ("analog_bits", {"calls": [2, 4]}),  # by draws, each budget by itself
    ],
)
def test_reading_a_text_tells_how_far_it_is(tmp_path, family, how):
    model = small_run(tmp_path / "run", family, 8).model
    (tmp_path / "other.txt").write_text(TEXT * 30)
    told: list[tuple[str, float]] = []
    how = {"calls": [], "sampler": None} | how
    with watched(lambda what, share: told.append((what, share))):
        report(
            model, data=str(tmp_path / "other.txt"), split="validation", tokens=None, draws=3, samples=0, seed=0, **how
        )
    shares = risen(told)["reading held-out text"]
    assert len(set(shares)) > (3 if family != "autoregressive" else 2)


def test_writing_and_ranking_tell_how_far_they_are(tmp_path):
    model = small_run(tmp_path / "run", "masked", 8).model
    told: list[tuple[str, float]] = []
    with watched(lambda what, share: told.append((what, share))):
        model.sample(40, calls=4)  # two batches
    assert len(set(risen(told)["writing"])) == 9
    told.clear()
    with watched(lambda what, share: told.append((what, share))):
        model.best(1, 3, draws=2, calls=2)
    assert set(risen(told)) == {"writing", *(f"reading text {i} of 3" for i in (1, 2, 3))}
    told.clear()
    model.sample(2, calls=2)
    assert not told


@pytest.mark.parametrize(
    ("where", "flags", "bar"), [("terminal", [], True), ("terminal", ["--json"], False), ("pipe", [], False)]
)
def test_a_bar_is_shown_in_a_terminal_only(tmp_path, monkeypatch, capsys, where, flags, bar):
    small_run(tmp_path / "run", "masked", 8)
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        if where == "terminal":
            monkeypatch.setattr(sys, "stderr", terminal)
            monkeypatch.setenv("TERM", "xterm")
        assert main(["sample", str(tmp_path / "run"), "-n", "2", "--calls", "2", *flags]) == 0
        terminal.write("|")
        terminal.flush()
        seen = os.read(reader, 100_000).decode()
    os.close(reader)
    assert ("writing" in seen) == bar
    assert "writing" not in capsys.readouterr().err
