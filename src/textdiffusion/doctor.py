"""What this machine is and would be asked to do: `textdiffusion doctor` and `train --dry-run`."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from textdiffusion import __version__
from textdiffusion.config import RunConfig
from textdiffusion.errors import UserError
from textdiffusion.loading import pick_device
from textdiffusion.machine import fastest_precision, micro_batch_for, processor_name, tune_allocator
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import count_parameters
from textdiffusion.run import build
from textdiffusion.training.learning import Learner
from textdiffusion.training.preparation import prepare, to_learn


def machine(device: str = "auto") -> dict[str, str]:
    """Facts about the machine, and the choices that would be made on it."""
    device = pick_device(device)
    precision = fastest_precision(torch.device(device))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "textdiffusion": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch",
        "gpu": ", ".join(gpus) or "none that torch can use",
        "device": device,
        "precision": f"{precision}: measured on this machine, bfloat16 products are "
        + ("clearly faster here" if precision == "bf16" else "not clearly faster here"),
    }


def estimate(config: RunConfig, device: str, processes: int = 1) -> dict[str, Any]:
    """What a training would be: sizes, arithmetic, memory and time; three steps are timed and thrown away.

    Args:
        processes: to share each batch, one a GPU or machine like this one. Their hours are the arithmetic's, with
            nothing for what they send each other; that is given in bytes.
    Raises:
        UserError: unusable data or settings.
    """
    tune_allocator()
    corpus, tokenizer, config = prepare(config, device=device)
    text = to_learn(config, corpus, tokenizer)
    process = build(config)
    network: Any = process.network
    network.to(device)
    training = config.training
    precision = training.precision
    if precision == "auto":
        precision = fastest_precision(torch.device(device))
    if precision == "bf16":
        network.compute_dtype = torch.bfloat16
    window, batch = int(config.network["window"]), training.batch
    if training.micro_batch is None:
        size = min(
            batch, micro_batch_for(window * network.symbols_a_token, config.vocabulary, network.config.width, device)
        )
        training = replace(training, micro_batch=size)
    learner = Learner(network, training)
    x_0 = torch.randint(0, config.vocabulary, (batch, window), device=device)
    seconds = []
    for step in range(3):
        begin = time.perf_counter()
        learner.learn(process, x_0, Noise(0, np.arange(batch), batch, step, device))
        seconds.append(time.perf_counter() - begin)
    parameters = count_parameters(network)
    # Block diffusion reads each text twice, once without noise.
    read = batch * window * network.symbols_a_token
    a_step = min(seconds)
    steps = training.steps or max(1, round(60 * (training.minutes or 0.0) / a_step))
    alone = {
        "minutes": round(steps * a_step / 60, 2),
    }
    if processes > 1:
        if batch < processes:
            raise UserError(f"{processes} processes cannot share a batch of {batch}; raise --set training.batch")
        # Each sends and receives the gradients once (ring all-reduce); or the weights twice and the gradients once.
        others = 4 * parameters * (processes - 1) / processes
        block = max(map(count_parameters, getattr(network, "parts", [network])))
        alone = {
            "processes": processes,
            "megabytes_of_state_each_ddp": round(5 * 4 * parameters / 1e6, 1),
            "megabytes_of_state_each_fsdp": round((5 * 4 * parameters / processes + 2 * 4 * block) / 1e6, 1),
            "megabytes_sent_a_step_each_ddp": round(2 * others / 1e6, 1),
            "megabytes_sent_a_step_each_fsdp": round(3 * others / 1e6, 1),
            "seconds_a_step_without_sending": round(a_step / processes, 4),
            "minutes_without_sending": round(steps * a_step / 60 / processes, 2),
        }
    # Weights, gradients, averaged weights, and one (Muon) or two (AdamW) moments, in float32; activations come on top.
    return {
        "family": config.family,
        "data": config.data.source,
        "characters_to_learn_from": sum(map(len, corpus.train)),
        "tokens_to_learn_from": text.training_tokens,
        "vocabulary": config.vocabulary,
        "parameters": parameters,
        "precision": precision,
        "tokens_a_step": batch * window,
        "tokens_a_pass": min(training.micro_batch or batch, batch) * window,
        "gigaflops_a_step": round(6 * network.products * read / 1e9, 1),
        "megabytes_of_state": round(5 * 4 * parameters / 1e6, 1),
        "seconds_a_step": round(a_step, 4),
        "steps": steps,
    } | alone
