"""Checkpoints of published diffusion language models, read as they are: SEDD, MDLM, BD3-LM, ddlm.

  louaaron/sedd-small, -medium       config.json (nested: graph, noise, model) and model.safetensors or .bin
  SEDD's own training, and its forks  .hydra/config.yaml or config.yaml, and a .pth with model and ema, or weights
  kuleshov-group/mdlm-owt            config.json (flat, model_type mdlm); weights behind the prefix "backbone."
  kuleshov-group/bd3lm-owt-*         the same with model_type bd3lm and block_size
  ddlm                               a folder saved by transformers (discrete_diffusion), or its trainer's .pth

None of their code is run, and none of their packages is needed: weights go under the names of networks/dit.py. Shapes
are read from the weights, since published configs are wrong in places (MDLM's cond_dim). Only tensors are unpickled.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from textdiffusion.config import RunConfig, check_new
from textdiffusion.errors import UserError
from textdiffusion.exchange.fetching import facts
from textdiffusion.run import Run, build
from textdiffusion.settings import TrainingConfig
from textdiffusion.text.data import DataConfig
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.tokenizer import build as build_tokenizer

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth", "checkpoints-meta/checkpoint.pth")
CONFIGS = ("config.yaml", ".hydra/config.yaml")
KNOWN = "SEDD, MDLM, BD3-LM and ddlm checkpoints can be read"
# ddlm's weights, under the names of networks/dit.py.
RENAMED = (
    (r"transformer\.wte\.weight", "vocab_embed.embedding"),
    (r"transformer\.wpe\.weight", "position.weight"),
    (r"transformer\.ln_f\.", "last_norm."),
    (r"lm_head\.", "output_layer."),
    (r"transformer\.h\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"transformer\.h\.(\d+)\.attn\.c_attn\.", r"blocks.\1.attn_qkv."),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.", r"blocks.\1.attn_out."),
    (r"transformer\.h\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.0."),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.2."),
    (r"transformer\.h\.(\d+)\.adaLN", r"blocks.\1.adaLN"),
)
# Its 106 symbols: two special ones, digits, letters, ASCII punctuation, white space, and quotes and dashes.
DDLM_SYMBOLS = [
    "<UNK>", "<PAD>", *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", " ", "\t", "\n", *"\u201c\u201d\u2018\u2019\u2014\u2013\u2026",
]  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A checkpoint, read."""

    what: str  # the system it is of
    config: RunConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer


def read(source: Path, tokenizer: str | None = None) -> Published:
    """Read a published checkpoint.

    Args:
        source: a folder, or a file of weights in one.
        tokenizer: of the token ids, as in ``--tokenizer``; None: the folder's own, else GPT-2's.
    Raises:
        UserError: no such file, one that is damaged or cut off, or of a model that is not known.
    """
    folder = source.parent if source.is_file() else source
    file = source if source.is_file() else _weights(source)
    try:
        return _read(folder, file, tokenizer)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{file} or its config is damaged, or of another model ({_line(error)}); {KNOWN}") from error


def _read(folder: Path, file: Path, tokenizer: str | None) -> Published:
    tensors = _tensors(file)
    body = facts(folder) or _settings(folder)
    names = "transformer.wte.weight" in tensors, "vocab_embed.embedding" in tensors
    if names == (True, False):
        what, config, tensors = _ddlm(body, tensors)
        symbols = _characters()
    elif names == (False, True):
        what, config, tensors = _dit(body, tensors, file)
        symbols = _tokens(folder, tokenizer)
    else:
        raise UserError(f"{file} holds the weights of some other model; {KNOWN}")
    tensors = {name: x.float().contiguous() for name, x in tensors.items()}
    if symbols.vocabulary != config.vocabulary:
        raise UserError(
            f"{file} is of {config.vocabulary} tokens, and the tokenizer has {symbols.vocabulary}; name its own with "
            "--tokenizer"
        )
    config = replace(config, tokenizer=symbols.kind, start=symbols.end_of_text)
    _check(config, tensors, file)
    return Published(what, config, tensors, symbols)


def convert(source: Path, path: Path, tokenizer: str | None = None) -> Published:
    """Make a run directory of a published checkpoint.

    Raises:
        UserError: as ``read``; or a folder that holds something already.
    """
    check_new(path)
    found = read(source, tokenizer)
    run = Run.create(path, found.config, found.tokenizer)
    run.save_weights(found.tensors)
    return found


