"""Tiny random models of transformers, with tokenizers, in folders as they come from the hub."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
SYMBOLS = sorted(set(TEXT))


def tokenizer(folder: Path, special: list[str], around: tuple[str, str] | None = None) -> int:
    """A tokenizer of characters; returns the number of its tokens."""
    words = {symbol: i for i, symbol in enumerate([*special, *SYMBOLS])}
    made = Tokenizer(models.WordLevel(words, unk_token=special[0]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    made.add_special_tokens(special)
    if around:
        ids = [(name, words[name]) for name in around]
        made.post_processor = processors.TemplateProcessing(f"{around[0]} $A {around[1]}", special_tokens=ids)
    made.save(str(folder / "tokenizer.json"))
    return len(words)


def bert(folder: Path) -> transformers.PreTrainedModel:
    """A masked language model."""
    folder.mkdir(parents=True)
    size = tokenizer(folder, ["[PAD]", "[CLS]", "[SEP]", "[MASK]"], ("[CLS]", "[SEP]"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]", "eos_token": "[SEP]"}))
    torch.manual_seed(1)
    shape = transformers.BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(shape).eval()
    model.save_pretrained(folder)
    return model


def causal(folder: Path, kind: str = "llama") -> transformers.PreTrainedModel:
    """A causal language model: gpt2, llama, qwen2 or gpt_neox. Its head is its embedding, but for gpt_neox."""
    folder.mkdir(parents=True)
    size = tokenizer(folder, ["<|endoftext|>"])
    torch.manual_seed(1)
    if kind == "gpt2":
        shape = transformers.GPT2Config(
            vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=40, initializer_range=0.2
        )
    else:
        shape = transformers.AutoConfig.for_model(
            kind, vocab_size=size + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            **({} if kind == "gpt_neox" else {"num_key_value_heads": 1 + (kind == "llama")}),
            max_position_embeddings=40, initializer_range=0.2, tie_word_embeddings=kind != "gpt_neox",
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(shape).eval()
    model.save_pretrained(folder)
    return model
