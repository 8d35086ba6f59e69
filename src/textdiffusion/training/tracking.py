"""A training's figures in TensorBoard or Weights & Biases, if asked for; metrics.jsonl has them always."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from textdiffusion.config import RunConfig
from textdiffusion.errors import UserError

KINDS = {"tensorboard": "pip install 'textdiffusion[track]'", "wandb": "pip install wandb"}


def check(kind: str | None) -> None:
    """Refuse a kind that there is not, or whose package is not installed.

    Raises:
        UserError: saying how to get it.
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise UserError(f"--track must be {' or '.join(KINDS)}, not {kind!r}")
    if find_spec(kind) is None:
        raise UserError(f"--track {kind} needs the package {kind}; install it with: {KINDS[kind]}")


def tracked(events: Iterator[Any], kind: str | None, config: RunConfig, path: Path) -> Iterator[Any]:
    """The events of a training (fit.py), their figures written down as they pass by.

    Args:
        kind: "tensorboard" (into ``path``/tensorboard), "wandb", or None for neither.
    Raises:
        UserError: as ``check``.
    """
    check(kind)
    if kind is None:
        yield from events
        return
    write, close = (_tensorboard if kind == "tensorboard" else _wandb)(config, path)
    try:
        for event in events:
            if figures := _figures(event):
                write(event.step, figures)
            yield event
    finally:
        close()


def _figures(event: Any) -> dict[str, Any]:
    """What is worth a curve: of steps the objective and the speed, of validations the held-out figure and a sample."""
    if hasattr(event, "objective"):
        return {"train/objective_nats": event.objective, "train/tokens_per_second": event.tokens_per_second}
    if hasattr(event, "figure"):
        found = {"validation/bits_per_char": event.figure.bits_per_char}
        return found if event.sample is None else found | {"sample": event.sample}
    return {}


Sink = tuple[Callable[[int, dict[str, Any]], None], Callable[[], None]]


def _tensorboard(config: RunConfig, path: Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # The run's folder is made by the training, which refuses one that is not empty: what is written begins with it.
    writers: list[Any] = []

    def write(step: int, figures: dict[str, Any]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(path / "tensorboard")))
            writers[0].add_text("config", f"```json\n{config.to_json()}```")
        for name, value in figures.items():
            if isinstance(value, str):
                writers[0].add_text(name, value, step)
            else:
                writers[0].add_scalar(name, value, step)

    def close() -> None:
        for writer in writers:
            writer.close()

    return write, close


def _wandb(config: RunConfig, path: Path) -> Sink:
    import wandb

    run = wandb.init(project="textdiffusion", name=path.name, config=dataclasses.asdict(config), resume="allow")
    return lambda step, figures: run.log(figures, step=step), run.finish
