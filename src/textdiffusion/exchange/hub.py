"""Runs among the models of transformers: the Auto classes, the hub, and streamers.

A run directory is a model folder already. Once this module is imported (it needs the extra hf, and nothing else here
imports it),

    AutoModelForMaskedLM.from_pretrained(RUN)    masked, block, uniform, score_entropy and sparse_distribution runs
    AutoModelForCausalLM.from_pretrained(RUN)    autoregressive runs
    AutoTokenizer.from_pretrained(RUN)           the run's tokenizer; this one needs nothing of ours

give its network with save_pretrained and push_to_hub, and what they save is a run directory again.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, GenerationMixin, PreTrainedModel
from transformers import PretrainedConfig as HubConfig
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

from textdiffusion.config import FOR_OTHERS, RunConfig, read_config
from textdiffusion.diffusion.coded import Coded
from textdiffusion.errors import UserError
from textdiffusion.families import family
from textdiffusion.model import Model
from textdiffusion.process import Process, State
from textdiffusion.run import build
from textdiffusion.settings import TrainingConfig, with_fields
from textdiffusion.text.data import DataConfig
from textdiffusion.text.template import encode

PARTS = {"data": DataConfig, "training": TrainingConfig}
KEPT = ("checkpoints/*", ".*")  # of a run directory, what the hub is not given


class TextDiffusionConfig(HubConfig):
    """A run's config.json, as transformers reads it; ``vocab_size`` is V, and ``mask_token_id`` the hidden symbol."""

    model_type = "textdiffusion"

    def __init__(self, **fields: Any):
        if "vocabulary" in fields:
            fields = fields | {"vocab_size": fields["vocabulary"], "mask_token_id": fields["vocabulary"]}
            fields |= {"bos_token_id": fields["start"], "eos_token_id": fields["start"], "use_cache": False}
            fields["num_hidden_layers"] = fields["network"].get("depth", 1)
        super().__init__(**fields)

    @property
    def run(self) -> RunConfig:
        """The same as the library has it.

        Raises:
            UserError: this is no config of a run.
        """
        names = RunConfig.__dataclass_fields__
        body = {name: getattr(self, name) for name in names if hasattr(self, name) and name not in FOR_OTHERS}
        if "family" not in body:
            raise UserError("this config is of no run: it has no family")
        body |= {part: with_fields(cls, body[part], part) for part, cls in PARTS.items()}
        config: RunConfig = with_fields(RunConfig, body, "config")
        return config


class _Hub(PreTrainedModel):
    """What both kinds share: the run's process, and its network under "network."."""

    config_class = TextDiffusionConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: TextDiffusionConfig):
        super().__init__(config)
        self.check(family(config.run.family))
        self.network: Any = build(config.run).network
        self.post_init()

    def check(self, cls: type[Process]) -> None:
        """Refuse a run of a family that this class is not for."""
        raise NotImplementedError

    @cached_property
    def process(self) -> Process:
        """The run's process; made late, since transformers makes models where tensors have no values."""
        return build(self.config.run, self.network)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Networks draw their own weights."""

    def get_input_embeddings(self) -> Any:
        return getattr(self.network, "embedding", None)


@final
class TextDiffusionForMaskedLM(_Hub):
    """A run that predicts hidden or replaced tokens from all others.

    ``forward(input_ids, attention_mask=None, position_ids=None, labels=None, times=None)``: noisy texts int64 [B L],
    hidden tokens being ``config.mask_token_id``; times in [0, 1], [B], are the share of hidden tokens unless given.
    ``logits`` are log p(x_0 | x_t), normalised, [B L V]: at a token that is shown, that it is itself. ``loss``, if
    labels are given (-100 where there is none): their mean cross-entropy. A text has no padding: attention_mask may
    only end a row, where nothing is predicted.
    """

    def check(self, cls: type[Process]) -> None:
        if cls.__name__ == "Autoregressive" or issubclass(cls, Coded):
            raise UserError(f"a run of {self.config.family} is no masked language model; use td.load")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        times: Tensor | None = None,
        **more: Any,
    ) -> MaskedLMOutput:
        del attention_mask, position_ids, more
        hidden = (input_ids == self.process.vocabulary).double().mean(-1)
        t = (hidden if times is None else times.double()).clamp(1e-6, 1.0)
        logits = self.process.predict(State(input_ids, t)).log_p
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return MaskedLMOutput(loss=loss, logits=logits)


@final
class TextDiffusionForCausalLM(_Hub, GenerationMixin):
    """An autoregressive run. ``forward(input_ids, attention_mask=None, labels=None)``: logits [B L V] at a position are
    those of the next token; a text begins with ``config.bos_token_id``."""

    def check(self, cls: type[Process]) -> None:
        if cls.__name__ != "Autoregressive":
            raise UserError(f"a run of {self.config.family} is no causal language model; use AutoModelForMaskedLM")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> CausalLMOutput:
        del attention_mask, more
        logits = self.network(input_ids)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **more: Any) -> dict[str, Any]:
        """All that is written, each time: what is kept of earlier calls is the library's own samplers' business."""
        del more
        return {"input_ids": input_ids}


def push(run: str | Path, name: str, *, licence: str | None = None, private: bool = True) -> str:
    """Put a run on the hub under USER/NAME, with its card, and without its checkpoints; returns its address.

    Args:
        licence: of the weights, a name that the hub knows (such as apache-2.0), put at the head of the card.
        private: only you can see it.
    Raises:
        UserError: no such run; or the hub refuses, or cannot be reached.
    """
    path = Path(run)
    read_config(path)
    card = path / "README.md"
    if licence is not None and card.exists():
        text = re.sub(r"^license: .*\n", "", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
        card.write_text(text.replace("---\n", f"---\nlicense: {licence}\n", 1), encoding="utf-8")
    import huggingface_hub

    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=name, folder_path=path, ignore_patterns=list(KEPT))
    except Exception as error:  # whatever the network or the hub's client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} cannot be put on the hub: {reason}") from error
    return str(done)


def stream(model: Model, streamer: Any, *, prompt: str | None = None, **how: Any) -> str:
    """Write one text, and show it as transformers' ``TextDiffusionStreamer`` would have it: ``put`` of the prompt,
    ``put_draft`` of what there is after each step, ``put`` of the text, ``end``.

    Args:
        model: a loaded run.
        streamer: anything with these methods; one without ``put_draft`` is given the text alone.
        how: as in ``Model.stream``. A position where nothing is written yet is shown as an underscore, or a space.
    """
    given = encode(prompt, model.tokenizer) if prompt else torch.zeros(0, dtype=torch.long)
    blank = next((ids[0] for symbol in "_ " if len(ids := model.tokenizer.encode(symbol)) == 1), None)
    blank = model.tokenizer.end_of_text if blank is None else blank
    streamer.put(given)
    frame = None
    for frame in model.stream(1, prompt=prompt, **how):
        tokens = frame.frame.tokens[0, len(given) :].cpu()
        if hasattr(streamer, "put_draft"):
            streamer.put_draft(torch.where(tokens < 0, blank, tokens))
    assert frame is not None
    streamer.put(tokens[tokens >= 0])
    streamer.end()
    return frame.texts[0]


def register() -> None:
    """Make the Auto classes know runs. Importing this module has done it."""
    AutoConfig.register("textdiffusion", TextDiffusionConfig, exist_ok=True)
    AutoModelForMaskedLM.register(TextDiffusionConfig, TextDiffusionForMaskedLM, exist_ok=True)
    AutoModelForCausalLM.register(TextDiffusionConfig, TextDiffusionForCausalLM, exist_ok=True)


register()
