"""The autoregressive baseline that diffusion is judged against: p(x) = prod_i p(x_i | x_1 .. x_{i-1}).

q           Seen as a noise process, it hides a text from its end: at time t the last ceil(t L) positions are hidden.
network     Causal; its input is the text moved one to the right, the end-of-text token in front.
loss        Cross-entropy of every token.
likelihood  Exact, at L calls, no more and no fewer.
sampling    Left to right with a key-value cache. Past the training window the older half of the window is forgotten and
            the rest encoded again, so that the network never sees a text longer than it was trained on.
departs from the usual in: windows, start token and network are those of the others, but for n-gram embeddings, in a
            training of few passes over its text (networks/ngrams.py; network.ngrams=0: none), and a mixture with what
            was counted of it (networks/counts.py; by default of characters and bytes; network.counts=0: none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from textdiffusion.diffusion.absorbing import Hiding, carry_over, hidden_evidence
from textdiffusion.diffusion.conditioning import at_least_one
from textdiffusion.diffusion.ordering import LeftToRight
from textdiffusion.errors import UserError
from textdiffusion.mathematics.cross_entropy import token_nats
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Context, Network, Nll, Prediction, State, as_network

TEACHES, SOFTLY = 8, 1e-3  # of so many texts one teaches how far counts are trusted, and how loudly


@dataclass
class AutoregressiveConfig:
    """The autoregressive family has no field of its own."""


@dataclass(frozen=True)
class _Read:
    """What has been read: the cache, and where in the text each row's window starts, int64 [B]."""

    cache: Any
    start: Tensor

    def select(self, rows: Tensor) -> _Read:
        return _Read(self.cache.select(rows), self.start[rows])