# -- files --------------------------------------------------------------------------------------------------------


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no weights: one of {', '.join(WEIGHTS)} was looked for")


def _tensors(file: Path) -> dict[str, Tensor]:
    """All weights of a file by name, averaged ones if it has them; without the prefixes that wrappers put before."""
    if not file.exists():
        raise UserError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            body: Any = load_file(file)
        else:
            body = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{file} is damaged or cut off ({_line(error)}); fetch it again") from None
    except Exception:  # what the unpickler refuses: torch's own class of errors, and others
        raise UserError(
            f"{file} is no run (a folder), and no file of weights that can be read: it holds more than tensors, and "
            "nothing else is unpickled; save its state_dict alone"
        ) from None
    average = body.get("ema") if isinstance(body, dict) else None
    for part in ("model_state_dict", "state_dict", "model"):
        if isinstance(body, dict) and isinstance(body.get(part), dict):
            body = body[part]
            break
    if not isinstance(body, dict) or not any(isinstance(x, Tensor) for x in body.values()):
        raise UserError(f"{file} holds no weights by name; {KNOWN}")
    found: dict[str, Tensor] = {}
    for name, x in body.items():
        name = re.sub(r"^(?:module\.|_orig_mod\.|backbone\.|model\.)+", "", str(name)).replace("_orig_mod.", "")
        if isinstance(x, Tensor) and x.is_floating_point():
            found[name] = x
    _average(found, average, file)
    return found


def _average(found: dict[str, Tensor], average: Any, file: Path) -> None:
    """Put averaged weights, a list in the order of the parameters, in the place of the last ones."""
    shadow = average.get("shadow_params") if isinstance(average, dict) else None
    if not shadow:
        return
    names = [name for name in found if not name.endswith("inv_freq")]
    if len(names) != len(shadow) or any(found[name].shape != x.shape for name, x in zip(names, shadow)):
        raise UserError(f"{file}: its averaged weights are not those of its network; it is damaged")
    found.update(zip(names, shadow))


def _settings(folder: Path) -> dict[str, Any]:
    for name in CONFIGS:
        try:
            body = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(body, dict):
            return body
    return {}


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


# -- networks -----------------------------------------------------------------------------------------------------


def _number(body: Any, *path: str) -> Any:
    """What a nested config says, or None."""
    for key in path:
        body = body.get(key) if isinstance(body, dict) else None
    return body


