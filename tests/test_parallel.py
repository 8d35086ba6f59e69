"""Several processes learn what one does: DDP, FSDP2, and one process, with the same draws; and what they say and keep.

The processes are started by torchrun and speak by gloo. What takes a group of its own for each family is slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import two_processes
from textdiffusion.families import names
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.parallel.distributed import ALONE
from training_together import B, learn, make, texts

HERE = Path(__file__).parent
STEPS = 20


def together(*command: object, processes: int = 2, timeout: float = 600, **more: str) -> subprocess.CompletedProcess:
    """Run a command in several processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    return subprocess.run(
        [*torchrun, *map(str, command)], capture_output=True, text=True, check=False, timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | more,
    )  # fmt: skip


def learnt(folder: Path, jobs: dict[str, dict]) -> dict[str, dict]:
    """What two processes find, and one, for each job."""
    with two_processes.two(HERE / "training_together.py", folder, json.dumps(jobs)) as processes:
        alone = {json.dumps(job | {"parallel": "no"}): job | {"parallel": "no"} for job in jobs.values()}
        one = {key: learn(ALONE, **job) for key, job in alone.items()}
        for code, _, errors in two_processes.said(processes, 3000):
            assert code == 0, errors[-3000:]
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}
    return {name: found[name] | {"one": one[json.dumps(job | {"parallel": "no"})]} for name, job in jobs.items()}


def jobs_of(families: list[str], body: str = "transformer") -> dict[str, dict]:
    return {
        f"{family}-{optimizer}-{parallel}-{body}": {
            "family": family, "parallel": parallel, "optimizer": optimizer, "steps": STEPS, "body": body,
        }
        for family in families
        for optimizer in ("adamw", "muon")
        for parallel in ("ddp", "fsdp")
    }  # fmt: skip


# The largest differences over all families are in docs/reliability.md.
LOSS, WEIGHT = 1e-5, 1e-4


def check(found: dict[str, dict]) -> None:
    for name, two in found.items():
        one = two["one"]
        difference = np.abs(np.array(two["losses"]) - np.array(one["losses"])).max()
        assert len(two["losses"]) == STEPS and difference < LOSS, (name, difference)
        assert two["weights"].keys() == one["weights"].keys()
        apart = max(np.abs(np.array(two["weights"][k]) - np.array(w)).max() for k, w in one["weights"].items())
        print(f"{name}: losses differ by at most {difference:.1e}, weights by {apart:.1e} of {one['moved']:.1e}")
        assert apart < min(WEIGHT, one["moved"] / 3), (name, apart, one["moved"])
        assert abs(two["nats"] / one["nats"] - 1) < LOSS, name


def test_two_processes_learn_what_one_does(tmp_path):
    check(learnt(tmp_path, {name: job for name, job in jobs_of(["masked"]).items() if "adamw" in name}))


@pytest.mark.slow
def test_two_processes_learn_what_one_does_in_every_family(tmp_path):
    check(learnt(tmp_path, jobs_of(names()) | jobs_of(["masked", "analog_bits"], "unet")))


@pytest.mark.parametrize("family", names())
def test_a_loss_makes_the_same_calls_whatever_its_draws(family):
    """Processes that share a network make its calls together; a row whose coins fall otherwise must not make fewer."""
    process, calls = make(family), []
    process.network.train()
    process.network.register_forward_hook(lambda *_: calls.append(1))
    x_0, counts = torch.from_numpy(texts(np.arange(1))), set()
    for seed in range(12):
        calls.clear()
        process.loss(x_0, Noise.of(seed, 1)).sum().backward()
        counts.add(len(calls))
        assert all(p.grad is not None for p in process.network.parameters()), "a parameter is not always used"
    assert len(counts) == 1


def test_rows_are_shared_out():
    from textdiffusion.parallel.distributed import Group

    for total, size in ((12, 2), (13, 4), (4, 4)):
        parts = [Group(rank, size).part(total) for rank in range(size)]
        assert np.concatenate(parts).tolist() == list(range(total))
        assert max(map(len, parts)) == Group(0, size).most(total)


def test_recomputed_activations_change_nothing():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = Transformer(TransformerConfig(inputs=7, outputs=7, window=8, depth=2, width=16, heads=2, dropout=0.2))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        net.train()
        if recompute:
            net.recompute()
        torch.manual_seed(1)
        net(torch.randint(7, (3, 8))).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SMALL = ["--length", "24", "--device", "cpu", "--set", "network.width=32", "--set", "network.depth=1",
         "--set", "network.heads=2", "--set", "training.batch=8", "--set", "training.precision=fp32",
         "--set", "training.evaluations=2", "--set", "training.checkpoint_seconds=0"]  # fmt: skip


