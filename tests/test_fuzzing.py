"""Whatever comes in, from hands or from strangers: one line and exit code 2, or an answer; never a traceback or a hang.

A few inputs of each kind by default; 10,000 among the slow tests, and 100 command lines from outside.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from small_runs import TEXT, small_run
from textdiffusion import families
from textdiffusion.commands.cli import main
from textdiffusion.errors import UserError
from textdiffusion.text.tokenizer import build

LIMIT = 60  # seconds that no input may take
SHARES = {"arguments": 2500, "settings": 1500, "configs": 1500, "damage": 2000, "texts": 1500, "unicode": 1000}


def light(kind: str):
    return settings(max_examples=8, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


def heavy(kind: str):
    return settings(max_examples=SHARES[kind], deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder of its own to work in, with nothing else that could be changed."""
    folder, before = tmp_path_factory.mktemp("fuzz"), os.getcwd()
    os.chdir(folder)
    for family in ("masked", "block", "uniform"):
        small_run(folder / "kept" / family, family, 16)
    Path("text.txt").write_text(TEXT * 20)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """A training that would begin is an answer: what is fuzzed is what comes before it."""
    monkeypatch.setattr(
        "textdiffusion.training.terminal.follow", lambda *_, **__: (_ for _ in ()).throw(UserError("trains"))
    )
    monkeypatch.setattr("textdiffusion.doctor.estimate", lambda *_, **__: {"steps": 1})
    monkeypatch.setattr("textdiffusion.verification.verify", lambda *_: [])


def hung(*_):
    raise TimeoutError("a hang")


def answer(arguments: list[str]) -> tuple[int, str]:
    """Exit code and error output, and that they are as promised."""
    out, error = io.StringIO(), io.StringIO()
    before = set(Path.cwd().parent.iterdir())
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = main(arguments)
            except SystemExit as stop:  # argparse leaves so
                code = stop.code or 0
    finally:
        signal.alarm(0)
    said = error.getvalue()
    assert code in (0, 2), (arguments, code, said)
    if code == 2:
        assert len(said.strip().splitlines()) == 1 and said.startswith("textdiffusion"), (arguments, said)
    assert set(Path.cwd().parent.iterdir()) == before
    return code, said


@pytest.mark.parametrize("pattern", ["", "^$", "[[a]b]", "a{0}"])
def test_expressions_that_once_got_through(pattern):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        answer(["sample", "kept/masked", "-n", "1", "--length", "8", "--calls", "1", "--regex", pattern])


# -- arguments ----------------------------------------------------------------------------------------------------

WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NUMBER = st.sampled_from(["0", "1", "-1", "2", "3", "1e9", "nan", "inf", "-inf", "1e400", "0x10", "", "9" * 30, "½"])
VALUE = st.one_of(WORD, NUMBER)
PLACES = st.sampled_from(["kept/masked", "kept/block", "kept/uniform", "kept", "nowhere", "text.txt", "", "/dev/null"])
SMALL = st.sampled_from(["0", "1", "2", "-1", "x", "9" * 20, "1.5", ""])
FLAGS = {
    "sample": {
        "-n": SMALL, "--length": SMALL, "--calls": SMALL, "--seed": SMALL, "--temperature": VALUE, "--top-p": VALUE,
        "--sampler": VALUE, "--prompt": VALUE, "--infill": VALUE, "--must-contain": WORD, "--acrostic": WORD,
        "--particles": SMALL, "--proofread": WORD, "--strength": VALUE, "--stop": None, "--json": None,
        "--precision": st.sampled_from(["fp32", "bf16", "x"]), "--reproducible": None, "--words": PLACES,
    },
    "eval": {
        "--calls": st.one_of(VALUE, st.just("1,2")), "--eval-tokens": st.sampled_from(["16", "0", "x", "-5"]),
        "--samples": st.sampled_from(["0", "1", "-1", "y"]), "--draws": SMALL, "--split": VALUE, "--data": PLACES,
        "--sampler": VALUE, "--json": None, "--temperature": VALUE,
    },
    "train": {
        "--family": st.one_of(WORD, st.sampled_from(families.names())), "--data": PLACES, "--out": PLACES,
        "--tokenizer": st.one_of(WORD, st.sampled_from(["char", "byte", "bpe:300", "bpe:x", "bpe:-1"])),
        "--length": VALUE, "--depth": VALUE, "--steps": VALUE, "--minutes": VALUE, "--seed": VALUE, "--preset": VALUE,
        "--parallel": VALUE, "--processes": VALUE, "--dry-run": None, "--resume": None, "--text-field": VALUE,
        "--set": WORD, "--json": None,
    },
    "prepare": {"--validation-share": VALUE, "--workers": st.sampled_from(["-1", "x", "99999"]), "--tokenizer": WORD},
    "families": {"--json": None}, "verify": {"--json": None}, "doctor": {}, "nonsense": {},
}  # fmt: skip


