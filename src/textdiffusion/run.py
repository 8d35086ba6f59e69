"""A run directory: all that the verbs share, laid out as a Hugging Face model folder.

  config.json         what the run is: family, network, tokenizer, data, training
  model.safetensors   the weights to use: the average with the best validation figure so far
  tokenizer.json      standard tokenizer file
  metrics.jsonl       one line a validation
  grid.json           what a token costs at each noise level, for the optimal grid; not of families that have none
  checkpoints/        what --resume needs, newest last
  README.md           model card
Files are written beside and renamed, so none is ever half there; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from textdiffusion import backbones
from textdiffusion.config import RunConfig, check_new, read_config
from textdiffusion.errors import UserError
from textdiffusion.families import family
from textdiffusion.pacing import FILE as GRID_FILE
from textdiffusion.pacing import costs_to_json, grid_of
from textdiffusion.process import Process
from textdiffusion.settings import with_fields
from textdiffusion.tokenizer import Tokenizer
from textdiffusion.training import Learner

KEEP = 2  # checkpoints


def build(config: RunConfig, network: torch.nn.Module | None = None) -> Process:
    """The process of a config around a network; None: a new one, seeded by ``training.seed``."""
    cls = family(config.family)
    process_config = with_fields(cls.Config, config.process, "process")
    if network is None:
        decided = cls.network_fields(process_config, config.vocabulary) | {"classes": len(config.labels)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            network = backbones.make(config, decided)
    return cls(network, process_config, config.vocabulary, start=config.start)


def fill(config: RunConfig, tensors: dict[str, Tensor], device: torch.device | str = "cpu", where: str = "") -> Process:
    """The process of a config with these weights, in evaluation mode.

    Args:
        tensors: the network's state; names may begin with "network.", as transformers saves them.
        where: what they were read from.
    Raises:
        UserError: they are of another network.
    """
    process = build(config)
    network = process.network
    assert isinstance(network, torch.nn.Module)
    if tensors and all(name.startswith("network.") for name in tensors):
        tensors = {name.removeprefix("network."): x for name, x in tensors.items()}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{where or 'the weights'} does not fit config.json: {reason}") from None
    network.to(device).eval()
    return process


def write(path: Path, text: str) -> None:
    """Write a text file so that it is either all there or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # Weights that a network uses under two names (an embedding that is the head as well) are written twice.
    written: set[tuple[int, int]] = set()
    for name, x in tensors.items():
        place = (x.data_ptr(), x.numel())
        if place in written and x.numel():
            tensors = tensors | {name: x.clone()}
        written.add(place)
    save_file(tensors, temporary, metadata={"format": "pt"})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; train the run first, or copy the file back") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or resume the run from its checkpoints") from None


class Run:
    """A run directory and its config."""

    def __init__(self, path: Path, config: RunConfig, tokenizer: Tokenizer):
        self.path, self.config, self.tokenizer = path, config, tokenizer

    @staticmethod
    def create(path: Path, config: RunConfig, tokenizer: Tokenizer) -> Run:
        """Make a new run directory.

        Raises:
            UserError: there is a run there already.
        """
        check_new(path)
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
        write(path / "config.json", config.to_json())
        return Run(path, config, tokenizer)

    @staticmethod
    def open(path: Path) -> Run:
        """Open a run directory, without its weights.

        Raises:
            UserError: there is none, or its config cannot be read.
        """
        config = read_config(path)
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocabulary != config.vocabulary or not 0 <= config.start < config.vocabulary:
            raise UserError(f"{path}/tokenizer.json does not belong to this run: it has {tokenizer.vocabulary} tokens")
        return Run(path, config, tokenizer)

    def save_weights(self, network: torch.nn.Module) -> None:
        self.save_tensors({k: v.contiguous() for k, v in network.state_dict().items()})

    def save_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Write model.safetensors; the tensors are those of the network's state."""
        _save_tensors(self.path / "model.safetensors", tensors)

    def load(self, device: torch.device | str = "cpu") -> Process:
        """The process with the run's weights, in evaluation mode, on the optimal grid if the run holds one.

        Raises:
            UserError: weights missing, damaged, or of another network; a damaged grid.
        """
        grid = grid_of(self.path)
        file = self.path / "model.safetensors"
        return fill(self.config, _load_tensors(file), device, str(file)).on(grid)

    def save_grid(self, costs: Sequence[float], examples: int) -> None:
        """Keep what tokens cost at each noise level; nothing, if nothing was measured."""
        if costs:
            write(self.path / GRID_FILE, costs_to_json(costs, examples))

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def save_checkpoint(self, learner: Learner, more: Mapping[str, float]) -> None:
        """Write a checkpoint beside, then rename its folder: a kill at any moment leaves the older ones whole."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        for file in self.path.glob(".*.[0-9]*"):  # left by a process killed while it wrote
            file.unlink(missing_ok=True)
        temporary = folder / f".writing-{os.getpid()}"
        temporary.mkdir()
        _save_tensors(temporary / "state.safetensors", learner.tensors())
        write(temporary / "state.json", json.dumps({**learner.numbers(), **more}) + "\n")
        final = folder / f"step-{learner.step:09d}"
        shutil.rmtree(final, ignore_errors=True)  # there only if it was damaged, and passed over when resuming
        os.rename(temporary, final)
        for old in self.checkpoints()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, learner: Learner) -> dict[str, float] | None:
        """Load the newest checkpoint that can be read into ``learner``; returns its numbers, None if there is none.

        Damaged ones that are newer are removed.

        Raises:
            UserError: there are checkpoints, and none can be read.
        """
        found = self.checkpoints()
        for number, path in enumerate(reversed(found)):
            try:
                numbers = json.loads((path / "state.json").read_text(encoding="utf-8"))
                learner.restore(_load_tensors(path / "state.safetensors"), numbers)
                for damaged in found[len(found) - number :]:
                    shutil.rmtree(damaged, ignore_errors=True)
                return dict(numbers)
            except (UserError, OSError, ValueError, TypeError, KeyError, RuntimeError):
                continue
        if found:
            raise UserError(
                f"no checkpoint in {self.path}/checkpoints can be read; restore one, or delete them to begin anew"
            )
        return None

    # -- metrics --------------------------------------------------------------------------------------------------
    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be made again."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, AttributeError):  # the last line may be torn
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        write(file, "".join(kept))
