"""Corpora prepared in shards: the same whoever makes them and however often they are stopped, and what reads them."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from textdiffusion.commands.cli import main
from textdiffusion.errors import UserError
from textdiffusion.files import checksum
from textdiffusion.text import preparing
from textdiffusion.text.preparing import _pieces, prepare_corpus
from textdiffusion.text.shards import BLOCK, Mixture, open_prepared, parse_mixture, training_text
from textdiffusion.text.windows import TokenRuns, Windows

WORDS = ["time", "noise", "token", "mask", "river", "cloud", "snow", "ünder", "語", "a", "the", "of", "and", "wrote"]


class Here:
    """A pool of processes that is this one: what several find is in the test that starts them."""

    def __init__(self, workers, context, start, arguments):
        start(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def shutdown(self, **how):
        pass

    def submit(self, act, *arguments):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(act(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(preparing, "ProcessPoolExecutor", Here)


def sentences(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(3, 40))) + "." for _ in range(count)]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Two text files, one of records, and a small table."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(sentences(1, 1500)), encoding="utf-8")
    (folder / "b.txt").write_text("\n".join(sentences(2, 300)), encoding="utf-8")
    with open(folder / "c.jsonl", "w", encoding="utf-8") as file:
        for text in sentences(3, 2000):
            file.write(json.dumps({"text": text, "n": len(text)}) + "\n")
    (folder / "d.csv").write_text("id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(sentences(4, 500))))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def text_of(part: TokenRuns, tokenizer) -> list[str]:
    """Each run as text, the end-of-text token as |."""
    edges = part.runs.tolist()
    return [tokenizer.decode(part.tokens[a:b], "|") for a, b in itertools.pairwise(edges)]


def test_all_of_a_corpus_is_there_once(sources, tmp_path, here):
    out = tmp_path / "out"
    done = prepare_corpus(str(sources), out, tokenizer="byte", validation_share=0.1, workers=1, piece=20_000)
    corpus = open_prepared(out)
    assert done.shards > 8 and not list(out.glob("piece-*"))
    runs = {name: text_of(part, corpus.tokenizer) for name, part in corpus.parts.items()}
    every = "".join(runs["train"] + runs["validation"])
    whole = [json.loads(line)["text"] for line in (sources / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = [text for run in runs["train"] + runs["validation"] for text in run.split("|")]
    assert set(whole + sentences(4, 500)) <= set(documents)
    letters = "".join((sources / f"{name}.txt").read_text(encoding="utf-8") for name in "ab")
    letters += "".join(whole) + "".join(sentences(4, 500)) + "|" * 2500
    assert sorted(every) == sorted(letters)
    assert 0.02 < done.validation_tokens / (done.tokens + done.validation_tokens) < 0.25
    assert not set(runs["train"]) & set(runs["validation"])
    for part in corpus.parts.values():
        assert part.characters == sum(len(t) for t in text_of(part, corpus.tokenizer))


def test_stopped_and_gone_on_with_it_is_the_same(sources, tmp_path, here, monkeypatch):
    """Stopped after every piece in turn; and shards lost or damaged afterwards are made anew, and no others."""
    how = {"tokenizer": "bpe:300", "workers": 1, "piece": 40_000}
    prepare_corpus(str(sources), tmp_path / "whole", **how)
    out, make = tmp_path / "part", preparing._make
    made = []

    def once(piece):
        if made and made[-1] == "stop":
            raise KeyboardInterrupt
        made.append("stop")
        return make(piece)

    monkeypatch.setattr(preparing, "_make", once)
    stops = 0
    while not (out / "corpus.json").exists():
        made.clear()
        try:
            prepare_corpus(str(sources), out, **how)
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    monkeypatch.setattr(preparing, "_make", make)
    whole = contents(tmp_path / "whole")
    assert contents(out) == whole
    shards = sorted(out.glob("train-*.npy"))
    raw = bytearray(shards[0].read_bytes())
    raw[-1] ^= 1
    shards[0].write_bytes(raw)
    shards[1].unlink()
    assert prepare_corpus(str(sources), out, **how).made == 2 and contents(out) == whole
    assert prepare_corpus(str(sources), out, **how).made == 0 and contents(out) == whole


def test_a_mistaken_field_can_be_put_right_in_the_same_folder(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    rows = [{"body": f"story {i} of a fox", "note": None, "blank": ""} for i in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for field in ("text", "note", "blank"):  # none of that name, and two that hold nothing
        with pytest.raises(UserError):
            prepare_corpus(str(source), out, tokenizer="byte", text_field=field, workers=1)
    assert prepare_corpus(str(source), out, tokenizer="char", text_field="body", workers=1).tokens
    assert json.loads((out / "corpus.json").read_text())["tokenizer"] == "char"


def test_other_settings_or_files_are_refused(sources, tmp_path, here):
    out = tmp_path / "out"
    prepare_corpus(str(sources / "b.txt"), out, tokenizer="byte", workers=1)
    with pytest.raises(UserError, match="other settings or from other files"):
        prepare_corpus(str(sources / "b.txt"), out, tokenizer="char", workers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "somebody's.txt").write_text("own")
    with pytest.raises(UserError, match="holds other files"):
        prepare_corpus(str(sources / "b.txt"), tmp_path / "full", workers=1)


def test_what_cannot_be_trained_on_is_said_at_once(tmp_path, here, capsys):
    assert main(["prepare", "pydoc", str(tmp_path / "out")]) == 2
    assert "needs no preparing" in capsys.readouterr().err
    lines = [json.dumps({"text": f"It was a bright cold day, number {i}"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for share, says in (("0.0001", "training needs both"), ("0.5", "train with: textdiffusion train")):
        out = ["--tokenizer", "byte", "--workers", "1", "--validation-share", share]
        assert main(["prepare", str(tmp_path / "a.jsonl"), str(tmp_path / share), *out]) == 0
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": 2}\n', "no JSON object"),
        ("a.jsonl", b'{"words": "one"}\n', "--text-field"),
        ("a.txt", b"caf\xe9\n" * 100, "not UTF-8"),
        ("a.txt", b"a\0b\n" * 100, "is zero"),
        ("a.txt", b"", "no text"),
    ],
)
def test_what_is_no_text_is_one_line(name, body, says, tmp_path, here, capsys):
    (tmp_path / name).write_bytes(body)
    command = ["prepare", str(tmp_path / name), str(tmp_path / "out"), "--tokenizer", "byte", "--workers", "1"]
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0], said


def test_a_piece_ends_where_a_line_does_or_a_character(tmp_path):
    for body in ("語" * 700_000, "\n".join(["語" * 3000] * 300)):
        (tmp_path / "a.txt").write_text(body, encoding="utf-8")
        size = (tmp_path / "a.txt").stat().st_size
        plan = preparing.Plan("x", [[str(tmp_path / "a.txt"), size]], "byte", "text", 0.1, 100_001)
        spans = [span for piece in _pieces(plan) for span in piece.spans]
        assert spans[0][1] == 0 and spans[-1][2] == size and len(spans) > 1
        assert all(a[2] == b[1] for a, b in itertools.pairwise(spans))
        texts = [text for span in spans for text, _ in preparing._span_texts(*span, "text")]
        assert "".join(texts) == body


def test_shards_read_like_one_array(sources, tmp_path, here):
    out = tmp_path / "out"
    prepare_corpus(str(sources), out, tokenizer="char", workers=1, piece=30_000, validation_share=0.05)
    part = open_prepared(out).parts["train"]
    files = sorted(out.glob("train-*.npy"))
    whole = TokenRuns(np.concatenate([np.load(f) for f in files]), part.runs, part.characters)
    sharded, flat = Windows(part, 48, seed=3), Windows(whole, 48, seed=3)
    rows = np.random.default_rng(0).integers(0, 3 * flat.per_epoch, 500)
    assert np.array_equal(sharded.rows(rows), flat.rows(rows)) and len(files) > 5


def test_a_damaged_shard_is_never_read(sources, tmp_path, here):
    out = tmp_path / "out"
    prepare_corpus(str(sources), out, tokenizer="byte", workers=1, piece=50_000)
    file = sorted(out.glob("train-*.npy"))[0]
    body = file.read_bytes()
    for broken in (body[:-1], body[:-1] + bytes([body[-1] ^ 1]), b"", body[:100]):
        file.write_bytes(broken)
        windows = Windows(open_prepared(out).parts["train"], 32, 0)
        with pytest.raises(UserError, match=r"train-000000\.npy is damaged"):
            windows.rows(np.arange(windows.per_epoch))


def test_a_corpus_that_names_files_elsewhere_is_refused(sources, tmp_path, here):
    out = tmp_path / "out"
    prepare_corpus(str(sources / "b.txt"), out, tokenizer="byte", workers=1, piece=50_000)
    file = out / "corpus.json"
    body = json.loads(file.read_text())
    for changes in ({"file": "../train-1.npy"}, {"file": "/etc/passwd"}, {"runs": [0, 10**9]}, {"tokens": "many"}):
        wrong = json.loads(json.dumps(body))
        wrong["shards"]["train"][0] |= changes
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="is damaged"):
            open_prepared(out)


def test_a_mixture_keeps_its_weights_and_its_place():
    def corpus(value: int, size: int) -> Windows:
        return Windows(TokenRuns(np.full(size, value), np.array([0, size])), 10, seed=value)

    parts = [corpus(1, 5000), corpus(2, 700), corpus(3, 90_000)]
    mixture = Mixture(parts, [0.6, 0.301, 0.099], seed=5)
    rows = np.arange(3 * BLOCK)
    whole = mixture.rows(rows)
    for block in whole.reshape(3, BLOCK, 10):
        assert np.bincount(block[:, 0], minlength=4)[1:].tolist() == [600, 301, 99]
    shuffled = np.random.default_rng(0).permutation(rows)
    assert np.array_equal(Mixture(parts, [0.6, 0.301, 0.099], seed=5).rows(shuffled), whole[shuffled])
    # Each corpus is read in its own order, without a gap: the first 1,800 examples of the first, and so on.
    order = Windows(TokenRuns(np.arange(5000), np.array([0, 5000])), 10, seed=1)
    mixture = Mixture([order, corpus(9000, 5000)], [0.5, 0.5], seed=0)
    mine = mixture.rows(np.arange(2 * BLOCK))
    assert np.array_equal(mine[mine[:, 0] != 9000], order.rows(np.arange(BLOCK)))


@pytest.mark.parametrize("source", ["mix:", "mix:a", "mix:a=0", "mix:a=-1", "mix:a=nan", "mix:a=inf", "mix:=1,b=2"])
def test_a_mixture_that_cannot_be_read_is_refused(source):
    with pytest.raises(UserError, match="a mixture is written mix:FOLDER=WEIGHT"):
        parse_mixture(source)


def test_training_and_evaluation_read_prepared_corpora(sources, tmp_path, here, capsys):
    first, second, run = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    prepare_corpus(str(sources / "a.txt"), first, tokenizer="bpe:300", workers=1, validation_share=0.1)
    prepare_corpus(str(sources / "c.jsonl"), second, tokenizer=f"hf:{first}", workers=1, validation_share=0.1)
    data = f"mix:{first}=3,{second}=1"
    small = ["--length", "24", "--steps", "6", "--depth", "1", "--set", "network.width=32", "--set", "network.heads=2"]
    assert main(["train", "--data", data, "--out", str(run), "--json", *small, "--set", "training.batch=8"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["finished"] and body["best"] > 0
    assert json.loads((run / "config.json").read_text())["tokenizer"] == "bpe:300"
    assert main(["eval", str(run), "--json", "--eval-tokens", "500"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "upper"
    shutil.rmtree(second)
    prepare_corpus(str(sources / "b.txt"), second, tokenizer=f"hf:{first}", workers=1, validation_share=0.1)
    assert main(["train", "--resume", "--out", str(run)]) == 2
    assert "is not the one this run was trained on" in capsys.readouterr().err
    shutil.rmtree(second)
    prepare_corpus(str(sources / "b.txt"), second, tokenizer="byte", workers=1, validation_share=0.1)
    assert main(["train", "--data", data, *small]) == 2
    assert f"--tokenizer hf:{first}" in capsys.readouterr().err


def test_held_out_text_follows_the_weights(sources, tmp_path, here):
    for name in ("a.txt", "c.jsonl"):
        prepare_corpus(str(sources / name), tmp_path / name[0], tokenizer="byte", workers=1, validation_share=0.3)
    text = training_text(f"mix:{tmp_path / 'a'}=1,{tmp_path / 'c'}=3", 20, 0, 2000)
    with_end = [bool((w == 256).any()) for w in text.held_out]
    assert abs(len(text.held_out) - 100) <= 2 and 10 < sum(with_end) <= 75


# Runs a command and says what it and all its processes took. By itself: what a process is said to have held counts what
# its parent held when it was started, and the parent of these tests has loaded torch.
MEASURED = """
import json, resource, subprocess, sys, time
begin = time.monotonic()
said = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True).stdout
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": time.monotonic() - begin, "processor": used.ru_utime + used.ru_stime,
                  "megabytes": used.ru_maxrss / 1024, "said": json.loads(said)}))
