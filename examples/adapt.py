"""What turning a causal language model into a diffusion model brings: held-out gaps, before, after, and from the left.

    python examples/adapt.py MODEL --data my.txt --minutes 5 --lora 16

MODEL is a folder of a causal model of transformers (GPT-2, Llama, Qwen ...), or its name on the hub. Of each held-out
window every fourth run of ``--gap`` tokens is hidden. Each hidden token is then predicted

  left     by the model as it was made, from all the true tokens before it, those of its own gap too
  before   by the diffusion model that --init-from makes of it, untrained, from both sides and without its gap
  after    by the same, trained

and a line says how often the likeliest token is the hidden one, and what it costs, in bits a token.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import textdiffusion as td
from textdiffusion.presets import configure
from textdiffusion.process import Process, State
from textdiffusion.run import build
from textdiffusion.text.data import tokenize
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.training.adaptation import fill
from textdiffusion.training.fit import prepare


@torch.inference_mode()
def recovered(process: Process, windows: torch.Tensor, hidden: torch.Tensor, left: bool) -> tuple[float, float]:
    """Share of hidden tokens that are the likeliest, and bits a hidden token."""
    hits, nats = [], []
    for x in windows.split(8):
        if left:
            shown = torch.cat((x.new_full((len(x), 1), process.start), x[:, :-1]), 1)
            law = process.network(shown).float().log_softmax(-1)[:, hidden]
        else:
            state = State(x.masked_fill(hidden, process.vocabulary), torch.ones(len(x)))
            law = process.predict(state, hidden.expand_as(x)).log_p.view(len(x), -1, process.vocabulary)
        wanted = x[:, hidden]
        hits.append((law.argmax(-1) == wanted).float())
        nats.append(-law.gather(-1, wanted.unsqueeze(-1)))
    return float(torch.cat(hits).mean()), float(torch.cat(nats).mean()) / np.log(2)


def main() -> None:
    """Measure, train, and measure again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--out", type=Path, default=Path("runs/adapted"))
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--gap", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    args = parser.parse_args()
    how = {"data": args.data, "length": args.length, "minutes": args.minutes, "steps": args.steps}
    how |= {"init_from": args.model, "settings": [f"network.lora={args.lora}", *args.settings]}

    hidden = torch.arange(args.length) % (4 * args.gap) // args.gap == 3
    rows = {}
    for name, family in (("left", "autoregressive"), ("before", "masked")):
        corpus, tokenizer, config = prepare(configure(family=family, **how))
        held_out = tokenize(corpus, tokenizer)["validation"]
        windows = evaluation_windows(held_out, args.length, limit=args.windows * args.length)
        whole = torch.from_numpy(np.stack([w for w in windows if len(w) == args.length]).astype(np.int64))
        process = build(replace(config, network=config.network | {"lora": 0}))
        fill(process.network, config)
        process.network.eval()
        rows[name] = recovered(process, whole, hidden, left=name == "left")
        del process
    model = td.train(args.out, family="masked", **how)
    rows["after"] = recovered(model.process, whole, hidden, left=False)
    print(f"{len(whole)} held-out windows, {int(hidden.sum())} of {args.length} tokens hidden")
    for name, (share, bits) in rows.items():
        print(f"{name:<8}{share:>7.1%} recovered {bits:>8.2f} bits a token")


if __name__ == "__main__":
    main()
