"""A model of replaced tokens mends text without being told where: how much of a corrupted text comes out right?

    python examples/proofreading.py runs/uniform

Characters of held-out windows are replaced at random; each window is handed to ``Model.proofread``, which is told how
many to expect and nothing else.
"""

import sys

import numpy as np

import textdiffusion as td
from textdiffusion.text.data import tokenize
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.training.preparation import prepare


def measure(model: td.Model, share: float, windows: int = 64, seed: int = 0) -> dict[str, float]:
    """Shares of all tokens that are wrong before and after; of the wrong ones, found (changed at all) and restored; of
    the right ones, broken."""
    corpus, tokenizer, _ = prepare(model.config, model.tokenizer)
    held_out = evaluation_windows(tokenize(corpus, tokenizer)["validation"], model.window)
    rng = np.random.default_rng(seed)
    wrong, found, mended, right, broken = 0, 0, 0, 0, 0
    for number, place in enumerate(rng.permutation(len(held_out))[:windows]):
        text = held_out[place].astype(int)
        noisy = np.where(rng.random(len(text)) < share, rng.integers(0, tokenizer.vocabulary, len(text)), text)
        after = model.proofread_tokens(noisy, share)
        was = noisy != text
        wrong, right, found = wrong + was.sum(), right + (~was).sum(), found + (was & (after != noisy)).sum()
        mended, broken = mended + (was & (after == text)).sum(), broken + (~was & (after != text)).sum()
        if number < 3:
            for name, ids in (("text", text), ("corrupted", noisy), ("mended", after)):
                print(f"{name:>10}  {tokenizer.decode(ids.tolist())!r}")
    total = wrong + right
    return {
        "wrong before": wrong / total, "wrong after": (wrong - mended + broken) / total,
        "found": found / max(wrong, 1), "restored": mended / max(wrong, 1), "broken": broken / max(right, 1),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        model = td.load(sys.argv[1] if len(sys.argv) > 1 else None)
        for share in (0.02, 0.05, 0.1, 0.2):
            print(share, {name: f"{value:.1%}" for name, value in measure(model, share).items()}, flush=True)
    except td.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