def _depth(tensors: dict[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=0)


def _shape(tensors: dict[str, Tensor], heads: int) -> dict[str, Any]:
    """Network fields that the weights say themselves."""
    width = tensors["vocab_embed.embedding"].shape[1]
    condition = tensors.get("sigma_map.mlp.2.weight")
    if not any(name.startswith("blocks.0.adaLN") for name in tensors):
        condition = None
    return {
        "depth": _depth(tensors),
        "width": width,
        "heads": heads,
        "condition": 0 if condition is None else len(condition),
    }


def _dit(body: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> tuple[str, RunConfig, dict[str, Tensor]]:
    """SEDD, MDLM or BD3-LM."""
    kind, graph = body.get("model_type"), _number(body, "graph", "type")
    if kind not in ("mdlm", "bd3lm") and graph not in ("absorb", "uniform"):
        raise UserError(f"{file} has no config beside it that says which model it is (config.json or config.yaml)")
    heads = _number(body, "model", "n_heads") or body.get("n_heads")
    turns = tensors.get("rotary_emb.inv_freq")
    tensors = {name: x for name, x in tensors.items() if not name.endswith("inv_freq") and "sampling_eps" not in name}
    symbols, width = tensors["vocab_embed.embedding"].shape
    if heads is None:
        if turns is None:
            raise UserError(f"{file}: neither the config nor the weights say how many heads it has (n_heads)")
        heads = width // (2 * len(turns))
    network = _shape(tensors, int(heads))
    if not network["condition"]:
        tensors = {name: x for name, x in tensors.items() if not name.startswith("sigma_map.")}
    network["window"] = int(_number(body, "model", "length") or body.get("model_length") or 1024)
    process: dict[str, Any] = {}
    if kind is not None:
        if body.get("time_conditioning") or body.get("causal"):
            raise UserError(f"{file}: of {kind} only models without time conditioning, and not causal ones, are read")
        vocabulary, family = symbols - 1, "masked" if kind == "mdlm" else "block"
        if kind == "bd3lm":
            process["block_length"] = int(body.get("block_size") or 1)
        what = {"mdlm": "MDLM", "bd3lm": "BD3-LM"}[kind]
    else:
        absorb, noise = graph == "absorb", _number(body, "noise", "type") or "loglinear"
        if noise not in ("loglinear", "geometric") or bool(_number(body, "model", "scale_by_sigma")) != absorb:
            raise UserError(
                f"{file}: SEDD is read with loglinear or geometric noise, scaled by sigma if and only if it absorbs"
            )
        vocabulary, family, what = symbols - absorb, "score_entropy", "SEDD"
        network |= {"noise": noise}
        process = {"graph": graph, "noise": noise, "given": 0.0}
        if noise == "geometric":
            low, high = (float(_number(body, "noise", name) or 0) for name in ("sigma_min", "sigma_max"))
            process |= {"sigma_min": low or 1e-4, "sigma_max": high or 20.0}
            network |= {name: process[name] for name in ("sigma_min", "sigma_max")}
        else:
            eps = float(_number(body, "noise", "eps") or 1e-3)
            network |= {"sigma_min": eps, "sigma_max": -math.log(eps)}
    return what, _config(family, network, process, vocabulary), tensors


def _ddlm(body: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, RunConfig, dict[str, Tensor]]:
    """ddlm: a GPT-2 with adaLN, uniform geometric noise from 1e-4 to 20."""
    renamed = {}
    for name, x in tensors.items():
        for pattern, ours in RENAMED:
            name = re.sub(f"^{pattern}", ours, name)
        renamed[name] = x
    width = renamed["vocab_embed.embedding"].shape[1]
    # All its published shapes have heads of 64.
    network = _shape(renamed, int(body.get("n_head") or max(1, width // 64))) | {
        "window": len(renamed.get("position.weight", ())) or 256,
        "positions": "learned",
        "gelu": "none",
        "bias": "blocks.0.attn_qkv.bias" in renamed,
        "feed_bias": "blocks.0.mlp.0.bias" in renamed,
        "last_norm": True,
        "noise": "geometric",
        "sigma_min": 1e-4,
        "sigma_max": 20.0,
    }
    process = {"graph": "uniform", "noise": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0, "given": 0.0}
    vocabulary = len(renamed["vocab_embed.embedding"])
    return "ddlm", _config("score_entropy", network, process, vocabulary), renamed


def _config(family: str, network: dict[str, Any], process: dict[str, Any], vocabulary: int) -> RunConfig:
    return RunConfig(
        family=family, data=DataConfig(source=""), backbone="dit", network=network, process=process,
        training=TrainingConfig(steps=1), vocabulary=vocabulary,
    )  # fmt: skip


def _check(config: RunConfig, tensors: dict[str, Tensor], file: Path) -> None:
    """Refuse weights that do not fill the network, before anything is written."""
    with torch.device("meta"):
        network = build(config).network
    assert isinstance(network, torch.nn.Module)
    wanted = network.state_dict()
    for name, x in wanted.items():
        if name not in tensors:
            raise UserError(f"{file} lacks {name}; it is cut off, or of another model")
        if tensors[name].shape != x.shape:
            raise UserError(f"{file}: {name} is {tuple(tensors[name].shape)}, where {tuple(x.shape)} is wanted")
    if more := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"{file} holds {more[0]}, which this kind of network does not have; {KNOWN}")


# -- tokens -------------------------------------------------------------------------------------------------------


def _tokens(folder: Path, kind: str | None) -> Tokenizer:
    if kind is not None:
        return Tokenizer.load(kind) if Path(kind).exists() else build_tokenizer(kind, [])
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    try:
        return build_tokenizer("hf:gpt2", [])
    except UserError:
        raise UserError(
            f"{folder} has no tokenizer.json, and GPT-2's cannot be fetched; put it there, or name one with --tokenizer"
        ) from None


def _characters() -> Tokenizer:
    """ddlm's tokenizer; its padding stands for the end of a text."""
    vocabulary = {symbol: index for index, symbol in enumerate(DDLM_SYMBOLS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<UNK>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, "hf:ddlm", "<PAD>")
