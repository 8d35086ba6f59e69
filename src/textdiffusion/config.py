"""The config of a run: made from settings, or read from its folder. Without torch, but for what a family decides."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from textdiffusion.errors import UserError
from textdiffusion.families import check as check_family
from textdiffusion.families import family
from textdiffusion.networks.shape import PretrainedShape, TransformerConfig
from textdiffusion.settings import TrainingConfig, with_fields
from textdiffusion.text.data import DataConfig

RUNS = Path("runs")
SHIPPED = Path(__file__).parent / "shipped"  # a small run that comes with the package (examples/shipped_run.py)
SHIPPED_INSTEAD = "there is no run under runs/: this is the small one that comes with the package"
# What config.json says to other programs, transformers above all, and not to this one.
FOR_OTHERS = {
    "model_type", "format", "architectures", "transformers_version", "dtype", "vocab_size", "mask_token_id",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "is_decoder", "use_cache",
    "num_hidden_layers",
}  # fmt: skip


@dataclass
class RunConfig:
    """What a run is. ``vocabulary`` and ``start`` are filled in once the tokenizer is there."""

    family: str = "masked"
    tokenizer: str = "char"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: str = "own"  # whose network: this library's, or one made elsewhere (backbones.py)
    init_from: str = ""  # the model whose weights the training began with (adaptation.py)
    network: dict[str, Any] = field(default_factory=dict)  # fields of its config, TransformerConfig
    process: dict[str, Any] = field(default_factory=dict)  # fields of the family's Config
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=1))
    vocabulary: int = 0
    start: int = 0
    labels: list[str] = field(default_factory=list)  # of the texts, if they have any; filled in from them
    text: str = ""  # hash of the text it was trained on, so that held-out text stays held out

    def to_json(self) -> str:
        body = {"model_type": "textdiffusion", "format": 1} | dataclasses.asdict(self)
        return json.dumps(body, indent=2) + "\n"


def override(config: RunConfig, settings: list[str]) -> RunConfig:
    """Apply ``part.key=value`` settings (YAML values) to a config.

    Raises:
        UserError: a setting that cannot be read or names no field.
    """
    parts: dict[str, dict[str, Any]] = {"network": dict(config.network), "process": dict(config.process)}
    for name in ("data", "training"):
        parts[name] = dataclasses.asdict(getattr(config, name))
    shape = PretrainedShape if config.backbone == "pretrained" else TransformerConfig
    kinds = {"network": shape, "data": DataConfig, "training": TrainingConfig}
    # The fields of a family come last: its file needs torch, and all else can be refused before that is loaded.
    for setting in sorted(settings, key=lambda setting: setting.startswith("process.")):
        path, equals, text = setting.partition("=")
        part, dot, key = path.partition(".")
        if not (equals and dot) or part not in parts:
            raise UserError(f"--set takes {'|'.join(parts)}.field=value, not {setting!r}")
        kind = family(config.family).Config if part == "process" else kinds[part]
        parts[part][key] = _value(text, get_type_hints(kind).get(key), path)
    data = with_fields(DataConfig, parts["data"], "data")
    training = with_fields(TrainingConfig, parts["training"], "training")
    if config.backbone != "own":
        return _override_other(config, parts, data, training, settings)
    with_fields(TransformerConfig, {"inputs": 1, "outputs": 1} | parts["network"], "network")
    cls = family(config.family)
    of_family = cls.network_fields(with_fields(cls.Config, parts["process"], "process"), 1)
    decided = dict.fromkeys(("estimates", "codes", "code_width", "clock"), 0) | {"reals": False} | of_family
    if "classes" in parts["network"]:
        raise UserError("network.classes follows from the labels of the text; use --label FIELD")
    for name in decided.keys() & parts["network"].keys():
        raise UserError(f"network.{name} is decided by the {config.family} family and cannot be set")
    with_fields(TransformerConfig, parts["network"] | decided, "network")
    return dataclasses.replace(config, network=parts["network"], process=parts["process"], data=data, training=training)


def _override_other(
    config: RunConfig, parts: dict[str, Any], data: DataConfig, training: TrainingConfig, settings: list[str]
) -> RunConfig:
    """The same for a network that was made elsewhere, whose shape is what it is."""
    free = {"pretrained": {"lora", "sees_hidden"}}.get(config.backbone, set())
    for setting in settings:
        name = setting.partition("=")[0]
        if name.startswith("network.") and name.removeprefix("network.") not in free:
            raise UserError(f"{name} is that of {config.init_from} and cannot be set")
    with_fields(family(config.family).Config, parts["process"], "process")
    network, process = parts["network"], parts["process"]
    return dataclasses.replace(config, network=network, process=process, data=data, training=training)


def _value(text: str, hint: Any, path: str) -> Any:
    """A YAML value for a field with this type hint."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {path}: cannot read the value {text!r}") from None
    if hint is str:
        return text  # a field name such as "no" is not YAML's false
    if isinstance(value, str):
        # YAML 1.1 takes 3e-3 for a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    return value


def read_config(path: Path) -> RunConfig:
    """The config of the run in a folder.

    Raises:
        UserError: there is no run, or its config cannot be read.
    """
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{path} is no run: it has no config.json; train one with `textdiffusion train --out {path}`")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(body, dict)
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, RecursionError):
        raise UserError(f"{file} is damaged: it is not a JSON object; restore it or train again") from None
    body = {k: v for k, v in body.items() if k not in FOR_OTHERS}
    for part, cls in (("data", DataConfig), ("training", TrainingConfig)):
        if part in body:
            body[part] = with_fields(cls, body[part], f"{file}: {part}")
    config: RunConfig = with_fields(RunConfig, body, str(file))
    check_family(config.family)
    if not isinstance(config.network.get("window"), int):
        raise UserError(f"{file} lacks network.window, a whole number; restore it or train again")
    return config


def check_new(path: Path) -> None:
    """Refuse a folder for a new run that holds one already, or something else.

    Raises:
        UserError: naming what is there.
    """
    if (path / "config.json").exists():
        raise UserError(f"{path} holds a run already; add --resume to go on with it, or choose another --out")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; choose an empty or a new folder for --out")
    ours = {"tokenizer.json", "tokenizer_config.json"}  # left by a run killed at its very start
    if others := [p.name for p in path.iterdir() if p.name not in ours and not p.name.startswith(".")]:
        raise UserError(f"{path} holds other files ({others[0]}, ...); choose an empty or a new folder for --out")


def new_run_path(family_name: str, data: str) -> Path:
    """A name under runs/ that is not taken."""
    stem = f"{family_name}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(data).stem).strip('-') or 'text'}"
    number = 1
    while (path := RUNS / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return path


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


def run_to_use(root: Path = RUNS) -> Path:
    """The newest run under ``root``; where there is none, the small one that comes with the package (SHIPPED)."""
    try:
        return newest_run(root)
    except UserError:
        return SHIPPED
