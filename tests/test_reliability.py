"""What docs/reliability.md promises: faults of machines, disks and people, and what is still there after them."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from small_runs import small_run
from textdiffusion.commands.cli import main
from textdiffusion.errors import UserError
from textdiffusion.files import alone_in, write
from textdiffusion.mathematics.noise import Noise
from textdiffusion.presets import configure
from textdiffusion.run import Run, RunConfig, build
from textdiffusion.settings import TrainingConfig
from textdiffusion.tensors import digest, load_tensors, save_tensors
from textdiffusion.training import checkpoints as module
from textdiffusion.training.checkpoints import Checkpoints, verify
from textdiffusion.training.fit import Stepped, Stopped, Validated, Warned, fit
from textdiffusion.training.learning import Learner

NETWORK = ["network.width=32", "network.heads=2", "training.batch=8", "training.precision=fp32"]


def learner(steps: int = 0) -> Learner:
    network = {"depth": 1, "width": 16, "heads": 2, "window": 8}
    process = build(RunConfig(network=network, vocabulary=11, training=TrainingConfig(steps=50)))
    made = Learner(process.network, TrainingConfig(steps=50, batch=4))
    for step in range(steps):
        made.learn(process, torch.randint(11, (4, 8)), Noise.of(0, 4, step=step))
    return made


def saved(folder: Path, *steps: int) -> tuple[Checkpoints, Learner]:
    kept, made = Checkpoints(folder), learner()
    for step in steps:
        made.step = step
        assert kept.save(made, {"best": float(step)}) is None
    assert kept.finish() is None
    return kept, made


def same(a: Learner, b: Learner) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def config_of(steps: int = 6, *more: str) -> RunConfig:
    return configure(length=24, depth=1, steps=steps, settings=[*NETWORK, "training.checkpoint_seconds=0", *more])


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_back_all_of_a_learner(tmp_path):
    made, kept = learner(3), Checkpoints(tmp_path)
    kept.save(made, {"best": 1.5})
    with torch.no_grad():  # training goes on while it is written
        next(made.network.parameters()).add_(1.0)
    assert kept.finish() is None
    other = learner()
    numbers, wrong = Checkpoints(tmp_path).restore(other)
    assert numbers == {"step": 3, "seconds": 0.0, "best": 1.5} and wrong == []
    with torch.no_grad():
        next(made.network.parameters()).sub_(1.0)
    assert other.step == 3
    a, b = made.tensors(), other.tensors()
    assert all(torch.allclose(a[k].double(), b[k].double(), atol=1e-6) for k in a) and a.keys() == b.keys()
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".distcp", ".metadata", ".pkl")]


def test_two_are_kept_and_the_older_go(tmp_path):
    kept, _ = saved(tmp_path, 1, 2, 3)
    assert [p.name for p in kept.whole()] == ["step-000000002", "step-000000003"]
    assert not list(tmp_path.glob(".*"))


def test_what_has_a_name_is_whole_while_older_ones_go(tmp_path, monkeypatch):
    """Killed in the midst of removing an old checkpoint: what is left of it no longer has a name."""
    real = shutil.rmtree

    def half(path, ignore_errors=False):
        next(Path(path).iterdir()).unlink()

    monkeypatch.setattr(module.shutil, "rmtree", half)
    kept, made = saved(tmp_path, 1, 2, 3)
    assert [p.name for p in kept.whole()] == ["step-000000002", "step-000000003"]
    for path in kept.whole():
        verify(path)
    monkeypatch.setattr(module.shutil, "rmtree", real)
    made.step = 4
    kept.save(made, {})
    assert kept.finish() is None and not list(tmp_path.glob(".*"))


def flip(file: Path, place: float = 0.5) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(place * (len(raw) - 1))] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, name, how):
    kept, _ = saved(tmp_path, 1, 2)
    file = kept.whole()[-1] / name
    if how == "flipped":
        flip(file)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-2])
    else:
        file.unlink()
    other = learner()
    numbers, wrong = kept.restore(other)
    assert numbers is not None and numbers["step"] == other.step == 1 and numbers["best"] == 1.0
    assert len(wrong) == 1 and "step-000000002 is damaged" in wrong[0]
    kept.save(other, {})
    assert kept.finish() is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]  # what was put aside goes when there is better


def test_where_none_is_whole_nothing_is_touched(tmp_path):
    kept, _ = saved(tmp_path, 1, 2)
    for path in kept.whole():
        flip(path / "state.safetensors")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        kept.restore(learner())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    kept, made = saved(tmp_path, 1)
    made.step = 2
    with torch.no_grad():
        next(made.network.parameters())[0] = math.nan
    kept.save(made, {})
    assert "no longer a number" in (kept.finish() or "")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


@pytest.fixture
def small_disk():
    """No file may grow beyond 1,000 bytes, as far as the system lets processes write: what a full disk is like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, request):
    kept, made = saved(tmp_path, 1)
    made.step = 2
    request.getfixturevalue("small_disk")
    kept.save(made, {})
    assert kept.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    verify(kept.whole()[0])


