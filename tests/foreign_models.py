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


def packed(file: Path) -> transformers.PreTrainedModel:
    """A Llama in one packed file (GGUF), laid out as llama.cpp does, with a byte-level tokenizer."""
    import gguf
    from tokenizers import pre_tokenizers

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<|endoftext|>"]
    torch.manual_seed(1)
    shape = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_key_value_heads=1, max_position_embeddings=40, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    out = gguf.GGUFWriter(str(file), "llama")
    out.add_context_length(40)
    out.add_embedding_length(32)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(2)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(shape.rms_norm_eps)
    out.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    out.add_vocab_size(len(words))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(words)
    out.add_token_types([1] * (len(words) - 1) + [3])
    out.add_token_merges(["t h"])
    out.add_bos_token_id(len(words) - 1)
    out.add_eos_token_id(len(words) - 1)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, x in model.model.state_dict().items():
        array = x.numpy()
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            rest = names[rest.removesuffix(".weight")]
            if heads := {"attn_q": 2, "attn_k": 1}.get(rest):  # the halves of a rotation stand side by side there
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            place = f"blk.{layer}.{rest}.weight"
        else:
            place = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
        out.add_tensor(place, array.copy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model
