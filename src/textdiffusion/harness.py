"""Runs in lm-evaluation-harness: likelihoods of continuations, and texts from prompts. Needs the extra eval.

    import lm_eval
    from textdiffusion.harness import Harness

    lm_eval.simple_evaluate(model=Harness("runs/mine", draws=32), tasks=["lambada_openai"])

What is a log-likelihood there is, of diffusion, minus an upper bound on -log p(continuation | context): that of
revealing the continuation's tokens one by one in random order, the context being shown (ARDM 2110.02037),

    -log p(y | c) <= M E_{n uniform on 1..M} E_{n random tokens of y hidden} mean of -log p(y_i | c, the rest of y)

estimated from ``draws`` draws of n and the hidden tokens, n stratified. It is exact for autoregressive runs. A score of
two continuations therefore compares bounds, with noise of its own; the number of draws belongs to every figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.evaluation.measures import evaluate
from textdiffusion.loading import load
from textdiffusion.mathematics.noise import Noise
from textdiffusion.model import Model
from textdiffusion.process import Discrete, Process, State

MOST = 128  # noisy texts in a network call


def groups(process: Process, length: int, first: int) -> list[range]:
    """Positions first .. length - 1 of a text, by what is revealed before what: all at once, by blocks, or one by one.

    Raises:
        UserError: a family of which no likelihood given a context is known.
    """
    if not isinstance(process.space, Discrete) or process.space.size == process.vocabulary:
        raise UserError("no likelihood given a context is known of this family, whose noise hides nothing")
    size = getattr(process, "size", None)
    if process.infills:
        return [range(first, length)]
    size = 1 if size is None else int(size)
    bounds = [first, *range((first // size + 1) * size, length, size), length]
    return [range(a, b) for a, b in pairwise(bounds)]


@torch.no_grad()
def continuation_nats(process: Process, x: Tensor, first: int, draws: int, seed: int = 0) -> tuple[float, bool]:
    """An estimate of the bound on -log p(x_first .. | what stands before), nats; exact where one token is revealed at a
    time from the left. And whether each token is the likeliest one given what is shown before its group.

    Args:
        process: a family with a hidden symbol.
        x: tokens int64 [L].
        first: where the continuation begins.
        draws: noisy copies for each group of positions.
    Raises:
        UserError: a family of which no likelihood given a context is known.
    """
    mask, texts, asked, weights = process.vocabulary, [], [], []
    for group in groups(process, len(x), first):
        count = len(group)
        copies = draws if count > 1 else 1
        noise = Noise.of(seed, copies, device=x.device)
        n = (noise.stratified("count") * count).long().clamp(max=count - 1) + 1
        order = noise.uniform("hide", count).argsort(-1).argsort(-1)
        hidden = torch.zeros(copies + 1, len(x), dtype=torch.bool, device=x.device)
        hidden[:copies, group.start : group.stop] = order < n.unsqueeze(-1)
        hidden[copies, group.start : group.stop] = True  # the last one, of no weight: what is likeliest of all
        noisy = x.expand(copies + 1, -1).masked_fill(hidden, mask)
        noisy[:, group.stop :] = mask
        texts.append(noisy)
        asked.append(hidden)
        weights.append(torch.cat((count / n.double() / copies, n.new_zeros(1, dtype=torch.float64))))
    rows, positions, weight = torch.cat(texts), torch.cat(asked), torch.cat(weights)
    # At the time at which so many are hidden on average: what a network that is told of time expects.
    t = (rows == mask).double().mean(-1)
    total, greedy = 0.0, True
    for begin in range(0, len(rows), MOST):
        part = slice(begin, begin + MOST)
        law = process.predict(State(rows[part], t[part]), positions[part]).log_p.double()
        wanted, row = x.expand(len(rows[part]), -1)[positions[part]], positions[part].nonzero()[:, 0]
        cost = -law.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        total += float((weight[part][row] * cost).sum())
        greedy = greedy and bool((law.argmax(-1) == wanted)[weight[part][row] == 0].all())
    return total, greedy


@final
@register_model("textdiffusion")
class Harness(TemplateLM):
    """A run as a model of the harness.

    Args:
        run: a run directory, or what else ``td.load`` takes.
        draws: noisy copies of each continuation, and of each window of a rolled text.
        calls: network calls a generated text; None: one a token.
        device, seed: of all draws.
    """

    def __init__(
        self, run: str | Model, draws: int = 32, calls: int | None = None, device: str = "auto", seed: int = 0,
        **ignored: Any,
    ):  # fmt: skip
        super().__init__()
        del ignored  # batch sizes and the like, which the harness hands to all models
        if int(draws) < 1:
            raise UserError(f"draws must be at least 1, not {draws}")
        self.model = run if isinstance(run, Model) else load(run, device)
        self.draws, self.calls, self.seed = int(draws), calls, int(seed)

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **how: Any) -> list[int]:
        return self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **how: Any
    ) -> list[tuple[float, bool]]:
        out = []
        for _, context, continuation in requests:
            if len(continuation) > self.model.window:
                raise UserError(f"a continuation of {len(continuation)} tokens is longer than the window of this run")
            room = self.model.window - len(continuation)
            before = context[max(0, len(context) - room) :] if room else []
            x = torch.tensor([*before, *continuation], device=self.model.device)
            nats, greedy = continuation_nats(self.model.process, x, len(before), self.draws, self.seed)
            out.append((-nats, greedy))
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Whole texts, cut into windows as in ``textdiffusion eval``."""
        out = []
        for request in requests:
            ids = np.asarray(self.tok_encode(request.args[0]), dtype=np.int64)
            windows = [ids[i : i + self.model.window] for i in range(0, len(ids), self.model.window)]
            tokenizer = self.model.tokenizer
            found = evaluate(
                self.model.process, windows, tokenizer.characters, tokenizer.spelling, draws=self.draws, seed=self.seed,
                device=self.model.device,
            )  # fmt: skip
            out.append(-found.figure.bits_per_char * found.characters * math.log(2))
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        out = []
        for request in requests:
            context, how = request.args
            ends = how.get("until") or []
            ends = [ends] if isinstance(ends, str) else list(ends)
            room = self.model.window
            wanted = min(int(how.get("max_gen_toks", room // 2)), max(1, room - 1))
            ids = self.tok_encode(context)
            before = self.model.tokenizer.decode(ids[-(room - wanted) :]) if len(ids) > room - wanted else context
            temperature = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
            length = min(room, len(self.tok_encode(before)) + wanted)
            text = self.model.sample(
                1, length, self.calls, prompt=before, temperature=temperature, seed=self.seed
            )[0][len(before) :]  # fmt: skip
            for end in filter(None, ends):
                text = text.partition(end)[0]
            out.append(text)
        return out