def test_a_full_disk_leaves_the_older_weights(tmp_path, request):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.ones(5)})
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError):
        save_tensors(path, {"w": torch.zeros(5000)})
    assert torch.equal(load_tensors(path)["w"], torch.ones(5)) and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch):
    """Saves fail from step 3 to 6: the training says so, goes on, and keeps what it can once there is room."""
    real, path, full = module.save_file, tmp_path / "run", [False]

    def failing(tensors, file, metadata=None):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file, metadata=metadata)

    monkeypatch.setattr(module, "save_file", failing)
    lines = []
    for event in fit(config_of(12), path):
        full[0] = 3 <= event.step <= 6 if isinstance(event, Stepped) else full[0]
        lines += [event.line] if isinstance(event, Warned) else []
    assert any("a checkpoint could not be written: No space left on device" in line for line in lines), lines
    assert isinstance(event, Stopped) and event.step == 12
    assert [p.name for p in Checkpoints(path / "checkpoints").whole()][-1] == "step-000000012"


def test_a_disk_that_stays_full_ends_in_one_line(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", failing)
    with pytest.raises(UserError, match="the last checkpoint could not be written: No space left on device; make room"):
        list(fit(config_of(), tmp_path / "run"))


def test_the_kept_weights_are_checked_and_made_again(tmp_path):
    path = tmp_path / "run"
    list(fit(config_of(), path))
    file = path / "model.safetensors"
    flip(file, 0.9)
    with pytest.raises(UserError, match="its checksum does not agree"):
        Run.open(path).load()
    list(fit(config_of(), path, resume=True))
    Run.open(path).load()
    file.unlink()
    events = list(fit(config_of(), path, resume=True))
    Run.open(path).load()
    # Nothing is left to learn, and what to do about that is said.
    assert [f"--init-from {path}" in event.line for event in events if isinstance(event, Warned)] == [True]
    assert file.stat().st_mode == (path / "config.json").stat().st_mode  # who can read the one can read the other


def test_a_checksum_sees_names_types_and_shapes():
    w = torch.arange(6.0)
    others = [{"v": w}, {"w": w.reshape(2, 3)}, {"w": w.double()}, {"w": -w}]
    assert len({digest(t) for t in [{"w": w}, *others]}) == 5
    assert digest({"w": w, "v": w}) == digest({"v": w.clone(), "w": w})


def test_the_same_weights_are_the_same_file(tmp_path):
    tensors = {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "ü": torch.ones(1).bfloat16()}
    files = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for file in files:
        save_tensors(file, tensors)
    assert len({file.read_bytes() for file in files}) == 1
    read = load_tensors(files[0])
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())


# -- people and machines ------------------------------------------------------------------------------------------


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "run"
    events = fit(config_of(), path)
    next(events)
    with pytest.raises(UserError, match="another process is writing to"):
        next(fit(config_of(), path, resume=True))
    events.close()
    *_, last = fit(config_of(), path, resume=True)
    assert isinstance(last, Stopped) and last.step == 6


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    code = f"from textdiffusion.files import alone_in\nfrom pathlib import Path\nimport time\n" \
           f"with alone_in(Path({str(tmp_path)!r})):\n    print('in', flush=True)\n    time.sleep(60)"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another process"), alone_in(tmp_path):
        pass
    other.kill()
    other.wait()
    with alone_in(tmp_path):
        pass