@st.composite
def command_lines(draw) -> list[str]:
    verb = draw(st.sampled_from(sorted(FLAGS)))
    out = [verb]
    if verb in ("sample", "eval", "families", "verify"):
        out.append(draw(st.one_of(PLACES, WORD)))
    if verb == "prepare":  # into a place where nothing can be made
        out += [draw(PLACES), draw(st.sampled_from(["text.txt", "kept", "kept/masked", "text.txt/x"]))]
    if verb == "sample":
        out += ["--length", "4", "--calls", "1", "-n", "1"]
    if verb == "eval":
        out += ["--eval-tokens", "16", "--samples", "0"]
    for flag in draw(st.lists(st.sampled_from([*sorted(FLAGS[verb]), "--device", "--colour"]), max_size=4)):
        value = FLAGS[verb].get(flag, st.sampled_from(["cpu", "mps", "x"]))
        out += [flag] if value is None else [flag, draw(value)]
    return out


@light("arguments")
@given(command_lines())
def test_arguments(arguments):
    answer(arguments)


@pytest.mark.slow
@heavy("arguments")
@given(command_lines())
def test_many_arguments(arguments):
    answer(arguments)


FIELD = st.sampled_from(["width", "heads", "window", "depth", "rate", "steps", "batch", "seed", "schedule", "source",
                         "dropout", "convolution", "precision", "time", "weight", "x", ""])  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), WORD),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORD, inner, max_size=3)), max_leaves=6,
)  # fmt: skip
SETTING = st.builds(
    lambda part, field, value: f"{part}.{field}={value}",
    st.sampled_from(["network", "process", "training", "data", "x"]), FIELD,
    st.one_of(VALUE, JSON.map(json.dumps), st.sampled_from(["!!python/object/apply:os.mkdir [x]", "&a [*a]"])),
)  # fmt: skip


@light("settings")
@given(st.sampled_from(families.names()), st.lists(SETTING, min_size=1, max_size=3))
def test_settings(family, every):
    answer(["train", "--family", family, *(x for s in every for x in ("--set", s))])


@pytest.mark.slow
@heavy("settings")
@given(st.sampled_from(families.names()), st.lists(SETTING, min_size=1, max_size=3))
def test_many_settings(family, every):
    answer(["train", "--family", family, *(x for s in every for x in ("--set", s))])


# -- run directories ----------------------------------------------------------------------------------------------


def a_copy(family: str) -> Path:
    folder = Path("copies") / family
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path("kept") / family, folder)
    return folder


def sampled(folder: Path) -> None:
    answer(["sample", str(folder), "-n", "1", "--length", "4", "--calls", "1", "--precision", "fp32"])


def changed(body, path: list[int], value):
    """A JSON value with one part replaced: the one that a list of numbers leads to."""
    if not path or not isinstance(body, dict | list) or not body:
        return value
    keys = sorted(body) if isinstance(body, dict) else range(len(body))
    key = list(keys)[path[0] % len(body)]
    body[key] = changed(body[key], path[1:], value)
    return body


def a_foreign_config(family, path, value) -> None:
    folder = a_copy(family)
    file = folder / "config.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    sampled(folder)


WHERE = st.lists(st.integers(0, 30), min_size=1, max_size=3)


@light("configs")
@given(st.sampled_from(["masked", "block", "uniform"]), WHERE, JSON)
def test_configs(family, path, value):
    a_foreign_config(family, path, value)


