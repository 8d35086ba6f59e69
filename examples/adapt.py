"""What turning a causal language model into a diffusion model brings: held-out gaps, before, after, and from the left.

    python examples/adapt.py smollm2 --data my.txt --minutes 20

MODEL is a folder of a causal model of transformers (GPT-2, Llama, Qwen ...), its name on the hub, a packed file (GGUF),
or `smollm2`, which a package brings. Of each held-out window every fourth run of ``--gap`` tokens is hidden.

  left     the model as it was made, which sees what stands before: all true tokens, those of earlier gaps too
  before   the diffusion model that --init-from makes of it, untrained, which sees both sides and no gap's tokens
  after    the same, trained

Two measures. Token by token: how often the likeliest token is the hidden one, and what it costs in bits; here ``left``
sees even the true tokens of its own gap. Whole gaps: each is written out, from the left by the likeliest token after
what has been written, by the diffusion model in the order of its confidence, in ``--calls`` calls; how many tokens are
the hidden ones, and how many gaps are so throughout. Standard errors are over windows; the last lines compare on the
same windows. If --out holds a run, stopped or finished, it is gone on with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import textdiffusion as td
from textdiffusion.mathematics.noise import Noise
from textdiffusion.presets import configure
from textdiffusion.process import Process, State
from textdiffusion.run import build
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.data import tokenize
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.training.adaptation import fill
from textdiffusion.training.preparation import prepare
from textdiffusion.training.terminal import follow

BATCH = 16  # windows at once
Figures = dict[str, Tensor]  # of each window, float64 [windows]


def by_windows(act: Callable[[Tensor], Figures], windows: Tensor) -> Figures:
    """The figures of all windows, worked out a few at a time."""
    parts = [act(x) for x in windows.split(BATCH)]
    return {name: torch.cat([part[name].double() for part in parts]) for name in parts[0]}


def costs(law: Tensor, wanted: Tensor) -> Figures:
    """Of laws [B N V] of hidden tokens [B N]: share whose likeliest token is it, and bits a token."""
    nats = -law.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    return {"likeliest": (law.argmax(-1) == wanted).double().mean(1), "bits": nats.double().mean(1) / np.log(2)}


def written(found: Tensor, wanted: Tensor, gap: int) -> Figures:
    """Of gaps that were written [B N], one behind the other: share of tokens that are right, and of whole gaps."""
    right = (found == wanted).view(len(found), -1, gap)
    return {"tokens": right.double().mean((1, 2)), "gaps": right.all(-1).double().mean(1)}


@torch.inference_mode()
def from_the_left(process: Process, x: Tensor, hidden: Tensor, gap: int) -> Figures:
    """Both measures, of an autoregressive process, for windows [B L] and hidden positions [L]."""
    wanted = x[:, hidden]
    shown = torch.cat((x.new_full((len(x), 1), process.start), x[:, :-1]), 1)
    law = process.network(shown, positions=hidden.expand_as(x)).float().log_softmax(-1)
    figures = costs(law.view(len(x), -1, law.shape[-1]), wanted)
    found = []
    for begin in hidden.nonzero().flatten().tolist()[::gap]:
        known = shown[:, : begin + 1]
        for _ in range(gap):
            last = (torch.arange(known.shape[1]) == known.shape[1] - 1).expand_as(known)
            known = torch.cat((known, process.network(known, positions=last).argmax(-1, keepdim=True)), 1)
        found.append(known[:, -gap:])
    return figures | written(torch.cat(found, 1), wanted, gap)


@torch.inference_mode()
def from_both_sides(process: Process, x: Tensor, hidden: Tensor, gap: int, calls: int) -> Figures:
    """Both measures, of masked diffusion."""
    wanted, asked = x[:, hidden], hidden.expand_as(x)
    law = process.predict(State(x.masked_fill(asked, process.vocabulary), torch.ones(len(x))), asked).log_p
    figures = costs(law.view(len(x), -1, law.shape[-1]), wanted)
    *_, last = sample(
        process, Noise.of(0, len(x)), x.shape[1], calls, sampler="confidence", tokens=x, given=~asked, temperature=0.0
    )
    return figures | written(last.tokens[:, hidden], wanted, gap)


def said(values: Tensor) -> str:
    """Mean and standard error."""
    return f"{float(values.mean()):.3f} ± {float(values.std() / len(values) ** 0.5):.3f}"


def report(rows: dict[str, Figures]) -> None:
    """Print the tables, and the differences window by window."""
    names = ("likeliest", "bits", "tokens", "gaps")
    print(f"{'':<15}{'likeliest is it':>18}{'bits a token':>18}{'tokens written':>18}{'whole gaps':>18}")
    for row, figures in rows.items():
        print(f"{row:<15}" + "".join(f"{said(figures[name]):>18}" for name in names))
    for other in ("before", "left") if "after" in rows else ():
        print(f"{'after - ' + other:<15}" + "".join(f"{said(rows['after'][n] - rows[other][n]):>18}" for n in names))


def main() -> None:
    """Measure, train, and measure again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--out", type=Path, default=Path("runs/adapted"))
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--gap", type=int, default=3)
    parser.add_argument("--calls", type=int, help="of the diffusion model, to fill the gaps of a window (default: gap)")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    args = parser.parse_args()
    how = {"data": args.data, "length": args.length, "minutes": args.minutes, "steps": args.steps}
    how |= {"init_from": args.model, "settings": [f"network.lora={args.lora}", *args.settings]}
    calls = args.calls or args.gap

    config = configure(family="masked", **how)
    corpus, tokenizer, _ = prepare(config)
    held_out = tokenize(corpus, tokenizer)["validation"]
    windows = evaluation_windows(held_out, args.length, limit=args.windows * args.length)
    whole = torch.from_numpy(np.stack([w for w in windows if len(w) == args.length]).astype(np.int64))
    place = torch.arange(args.length)
    hidden = (place % (4 * args.gap) // args.gap == 3) & (place < args.length // (4 * args.gap) * 4 * args.gap)
    print(
        f"{len(whole)} held-out windows, {int(hidden.sum())} of {args.length} tokens hidden, {calls} calls", flush=True
    )

    def untrained(family: str) -> Process:
        full = prepare(configure(family=family, **how))[2]
        process = build(replace(full, network=full.network | {"lora": 0}))
        fill(process.network, full)
        process.network.eval()
        return process

    def measure(name: str) -> Figures:
        if name == "left":
            process = untrained("autoregressive")
            return by_windows(lambda x: from_the_left(process, x, hidden, args.gap), whole)
        process = untrained("masked") if name == "before" else td.load(args.out).process
        return by_windows(lambda x: from_both_sides(process, x, hidden, args.gap, calls), whole)

    rows = {name: measure(name) for name in ("left", "before")}
    report(rows)
    stopped = follow(config, args.out, (args.out / "config.json").exists(), "cpu", Console())
    if stopped.signal is not None:
        sys.exit(128 + stopped.signal)
    report(rows | {"after": measure("after")})


if __name__ == "__main__":
    main()
