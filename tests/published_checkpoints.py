"""Seeded random checkpoints in the formats of published systems, restated plainly.

The restatement follows the published descriptions, one position, head and row at a time where that is plainest, and
shares nothing with the library.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from tokenizers import models

D, C, HEADS, BLOCKS, TOKENS = 32, 16, 2, 2, 20


def _draw(*shape: int, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(*shape)


def dit_weights(symbols: int, adaln: bool = True, prefix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """SEDD's names; MDLM and BD3-LM put "backbone." before."""
    torch.manual_seed(seed)
    out = {"vocab_embed.embedding": _draw(symbols, D)}
    if adaln:
        for part, width in (("0", 256), ("2", C)):
            out |= {f"sigma_map.mlp.{part}.weight": _draw(C, width), f"sigma_map.mlp.{part}.bias": _draw(C)}
    out["rotary_emb.inv_freq"] = 1.0 / 10000 ** (torch.arange(0, D // HEADS, 2) / (D // HEADS))
    for i in range(BLOCKS):
        b = f"blocks.{i}."
        out |= {b + "norm1.weight": 1 + _draw(D), b + "attn_qkv.weight": _draw(3 * D, D)}
        out |= {b + "attn_out.weight": _draw(D, D), b + "norm2.weight": 1 + _draw(D)}
        out |= {b + "mlp.0.weight": _draw(4 * D, D), b + "mlp.0.bias": _draw(4 * D)}
        out |= {b + "mlp.2.weight": _draw(D, 4 * D), b + "mlp.2.bias": _draw(D)}
        if adaln:
            out |= {b + "adaLN_modulation.weight": _draw(6 * D, C), b + "adaLN_modulation.bias": _draw(6 * D)}
    out |= {"output_layer.norm_final.weight": 1 + _draw(D), "output_layer.linear.weight": _draw(symbols, D)}
    out["output_layer.linear.bias"] = _draw(symbols)
    if adaln:
        out |= {"output_layer.adaLN_modulation.weight": _draw(2 * D, C)}
        out |= {"output_layer.adaLN_modulation.bias": _draw(2 * D)}
    return {prefix + name: x for name, x in out.items()}


def ddlm_weights(bias: bool, seed: int = 0, symbols: int = 106, window: int = 24) -> dict[str, torch.Tensor]:
    """A width of 128: its heads are 64 wide."""
    torch.manual_seed(seed)
    width = 128
    out = {"transformer.wte.weight": _draw(symbols, width), "transformer.wpe.weight": _draw(window, width)}
    for part, n in (("0", 256), ("2", C)):
        out |= {f"sigma_map.mlp.{part}.weight": _draw(C, n), f"sigma_map.mlp.{part}.bias": _draw(C)}
    shapes = {
        "ln_1": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width), "ln_2": (width,),
        "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width),
    }  # fmt: skip
    for i in range(BLOCKS):
        for name, shape in shapes.items():
            out[f"transformer.h.{i}.{name}.weight"] = _draw(*shape, scale=0.15) + (len(shape) == 1)
            if bias:
                out[f"transformer.h.{i}.{name}.bias"] = _draw(shape[0])
        out[f"transformer.h.{i}.adaLN_modulation.weight"] = _draw(6 * width, C)
        out[f"transformer.h.{i}.adaLN_modulation.bias"] = _draw(6 * width)
    for name in ("transformer.ln_f", "lm_head.norm_final"):
        out[f"{name}.weight"] = 1 + _draw(width)
        if bias:
            out[f"{name}.bias"] = _draw(width)
    out |= {"lm_head.linear.weight": _draw(symbols, width, scale=0.03), "lm_head.linear.bias": _draw(symbols)}
    out |= {"lm_head.adaLN_modulation.weight": _draw(2 * width, C), "lm_head.adaLN_modulation.bias": _draw(2 * width)}
    return out


# -- folders ------------------------------------------------------------------------------------------------------


def tokenizer_file(folder: Path) -> None:
    """A tokenizer of TOKENS words, which stands for GPT-2's."""
    words = {f"w{i} ": i for i in range(TOKENS - 1)} | {"<|endoftext|>": TOKENS - 1}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0 ")).save(str(folder / "tokenizer.json"))


def sedd_config(**model: object) -> dict[str, object]:
    """config.json of louaaron/sedd-small, at the sizes of these tests."""
    return {
        "ngpus": 8, "tokens": TOKENS, "training": {"ema": 0.9999}, "sampling": {"predictor": "analytic"},
        "graph": {"type": "absorb", "file": "data", "report_all": False},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "model": {"name": "tiny", "type": "ddit", "hidden_size": D, "cond_dim": C, "length": 16, "n_blocks": BLOCKS,
                  "n_heads": HEADS, "scale_by_sigma": True, "dropout": 0.1} | model,
    }  # fmt: skip


def sedd(folder: Path, kind: str = "safetensors") -> dict[str, torch.Tensor]:
    """A folder as on the hub, or one that SEDD's training leaves, with averaged weights."""
    folder.mkdir(parents=True)
    tokenizer_file(folder)
    weights = dit_weights(TOKENS + 1)
    if kind == "training":
        (folder / ".hydra").mkdir()
        (folder / ".hydra/config.yaml").write_text(yaml.safe_dump(sedd_config()))
        (folder / "checkpoints-meta").mkdir()
        last = {f"module.{name}": torch.zeros_like(x) for name, x in weights.items()}
        shadow = [x for name, x in weights.items() if "inv_freq" not in name]
        body = {"model": last, "ema": {"decay": 0.9999, "num_updates": 5, "shadow_params": shadow}, "step": 5}
        torch.save(body | {"optimizer": {"state": {}, "param_groups": []}}, folder / "checkpoints-meta/checkpoint.pth")
        return weights
    (folder / "config.json").write_text(json.dumps(sedd_config()))
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return weights


def mdlm(folder: Path) -> dict[str, torch.Tensor]:
    """config.json of kuleshov-group/mdlm-owt with its wrong cond_dim."""
    folder.mkdir(parents=True)
    tokenizer_file(folder)
    weights = dit_weights(TOKENS + 1)
    body = {"model_type": "mdlm", "vocab_size": TOKENS + 1, "model_length": 16, "hidden_dim": D, "cond_dim": 129,
            "n_blocks": BLOCKS, "n_heads": HEADS, "dropout": 0.1, "time_conditioning": False,
            "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(body))
    save_file({f"backbone.{name}": x for name, x in weights.items()}, folder / "model.safetensors")
    return weights


def bd3lm(folder: Path, adaln: bool = True) -> dict[str, torch.Tensor]:
    """config.json of kuleshov-group/bd3lm-owt-block_size4."""
    folder.mkdir(parents=True)
    tokenizer_file(folder)
    weights = dit_weights(TOKENS + 1, adaln)
    body = {"model_type": "bd3lm", "block_size": 4, "vocab_size": TOKENS + 1, "model_length": 16, "cross_attn": True,
            "adaln": adaln, "attn_backend": "flex", "causal": False, "hidden_dim": D, "cond_dim": 128, "dropout": 0.1,
            "n_blocks": BLOCKS, "n_heads": HEADS, "time_conditioning": False, "var_min": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(body))
    more = {"sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.tensor(0.999)}
    save_file({f"backbone.{name}": x for name, x in weights.items()} | more, folder / "model.safetensors")
    return weights


def ddlm(folder: Path, bias: bool = False, pth: bool = False) -> dict[str, torch.Tensor]:
    """A folder of ddlm's save_pretrained, or the .pth of its trainer alone."""
    folder.mkdir(parents=True)
    weights = ddlm_weights(bias)
    if pth:
        body = {"epoch": 3, "global_step": 7, "model_state_dict": weights, "val_loss": 1.0}
        torch.save(body | {"optimizer_state_dict": {"state": {}}}, folder / "best_model.pth")
        return weights
    config = {"model_type": "discrete_diffusion", "block_size": 24, "n_layer": BLOCKS, "n_head": 2, "n_embd": 128,
              "cond_dim": C, "dropout": 0.1, "bias": bias, "architectures": ["X"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


# -- the restatement ----------------------------------------------------------------------------------------------


def condition(w: dict[str, torch.Tensor], sigma: torch.Tensor) -> torch.Tensor:
    """silu(mlp([cos, sin] of sigma at 128 frequencies)), [B C]."""
    angles = torch.stack([sigma * math.exp(-math.log(10000) * k / 128) for k in range(128)], -1)
    h = torch.cat([angles.cos(), angles.sin()], -1) @ w["sigma_map.mlp.0.weight"].T + w["sigma_map.mlp.0.bias"]
    return F.silu(F.silu(h) @ w["sigma_map.mlp.2.weight"].T + w["sigma_map.mlp.2.bias"])


def norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
    return x + w[f"{name}.bias"] if f"{name}.bias" in w else x


def linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    x = x @ w[f"{name}.weight"].T
    return x + w[f"{name}.bias"] if f"{name}.bias" in w else x


def turn(x: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Rotary code on one head [L d]: (x_j, x_{j + d/2}) is a complex number, turned by place / 10000^(2j/d)."""
    half = x.shape[-1] // 2
    speed = torch.tensor([10000 ** (-j / half) for j in range(half)], dtype=torch.float64)
    angle = torch.tensor(places, dtype=torch.float64).unsqueeze(-1) * speed
    z = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1).float()


def attention(qkv: torch.Tensor, heads: int, places: list[int] | None, seen: torch.Tensor | None) -> torch.Tensor:
    """[L 3D] to [L D], head by head; places None: without rotary code."""
    q, k, v = qkv.split(qkv.shape[-1] // 3, -1)
    out = []
    for a, b, c in zip(*(part.chunk(heads, -1) for part in (q, k, v)), strict=True):
        if places is not None:
            a, b = turn(a, places), turn(b, places)
        logits = a @ b.T / math.sqrt(a.shape[-1])
        if seen is not None:
            logits = logits.masked_fill(~seen, -1e30)
        out.append(logits.softmax(-1) @ c)
    return torch.cat(out, -1)


def dit(w, x, sigma=None, places=None, seen=None, heads=HEADS):
    """Raw outputs [B L V'] of SEDD's, MDLM's and BD3-LM's network for symbols x; sigma [B], or None: adaln is off."""
    c = None if sigma is None else condition(w, sigma)
    places = list(range(x.shape[1])) if places is None else places
    rows = []
    for row in range(len(x)):
        h = w["vocab_embed.embedding"][x[row]]
        for i in range(BLOCKS):
            b = f"blocks.{i}"
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
                (0, 0, 1) * 2 if c is None else linear(c[row], w, f"{b}.adaLN_modulation").chunk(6)
            )
            a = norm(h, w, f"{b}.norm1") * (1 + scale) + shift
            a = attention(linear(a, w, f"{b}.attn_qkv"), heads, places, seen)
            h = h + gate * linear(a, w, f"{b}.attn_out")
            a = linear(norm(h, w, f"{b}.norm2") * (1 + scale_mlp) + shift_mlp, w, f"{b}.mlp.0")
            a = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
            h = h + gate_mlp * linear(a, w, f"{b}.mlp.2")
        shift, scale = (0, 0) if c is None else linear(c[row], w, "output_layer.adaLN_modulation").chunk(2)
        rows.append(linear(norm(h, w, "output_layer.norm_final") * (1 + scale) + shift, w, "output_layer.linear"))
    return torch.stack(rows)


def ddlm_outputs(w, x, sigma):
    """Log-ratios [B L V] of ddlm's network, 0 at the symbols x."""
    c, rows = condition(w, sigma), []
    for row in range(len(x)):
        h = w["transformer.wte.weight"][x[row]] + w["transformer.wpe.weight"][: x.shape[1]]
        for i in range(BLOCKS):
            b = f"transformer.h.{i}"
            parts = linear(c[row], w, f"{b}.adaLN_modulation").chunk(6)
            a = norm(h, w, f"{b}.ln_1") * (1 + parts[1]) + parts[0]
            a = attention(linear(a, w, f"{b}.attn.c_attn"), h.shape[-1] // 64, None, None)
            h = h + parts[2] * linear(a, w, f"{b}.attn.c_proj")
            a = linear(norm(h, w, f"{b}.ln_2") * (1 + parts[4]) + parts[3], w, f"{b}.mlp.c_fc")
            a = 0.5 * a * (1 + torch.erf(a / math.sqrt(2)))
            h = h + parts[5] * linear(a, w, f"{b}.mlp.c_proj")
        shift, scale = linear(c[row], w, "lm_head.adaLN_modulation").chunk(2)
        h = norm(norm(h, w, "transformer.ln_f"), w, "lm_head.norm_final") * (1 + scale) + shift
        rows.append(linear(h, w, "lm_head.linear").scatter(-1, x[row].unsqueeze(-1), 0.0))
    return torch.stack(rows)