@final
class Autoregressive(Hiding):
    """The autoregressive baseline; see the head of the file."""

    Config: ClassVar[type] = AutoregressiveConfig
    summary: ClassVar[str] = "left to right, one token a call; exact likelihood; prompts, and gaps filled by particles"
    paper: ClassVar[str] = "the usual causal language model"
    bounded: ClassVar[bool] = False
    infills: ClassVar[bool] = False
    remembers: ClassVar[bool] = True

    def __init__(self, network: Network, config: AutoregressiveConfig, vocabulary: int, *, start: int = 0):
        super().__init__(network, config, vocabulary, start=start)
        self.steps = {"left-to-right": LeftToRight(self.mask)}

    @classmethod
    def network_fields(cls, config: Any, vocabulary: int) -> dict[str, Any]:
        return {"inputs": vocabulary, "outputs": vocabulary, "attention": "causal", "time": False, "clean": False}

    # -- forward --------------------------------------------------------------------------------------------------
    def q_sample(self, x_0: Tensor, t: Tensor, noise: Noise) -> State:
        length = x_0.shape[1]
        shown = length - torch.ceil(t.double() * length - 1e-9)
        hidden = torch.arange(length, device=x_0.device) >= shown.unsqueeze(-1)
        return State(x_0.masked_fill(hidden, self.mask), t.double())

    # -- learning -------------------------------------------------------------------------------------------------
    def _inputs(self, x: Tensor) -> Tensor:
        """The text moved one to the right; positions that are hidden hold the start token, and are read by nobody."""
        x = torch.cat((x.new_full((len(x), 1), self.start), x[:, :-1]), 1)
        return x.masked_fill(x == self.mask, self.start)

    def predict(self, state: State, positions: Tensor | None = None, condition: Tensor | None = None) -> Prediction:
        """log p(x_i | x_<i); only positions up to the first hidden one have a meaning."""
        if positions is not None and bool((positions.sum(-1) == 1).all()):
            logits, memory = self._read_on(state, positions, condition)
        else:
            logits, memory = self.network(self._inputs(state.x), condition=condition, positions=positions), None
        symbols = state.x if positions is None else state.x[positions]
        return Prediction(carry_over(logits, symbols, self.mask), memory=memory)

    def _read_on(self, state: State, positions: Tensor, condition: Tensor | None) -> tuple[Tensor, _Read | None]:
        """Outputs [B V] at one position a row, reading only what the cache has not read yet."""
        x, memory = state.x, state.memory
        at = positions.long().argmax(-1)
        # A plain callable, such as an oracle in a test, has no cache and reads the whole prefix each time.
        empty_cache = getattr(self.network, "empty_cache", None)
        window = x.shape[1] if empty_cache is None else self.network.config.window  # type: ignore[attr-defined]
        start = torch.zeros_like(at) if memory is None else memory.start
        full = at - start >= window
        if memory is not None and not full.any():
            local = (at - start).unsqueeze(-1)
            token = x.gather(1, (at - 1).unsqueeze(-1))
            return self.network(token, condition=condition, cache=memory.cache, at=local)[:, 0], memory
        # Read the prefix, or what is kept of it, in one call.
        start = torch.where(full, at - window // 2, start)
        local = torch.arange(int((at - start).max()) + 1, device=x.device).expand(len(x), -1)
        source = (start.unsqueeze(-1) + local).clamp(max=x.shape[1] - 1)
        inputs = self._inputs(x.gather(1, source))
        last = local == (at - start).unsqueeze(-1)
        if empty_cache is None:
            return self.network(inputs, condition=condition, positions=last), None
        cache = empty_cache(len(x))
        return self.network(inputs, condition=condition, positions=last, cache=cache, at=local), _Read(cache, start)

    def loss(self, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> Tensor:
        """Nats per token [B] of the network's own law: the negative log-likelihood, but for counts, over the length."""
        inputs = self._inputs(x_0)
        counts = getattr(self.network, "counts", None)
        logits = self.network(inputs, condition=condition, **({} if counts is None else {"alone": True}))
        nats = token_nats(logits.flatten(0, 1), x_0.flatten()).view(x_0.shape).sum(-1)
        if counts is not None:
            # How far counts are trusted is few numbers, which a few of a batch's texts teach, by what is detached from
            # the network: so little that the clipping of gradients does not feel it, and Adam does not mind.
            teaches = torch.from_numpy(noise.rows % TEACHES == 0).to(x_0.device)
            few = at_least_one(teaches)
            mixed = counts(logits[few].detach(), counts.contexts(inputs[few]), x_0[few])
            more = token_nats(mixed.flatten(0, 1), x_0[few].flatten()).view(x_0[few].shape).sum(-1)
            more = SOFTLY * teaches[few] * (more - more.detach())
            nats = nats.index_add(0, few, more.to(nats.dtype))
        return nats / x_0.shape[1]

    def nll(self, x_0: Tensor, noise: Noise, calls: int | None = None) -> Nll:
        """Exact. Raises UserError for fewer calls than tokens: this family has no such sampler."""
        if calls is not None and calls < x_0.shape[1]:
            raise UserError(
                f"the autoregressive family takes {x_0.shape[1]} calls for {x_0.shape[1]} tokens, not {calls}"
            )
        logits = self.network(self._inputs(x_0))
        diffusion = token_nats(logits.flatten(0, 1), x_0.flatten()).view(x_0.shape).sum(-1).double()
        zero = torch.zeros_like(diffusion)
        return Nll(diffusion, zero, zero, "exact", "left-to-right", x_0.shape[1])

    def ideal(self, context: Context) -> Network:
        def outputs(inputs: Tensor, t: Tensor | None) -> Tensor:
            # Output i stands behind inputs 0..i, which hold tokens 0..i-1 behind the start token.
            text = torch.cat((inputs[:, 1:], inputs.new_zeros(len(inputs), 1)), 1)
            places = torch.arange(text.shape[1], device=text.device)
            rows = [context(hidden_evidence(text.masked_fill(places >= i, self.mask), self.mask))[:, i] for i in places]
            return torch.stack(rows, 1)

        return as_network(outputs)

    # -- reverse --------------------------------------------------------------------------------------------------
    def plan(self, free: Tensor, calls: int, sampler: str) -> Sequence[float]:
        length = int(free.sum())
        return [1 - k / length for k in range(length)] + [0.0]
