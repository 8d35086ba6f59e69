"""Training that begins with a model (--init-from): a run, a published checkpoint, or a language model of transformers.

  a masked language model (BERT, RoBERTa, ModernBERT ...)    masked diffusion, as it stands
  a causal one (GPT-2, Llama, Qwen ...)                      masked (all see all), block (block-causal), autoregressive

What is decided here is the config of the run, without torch; weights are read when the training begins. The run is
then whole: it holds all weights, and reads nothing of what it began with.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from textdiffusion.config import RunConfig, read_config
from textdiffusion.errors import UserError
from textdiffusion.exchange.fetching import facts, fetch, is_foreign
from textdiffusion.parallel.launching import launched
from textdiffusion.text.tokenizer import Tokenizer

# Learning rates for weights that have been learnt; those of training from nothing would undo them.
RATE, LEAST_WARMUP = 3e-4, 0.05
# Of a language model of transformers: a small batch, since a budget of minutes buys few tokens and a step is cheap
# beside them; and a checkpoint less often, since one is four times the weights.
ADAPTED_TOKENS, ADAPTED_CHECKPOINTS = 512, 300.0
DROPPED = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")


def begin_from(config: RunConfig, source: str, tokenizer: str | None = None) -> RunConfig:
    """The config of a run that begins with the model in ``source``: its network, tokenizer and rates.

    Args:
        config: family, data, window and training.
        source: a run directory, a folder of a published checkpoint or of a transformers model, a packed file (GGUF),
            the short name of one that a package brings (exchange/packed.py), or USER/NAME.
        tokenizer: another than its own; ids must mean the same.
    Raises:
        UserError: nothing is there, or it cannot begin a run of this family.
    """
    place = fetch(source)
    training = replace(config.training, rate=RATE, warmup=max(config.training.warmup, LEAST_WARMUP))
    config = replace(config, init_from=str(source), training=training)
    if not is_foreign(place):
        begun = read_config(place)
        if begun.family != config.family:
            raise UserError(f"{source} is a {begun.family} run; begin with it by --family {begun.family}")
        process = begun.process | config.process
        return replace(config, backbone=begun.backbone, network=begun.network, process=process, tokenizer=f"hf:{place}")
    if is_published(place):
        from textdiffusion.exchange.published import read

        found = read(place, tokenizer).config
        if found.family != config.family:
            raise UserError(f"{source} is a {found.family} model; begin with it by --family {found.family}")
        kind = tokenizer or ("hf:gpt2" if not (place / "tokenizer.json").exists() else f"hf:{place}")
        process = found.process | config.process
        return replace(config, backbone="dit", network=found.network, process=process, tokenizer=kind)
    return _of_transformers(config, place, source, tokenizer)


def is_published(place: Path) -> bool:
    """Whether a folder or file is a published diffusion checkpoint, by its config."""
    body = facts(place)
    known = body.get("model_type") in ("mdlm", "bd3lm", "discrete_diffusion") or "graph" in body
    return place.is_file() or not body or known


def _of_transformers(config: RunConfig, place: Path, source: str, tokenizer: str | None) -> RunConfig:
    body = facts(place)
    made = " ".join(body.get("architectures") or ())
    if not made or "model_type" not in body:
        raise UserError(f"{source}/config.json does not say what the model is (model_type, architectures)")
    causal = "ForMaskedLM" not in made
    if causal and "ForCausalLM" not in made and "LMHead" not in made:
        raise UserError(f"{source} is {made}, neither a masked nor a causal language model")
    allowed = ("masked", "block", "autoregressive") if causal else ("masked",)
    if config.family not in allowed:
        what = "causal" if causal else "masked"
        raise UserError(f"a {what} language model can begin a run of --family {' or '.join(allowed)} only")
    width = next((int(body[name]) for name in WIDTHS if isinstance(body.get(name), int)), 768)
    kind = tokenizer or f"hf:{place}"
    tokens = Tokenizer.load(kind.removeprefix("hf:"))
    size = int(body.get("vocab_size") or 0)
    if tokens.vocabulary > size:
        raise UserError(f"{source} has {size} tokens, and its tokenizer {tokens.vocabulary}; name another --tokenizer")
    network: dict[str, Any] = {
        "model": {"model_type": body["model_type"]} | {k: v for k, v in body.items() if k not in DROPPED},
        "causal": causal,
        "width": width,
        "window": config.network["window"],
        "start": tokens.end_of_text,
        # A causal model has never read a hidden token: where none is seen from elsewhere, it begins less badly.
        "sees_hidden": not causal,
    }
    if not causal:
        mask = _mask(tokens)
        if mask is None:
            raise UserError(f"{source}: its tokenizer has no mask token, and a masked language model needs one")
        before, behind = _around(tokens)
        network |= {"mask": mask, "prefix": before, "suffix": behind}
    longest = int(body.get("max_position_embeddings") or body.get("n_positions") or 10**6)
    room = longest - len(network.get("prefix", ())) - len(network.get("suffix", ())) - 2
    if config.network["window"] > room:
        raise UserError(f"{source} reads texts of up to {room} tokens; give --length {room} or less")
    # Every process has to have a window of a step.
    batch = max(launched(), min(config.training.batch, ADAPTED_TOKENS // config.network["window"]))
    training = replace(config.training, batch=batch, checkpoint_seconds=ADAPTED_CHECKPOINTS)
    return replace(config, backbone="pretrained", network=network, tokenizer=kind, training=training)


def _mask(tokens: Tokenizer) -> int | None:
    """The id of the mask token, by its usual names."""
    for name in ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>"):
        if (found := tokens.backend.token_to_id(name)) is not None:
            return int(found)
    return None


def _around(tokens: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the model's own tokenizer puts before and behind a text."""
    bare = tokens.backend.encode("a", add_special_tokens=False).ids
    whole = tokens.backend.encode("a", add_special_tokens=True).ids
    more = len(whole) - len(bare)
    for before in range(more + 1):
        if whole[before : before + len(bare)] == bare:
            return list(whole[:before]), list(whole[before + len(bare) :])
    return [], []


def fill(network: Any, config: RunConfig) -> None:
    """Give a new network the weights that its run begins with.

    Raises:
        UserError: they are damaged, or of another network.
    """
    place = fetch(config.init_from)
    if config.backbone == "pretrained" and is_foreign(place):
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        make: Any = AutoModelForCausalLM if config.network["causal"] else AutoModelForMaskedLM
        try:
            network.begin_with(make.from_pretrained(place, dtype="float32"))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0][:150]
            raise UserError(f"{config.init_from} cannot be read: {reason}") from error
        return
    from textdiffusion.exchange.published import read
    from textdiffusion.run import Run

    if is_foreign(place):
        kind = None if config.tokenizer in ("hf:gpt2", f"hf:{place}") else config.tokenizer
        tensors = read(place, kind).tensors
    else:
        run = Run.open(place)
        began = run.load().network
        tensors = began.state_dict()  # type: ignore[attr-defined]
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{config.init_from} does not fit this run's network: {reason}") from None
