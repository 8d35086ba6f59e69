"""What free ratios cost score entropy over masked diffusion, which fixes how fast tokens are revealed.

    python examples/rate_penalty.py runs/score_entropy

With absorbing noise the bound of score entropy is that of masked diffusion plus a penalty for the rate of reveals,
which its ratios are free to get wrong (families/score_entropy.py). Both in bits per character of held-out text.
"""

import math
import sys

import numpy as np
import torch

import textdiffusion as td
from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.text.data import tokenize
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.training.preparation import prepare


@torch.inference_mode()
def measure(model: td.Model, draws: int = 4, batch: int = 64) -> tuple[float, float]:
    """(bound, the penalty's part of it), bits per character, on the same draws of the noise."""
    process = model.process
    if not hasattr(process, "rate_penalty") or process.config.graph != "absorb":
        raise UserError("the rate penalty is that of a score_entropy run with process.graph=absorb")
    corpus, tokenizer, _ = prepare(model.config, model.tokenizer)
    windows = evaluation_windows(tokenize(corpus, tokenizer)["validation"], model.window)
    x = torch.from_numpy(np.stack([w for w in windows if len(w) == model.window]).astype(np.int64))
    bound = penalty = 0.0
    for draw in range(draws):
        for begin in range(0, len(x), batch):
            part = x[begin : begin + batch]
            noise = Noise(0, np.arange(begin, begin + len(part)), len(x), draw)
            # Times of density 1 / (2 sqrt t), as in nll: the integrand grows like 1 / t.
            root = noise.stratified("time").clamp(1e-6, 1 - 1e-9)
            state = process.q_sample(part, root.square(), noise)
            bound += float((2 * root * process.rate(part, state)).sum() + process.prior_term(part).sum())
            penalty += float((2 * root * process.rate_penalty(part, state)).sum())
    characters = draws * float(tokenizer.characters[x.numpy()].sum()) * math.log(2)
    return bound / characters, penalty / characters


if __name__ == "__main__":
    try:
        bound, penalty = measure(td.load(sys.argv[1] if len(sys.argv) > 1 else None))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"bound <= {bound:.3f} bits/char, of which penalty for the rate {penalty:.3f}")
