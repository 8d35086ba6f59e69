"""Conditional models from end to end: labels of data, training with them, and what is written, edited and ranked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import textdiffusion as td
from textdiffusion.commands.cli import main
from textdiffusion.errors import UserError
from textdiffusion.evaluation.ranking import rank
from textdiffusion.text.data import DataConfig, load_corpus, tokenize
from textdiffusion.text.tokenizer import build
from textdiffusion.text.windows import Windows, evaluation_labels, evaluation_windows

LETTERS = {"early": "abcd", "late": "wxyz"}


def text_of(letters: str, size: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters + " "), size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of letters that they do not share."""
    place = tmp_path_factory.mktemp("two")
    for number, (name, letters) in enumerate(LETTERS.items()):
        (place / f"{name}.txt").write_text(text_of(letters, 4000, number))
    return place


def records(path, labels, key="kind"):
    rows = [{"text": text_of(LETTERS[k], 60, i), key: k} for i, k in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("kind", ["file", "folder", "field"])
def test_every_window_is_of_one_label_and_has_it(folder, tmp_path, kind):
    if kind == "file":
        config = DataConfig(str(folder), label="file")
    elif kind == "folder":
        for name in LETTERS:
            (tmp_path / name).mkdir()
            (tmp_path / name / "all.txt").write_text((folder / f"{name}.txt").read_text())
        config = DataConfig(str(tmp_path), label="folder")
    else:
        config = DataConfig(str(records(tmp_path / "a.jsonl", ["early", "late"] * 60)), label="kind")
    corpus = load_corpus(config)
    assert len(corpus.labels["train"]) == len(corpus.train) and set(corpus.labels["validation"]) == set(LETTERS)
    tokenizer = build("char", corpus.train)
    runs = tokenize(corpus, tokenizer, tmp_path / "cache")
    windows, names = Windows(runs["train"], 32, 0), sorted(LETTERS)
    found = set()
    for step in (0, 40):
        numbers = np.arange(step, step + 30)
        for ids, label in zip(windows.rows(numbers), windows.labels(numbers)):
            assert set(tokenizer.decode(ids.tolist())) - {" ", "\n"} <= set(LETTERS[names[label]])
            found.add(int(label))
    assert found == {0, 1}
    held_out = evaluation_windows(runs["validation"], 32)
    for ids, label in zip(held_out, evaluation_labels(runs["validation"], 32)):
        assert set(tokenizer.decode(ids.tolist())) - {" ", "\n"} <= set(LETTERS[names[label]])
    assert not set(corpus.train) & set(corpus.validation)


def test_what_is_no_label_is_refused(folder, tmp_path):
    for data, label, line in (
        (folder, "folder", "--label folder finds 1 different labels"),
        (
            records(tmp_path / "a.jsonl", ["early", "late"] * 20),
            "sort",
            "record 1: no --label sort; its fields",
        ),
        (records(tmp_path / "b.jsonl", ["early"] * 20), "kind", "finds 1 different"),
    ):
        with pytest.raises(UserError, match=line):
            load_corpus(DataConfig(str(data), label=label))
    with pytest.raises(UserError, match="the built-in text has no labels"):
        load_corpus(DataConfig(label="file"))


SETTINGS = ["training.batch=16", "network.width=32", "network.heads=2", "training.evaluations=1"]


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory) -> td.Model:
    out = tmp_path_factory.mktemp("labelled") / "run"
    return td.train(out, data=str(folder), label="file", depth=1, steps=60, length=16, settings=SETTINGS)


def share(texts: list[str], label: str) -> float:
    """Of the letters, those of the label."""
    letters = [c for text in texts for c in text if c not in " \n"]
    return sum(c in LETTERS[label] for c in letters) / len(letters)


def test_texts_have_their_label_and_guidance_gives_more_of_it(model):
    for label in LETTERS:
        shares = [share(model.sample(8, calls=16, label=label, guidance=w), label) for w in (-0.7, 0.0, 3.0)]
        assert shares[0] < shares[1] > 0.8 and shares[2] > 0.97, shares
    free = share(model.sample(16, calls=8, label="late", guidance=-1.0), "late")
    assert 0.2 < free < 0.8  # either file's, as without a label


@pytest.mark.parametrize(
    "name, body", [("analog_bits", "transformer"), ("analog_bits", "unet"), ("gaussian_embedding", "transformer")]
)
def test_reals_learn_labels_too(folder, tmp_path, name, body):
    """In few steps: given the label, text costs less than with the other one."""
    settings = [*SETTINGS, f"network.body={body}"]
    model = td.train(
        tmp_path / "run", family=name, data=str(folder), label="file", depth=1, steps=100, length=16, settings=settings
    )
    ids = torch.tensor([model.tokenizer.encode(text_of(LETTERS["early"], 16, 7 + i)) for i in range(4)])
    costs = [rank(model.process, ids, model.tokenizer.characters, 16, label=k, draws=8) for k in (0, 1)]
    right, wrong = (sum(figure.bits_per_char for _, figure in found) / len(found) for found in costs)
    assert right < wrong - 0.1


