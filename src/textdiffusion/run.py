"""A run directory: all that the verbs share, laid out as a Hugging Face model folder.

  config.json         what the run is: family, network, tokenizer, data, training
  model.safetensors   the weights to use: the average with the best validation figure so far
  tokenizer.json      standard tokenizer file
  metrics.jsonl       one line a validation
  grid.json           what a token costs at each noise level, for the optimal grid; not of families that have none
  checkpoints/        what --resume needs, newest last (checkpoints.py)
  README.md           model card
Files are written beside and renamed, so none is ever half there; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textdiffusion import backbones
from textdiffusion.config import RunConfig, check_new, read_config
from textdiffusion.errors import UserError
from textdiffusion.families import family
from textdiffusion.files import write
from textdiffusion.networks.bodies import landmarks
from textdiffusion.networks.shape import TransformerConfig
from textdiffusion.process import Process
from textdiffusion.sampling.pacing import FILE as GRID_FILE
from textdiffusion.sampling.pacing import costs_to_json, grid_of
from textdiffusion.settings import with_fields
from textdiffusion.tensors import load_tensors, save_tensors
from textdiffusion.text.tokenizer import Tokenizer


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
    try:
        network.load_state_dict(_bare(tensors))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{where or 'the weights'} does not fit config.json: {reason}") from None
    network.to(device).eval()
    return process


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network has them, also of what transformers saved."""
    if not all(name.startswith("network.") for name in tensors):
        return tensors
    return {name.removeprefix("network."): x for name, x in tensors.items()}


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

    def save_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Keep weights (a whole state, on any device) as the ones to use: one file, all there or not at all."""
        tensors: dict[str, Tensor] = {}
        written: set[tuple[int, int]] = set()
        for name, weight in weights.items():
            tensor = weight.detach().cpu().contiguous()
            # Weights that a network uses under two names (an embedding that is the head as well) are written twice.
            place = (tensor.data_ptr(), tensor.numel())
            tensors[name] = tensor.clone() if place in written and tensor.numel() else tensor
            written.add(place)
        save_tensors(self.path / "model.safetensors", tensors)

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to use, and they are what was written."""
        try:
            load_tensors(self.path / "model.safetensors")
            return True
        except UserError:
            return False

    def load(self, device: torch.device | str = "cpu") -> Process:
        """The process with the run's weights, in evaluation mode, on the optimal grid if the run holds one.

        Raises:
            UserError: weights missing, damaged, or of another network; a damaged grid.
        """
        tensors = _bare(load_tensors(self.path / "model.safetensors"))
        if self.config.backbone == "own":
            self._check_size(tensors)
        grid = grid_of(self.path)
        return fill(self.config, tensors, device, str(self.path / "model.safetensors")).on(grid)

    def save_grid(self, costs: Sequence[float], examples: int) -> None:
        """Keep what tokens cost at each noise level; nothing, if nothing was measured."""
        if costs:
            write(self.path / GRID_FILE, costs_to_json(costs, examples))

    def _check_size(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a config that asks for another network than the weights are of, before memory is taken for it."""
        cls = family(self.config.family)
        fields = self.config.network | {"classes": len(self.config.labels)}
        fields |= cls.network_fields(with_fields(cls.Config, self.config.process, "process"), self.config.vocabulary)
        for name, size in landmarks(with_fields(TransformerConfig, fields, "network")).items():
            there = tuple(tensors[name].shape) if name in tensors else None
            if there != size:
                raise UserError(
                    f"{self.path}/model.safetensors does not fit config.json: {name} is {there or 'missing'} there, "
                    f"and should be {size or 'missing'}; put back the one that belongs to the other"
                )

    def tidy(self) -> None:
        """Remove what a process left that was killed while it wrote."""
        for file in self.path.glob(".*.[0-9]*"):
            file.unlink(missing_ok=True)

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
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError, AttributeError, TypeError):  # the last line may be torn
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        write(file, "".join(kept))
