"""Why Sparse Distribution Diffusion repeats words, and what its perplexity measures: the recipe in small, beside ours.

    python examples/reproduce_sdd.py [my.txt] [--steps 400]

The recipe: a position holds k weighted tokens, its own in slot 0 at every noise level. Noise flattens the probabilities
to 1 / V and shakes the embeddings ("flatten"), or also exchanges tokens for random ones, at 1 / V ("swap"). The network
attends from every slot to every slot, a code of places tells the slots apart, and is scored at all positions. Sampling
starts from random tokens at 1 / V; each call replaces the slots by the k likeliest tokens, and nothing is drawn. It has
two more ways to train. "k grows": from 1 slot, by doubling. "two steps": what the network says is made noisy again, at
all positions, and handed to it, and it learns from what it says then.

Three things follow, each with its columns. Scored at a time near 0 its "perplexity" is 1, since the answer is in
slot 0: the figure is of copying. Handed a wrong token there it copies that. And samples are a fixed map of a state that
says nothing: what is random at the start either stays, as junk, or gives way to the token that is likeliest anywhere.
In two steps not even copying is learnt: the first call is not taught, and passes nothing of the text on.

``families/sparse_distribution.py`` hides the answer, gives slots no number and draws tokens one after another.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.presets import configure
from textdiffusion.run import build
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.data import tokenize
from textdiffusion.text.windows import Windows, evaluation_windows
from textdiffusion.training.learning import Learner, TrainingConfig
from textdiffusion.training.preparation import prepare

LENGTH, K, WIDTH, DEPTH, HEADS, BATCH = 16, 4, 64, 2, 2, 32


class Recipe(nn.Module):
    """The system's network, noise, loss and sampler. Shapes: B batch, L length, K slots, D width, V vocabulary."""

    def __init__(self, vocabulary: int, swap: bool):
        super().__init__()
        self.vocabulary, self.swap = vocabulary, swap
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.confidence = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH * K, WIDTH))  # of every slot: this is what numbers them
        self.mixes = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(DEPTH))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(DEPTH)
        )
        self.trust = nn.Parameter(torch.ones(DEPTH + 1))
        self.query = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, p: Tensor, tokens: Tensor, t: Tensor, shake: Tensor | None = None) -> Tensor:
        """Logits [B L V] of slots: probabilities and tokens [B L K] at times [B]; noise of the embeddings [B L K D]."""
        h = self.embedding(tokens) + (0 if shake is None else shake)
        h = (h + self.confidence(p.unsqueeze(-1)) + self.time(t.view(-1, 1, 1, 1))).flatten(1, 2)
        weight, slots = (p.flatten(1) + 1e-8).log(), p.shape[-1]
        place = self.place.view(LENGTH, K, WIDTH)[:, :slots].flatten(0, 1)
        for i, (mix, feed) in enumerate(zip(self.mixes, self.feeds, strict=True)):
            x = F.layer_norm(h, (WIDTH,)) + place
            bias = (self.trust[i] * weight).unsqueeze(1).expand(-1, LENGTH * slots, -1).repeat_interleave(HEADS, 0)
            h = h + mix(x, x, x, attn_mask=bias, need_weights=False)[0]
            h = h + feed(h)
        h = F.layer_norm(h, (WIDTH,)).unflatten(1, (LENGTH, slots))
        share = (h @ self.query / WIDTH**0.5 + self.trust[DEPTH] * weight.unflatten(1, (LENGTH, slots))).softmax(-1)
        return self.head((share.unsqueeze(-1) * h).sum(2))

    def noisy(
        self, slot_0: Tensor, t: Tensor, generator: torch.Generator, slots: int = K
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, tokens and noise of the embeddings at times t [B] of texts in slot 0 [B L]."""
        others = torch.randint(self.vocabulary, (*slot_0.shape, slots - 1), generator=generator)
        tokens = torch.cat((slot_0.unsqueeze(-1), others), -1)
        clean = torch.full(tokens.shape, 0.01)
        clean[..., 0] = 1 - 0.01 * (slots - 1)
        return self.noise(clean, tokens, t, generator)

    def noise(
        self, clean: Tensor, tokens: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, probabilities and tokens [B L K], made noisy."""
        n = (1 - torch.cos(math.pi * t / 2)).view(-1, 1, 1)
        p = (1 - n) * clean + n / self.vocabulary
        if self.swap:
            gone = torch.rand(p.shape, generator=generator) < n * (1 - clean / clean[..., :1] * (1 - n))
            tokens = torch.where(gone, torch.randint(self.vocabulary, p.shape, generator=generator), tokens)
            p = torch.where(gone, 1 / self.vocabulary, p)
        shake = 0.1 * n.unsqueeze(-1) * torch.randn(*p.shape, WIDTH, generator=generator)
        return p, tokens, shake * (not self.swap)

    def cost(self, x: Tensor, t: Tensor, generator: torch.Generator, slots: int = K, two_steps: bool = False) -> Tensor:
        """Mean cross-entropy of all positions, nats: what it is trained on, and what its perplexity is made of."""
        p, tokens, shake = self.noisy(x, t, generator, slots)
        if two_steps:
            with torch.no_grad():
                p, tokens = self(p, tokens, t, shake).softmax(-1).topk(slots, -1)
            p, tokens, shake = self.noise(p, tokens, t, generator)
        return F.cross_entropy(self(p, tokens, t, shake).flatten(0, 1), x.flatten())

    @torch.no_grad()
    def write(self, rows: int, generator: torch.Generator, calls: int = 25) -> Tensor:
        """Texts [rows L]: the k likeliest tokens, again and again; slot 0 in the end."""
        tokens = torch.randint(self.vocabulary, (rows, LENGTH, K), generator=generator)
        p = torch.full(tokens.shape, 1 / self.vocabulary)
        for call in range(calls):
            law = self(p, tokens, torch.full((rows,), 1 - call / calls)).softmax(-1)
            p, tokens = law.topk(K, -1)
        return tokens[..., 0]

    @torch.no_grad()
    def copied(self, x: Tensor, generator: torch.Generator) -> float:
        """How often the answer is what stands in slot 0, where that is a wrong token, at t = 1/2 and not swapped."""
        wrong = (x + torch.randint(1, self.vocabulary, x.shape, generator=generator)) % self.vocabulary
        t = torch.full((len(x),), 0.5)
        swap, self.swap = self.swap, False
        p, tokens, _ = self.noisy(wrong, t, generator)
        self.swap = swap
        return float((self(p, tokens, t).argmax(-1) == wrong).float().mean())


def train_recipe(network: Recipe, batches: Iterator[Tensor], *, grows: bool = False, two_steps: bool = False) -> Recipe:
    """AdamW, the rate falling to a tenth along a cosine, as in the system; k doubles from 1, each for as many steps."""
    generator, batches = torch.Generator().manual_seed(0), list(batches)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), eta_min=2e-4)
    stages = K.bit_length()
    for step, x in enumerate(batches):
        slots = 2 ** (step * stages // len(batches)) if grows else K
        loss = network.cost(x, torch.rand(len(x), generator=generator), generator, slots, two_steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def looks(texts: Tensor) -> list[str]:
    """Shares of tokens that repeat the one before and of distinct ones among all; entropy of the tokens, bits."""
    share = torch.bincount(texts.flatten()).double() / texts.numel()
    repeats = float((texts[:, 1:] == texts[:, :-1]).double().mean())
    return [
        f"{repeats:.1%}",
        f"{len(texts.unique()) / texts.numel():.1%}",
        f"{max(0.0, -float(torch.special.xlogy(share, share).sum()) / math.log(2)):.2f}",
    ]


def main(data: str, steps: int, texts: int = 64) -> list[list[str]]:
    """Train all of them, print the table, and return its rows."""
    settings = [f"network.width={WIDTH}", f"network.heads={HEADS}", f"training.batch={BATCH}"]
    config = configure(
        family="sparse_distribution", data=data, tokenizer="bpe:300", length=LENGTH, depth=DEPTH, steps=steps,
        settings=[*settings, f"process.candidates={K}"],
    )  # fmt: skip
    corpus, tokenizer, config = prepare(config)
    runs = tokenize(corpus, tokenizer)
    windows = Windows(runs["train"], LENGTH, 0)
    held_out = [w for w in evaluation_windows(runs["validation"], LENGTH) if len(w) == LENGTH][:256]
    x = torch.from_numpy(np.stack(held_out).astype(np.int64))

    def batches() -> Iterator[Tensor]:
        for step in range(steps):
            yield torch.from_numpy(windows.rows(np.arange(step * BATCH, (step + 1) * BATCH)))

    head = ["", "t from .1 to .9", "t near 0", "t near 1", "copies slot 0", "repeats", "distinct", "bits a token"]
    rows, written = [head, ["held-out text", "", "", "", "", *looks(x)]], {}
    ways: dict[str, tuple[bool, dict[str, bool]]] = {
        "recipe, flatten": (False, {}), "recipe, swap": (True, {}), "swap, k grows": (True, {"grows": True}),
        "swap, two steps": (True, {"two_steps": True}),
    }  # fmt: skip
    for name, (swap, way) in ways.items():
        torch.manual_seed(0)
        network = train_recipe(Recipe(tokenizer.vocabulary, swap), batches(), **way)
        generator, perplexities = torch.Generator().manual_seed(1), []
        for low, high in ((0.1, 0.9), (0.0, 0.02), (0.98, 1.0)):
            with torch.no_grad():
                t = low + (high - low) * (torch.arange(len(x)) + 0.5) / len(x)
                perplexities.append(
                    f"{math.exp(float(network.cost(x, t, generator, two_steps=bool(way.get('two_steps'))))):.2f}"
                )
        written[name] = network.write(texts, generator)
        copied = f"{network.copied(x, generator):.0%}"
        rows.append([name, *perplexities, copied, *looks(written[name])])
    process = build(config)
    learner = Learner(process.network, TrainingConfig(steps=steps, batch=BATCH))  # type: ignore[arg-type]
    for step, batch in enumerate(batches()):
        learner.learn(process, batch, Noise.of(0, BATCH, step=step))
    process = process.over(learner.average.module.eval())
    with torch.no_grad():
        # Perplexity of a hidden token: over all numbers of them, which is the bound; with one hidden; with all.
        bound = process.nll(x, Noise.of(1, len(x))).total.mean() / LENGTH
        few, every = (
            process.curve_point(x, torch.full((len(x),), n), Noise.of(2, len(x))).mean() for n in (1, LENGTH)  # type: ignore[attr-defined]
        )  # fmt: skip
    *_, last = sample(process, Noise.of(3, texts), LENGTH, 2 * LENGTH)
    written["ours"] = last.tokens
    figures = [f"{math.exp(float(nats)):.2f}" for nats in (bound, few, every)]
    rows.append(["ours", *figures, "it has none", *looks(last.tokens)])
    print(f"{tokenizer.vocabulary} tokens; {steps} steps of {BATCH} texts of {LENGTH} tokens")
    print('"perplexity" at noise levels; of ours, of hidden tokens alone: a bound, one hidden, all hidden\n')
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, tokens in written.items():
        print(f"\n{name}")
        for ids in tokens[:4]:
            print(f"  {tokenizer.decode(ids.tolist())!r}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="pydoc", help="a text (default: the built-in one)")
    parser.add_argument("--steps", type=int, default=400)
    chosen = parser.parse_args()
    try:
        if chosen.steps < 1:
            raise UserError(f"--steps must be at least 1, not {chosen.steps}")
        main(chosen.data, chosen.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