def test_a_place_that_cannot_be_written_is_one_line(capsys):
    out = "/proc/textdiffusion-run" if Path("/proc").is_dir() else "/dev/null/run"
    assert main(["train", "--steps", "1", "--out", out]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and out in said[0]


def test_a_figure_that_is_no_number_is_never_the_best(tmp_path, monkeypatch):
    from dataclasses import replace

    from textdiffusion.training import fit as fitting

    real, path = fitting.evaluate, tmp_path / "run"

    def astray(*arguments, **more):
        report = real(*arguments, **more)
        return replace(report, figure=replace(report.figure, bits_per_char=math.nan)) if astray.on else report

    astray.on = False
    monkeypatch.setattr(fitting, "evaluate", astray)
    kept = None
    for event in fit(config_of(4, "training.evaluations=2"), path):
        if isinstance(event, Validated):
            if astray.on:
                assert not event.best and (path / "model.safetensors").read_bytes() == kept
            kept, astray.on = (path / "model.safetensors").read_bytes(), True
    assert isinstance(event, Stopped) and event.best is not None and math.isfinite(event.best)


def test_a_half_written_file_is_never_in_place(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write(path, "before")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# -- what strangers send ------------------------------------------------------------------------------------------


def test_nothing_in_a_run_is_executed(tmp_path, capsys):
    """Pickles under the names of weights and checkpoints are refused, unread."""
    import pickle

    path = tmp_path / "run"
    small_run(path, "masked", 16)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert main(["sample", str(path), "-n", "1"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    (path / "model.safetensors").unlink()
    assert main(["sample", str(path), "-n", "1"]) == 2
    assert "pytorch_model.bin is not read" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_a_header_that_asks_for_much_memory_is_refused(tmp_path):
    import struct

    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for length, body in ((len(header), header), (2**62, header), (2**31, b"")):
        path.write_bytes(struct.pack("<Q", length) + body)
        with pytest.raises(UserError, match="damaged"):
            load_tensors(path)


def test_a_config_that_asks_for_a_huge_network_is_refused(tmp_path, capsys):
    path = tmp_path / "run"
    small_run(path, "masked", 16)
    config = path / "config.json"
    body = json.loads(config.read_text())
    body["network"] |= {"width": 10**7, "heads": 1, "depth": 1}
    config.write_text(json.dumps(body))
    begin = time.monotonic()
    assert main(["sample", str(path), "-n", "1"]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and time.monotonic() - begin < 20, said


# -- the soak -----------------------------------------------------------------------------------------------------


def session(server: subprocess.Popen, arguments: list[str], until: Callable[[], bool]) -> int:
    """A command line in a process of its own, killed once ``until`` says so; its exit code."""
    server.stdin.write(json.dumps(arguments).encode() + b"\n")
    number = int(server.stdout.readline())
    while not until() and not select.select([server.stdout], [], [], 0.001)[0]:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    return int(server.stdout.readline())


def newest_step(run: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in run.glob("checkpoints/step-*")), default=0)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    """SIGKILL at random moments of a training that saves as often as it can; at the end all is as if nothing had been.

    Two thirds of the moments are spread over the steps of the whole run, which is nearly always in the midst of a save;
    a third come before a process has saved anything: while the run is made, or read and tidied. After every kill each
    checkpoint that has its name is whole, the newest is still there with the one before it, and so are the weights to
    use. TEXTDIFFUSION_KILLS sets another number.
    """
    kills, seed = int(os.environ.get("TEXTDIFFUSION_KILLS", "100")), time.time_ns()
    chance, steps = random.Random(seed), max(200, 20 * kills)
    print(f"drawn from {seed}")
    text, whole, part = tmp_path / "my.txt", tmp_path / "whole", tmp_path / "part"
    text.write_text(" ".join(chance.choices(["it", "was", "a", "bright", "cold", "day", "in", "April"], k=4000)))
    settings = [x for s in [*NETWORK, "training.checkpoint_seconds=0"] for x in ("--set", s)]
    begin = ["train", "--data", str(text), "--steps", str(steps), "--length", "24", "--depth", "1", "--device", "cpu"]
    begin += settings
    # None: before anything is saved; one of these first, while there is no run yet.
    early = kills // 3
    late = kills - early
    moments = [None] * (early - 1) + [(i + chance.random()) / late * 0.9 * steps for i in range(late)]
    goals = iter(sorted(goal for goal in moments if goal is not None))
    chance.shuffle(moments)
    moments = [None] * (kills - len(moments)) + [None if goal is None else next(goals) for goal in moments]
    seen, in_saves, before_any, startup = [], 0, 0, 0.5
    with (tmp_path / "said").open("wb") as errors:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "forking_train.py")], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        said = lambda: (tmp_path / "said").read_text()[-2000:]  # noqa: E731
        try:
            assert session(server, [*begin, "--out", str(whole)], lambda: False) == 0, said()
            for goal in moments:
                started, before = time.monotonic(), newest_step(part)
                wait, last = chance.uniform(0, 1.2 * startup), chance.uniform(0, 0.03)

                def due(goal=goal, started=started, before=before, wait=wait, last=last) -> bool:
                    if goal is None:
                        return time.monotonic() - started > wait
                    if newest_step(part) <= max(goal, before):
                        return False
                    time.sleep(last)  # and then anywhere in a save or two
                    return True

                there = (part / "config.json").exists()
                code = session(server, [*(["train", "--resume"] if there else begin), "--out", str(part)], due)
                assert code == -signal.SIGKILL, f"it ended before it was killed, with exit code {code}: {said()}"
                named = sorted((part / "checkpoints").glob("step-*"))
                for path in named:
                    verify(path)
                assert len(named) >= min(2, newest_step(part)), "a checkpoint was lost"
                assert newest_step(part) >= before, "the newest checkpoint was lost"
                if (part / "model.safetensors").exists():
                    Run.open(part).load()
                if goal is not None and newest_step(part) < before + 10:
                    startup = time.monotonic() - started  # about how long it takes until something is saved
                seen.append(newest_step(part))
                in_saves += bool(list(part.glob("checkpoints/.writing-*")))
                before_any += newest_step(part) == before
            assert session(server, ["train", "--resume", "--out", str(part)], lambda: False) == 0, said()
        finally:
            server.kill()
            server.wait()
    print(f"{kills} kills, with checkpoints from step {seen[0]:,} to {seen[-1]:,} of {steps:,}; {in_saves} left a "
          f"checkpoint half written, {before_any} came before the process had saved one")  # fmt: skip
    assert in_saves >= kills // 5, "hardly a kill came in the midst of a save"  # of a handful, none may
    assert max(seen) > steps * 0.9 * (late - 1) / late, "the kills did not go on over the run"
    assert (whole / "model.safetensors").read_bytes() == (part / "model.safetensors").read_bytes()
    a, b = (load_tensors(run / f"checkpoints/step-{steps:09d}/state.safetensors") for run in (whole, part))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)  # optimisers too
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, part)]
    assert [x | {"seconds": 0} for x in lines[0]] == [x | {"seconds": 0} for x in lines[1]]
    assert not list(part.rglob(".*")) and not list(part.rglob("damaged-*"))