@pytest.mark.slow
@heavy("configs")
@given(st.sampled_from(["masked", "block", "uniform"]), WHERE, JSON)
def test_many_configs(family, path, value):
    a_foreign_config(family, path, value)


def damaged(family: str, name: str, changes: list[tuple[float, int]], cut: float) -> None:
    folder = a_copy(family)
    raw = bytearray((folder / name).read_bytes())
    for place, value in changes:
        raw[int(place * (len(raw) - 1))] = value
    (folder / name).write_bytes(raw[: max(0, int(cut * len(raw)))])
    sampled(folder)
    weights = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    assert len(weights) == 1


DAMAGE = (
    st.sampled_from(["masked", "uniform"]),
    st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1)),
)


@light("damage")
@given(*DAMAGE)
def test_damage(family, name, changes, cut):
    damaged(family, name, changes, cut)


@pytest.mark.slow
@heavy("damage")
@given(*DAMAGE)
def test_much_damage(family, name, changes, cut):
    damaged(family, name, changes, cut)


# -- texts --------------------------------------------------------------------------------------------------------

PATTERN = st.one_of(
    WORD, st.text("ab.*+?()[]{}|^$\\,-0129_ dwsnu", max_size=14),
    st.sampled_from(["(a|b)*c", "a{2,3}", "[a-", "(?P<x>a)", "(?=a)b", r"\1", "(a*)*", "a{0}", "[^a]*", "a{99999}"]),
)  # fmt: skip
KINDS = st.sampled_from(["--regex", "--infill", "--prompt", "--must-contain", "--acrostic", "--proofread"])


def written(family: str, flags: list[tuple[str, str]]) -> None:
    more = [x for flag, text in flags for x in (flag, text)]
    length = [] if any(flag in ("--infill", "--proofread") for flag, _ in flags) else ["--length", "8"]
    end = [] if any(flag == "--proofread" for flag, _ in flags) else ["-n", "1"]
    answer(["sample", f"kept/{family}", "--calls", "2", *length, *end, *more])


TEXTS = (st.sampled_from(["masked", "block", "uniform"]), st.lists(st.tuples(KINDS, PATTERN), min_size=1, max_size=2))


@light("texts")
@given(*TEXTS)
def test_texts(family, flags):
    written(family, flags)


@pytest.mark.slow
@heavy("texts")
@given(*TEXTS)
def test_many_texts(family, flags):
    written(family, flags)


ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def tokenized(text: str) -> None:
    for kind in ("byte", "bpe:300", "char"):
        tokenizer = build(kind, [TEXT])
        ids = tokenizer.encode(text)
        assert tokenizer.encode_array(text).tolist() == ids and all(0 <= i < tokenizer.vocabulary for i in ids)
        if kind == "char":
            unseen = set(tokenizer.unseen(text))
            expected = "".join("�" if c in unseen else c for c in text)
        else:
            expected = text
        assert tokenizer.decode(ids) == expected
        assert tokenizer.characters[ids].sum() == len(text)


@light("unicode")
@given(ANY)
def test_unicode(text):
    tokenized(text)


@pytest.mark.slow
@heavy("unicode")
@given(ANY)
def test_much_unicode(text):
    tokenized(text)


@pytest.mark.slow
def test_command_lines_from_outside(place):
    """100 of them, as processes: the same promise, with bytes that are no text among them."""
    chance = random.Random(0)
    for _ in range(100):
        line: list[bytes] = [b"sample", b"kept/masked", b"-n", b"1", b"--length", b"4", b"--calls", b"1"]
        flag = chance.choice([b"--prompt", b"--infill", b"--regex", b"--sampler", b"--seed", b"--nothing"])
        line += [flag, bytes(chance.randrange(1, 256) for _ in range(chance.randint(0, 12)))]
        result = subprocess.run([sys.executable, "-m", "textdiffusion", *line], capture_output=True, timeout=120,
                                check=False)  # fmt: skip
        assert result.returncode in (0, 2) and b"Traceback" not in result.stderr, (line, result.stderr)
        if result.returncode == 2:
            assert len(result.stderr.strip().splitlines()) == 1, (line, result.stderr)