"""
FULL = 10**9


@pytest.mark.slow
def test_a_large_corpus_in_little_memory(tmp_path):
    """Synthetic text, one gigabyte unless TEXTDIFFUSION_BYTES says otherwise: prepared by two processes, killed on the
    way, gone on with; no process takes more than 400 MB, all that was made is kept, and every character is there.

    The rate and how many cores were busy are printed; at full size more than 1.3 must have been, so that the machine
    should do nothing else.
    """
    size, out = int(os.environ.get("TEXTDIFFUSION_BYTES", str(FULL))), tmp_path / "out"
    source, block = tmp_path / "big.txt", "\n".join(sentences(0, 20_000)) + "\n"
    with open(source, "w", encoding="utf-8") as file:
        written = number = 0
        while written < size:
            written += file.write(f"{number}\n{block}")
            number += 1
    command = [sys.executable, "-m", "textdiffusion", "prepare", str(source), str(out), "--json", "--workers", "2",
               "--tokenizer", "bpe:1024"]  # fmt: skip
    pieces = -(-source.stat().st_size // preparing.PIECE)
    before = max(0, min(3, pieces - 3))  # made before the kill: two processes make two more at a time
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not ((out / "tokenizer.json").exists() and len(made_in(out)) >= before):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = made_in(out)
    assert len(there) >= before and not (out / "corpus.json").exists()
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    body, busy = found["said"], found["processor"] / found["seconds"]
    corpus = json.loads((out / "corpus.json").read_text())
    rate = source.stat().st_size * body["made"] / corpus["pieces"] / found["processor"] / 1e6
    print(f"{source.stat().st_size:,} bytes, killed after {len(there)} of {corpus['pieces']} pieces; the others in "
          f"{found['seconds']:.0f} s: {rate:.1f} MB a second of a core, {busy:.2f} cores busy, "
          f"{found['megabytes']:.0f} MB at most in a process")  # fmt: skip
    assert corpus["pieces"] - body["made"] == len(there), "what was made before the kill was made again"
    assert body["characters"] == written and body["validation_tokens"] > 0
    for shard in (shard for part in corpus["shards"].values() for shard in part):
        file = out / shard["file"]
        assert checksum(file) == shard["sha256"]
        assert there.get(file.name, file.stat().st_mtime_ns) == file.stat().st_mtime_ns  # not touched since
    assert found["megabytes"] < 400
    if size >= FULL and (os.cpu_count() or 1) >= 2:
        assert busy > 1.3


def made_in(out: Path) -> dict[str, int]:
    """Training shards of the pieces that are whole, and when they were written."""
    names = [f"train-{path.stem.removeprefix('piece-')}.npy" for path in out.glob("piece-*.json")]
    return {name: (out / name).stat().st_mtime_ns for name in names}
