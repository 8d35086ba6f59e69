"""Models made elsewhere as networks: any module that maps ids to logits, and those of transformers in particular.

Shapes: B batch, L length, V vocabulary, N asked positions, D width. The families put their hidden symbol behind the V
tokens; here it becomes the model's own mask id, or an embedding of our own where the model has none.

What a causal model needs to denoise (DiffuLLaMA 2410.17891, Dream 2508.15487): it is handed a mask of attention by
which all positions see all, or block-causally, the blocks before and their own; and, where all see all, it keeps to
what it was taught, to say at a position what the next one holds: it reads a start token in front and is moved by one.
With ``sees_hidden = False`` a hidden token is seen by itself alone, so that others read texts as they know them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textdiffusion.errors import UserError
from textdiffusion.networks.shape import PretrainedShape


def logits_of(answer: Any) -> Tensor:
    """Logits [B L V'] of what a model returned: a tensor, a mapping or an object with ``logits``, or a tuple."""
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, dict) and "logits" in answer:
        found = answer["logits"]
    else:
        found = getattr(answer, "logits", None)
    return torch.as_tensor(answer[0] if found is None else found)


def without_mask(logits: Tensor, mask: int, vocabulary: int) -> Tensor:
    """The logits of the V tokens; that of a mask id among them as low as can be: no text holds it."""
    logits = logits[..., :vocabulary]
    if not 0 <= mask < vocabulary:
        return logits
    low = torch.finfo(logits.dtype).min / 2
    return logits.index_fill(-1, torch.tensor([mask], device=logits.device), low)


