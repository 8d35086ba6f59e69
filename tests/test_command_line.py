"""The command line: what it prints, its exit codes and one-line errors; in this process, and from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from textdiffusion import families
from textdiffusion.commands.cli import main

SMALL = ["--steps", "30", "--set", "network.width=32", "--set", "network.depth=1", "--set", "network.heads=2",
         "--length", "24", "--set", "training.batch=8", "--device", "cpu"]  # fmt: skip


def run(*arguments: object, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "textdiffusion", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def outside(*arguments: object, **how) -> str:
    """Standard output of a command that succeeds, run as a process of its own."""
    result = run(*arguments, **how)
    assert result.returncode == 0, result.stderr
    return result.stdout


def ok(*arguments: object) -> str:
    """The same in this process, which need not load torch again."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([str(a) for a in arguments])
    assert code == 0, error.getvalue()
    return out.getvalue()


def refused(*arguments: object, **how) -> str:
    """The one line of an error: exit code 2, nothing on stdout, no traceback."""
    result = run(*arguments, **how)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert result.stdout == "" and "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with one small run of each family."""
    folder = tmp_path_factory.mktemp("runs")
    for family in ("masked", "autoregressive", "uniform", "block"):
        out = ok("train", "--family", family, "--out", folder / family, "--json", *SMALL)
        body = json.loads(out)
        assert body["step"] == 30 and body["finished"] and body["best"] > 0
    return folder