def newest(run: Path) -> dict:
    """Counters and files of a run's newest checkpoint."""
    path = sorted((run / "checkpoints").glob("step-*"))[-1]
    return json.loads((path / "state.json").read_text()) | {"files": sorted(p.name for p in path.iterdir())}


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["masked", "sparse_distribution", "gaussian_embedding"])
def test_a_run_changes_hands(family, tmp_path):
    """Begun by two processes in shards, gone on with by one, then by two with whole networks: each takes up the last
    one's counters, and the end is that of an undisturbed run but for rounding."""
    train = ["-m", "textdiffusion", "train", "--family", family, "--steps", "40", *SMALL]
    whole = subprocess.run([sys.executable, *train, "--out", str(tmp_path / "whole")], capture_output=True, check=False)
    assert whole.returncode == 0, whole.stderr
    part = tmp_path / "part"
    hands = [("fsdp", 2, "15"), (None, 1, "30"), ("ddp", 2, None)]
    for number, (parallel, processes, stop) in enumerate(hands):
        begin = train if number == 0 else ["-m", "textdiffusion", "train", "--resume"]
        command = [*begin, "--out", part, "--json", *(["--parallel", parallel] if parallel else [])]
        environment = {"STOP_AT": stop} if stop else {}
        script = HERE / "stopping_train.py"
        command = [script, *command[2:]]
        if processes == 1:
            result = subprocess.run(
                [sys.executable, *map(str, command)], capture_output=True, text=True, check=False,
                env=os.environ | environment,
            )  # fmt: skip
        else:
            result = together(*command, **environment)
        found = newest(part)
        assert found["step"] == int(stop or 40), (result.stdout, result.stderr[-3000:])
        assert len([f for f in found["files"] if f.endswith(".safetensors")]) == (2 if parallel == "fsdp" else 1)
    a, b = weights(tmp_path / "whole"), weights(part)
    assert a.keys() == b.keys()
    # Muon's rounding is of bfloat16: single weights of rare symbols may go apart, what they say may not.
    assert all((a[k] - b[k]).double().norm() <= 0.3 * a[k].double().norm() for k in a)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "whole", part)
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    apart = [abs(one["bits_per_char"] - two["bits_per_char"]) for one, two in zip(*logs, strict=True)]
    assert max(apart) < 5e-3, apart


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path):
    """SIGKILL of one of two processes: the other ends too; torchrun starts both again, and the end is the same, bit
    for bit."""
    train = ["train", "--steps", "40", *SMALL, "--json"]
    script = HERE / "stopping_train.py"
    result = together(script, *train, "--out", tmp_path / "whole")
    assert result.returncode == 0, result.stderr[-3000:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    result = subprocess.run(
        [*torchrun, str(script), *train, "--out", str(tmp_path / "part")], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "KILL_AT": "17", "KILL_RANK": "1"}, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "part" / "killed").exists()
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_evaluation_and_samples_are_shared_out(tmp_path):
    """Two processes find the figures that one does, and write the same texts in the same order."""
    run = tmp_path / "run"
    train = [sys.executable, "-m", "textdiffusion", "train", "--steps", "20", *SMALL, "--out", str(run)]
    assert subprocess.run(train, capture_output=True, check=False).returncode == 0
    sample = ["-m", "textdiffusion", "sample", run, "-n", "20", "--calls", "3", "--reproducible", "--json"]
    measure = ["-m", "textdiffusion", "eval", run, "--eval-tokens", "3000", "--samples", "0", "--json", "--calls", "4"]
    for command in (sample, measure):
        one = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
        # torchrun's --module takes a module's name.
        two = together("--module", *command[1:])
        assert one.returncode == two.returncode == 0, two.stderr[-2000:]
        a, b = json.loads(one.stdout), json.loads(two.stdout)
        if command is sample:
            assert a == b
        else:
            assert a["kind"] == b["kind"] and a["windows"] == b["windows"]
            for first, second in zip([a, *a["by_calls"]], [b, *b["by_calls"]], strict=True):
                assert abs(first["bits_per_char"] - second["bits_per_char"]) < 1e-5


def test_parallel_without_processes_says_how(capsys, monkeypatch):
    from textdiffusion.commands.cli import main

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "--parallel", "fsdp"]) == 2
    assert "torchrun --nproc_per_node=2" in capsys.readouterr().err


def test_a_dry_run_says_what_processes_would_hold_and_send(capsys):
    from textdiffusion.commands.cli import main

    assert main(["train", "--dry-run", "--processes", "4", "--steps", "10", "--json", *SMALL]) == 0
    plan = json.loads(capsys.readouterr().out)
    mega = plan["parameters"] / 1e6
    assert plan["megabytes_of_state_each_ddp"] == pytest.approx(20 * mega, abs=0.06)
    assert plan["megabytes_of_state_each_fsdp"] > plan["megabytes_of_state_each_ddp"] / 4 - 0.06
    assert plan["megabytes_sent_a_step_each_ddp"] == pytest.approx(2 * 4 * mega * 3 / 4, abs=0.06)
    assert plan["megabytes_sent_a_step_each_fsdp"] == pytest.approx(3 * 4 * mega * 3 / 4, abs=0.06)
    assert main(["train", "--processes", "4"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_is_refused():
    from textdiffusion.errors import UserError
    from textdiffusion.parallel.distributed import Group
    from textdiffusion.settings import TrainingConfig
    from textdiffusion.training.learning import Learner

    net = Transformer(TransformerConfig(inputs=7, outputs=7, window=8, depth=1, width=16, heads=2))
    with pytest.raises(UserError, match="cannot share a batch of 2"):
        Learner(net, TrainingConfig(steps=1, batch=2), Group(0, 3))
    assert B >= 2
