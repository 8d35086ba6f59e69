"""From a run directory, or from data, to a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from textdiffusion.config import SHIPPED, SHIPPED_INSTEAD, new_run_path, newest_run, override, read_config, run_to_use
from textdiffusion.errors import UserError
from textdiffusion.exchange.fetching import fetch, is_foreign
from textdiffusion.exchange.published import read
from textdiffusion.model import Model
from textdiffusion.parallel.distributed import ALONE, Group
from textdiffusion.presets import configure
from textdiffusion.run import Run, build, fill
from textdiffusion.settings import Precision, check_device
from textdiffusion.training.fit import Stopped, fit
from textdiffusion.training.tracking import tracked


def pick_device(device: str) -> str:
    """ "auto" is a CUDA GPU if there is one, else the CPU.

    Raises:
        UserError: the device is not there.
    """
    check_device(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU that torch can use here; try --device cpu, or `textdiffusion doctor`")
    return device


def load(
    path: str | Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    group: Group = ALONE,
    settings: Sequence[str] = (),
) -> Model:
    """Load a run directory, or a model of the hub by USER/NAME; None takes the newest run under runs/, or warns that it
    takes the one that comes with the package where there is none (`textdiffusion.SHIPPED`).

    A published checkpoint (published.py) is read as it is; `textdiffusion convert` makes a run of it once and for all.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        precision: what to sample in: "fp32", "bf16", or "auto" for what this machine multiplies faster.
        group: processes, with a copy of the model each, that share what is evaluated and written.
        settings: of the sampling, in the place of those of the run: fields that the family's Config names
            ``at_sampling``, as "process.delta=2".
    Raises:
        UserError: there is no run, or it is damaged; a setting that samples cannot change.
    """
    model = _load(path, pick_device(device), precision, group)
    if settings:
        kind, run = type(model.process.config), model.config
        known = [f"process.{name}" for name in getattr(kind, "at_sampling", {})]
        if other := [s for s in settings if s.partition("=")[0] not in known]:
            can = f"; what can: {', '.join(known)}" if known else ""
            raise UserError(f"{other[0].partition('=')[0]} of a run of {run.family} cannot be changed at sampling{can}")
        network, grid = model.process.network, model.process.grid
        assert isinstance(network, torch.nn.Module)
        model.config = override(run, list(settings))
        model.process = build(model.config, network).on(grid)
    return model


def check_settings(model: Model, settings: Sequence[str], sampler: str | None) -> None:
    """Refuse a setting of the sampling that the sampler does not go by, and would not be seen to be left out.

    Raises:
        UserError: naming the samplers that do.
    """
    for name in (setting.partition("=")[0] for setting in settings):
        by = type(model.process.config).at_sampling[name.removeprefix("process.")]
        if sampler not in by:
            raise UserError(f"{name} is of the sampler {' and '.join(by)} alone; add --sampler {by[0]}")


def _load(path: str | Path | None, device: str, precision: Precision, group: Group) -> Model:
    """As it was trained."""
    place = run_to_use() if path is None else fetch(path)
    if path is None and place == SHIPPED:
        warnings.warn(SHIPPED_INSTEAD, stacklevel=2)
    if is_foreign(place):
        found = read(place)
        return Model(fill(found.config, found.tensors, device), found.tokenizer, found.config, device, precision)
    run = Run.open(place)
    return Model(run.load(device), run.tokenizer, run.config, device, precision, group)


def train(
    out: str | Path | None = None, device: str = "auto", resume: bool = False, track: str | None = None, **flags: Any
) -> Model:
    """Train a model and load it; arguments as in `presets.configure` (family, data, tokenizer, length, depth, steps,
    minutes, seed, settings, init_from); ``track`` is None, "tensorboard" or "wandb". Prints nothing; use the command
    line, or `fit.fit`, to see it learn.

    Raises:
        UserError: unusable data or settings.
    """
    if resume:
        if flags:
            raise UserError(
                f"resume goes on with a run as it was begun; leave out {next(iter(flags))}, or start a new run"
            )
        path = Path(out) if out is not None else newest_run()
        config = read_config(path)
    else:
        config = configure(**flags)
        path = Path(out) if out is not None else new_run_path(config.family, config.data.source)
    for event in tracked(fit(config, path, resume=resume, device=pick_device(device)), track, config, path):
        if isinstance(event, Stopped) and event.signal is not None:
            raise KeyboardInterrupt(f"stopped and saved in {path}")
    return load(path, device)
