"""A run directory: all that the verbs share, laid out as a Hugging Face model folder.

  config.json         what the run is: family, network, tokenizer, data, training
  model.safetensors   the weights to use: the average with the best validation figure so far
  tokenizer.json      standard tokenizer file
  metrics.jsonl       one line a validation
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
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
    text: str = ""  # hash of the text it was trained on, so that held-out text stays held out

    def to_json(self) -> str:
        body = {"model_type": "textdiffusion", "format": 1} | dataclasses.asdict(self)
        return json.dumps(body, indent=2) + "\n"


def with_fields(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a config dataclass; a wrong name or type is one clear line.

    Raises:
        UserError: naming the field and what it may be.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a group of fields, not {values!r}")
    hints = get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"there is no field {where}.{name}; {where} has: {', '.join(fields) or 'no fields'}")
        if not _fits(value, hints[name]):
            raise UserError(f"{where}.{name} must be {_wanted(hints[name])}, not {value!r}")
    try:
        return cls(**values)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in values]
        raise UserError(f"{where} lacks fields; it needs some of: {', '.join(missing)}") from None


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint) and isinstance(value, str)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_wanted(part) for part in get_args(hint))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


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
        kinds = {"network": TransformerConfig, "process": family(config.family).Config}
        kinds |= {"data": DataConfig, "training": TrainingConfig}
        if get_type_hints(kinds[part]).get(key) is str:
            value = text  # a field name such as "no" is not YAML's false
        if isinstance(value, str) and get_type_hints(kinds[part]).get(key) is not str:
            # YAML 1.1 takes 3e-3 for a string.
            with contextlib.suppress(ValueError):
                value = float(value)
        parts[part][key] = value
    cls = family(config.family)
    decided = cls.network_fields(with_fields(cls.Config, parts["process"], "process"), 1)
    for name in decided.keys() & parts["network"].keys():
        raise UserError(f"network.{name} is decided by the {config.family} family and cannot be set")
    with_fields(TransformerConfig, parts["network"] | decided, "network")
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
    with torch.random.fork_rng(devices=[]):
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
        ours = {"tokenizer.json", "tokenizer_config.json"}  # left by a run killed at its very start
        if others := [p.name for p in path.iterdir() if p.name not in ours and not p.name.startswith(".")]:
            raise UserError(f"{path} holds other files ({others[0]}, ...); choose an empty or a new folder for --out")
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
        except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, RecursionError):
            raise UserError(f"{file} is damaged: it is not a JSON object; restore it or train again") from None
        body = {k: v for k, v in body.items() if k not in ("model_type", "format")}
        for part, cls in (("data", DataConfig), ("training", TrainingConfig)):
            if part in body:
                body[part] = with_fields(cls, body[part], f"{file}: {part}")
        config: RunConfig = with_fields(RunConfig, body, str(file))
        family(config.family)
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocabulary != config.vocabulary or not 0 <= config.start < config.vocabulary:
            raise UserError(f"{path}/tokenizer.json does not belong to this run: it has {tokenizer.vocabulary} tokens")
        if not isinstance(config.network.get("window"), int):
            raise UserError(f"{file} lacks network.window, a whole number; restore it or train again")
        return Run(path, config, tokenizer)

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


def newest_run(root: Path = RUNS) -> Path:
    """The run under ``root`` that was changed last.

    Raises:
        UserError: there is none.
    """

    def changed(config: Path) -> float:
        files = (config, config.with_name("model.safetensors"), config.with_name("metrics.jsonl"))
        return max(f.stat().st_mtime for f in files if f.exists())

    found = sorted(root.glob("*/config.json"), key=changed)
    if not found:
        raise UserError(f"there is no run under {root}/; train one with `textdiffusion train`, or name a run directory")
    return found[-1].parent