def test_help_lists_the_verbs_and_is_quick():
    begin = time.perf_counter()
    text = outside("--help")
    assert time.perf_counter() - begin < 5  # without torch: the next check says why it is quick
    for verb in ("demo", "train", "sample", "eval", "compare", "ui", "families", "doctor"):
        assert verb in text
    code = "import sys, textdiffusion.commands.cli as c; c.parser_of(c.ACTS); "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mistakes_are_refused_before_torch_is_loaded(runs, tmp_path):
    """Seconds of waiting, for a slip of the finger."""
    run = str(runs / "masked")
    (tmp_path / "FILE").write_text("a file where a folder should be")
    wrong = [
        ["train", "--data", "nowhere.txt"], ["train", "--family", "mask"], ["train", "--steps", "0"],
        ["train", "--tokenizer", "letters"], ["train", "--tokenizer", "bpe:3"], ["train", "--depth", "0"],
        ["train", "--set", "network.wdith=3"], ["train", "--set", "network.width=wide"],
        ["train", "--set", "training.rate=-1"], ["train", "--set", "nonsense"], ["train", "--device", "mps"],
        ["train", "--out", run], ["train", "--out", "FILE"], ["train", "--resume", "--out", "nowhere"],
        ["sample", "nowhere"], ["sample", run, "--save-replay", "x.txt"],
        ["sample", run, "-n", "0"], ["sample", run, "--top-p", "2"],
        ["sample", run, "--temperature", "-1"], ["sample", run, "--calls", "0"], ["sample", run, "--length", "0"],
        ["sample", run, "--prompt", "x", "--infill", "x_"], ["sample", run, "--strength", "0.2"],
        ["eval", run, "--data", "nowhere.txt"], ["eval", run, "--calls", "2,x"], ["eval", "nowhere"],
        ["demo", "--minutes", "0"], ["families", "nothing"], ["verify", "nothing"], ["verify", "nothing.py"],
    ]  # fmt: skip
    code = (
        "import json, sys\nfrom textdiffusion.commands.cli import main\nassert main(['families']) == 0\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    code, loaded = main(line), 'torch' in sys.modules\n"
        "    assert code == 2 and not loaded, (line, code, loaded)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(wrong)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.strip().splitlines()) == len(wrong)


def test_sampling_loads_no_more_than_it_needs(runs):
    code = (
        "import sys\nfrom textdiffusion.commands.cli import main\n"
        f"assert main(['sample', {str(runs / 'masked')!r}, '-n', '1']) == 0\n"
        "unneeded = {'rich', 'torch._dynamo', 'torch._inductor', 'sympy', 'matplotlib', 'datasets', 'IPython'}\n"
        "sys.exit(', '.join(unneeded & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_run_is_a_folder_of_plain_files(runs):
    path = runs / "masked"
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "checkpoints", "README.md"} <= {
        p.name for p in path.iterdir()
    }
    assert json.loads((path / "config.json").read_text())["model_type"] == "textdiffusion"
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 30 and lines[-1]["kind"] == "upper"
    assert str(path) in (path / "README.md").read_text()
    assert not [p for p in path.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]
    assert not list(path.rglob(".*")), "a temporary file was left"


def test_sample(runs):
    body = json.loads(ok("sample", runs / "masked", "-n", 3, "--calls", 5, "--json"))
    assert len(body["samples"]) == 3 and body["calls"] == 5
    again = json.loads(ok("sample", runs / "masked", "-n", 3, "--calls", 5, "--json"))
    assert again == body
    fewer = json.loads(ok("sample", runs / "masked", "-n", 1, "--calls", 5, "--json"))
    assert fewer["samples"][0] == body["samples"][0]
    text = json.loads(ok("sample", runs / "masked", "-n", 1, "--infill", r"a\_b ____ the", "--json"))["samples"][0][
        "text"
    ]
    assert text.startswith("a_b ") and text.endswith(" the") and len(text) == 12
    for family in ("masked", "autoregressive"):
        text = json.loads(ok("sample", runs / family, "-n", 1, "--prompt", "def ", "--json"))["samples"][0]["text"]
        assert text.startswith("def ")
    frames = ok("sample", runs / "masked", "-n", 1, "--watch")
    assert "░" in frames.splitlines()[0] and "░" not in frames.splitlines()[-1]
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        main(["sample", "--help"])
    assert "--device" in text.getvalue() and "--top-p" in text.getvalue()
    for family in ("autoregressive", "block"):
        long = json.loads(ok("sample", runs / family, "-n", 1, "--length", 70, "--json"))
        assert long["calls"] == 70 and len(long["samples"][0]["text"]) >= 70
    ok("sample", runs / "block", "-n", 2, "--length", 70, "--stop")


def test_proofread(runs):
    mended, said = ok("sample", runs / "uniform", "--proofread", "def main():").splitlines()
    body = json.loads(ok("sample", runs / "uniform", "--proofread", "def main():", "--json"))
    assert body["samples"][0]["text"] == mended
    assert said == "changed: " + (", ".join(f"{old!r} to {new!r}" for old, new in body["changes"]) or "nothing")


def test_eval_of_long_samples(runs):
    body = json.loads(ok("eval", runs / "block", "--eval-tokens", 500, "--samples", 2, "--length", 60, "--top-p", 0.9,
                         "--json"))  # fmt: skip
    assert body["samples"]["calls"] == 60 and body["samples"]["seconds"] > 0


def test_eval(runs):
    body = json.loads(ok("eval", runs / "masked", "--calls", "1,4,24", "--eval-tokens", 2000, "--samples", 4, "--json"))
    assert body["kind"] == "upper" and body["bits_per_char"] > 0 and body["standard_error"] > 0
    by_calls = [f["bits_per_char"] for f in body["by_calls"]]
    assert len(by_calls) == 3 and by_calls[0] > by_calls[2] - 0.3
    assert abs(by_calls[2] - body["bits_per_char"]) < 1e-6  # one position a call: the continuous bound
    assert len(body["curve"]) == 24 and 0 <= body["samples"]["valid_words"] <= 1
    body = json.loads(ok("eval", runs / "autoregressive", "--eval-tokens", 2000, "--samples", 0, "--json"))
    assert body["kind"] == "exact" and body["by_calls"] == [] and body["samples"] is None
    assert "<=" in ok("eval", runs / "masked", "--eval-tokens", 500, "--samples", 2)


def test_families_and_doctor():
    # What the list reads from the text of the files is what the classes say.
    every = {name: families.family(name) for name in families.names()}
    expected = [{"name": name, "summary": cls.summary, "paper": cls.paper} for name, cls in every.items()]
    assert json.loads(ok("families", "--json")) == expected and len(expected) >= 5
    assert "process.schedule" in ok("families", "masked")
    assert json.loads(ok("doctor", "--device", "cpu", "--json"))["device"] == "cpu"


def test_the_newest_run_is_the_default(runs, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "only").symlink_to(runs / "masked")
    assert json.loads(outside("sample", "-n", 1, "--json", cwd=tmp_path))["samples"]
    assert "textdiffusion train" in refused("train", "--resume", cwd=tmp_path / "runs")


def test_dry_run_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = json.loads(ok("train", "--dry-run", "--json", *SMALL))
    assert plan["parameters"] > 1000 and plan["steps"] == 30
    assert not list(tmp_path.iterdir())


def test_a_pipe_gets_plain_lines(tmp_path):
    text = outside("train", "--out", tmp_path / "r", *SMALL)
    assert "\x1b" not in text and "\r" not in text
    assert "held out <= " in text and "trained" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--data", "nowhere.txt"], "nowhere.txt"),
        (["train", "--data", "empty.txt"], "empty"),
        (["train", "--data", "binary.txt"], "binary.txt"),
        (["train", "--data", "three.txt"], "3 "),
        (["train", "--family", "mask"], "there is no family 'mask'"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--minutes", "-1"], "--minutes"),
        (["train", "--steps", "5", "--minutes", "1"], "not allowed with"),
        (["train", "--tokenizer", "letters"], "letters"),
        (["train", "--tokenizer", "bpe:3"], "bpe"),
        (["train", "--set", "network.wdith=3"], "wdith"),
        (["train", "--set", "network.width=wide"], "network.width"),
        (["train", "--set", "network.width=100", "--set", "network.heads=3"], "network.heads"),
        (["train", "--set", "nonsense"], "--set"),
        (["train", "--depth", "0"], "--depth"),
        (["train", "--length", "0"], "--length"),
        (["train", "--minutes", "inf"], "--minutes"),
        (["train", "--seed", "99999999999999999999"], "--seed"),
        (["train", "--data", "x" * 300], "name"),
        (["train", "--tokenizer", "bpe:99999999999999999999"], "bpe"),
        (["train", "--set", "training.average=0"], "training.average"),
        (["train", "--set", "training.steps=abc"], "training.steps"),
        (["train", "--set", "training.rate=-1"], "training.rate"),
        (["train", "--set", "network.positions=relative"], "learned or rotary"),
        (["train", "--set", "network.depth=-1"], "network.depth"),
        (["train", "--set", "network.attention=causal"], "decided by the masked family"),
        (["train", "--set", "network.dropout=2"], "network.dropout"),
        (["train", "--set", "process.weight=heavy"], "flat"),
        (["train", "--out", "FULL"], "other files"),
        (["train", "--out", "FILE"], "FILE"),
        (["train", "--resume", "--steps", "7", "--out", "RUN"], "--steps"),
        (["train", "--resume", "--dry-run"], "--dry-run"),
        (["train", "--device", "mps"], "float64"),
        (["sample", "RUN", "--length", "0"], "--length"),
        (["sample", "AR", "--length", "100000000000000"], "--length"),
        (["sample", "RUN", "--prompt", "\udcff"], "Unicode"),
        (["sample", "NULLED"], "training"),
        (["sample", "MIXED"], "tokenizer.json"),
        (["eval", "RUN", "--sampler", "remask", "--calls", "2"], "no bound is known"),
        (["eval", "RUN", "--split", "test"], "test part"),
        (["eval", "RUN", "--data", "nowhere.txt"], "nowhere.txt"),
        (["train", "--out", "RUN"], "--resume"),
        (["train", "--resume", "--out", "nowhere"], "nowhere"),
        (["train", "--colour"], "--colour"),
        (["draw"], "draw"),
        ([], "VERB"),
        (["sample", "nowhere"], "nowhere"),
        (["sample", "RUN", "--temperature", "-1"], "--temperature"),
        (["sample", "RUN", "--temperature", "warm"], "--temperature"),
        (["sample", "RUN", "-n", "0"], "-n"),
        (["sample", "RUN", "--calls", "0"], "--calls"),
        (["sample", "RUN", "--top-p", "2"], "--top-p"),
        (["sample", "RUN", "--sampler", "magic"], "magic"),
        (["sample", "RUN", "--length", "25"], "autoregressive"),
        (["sample", "RUN", "--infill", "no gap"], "gap"),
        (["sample", "RUN", "--infill", "語 ____"], "語"),
        (["sample", "RUN", "--prompt", "x" * 30], "prompt"),
        (["sample", "RUN", "--prompt", "x", "--infill", "x_"], "--infill"),
        (["sample", "AR", "--infill", "The ____ sat", "--regex", "T.*"], "leave one of them out"),
        (["sample", "AR", "--infill", "The ____ sat", "--stop"], "leave out --stop"),
        (["sample", "RUN", "--stop"], "autoregressive, block"),
        (["sample", "RUN", "--temp", "1"], "--temp"),  # no flag by half its name
        (["train", "--processes=8"], "--dry-run"),
        (["sample", "RUN", "--proofread", "The cat"], "--family uniform"),
        (["sample", "UNIFORM", "--proofread", "The cat", "--strength", "1"], "--strength"),
        (["sample", "UNIFORM", "--proofread", "x" * 30], "1 to 24 tokens"),
        (["sample", "UNIFORM", "--proofread", ""], "1 to 24 tokens"),
        (["sample", "UNIFORM", "--proofread", "x", "--calls", "0"], "--calls"),
        (["sample", "UNIFORM", "--proofread", "x", "--prompt", "y"], "--prompt"),
        (["sample", "UNIFORM", "--strength", "0.2"], "--proofread"),
        (["train", "--family", "block", "--length", "4"], "block_length"),
        (["eval", "RUN", "--calls", "2,x"], "--calls"),
        (["eval", "RUN", "--eval-tokens", "0"], "--eval-tokens"),
        (["families", "nothing"], "nothing"),
        (["sample", "TRUNCATED"], "model.safetensors"),
        (["sample", "NOCONFIG"], "config.json"),
        (["sample", "BROKEN"], "config.json"),
        (["sample", "UNKNOWN"], "there is no family 'magic'"),
        (["sample", "OTHER"], "does not fit"),
    ],
    ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else None,
)  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, says, runs, tmp_path, monkeypatch, capsys):
    """In this process, for speed; a few of them from outside stand below."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "three.txt").write_text("abc")
    places = {
        "RUN": runs / "masked",
        "AR": runs / "autoregressive",
        "UNIFORM": runs / "uniform",
        "BLOCK": runs / "block",
    }
    (tmp_path / "FILE").write_text("a file where a folder should be")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "README.md").write_text("somebody's own")
    for broken in ("TRUNCATED", "NOCONFIG", "BROKEN", "UNKNOWN", "OTHER", "NULLED", "MIXED"):
        if broken in arguments:
            places[broken] = tmp_path / broken.lower()
            shutil.copytree(runs / "masked", places[broken])
    if "TRUNCATED" in arguments:
        weights = places["TRUNCATED"] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    if "NOCONFIG" in arguments:
        (places["NOCONFIG"] / "config.json").unlink()
    if "BROKEN" in arguments:
        (places["BROKEN"] / "config.json").write_text('{"family": ')
    if "NULLED" in arguments:
        config = places["NULLED"] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"training": None}))
    if "MIXED" in arguments:
        config = places["MIXED"] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocabulary": 7, "start": 0}))
    if "UNKNOWN" in arguments:
        config = places["UNKNOWN"] / "config.json"
        config.write_text(config.read_text().replace('"masked"', '"magic"'))
    if "OTHER" in arguments:
        config = places["OTHER"] / "config.json"
        config.write_text(config.read_text().replace('"width": 32', '"width": 64'))
    try:
        code = main([str(places.get(a, a)) for a in arguments])
    except SystemExit as stop:  # argparse leaves so
        code = stop.code
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert len(error.strip().splitlines()) == 1 and says in error, error


def test_a_reader_that_goes_away_is_no_error(runs):
    command = f"{sys.executable} -m textdiffusion families masked | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.strip() == "0" and result.stderr == ""


def test_damaged_checkpoints_are_passed_over_or_refused(whole, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    newest = sorted((part / "checkpoints").iterdir())[-1]
    older = newest.with_name("step-000000001")
    shutil.copytree(newest, older)
    (newest / "state.safetensors").write_bytes(b"broken")
    ok("train", "--resume", "--out", part)  # the older one is whole
    assert same(weights_of(whole), weights_of(part))
    for path in (part / "checkpoints").iterdir():
        (path / "state.safetensors").write_bytes(b"broken")
    before = (part / "metrics.jsonl").read_bytes()
    assert "no checkpoint" in refused("train", "--resume", "--out", part)
    assert (part / "metrics.jsonl").read_bytes() == before


def test_bad_input_from_outside(runs, tmp_path):
    assert "nowhere.txt" in refused("train", "--data", "nowhere.txt", cwd=tmp_path)
    assert "--temperature" in refused("sample", runs / "masked", "--temperature", "-1")
    assert "--colour" in refused("train", "--colour")
    assert "VERB" in refused()


def weights_of(path: Path) -> dict:
    from safetensors.numpy import load_file

    newest = sorted((path / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state.safetensors") | {"best": (path / "model.safetensors").read_bytes()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all((a[k] == b[k]).all() if hasattr(a[k], "all") else a[k] == b[k] for k in a)


LONGER = ["train", "--steps", "300", *SMALL[2:], "--set", "training.precision=fp32"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that is never stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    ok(*LONGER, "--out", path)
    return path


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_resuming_gives_the_same_run(how, whole, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "textdiffusion", *LONGER, "--out", str(tmp_path / "part")],
        stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step") and "held out" in line and int(line.split()[1].replace(",", "")) >= 30:
            break
    process.send_signal(how)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + how
    assert "--resume" in out
    ok("train", "--resume", "--out", tmp_path / "part")
    assert same(weights_of(whole), weights_of(tmp_path / "part"))
    steps = [
        [json.loads(line)["step"] for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (whole, tmp_path / "part")
    ]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_the_same(tmp_path):
    import random

    more = [*LONGER, "--set", "training.checkpoint_seconds=0.2"]
    more[2] = "1200"
    ok(*more, "--out", tmp_path / "whole")
    chance = random.Random(time.time_ns())
    part = tmp_path / "part"
    for kill in range(3):
        command = ["train", "--resume", "--out", str(part)] if kill else [*more, "--out", str(part)]
        process = subprocess.Popen(
            [sys.executable, "-m", "textdiffusion", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (part / "config.json").exists():
            time.sleep(0.05)
        # The first kill may come before any checkpoint; the later ones allow for torch to be loaded.
        time.sleep((2 + 4 * (kill > 0)) * chance.random())
        assert process.poll() is None, "the run was over before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    ok("train", "--resume", "--out", part)
    assert same(weights_of(tmp_path / "whole"), weights_of(part))
    assert not list(part.rglob(".writing-*"))


@pytest.mark.parametrize("name", families.names())
def test_every_family_is_described_with_all_its_fields(name, capsys):
    assert main(["families", name, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    fields = {field.name for field in dataclasses.fields(families.family(name).Config)}
    assert {key.split()[0].removeprefix("process.") for key in said["fields"]} == fields
    assert all(said["fields"].values()) and said["samplers"]
