"""A run directory: all that the verbs share, and a Hugging Face model folder.

  config.json         what the run is: family, network, tokenizer, data, training
  model.safetensors   the weights to use: the average with the best validation figure so far
  tokenizer.json      standard tokenizer file
  metrics.jsonl       one line a validation, and one a minute or so of training
  checkpoints/        what --resume needs, newest last
  README.md           model card
Files are written beside and renamed, so none is ever half there; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from textdiffusion.data import DataConfig
from textdiffusion.errors import UserError
from textdiffusion.families import family
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.process import Process
from textdiffusion.tokenizer import Tokenizer
from textdiffusion.training import Learner, TrainingConfig

RUNS = Path("runs")
KEEP = 2  # checkpoints


@dataclass
class RunConfig:
    """What a run is. ``vocabulary`` and ``start`` are filled in once the tokenizer is there."""

    family: str = "masked"
    tokenizer: str = "char"
    data: DataConfig = field(default_factory=DataConfig)
    network: dict[str, Any] = field(default_factory=dict)  # fields of TransformerConfig
    process: dict[str, Any] = field(default_factory=dict)  # fields of the family's Config
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=1))
    vocabulary: int = 0
    start: int = 0

    def to_json(self) -> str:
        body = {"model_type": "textdiffusion", "format": 1} | dataclasses.asdict(self)
        return json.dumps(body, indent=2) + "\n"


def with_fields(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a config dataclass; a wrong name or type is one clear line.

    Raises:
        UserError: naming the field and what it may be.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"there is no field {where}.{name}; {where} has: {', '.join(known) or 'no fields'}")
        default = known[name].default
        wanted = type(default) if default is not dataclasses.MISSING and default is not None else type(value)
        number = wanted is float and isinstance(value, int | float) and not isinstance(value, bool)
        if not (number or isinstance(value, wanted)) or (isinstance(value, bool) and wanted is not bool):
            raise UserError(f"{where}.{name} must be of type {wanted.__name__}, not {value!r}")
    return cls(**values)


def override(config: RunConfig, settings: list[str]) -> RunConfig:
    """Apply ``part.key=value`` settings (YAML values) to a config.

    Raises:
        UserError: a setting that cannot be read or names no field.
    """
    parts: dict[str, dict[str, Any]] = {"network": dict(config.network), "process": dict(config.process)}
    for name in ("data", "training"):
        parts[name] = dataclasses.asdict(getattr(config, name))
    for setting in settings:
        path, equals, text = setting.partition("=")
        part, dot, key = path.partition(".")
        if not (equals and dot) or part not in parts:
            raise UserError(f"--set takes {'|'.join(parts)}.field=value, not {setting!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {path}: cannot read the value {text!r}") from None
        if isinstance(value, str):
            # YAML 1.1 takes 3e-3 for a string.
            with contextlib.suppress(ValueError):
                value = float(value)
        parts[part][key] = value
    with_fields(family(config.family).Config, parts["process"], "process")
    fixed = {"inputs": 1, "outputs": 1}
    with_fields(TransformerConfig, fixed | parts["network"], "network")
    return dataclasses.replace(
        config,
        network=parts["network"],
        process=parts["process"],
        data=with_fields(DataConfig, parts["data"], "data"),
        training=with_fields(TrainingConfig, parts["training"], "training"),
    )


def build(config: RunConfig) -> Process:
    """The process of a config around a new network, seeded by ``training.seed``."""
    cls = family(config.family)
    process_config = with_fields(cls.Config, config.process, "process")
    fields = config.network | cls.network_fields(process_config, config.vocabulary)
    torch.manual_seed(config.training.seed)
    network = Transformer(with_fields(TransformerConfig, fields, "network"))
    return cls(network, process_config, config.vocabulary, start=config.start)


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
        if (path / "config.json").exists():
            raise UserError(f"{path} holds a run already; add --resume to go on with it, or choose another --out")
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
        file = path / "config.json"
        if not file.exists():
            raise UserError(
                f"{path} is no run: it has no config.json; train one with `textdiffusion train --out {path}`"
            )
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            assert isinstance(body, dict)
        except (json.JSONDecodeError, UnicodeDecodeError, AssertionError):
            raise UserError(f"{file} is damaged: it is not a JSON object; restore it or train again") from None
        body = {k: v for k, v in body.items() if k not in ("model_type", "format")}
        for part, cls in (("data", DataConfig), ("training", TrainingConfig)):
            if isinstance(body.get(part), dict):
                body[part] = with_fields(cls, body[part], f"{file}: {part}")
        config: RunConfig = with_fields(RunConfig, body, str(file))
        family(config.family)
        return Run(path, config, Tokenizer.load(path))

    def save_weights(self, network: torch.nn.Module) -> None:
        _save_tensors(self.path / "model.safetensors", {k: v.contiguous() for k, v in network.state_dict().items()})

    def load(self, device: torch.device | str = "cpu") -> Process:
        """The process with the run's weights, in evaluation mode.

        Raises:
            UserError: weights missing, damaged, or of another network.
        """
        process = build(self.config)
        network = process.network
        assert isinstance(network, Transformer)
        tensors = _load_tensors(self.path / "model.safetensors")
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.path}/model.safetensors does not fit config.json: {reason}") from None
        network.to(device).eval()
        return process

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
        temporary = folder / f".writing-{os.getpid()}"
        temporary.mkdir()
        _save_tensors(temporary / "state.safetensors", learner.tensors())
        write(temporary / "state.json", json.dumps({**learner.numbers(), **more}) + "\n")
        final = folder / f"step-{learner.step:09d}"
        if final.exists():
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, final)
        for old in self.checkpoints()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, learner: Learner) -> dict[str, float]:
        """Load the newest checkpoint that can be read into ``learner``; returns its numbers.

        Raises:
            UserError: there is none.
        """
        for path in reversed(self.checkpoints()):
            try:
                numbers = json.loads((path / "state.json").read_text(encoding="utf-8"))
                learner.restore(_load_tensors(path / "state.safetensors"), numbers)
                return dict(numbers)
            except (UserError, OSError, json.JSONDecodeError, RuntimeError, KeyError):
                continue
        raise UserError(f"{self.path} has no checkpoint to resume from; train it anew with another --out")

    # -- metrics --------------------------------------------------------------------------------------------------
    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be made again."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line).get("step", 0) <= step]
            write(file, "".join(line + "\n" for line in kept))


def newest_run(root: Path = RUNS) -> Path:
    """The run under ``root`` that was changed last.

    Raises:
        UserError: there is none.
    """
    found = sorted(root.glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"there is no run under {root}/; train one with `textdiffusion train`, or name a run directory")
    return found[-1].parent
