"""examples/control.py: its parts against what is known, and all of it on runs of nothing."""

from __future__ import annotations

import json
import math

import control
import pytest

import textdiffusion as td
from textdiffusion.families import family
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.verification.subject import Subject

SETTINGS = ["training.batch=8", "network.width=32", "network.heads=2", "network.ngrams=0", "training.evaluations=1"]


@pytest.mark.parametrize("name", ["masked", "sparse_distribution"])
def test_the_bits_of_a_gap_are_those_of_its_conditional(name):
    """With the exact posterior in the network's place the mean over orders is -log p(gap | the rest)."""
    world = random_table(2, 5, seed=4)
    ids, gap = world.texts[11], slice(1, 4)
    agrees = (world.texts[:, [0, 4]] == ids[[0, 4]]).all(-1)
    exact = -math.log2(float(world.p[11] / world.p[agrees].sum())) / 3
    found = control.gap_bits(Subject(family(name)).ideal(world), ids.numpy(), gap, draws=300)
    assert found == pytest.approx(exact, rel=0.03)
    assert control.gap_bits(Subject(family("uniform")).ideal(world), ids.numpy(), gap) is None


def test_the_bits_of_a_gap_from_its_left_are_exact():
    world = random_table(2, 5, seed=4)
    ids, p = world.texts[11], world.p.view([2] * 5)
    left = p[ids[0]].sum()
    exact = -math.log2(float(p[tuple(ids[:4])].sum() / left)) / 3
    judge = type("Judge", (), {"process": Subject(family("autoregressive")).ideal(world)})
    assert control.left_bits(judge, ids.numpy(), slice(1, 4)) == pytest.approx(exact)


def test_naive_bayes_tells_texts_apart():
    classify = control.NaiveBayes({"sea": "the waves and the shore " * 20, "sums": "one and two are three " * 20})
    assert classify("waves on a shore") == "sea" and classify("two and one") == "sums"


def test_all_of_it_runs_and_takes_up_where_it_was_stopped(tmp_path, capsys):
    book = tmp_path / "two"
    book.mkdir()
    for name, line in (("sea", "the waves and the shore, "), ("sums", "one and two are three. ")):
        (book / f"{name}.txt").write_text((line + "The Prince went to war.\n") * 40)
    runs = {}
    for name, label in (("masked", "file"), ("autoregressive", None)):
        runs[name] = str(tmp_path / name)
        td.train(
            runs[name], family=name, data=str(book), label=label, depth=1, steps=2, length=32, settings=SETTINGS
        )  # fmt: skip
    out = tmp_path / "out"
    sizes = {"texts": 2, "length": 32, "calls": 2, "window": 32, "gap": 4, "gaps": 2, "alternatives": 2, "draws": 2}
    words = [str(out), "--runs", runs["masked"], "--judge", runs["autoregressive"], "--labelled", runs["masked"]]
    words += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    control.main(words)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    held = [row for row in rows if row["part"] == "constraints"]
    assert len(held) == 10 and all(row["satisfied"] == 2 for row in held)
    assert {row["part"] for row in rows} == {"constraints", "gaps", "guidance"}
    table, before = (out / "control.md").read_text(), (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text("".join(line + "\n" for line in before.splitlines()[:-1]))
    control.main(words)
    assert len((out / "rows.jsonl").read_text().splitlines()) == len(rows)
    assert table.count("\n") == (out / "control.md").read_text().count("\n")
    capsys.readouterr()
    with pytest.raises(td.UserError, match="--judge"):
        control.main([str(out), "--runs", runs["masked"]])
