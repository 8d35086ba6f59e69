"""What a judge makes of texts: nats a token, from which generative perplexity follows. Never the only measure.

The judge is an autoregressive model trained on the same text with the budget of the others, from another seed than the
autoregressive row, and with the n-gram embeddings that its kind profits from. Each text is judged on its own, from an
end-of-text token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from textdiffusion.mathematics.noise import Noise
from textdiffusion.model import Model

BATCH = 32


class Judge(Protocol):
    """Scores texts."""

    name: str

    def nats(self, tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Nats of each text, and how many of the judge's tokens it has; float64 and int64 [texts]."""
        ...


class OwnJudge:
    """A run of the autoregressive family, with the tokenizer of those that it judges."""

    name = "an autoregressive model of its own, trained alike"

    def __init__(self, model: Model):
        self.model = model

    @torch.inference_mode()
    def nats(self, tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        out = np.zeros(len(tokens))
        for length in {len(t) for t in tokens}:
            rows = [i for i, t in enumerate(tokens) if len(t) == length]
            for first in range(0, len(rows), BATCH):
                part = rows[first : first + BATCH]
                x = torch.from_numpy(np.stack([tokens[i] for i in part]).astype(np.int64)).to(self.model.device)
                nll = self.model.process.nll(x, Noise.of(0, len(part), device=self.model.device))
                out[part] = nll.total.double().cpu().numpy()
        return out, np.array([len(t) for t in tokens])
