"""Look inside: what the forward process does to a text, and what the network makes of what is left."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from textdiffusion.display.frames import Cell, based, degree, one_line, pieces_of, visible
from textdiffusion.display.replay.canvas import player
from textdiffusion.display.replay.recording import Panel, Recording
from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import State
from textdiffusion.text.template import encode
from textdiffusion.ui.loaded import Loaded

TIMES = 33  # noise levels, 0 and 1 among them
BARS = "▁▂▃▄▅▆▇█"
PROBE = 8192  # tokens on which the amount of noise is measured, fewer of a large vocabulary
LONGEST = 512  # tokens to look into


def forward(run: Loaded, text: str, seed: int = 0) -> Iterator[str]:
    """A text on its way into noise, with the network's best guess at each token and how unsure it is, in bits.

    The draws are the same at every noise level. Families that write from left to right predict one place at a time, and
    have no guess at all the others.

    Raises:
        UserError: no text, symbols that the tokenizer cannot express, or a text that is too long.
    """
    tokens = encode(text, run.model.tokenizer)
    most = min(run.longest, LONGEST)
    if not 1 <= len(tokens) <= most:
        raise UserError(f"this page looks into texts of 1 to {most} tokens, not {len(tokens)}; paste a shorter one")
    guesses = run.model.process.infills
    top = math.log2(run.model.tokenizer.vocabulary)
    more = ["what the network would write", f"how unsure it is of each token (a full bar is {top:.1f} bits)"]
    panel = Panel(f"{run.name} · forward", labels=["the text, with noise", *more * guesses])
    for t in np.linspace(0, 1, TIMES):
        rows, status = _moment(run, tokens, float(t), seed, guesses)
        panel.put(rows, status, float(t), {"t": float(t)})
    panel.texts = [text]
    note = "" if guesses else "This family predicts only what comes next, so there is no guess at hidden places beyond."
    yield player(Recording([panel], {"text": text, "seed": seed}, note), begin=0.4, downloads=False)


def _moment(run: Loaded, tokens: torch.Tensor, t: float, seed: int, guesses: bool) -> tuple[list[list[Cell]], str]:
    """Rows and status at noise level t."""
    model = run.model
    names, raw = model.tokenizer.pieces(), model.tokenizer.token_bytes()
    x_0 = tokens.to(model.device).unsqueeze(0)
    noise = Noise.of(seed, 1, device=model.device)
    state = model.process.q_sample(x_0, torch.tensor([t], dtype=torch.float64, device=model.device), noise)
    seen = model.process.decode(state)[0].tolist()
    changed = [a != b for a, b in zip(seen, tokens.tolist())]
    pieces = [visible(one_line(piece)) for piece in pieces_of(seen, names, raw)]
    shown = list(based(("n" if new else "p", piece) for piece, new in zip(pieces, changed)))
    status = f"noise {t:.2f} · {sum(changed) / len(changed):.0%} of the tokens changed"
    if not guesses:
        return [shown], status
    best, chance, bits = _predictions(run, state) if t > 0 else (tokens.tolist(), [1.0] * len(seen), [0.0] * len(seen))
    # A token that is known for certain stands there as it is.
    likeliest = [visible(one_line(piece)) for piece in pieces_of(best, names, raw)]
    guess = [("p" if p > 1 - 1e-6 else f"c{degree(p)}", piece) for piece, p in zip(likeliest, chance, strict=True)]
    top = math.log2(model.tokenizer.vocabulary)
    bars = [("b", BARS[min(int(h / top * len(BARS)), len(BARS) - 1)] if h > 1e-3 else " ") for h in bits]
    unsure = [h for h in bits if h > 1e-3]
    mean = f" · {sum(unsure) / len(unsure):.2f} bits unsure of each it does not know" if unsure else ""
    return [shown, guess, bars], status + mean


@torch.inference_mode()
def _predictions(run: Loaded, state: State) -> tuple[list[int], list[float], list[float]]:
    """The likeliest token at each place, its probability, and the entropy there in bits."""
    log_p = run.model.process.predict(state).log_p[0].double()
    chance, best = log_p.max(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1) / math.log(2)
    return best.tolist(), chance.exp().tolist(), entropy.tolist()


def noise_curve(run: Loaded, seed: int = 0) -> list[dict[str, float]]:
    """How much the noise changes: t, and the share of some thousand tokens that are others at t."""
    process, device = run.model.process, run.model.device
    size = max(64, min(PROBE, 2**24 // run.model.tokenizer.vocabulary))
    x_0 = torch.zeros(1, size, dtype=torch.long, device=device)
    found = []
    for t in np.linspace(0, 1, TIMES):
        times = torch.tensor([float(t)], dtype=torch.float64, device=device)
        state = process.q_sample(x_0, times, Noise.of(seed, 1, device=device))
        changed = (process.decode(state) != x_0).double().mean()
        found.append({"t": float(t), "changed": float(changed)})
    return found