def test_an_edit_towards_the_other_label_changes_the_letters(model):
    old = "abcd dcba abba c"
    assert model.edit(old, 0.0, label="late") == [old]
    new = model.edit(old, 1.0, 4, 32, label="late", guidance=2.0)
    assert share(new, "late") > 0.9 and all(len(text) == len(old) for text in new)
    some = model.edit(old, 0.3, 8, 8, label="late")
    kept = np.mean([a == b for text in some for a, b in zip(text, old)])
    assert 0.5 < kept < 0.95


def test_rewards_and_ranking_in_the_api(model):
    plain = model.sample(6, calls=8)
    more = model.sample(6, calls=8, particles=8, reward=lambda texts: [3.0 * text.count("a") for text in texts])
    assert "".join(more).count("a") > 2 * "".join(plain).count("a")
    best = model.best(3, n=6, calls=4, infill="ab____wx")
    figures = [figure.bits_per_char for _, figure in best]
    assert figures == sorted(figures) and all(t.startswith("ab") and t.endswith("wx") for t, _ in best)
    with pytest.raises(UserError, match="--best must be from 1 to 2"):
        model.best(3, n=2)
    for how, line in (
        ({"reward": lambda texts: [0.0]}, "ask for some, such as particles=8"),
        ({"reward": lambda t: [0.0] * len(t), "particles": 2, "edit": "ab"}, "leave out --edit"),
        ({"edit": "abc", "length": 5}, "keeps its length, here 3 tokens"),
        ({"edit": "ab", "prompt": "a"}, "leave out --prompt"),
        ({"label": "noon"}, "this run has no label 'noon'; it has: early, late"),
        ({"guidance": 1.0}, "give --label as well"),
        ({"label": "late", "guidance": -3.0}, "--guidance must be from -1"),
    ):
        with pytest.raises(UserError, match=line):
            model.sample(2, calls=2, **how)


def test_a_likelier_text_ranks_first(model):
    """Among letters of one file, and of both; given the label, too."""
    ids = torch.tensor([model.tokenizer.encode(t) for t in ("abcd ddbc cbda a", "azcx dwby czdx a")])
    order = rank(model.process, ids, model.tokenizer.characters, model.window, draws=16)
    assert [number for number, _ in order] == [0, 1] and order[0][1].kind == "upper"
    told = [rank(model.process, ids[:1], model.tokenizer.characters, 16, label=k, draws=16)[0][1] for k in (0, 1)]
    assert told[0].bits_per_char < order[0][1].bits_per_char < told[1].bits_per_char


def test_the_command_line(model, folder, tmp_path, capsys):
    run = str(folder / "run")
    flags = ["--depth", "1", "--steps", "4", "--length", "16", *(x for s in SETTINGS for x in ("--set", s))]
    assert main(["train", "--data", str(folder / "*.txt"), "--label", "file", "--out", run, *flags]) == 0
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["labels"] == ["early", "late"] and config["data"]["label"] == "file"
    assert "early, late" in (folder / "run" / "README.md").read_text()
    capsys.readouterr()
    how = ["--label", "late", "--guidance", "1.5", "--ramp", "0.5", "--calls", "4", "--json"]
    assert main(["sample", run, "-n", "2", *how]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 4
    assert main(["sample", run, "-n", "1", "--edit", "abcd wxyz", "--strength", "0.5", "--calls", "2", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["samples"]
    assert len(said["text"]) == 9 and said["calls"] <= 2 and (said["changes"] or said["text"] == "abcd wxyz")
    assert main(["sample", run, "-n", "1", "--edit", "abcd", "--strength", "0"]) == 0
    assert capsys.readouterr().out == "abcd\nchanged: nothing\n"
    assert main(["sample", run, "-n", "3", "--best", "2", "--infill", "ab__", "--calls", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("--- 1  <= ") and lines[0].endswith("bits/char") and len(lines) == 4
    assert main(["eval", run, "--samples", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unlabelled"]["bits_per_char"] > 0 and report["bits_per_char"] > 0
    for words, line in (
        (["--label", "noon"], "it has: early, late"),
        (["--guidance", "1"], "give --label as well"),
        (["--strength", "0.5"], "belongs to --edit and --proofread"),
        (["--best", "2", "--watch"], "--best chooses among texts once they are written"),
        (["--edit", "a", "--regex", "a"], "leave out --edit"),
    ):
        assert main(["sample", run, *words]) == 2
        assert line in capsys.readouterr().err
    assert main(["train", "--set", "network.classes=3", "--dry-run"]) == 2
    assert "use --label FIELD" in capsys.readouterr().err
    # Other labels than those the run knows: it cannot go on.
    (folder / "late.txt").rename(folder / "later.txt")
    assert main(["train", "--out", run, "--resume"]) == 2
    assert "no longer has the labels of this run" in capsys.readouterr().err
    (folder / "later.txt").rename(folder / "late.txt")