def test_what_is_refused_leaves_no_run_behind(tmp_path, monkeypatch):
    """A run begun with weights that do not fit could be resumed, from none at all."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("It was a bright cold day in April. " * 100, encoding="utf-8")
    begin = ["train", "--data", "my.txt", "--length", "24", "--depth", "1", "--steps", "2", "--device", "cpu"]
    assert main([*begin, "--out", "one"]) == 0
    Path("kept.txt").write_text("mine", encoding="utf-8")
    wrong = ["train", "--data", "my.txt", "--init-from", "one", "--out", "two", "--steps", "2", "--device", "cpu"]
    assert main([*wrong, "--set", "network.width=32", "--set", "network.heads=2"]) == 2
    assert not Path("two/config.json").exists() and Path("kept.txt").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("It was a bright cold day in April. " * 100, encoding="utf-8")
    assert main(["train", "--data", "my.txt", "--length", "24", "--depth", "1", "--steps", "30", "--out", "one"]) == 0
    config = configure(data="my.txt", init_from="one", steps=3, settings=["training.precision=fp32"])
    first = [event for event in fit(config, Path("whole")) if isinstance(event, Stepped)]
    events = fit(config, Path("killed"))
    for event in events:
        if isinstance(event, Stepped):
            break
    events.close()  # as a kill would: nothing is saved
    shutil.rmtree("killed/checkpoints", ignore_errors=True)
    again = [e for e in fit(Run.open(Path("killed")).config, Path("killed"), resume=True) if isinstance(e, Stepped)]
    assert [e.objective for e in again] == [e.objective for e in first]