class Logits(nn.Module):
    """A module that maps ids [B L] to logits [B L V'] as the network of a masked family.

    Args:
        model: the module.
        vocabulary: V, ids below which are tokens.
        mask: the id that it reads as hidden.
        shift: it says at a position what the next one holds, as Dream does; the first position's own logits then say
            the first token as well.
    """

    def __init__(self, model: nn.Module, vocabulary: int, mask: int, *, shift: bool = False):
        super().__init__()
        self.model, self.vocabulary, self.mask, self.shift = model, vocabulary, mask, shift

    def forward(
        self, x: Tensor, t: Tensor | None = None, condition: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        del t, condition
        logits = logits_of(self.model(x.masked_fill(x == self.vocabulary, self.mask)))
        if self.shift:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
        logits = logits if positions is None else logits[positions]
        return without_mask(logits, self.mask, self.vocabulary)


class Pretrained(nn.Module):
    """A masked or causal language model of transformers as a network; weights are its own, under "model.".

    ``forward(x, t=None, condition=None, positions=None, halves=False)`` as in ``networks/transformer.py``: time and
    classes it knows none of; ``halves`` for attention = "block".

    Raises:
        UserError: transformers (or, for low-rank adapters, peft) is not there, or does not know the model.
    """

    def __init__(self, config: PretrainedShape):
        super().__init__()
        self.config, self.compute_dtype, self.compiled = config, torch.float32, False
        self.model: Any = new_model(config)
        learns = config.mask < 0 and config.attention != "causal"
        self.mask_embedding = nn.Parameter(torch.zeros(config.width)) if learns else None
        self._wrap()

    def _wrap(self) -> None:
        """Put low-rank adapters beside the linear maps and keep the weights themselves as they are."""
        if not self.config.lora:
            return
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError("network.lora needs peft; install it with: pip install 'textdiffusion[hf]'") from None
        how = LoraConfig(r=self.config.lora, lora_alpha=2 * self.config.lora, target_modules="all-linear")
        self.model = inject_adapter_in_model(how, self.model)

    def begin_with(self, model: Any) -> None:
        """Take a trained model's weights; the embedding of a hidden token begins as the mean of all."""
        plain, table = model.state_dict(), model.get_input_embeddings().weight
        with torch.no_grad():
            for name, x in self.model.state_dict().items():
                # Adapters keep the layer that they stand beside as base_layer.
                if (old := plain.get(name.replace(".base_layer.", "."))) is not None:
                    x.copy_(old)
            if self.mask_embedding is not None:
                self.mask_embedding.copy_(table.float().mean(0))

    # -- what training asks of a network --------------------------------------------------------------------------
    def hidden_matrices(self) -> list[nn.Parameter]:
        """None: weights that have been taught by AdamW are taught on by it."""
        return []

    def compile_blocks(self) -> None:
        """Compile the model."""
        self.compiled = True
        self.model.compile()

    @property
    def products(self) -> float:
        """Weights that a position is multiplied by: all but tables, which are looked up. Attention comes on top."""
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return float(sum(p.numel() for p in self.parameters()) - tables)

    @property
    def symbols_a_token(self) -> int:
        """Symbols read in training for each token of a text."""
        return 2 if self.config.attention == "block" else 1

    # -- forward --------------------------------------------------------------------------------------------------
    def _seen(self, length: int, halves: bool, device: torch.device) -> Tensor | None:
        """Who sees whom, bool [n n]; None: as the model has it."""
        config = self.config
        if not config.causal or config.attention == "causal":
            return None
        if config.attention == "bidirectional":
            return torch.ones(length, length, dtype=torch.bool, device=device)
        block = torch.arange(length, device=device) // config.block_length
        own, before = block.unsqueeze(-1) == block, block.unsqueeze(-1) > block
        if not halves:
            return own | before
        return torch.cat((torch.cat((own, before), 1), torch.cat((torch.zeros_like(own), own | before), 1)))

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        condition: Tensor | None = None,
        positions: Tensor | None = None,
        halves: bool = False,
    ) -> Tensor:
        del t, condition
        config, rows = self.config, len(x)
        length = x.shape[1] // 2 if halves else x.shape[1]
        if length > config.window:
            raise UserError(f"this network reads at most {config.window} tokens, not {length}")
        shift = config.causal and config.attention == "bidirectional"
        before = ([config.start] if shift else []) + config.prefix
        around = (x.new_tensor(part).expand(rows, -1) for part in (before, config.suffix))
        ids = torch.cat((next(around), x, next(around)), 1)
        hidden = ids == config.outputs if config.inputs > config.outputs else torch.zeros_like(ids, dtype=torch.bool)
        how: dict[str, Any] = {}
        if self.mask_embedding is None:
            how["input_ids"] = ids.masked_fill(hidden, max(config.mask, 0))
        else:
            table = self.model.get_input_embeddings()(ids.masked_fill(hidden, config.start))
            how["inputs_embeds"] = torch.where(hidden.unsqueeze(-1), self.mask_embedding.to(table.dtype), table)
        seen = self._seen(ids.shape[1] // 2 if halves else ids.shape[1], halves, x.device)
        if seen is not None:
            if not config.sees_hidden:
                itself = torch.eye(len(seen), dtype=torch.bool, device=x.device)
                seen = seen & (~hidden.unsqueeze(1) | itself)
            dtype = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else torch.float32
            bias = torch.zeros(seen.shape, dtype=dtype, device=x.device).masked_fill(~seen, torch.finfo(dtype).min)
            how["attention_mask"] = bias.expand(rows, *bias.shape[-2:]).unsqueeze(1)
            at = torch.arange(ids.shape[1] // 2 if halves else ids.shape[1], device=x.device)
            how["position_ids"] = (at.repeat(2) if halves else at).expand(rows, -1)
        if config.causal:
            how["use_cache"] = False
        first = len(before) - shift

        def asked(values: Tensor) -> Tensor:
            """Of values [B L' ...] those that say something of the text, [B L ...]; of the asked positions, [N ...]."""
            values = values[:, first : first + x.shape[1]]
            return values if positions is None else values[positions]

        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            logits = self._logits(how, ids.shape, asked)
        return without_mask(logits, config.mask, config.outputs)

    def _logits(self, how: dict[str, Any], shape: torch.Size, asked: Callable[[Tensor], Tensor]) -> Tensor:
        """The asked rows of the model's logits; its head, which is as wide as the vocabulary, maps those alone.

        What reaches the head is cut down on its way there, so that whatever the model does before and behind it stays.
        Of a model whose head is not known, is compiled, or reads something else than [B L' D], the logits are cut down.
        """
        head, cut = self.model.get_output_embeddings(), False

        def before_head(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal cut
            if len(given) != 1 or given[0].dim() != 3 or given[0].shape[:2] != shape:
                return None
            cut = True
            return (asked(given[0]),)

        hook = None if head is None or self.compiled else head.register_forward_pre_hook(before_head)
        try:
            logits = logits_of(self.model(**how))
        finally:
            if hook is not None:
                hook.remove()
        return logits if cut else asked(logits)


def new_model(config: PretrainedShape) -> Any:
    """A new model of transformers of a config's shape.

    Raises:
        UserError: transformers is not there, or does not know it.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    except ImportError:
        raise UserError("this network needs transformers; install it with: pip install 'textdiffusion[hf]'") from None
    body = dict(config.model)
    try:
        shape = AutoConfig.for_model(body.pop("model_type"), **body)
        make = AutoModelForCausalLM if config.causal else AutoModelForMaskedLM
        return make.from_config(shape, attn_implementation="sdpa")
    except (ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"transformers cannot make a model of network.model: {reason}") from error
