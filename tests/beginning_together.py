"""What a process does in tests/test_adaptation.py: a run that begins with a model made elsewhere is learnt, stopped by
a signal in the middle, and gone on with.

The arguments are the source, the text, and the run. Started as torchrun does; also alone, for what one process finds.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Literal

import torch

from textdiffusion.parallel.distributed import joined
from textdiffusion.presets import configure
from textdiffusion.training.fit import Started, Stepped, Stopped, fit

STEPS, HALF = 8, 4
SETTINGS = ["training.batch=4", "training.micro_batch=2", "training.precision=fp32", "training.evaluations=2"]


def learn(source: str, text: str, out: str, parallel: Literal["auto", "ddp", "fsdp"] = "auto") -> list[float]:
    """What is minimised, after each step, averaged as it is shown."""
    config = configure(family="masked", length=12, steps=STEPS, data=text, init_from=source, settings=SETTINGS)
    found = []
    for resume in (False, True):
        for event in fit(config, Path(out), resume=resume, parallel=parallel):
            if isinstance(event, Started):
                assert event.resumed_at == (HALF if resume else 0)
            elif isinstance(event, Stepped):
                found.append(event.objective)
                if event.step == HALF and not resume:
                    os.kill(os.getpid(), signal.SIGTERM)
            elif isinstance(event, Stopped):
                assert event.step == (STEPS if resume else HALF)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined():
        print(*learn(*sys.argv[1:4], parallel="fsdp"))
