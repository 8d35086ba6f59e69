"""What a process of a group does in tests/test_parallel.py: learn for some steps, and say how it went.

Started by torchrun; also alone, for what one process would have found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from textdiffusion.mathematics.noise import Noise
from textdiffusion.parallel.distributed import Group, joined
from textdiffusion.process import Process
from textdiffusion.run import RunConfig, build
from textdiffusion.settings import TrainingConfig
from textdiffusion.training.learning import Learner, train

V, L, B = 11, 12, 12


def texts(rows: np.ndarray) -> np.ndarray:
    return np.stack([np.random.default_rng(int(row)).integers(0, V, L) for row in rows])


def make(family: str, body: str = "transformer") -> Process:
    network = {"depth": 2, "width": 32, "heads": 2, "window": L, "dropout": 0.0}
    if family in ("autoregressive", "block"):
        network["ngrams"] = 3
    if family == "autoregressive":
        network["counts"] = 3
    process = build(RunConfig(family=family, network=network | {"body": body}, vocabulary=V, start=V - 1))
    if family == "autoregressive":
        process.network.counts.count(texts(np.arange(50)).ravel())
    return process


def learn(group: Group, family: str, parallel: str, optimizer: str, steps: int, body: str) -> dict:
    """Losses, the averaged weights in the end, and what they say of a text."""
    process = make(family, body)
    if optimizer == "adamw":
        process.network.hidden_matrices = list  # AdamW learns the matrices too
    config = TrainingConfig(steps=steps, batch=B, micro_batch=3, precision="fp32", rate=3e-3)
    before = {k: v.clone() for k, v in process.network.state_dict().items()}
    learner = Learner(process.network, config, group, shard=parallel == "fsdp")
    losses = [now.loss for now in train(process, texts, learner)]
    weights = learner.whole_average()
    view = process.over(learner.average.module.eval())
    with torch.inference_mode():
        nats = learner.averaged(view.nll, torch.from_numpy(texts(np.arange(B))), Noise.of(7, B)).total.sum().item()
    moved = max((weights[k] - before[k]).abs().max().item() for k in weights if not k.startswith("clock"))
    return {
        "losses": losses,
        "moved": moved,
        "weights": {k: v.double().flatten().tolist() for k, v in weights.items()},
        "nats": nats,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    with joined() as group:
        for name, job in jobs.items():
            found = learn(group, **job)
            if group.main:
                (out / f"{name}.json").write_text(json.dumps(found))
