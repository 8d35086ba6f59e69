"""Deterministic automata over tokens, and sums over all texts that they accept.

A pattern is compiled to an automaton over bytes (patterns.py); tokens, whatever their tokenizer, walk it by their
bytes. What a sampler then asks (constraints.py), for factorised laws of a text's tokens, is answered by
forward-backward in O(L E): the chance that a text of L tokens matches, and a joint draw among those that do (as in
DINGO, 2505.23061). Sums are made in float64; of rows where they would underflow, in the log domain.

Shapes: B batch, L length, V vocabulary, Q states, E edges (pairs of states that some token leads between), K labels
(distinct sets of tokens that an edge stands for). The state after the last one, Q, is dead: nothing leads out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SAFE = -575.0  # nats: above, no sum that is made of float64 products lacks a share of more than 1e-50


@dataclass(frozen=True)
class ByteAutomaton:
    """A deterministic automaton over bytes: step int64 [Q + 1, 256], accepts bool [Q + 1]; it starts in state 0."""

    step: np.ndarray
    accepts: np.ndarray

    def __and__(self, other: ByteAutomaton) -> ByteAutomaton:
        """The automaton of the texts that both accept, minimised."""
        size = len(other.step)
        dead = len(self.step) * size - 1
        number, order, frontier = {0: 0}, [0], np.array([0])
        rows = []
        while len(frontier):
            here, there = np.divmod(frontier, size)
            to = self.step[here] * size + other.step[there]
            gone = (self.step[here] == len(self.step) - 1) | (other.step[there] == size - 1)
            to = np.where(gone, dead, to)
            rows.append(to)
            new = [pair for pair in np.unique(to).tolist() if pair not in number and pair != dead]
            number |= {pair: len(number) + i for i, pair in enumerate(new)}
            order += new
            frontier = np.array(new, dtype=np.int64)
        pairs, names = np.array([*order, dead]), np.array([*number.values(), len(order)])
        place = np.argsort(pairs)
        to = np.concatenate([*rows, np.full((1, 256), dead)])
        step = names[place][np.searchsorted(pairs[place], to)]
        here, there = np.divmod(pairs, size)
        return ByteAutomaton(*minimal(step, self.accepts[here] & other.accepts[there]))


def minimal(step: np.ndarray, accepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest automaton of the same texts (Moore): step [Q + 1, symbols], accepts [Q + 1]; start first, dead
    last."""
    # 1. States from which no text is accepted are dead, and those that the start does not lead to are dropped. How far
    # it is to a text's end tells many states apart at once.
    dead, far = len(step) - 1, np.where(accepts, 0, -1)
    while (closer := (far < 0) & (far[step] >= 0).any(1)).any():
        far[closer] = far.max() + 1
    step = np.where(far[step] >= 0, step, dead)
    seen, frontier = np.zeros(len(step), dtype=bool), np.array([0])
    while len(frontier):
        seen[frontier] = True
        frontier = np.setdiff1d(step[frontier], np.flatnonzero(seen))
    seen[dead] = True
    kept = np.flatnonzero(seen)
    names = np.full(len(step), -1)
    names[kept] = np.arange(len(kept))
    step, accepts, far = names[step[kept]], accepts[kept], far[kept]
    # 2. States are told apart by where they lead, until that tells no more of them apart.
    kind = np.unique(far, return_inverse=True)[1]
    columns = np.unique(step, axis=1, return_index=True)[1]
    moves, seed = step[:, columns], 0
    while True:
        factor = np.random.default_rng(seed).integers(1 << 62, size=len(columns) + 1, dtype=np.uint64)
        count = 0
        while kind.max() + 1 != count:
            count = kind.max() + 1
            # A row of kinds by a hash: sorting the rows themselves takes ten times as long.
            code = (kind.astype(np.uint64)[moves] * factor[1:]).sum(1, dtype=np.uint64) + kind.astype(
                np.uint64
            ) * factor[0]
            kind = np.unique(code, return_inverse=True)[1]
        one = np.unique(kind, return_index=True)[1]
        if (kind[moves] == kind[moves[one]][kind]).all() and (accepts == accepts[one][kind]).all():
            break
        kind, seed = np.unique(far, return_inverse=True)[1], seed + 1  # two rows shared a hash
    # 3. Number the kinds: the start first, the dead state last, which is no other even if nothing is accepted.
    last = kind[-1]
    order = [k for k in dict.fromkeys(kind.tolist()) if k != last]
    if not order:
        return np.full((2, step.shape[1]), 1), np.zeros(2, dtype=bool)
    name = np.empty(count, dtype=np.int64)
    name[[*order, last]] = np.arange(len(order) + 1)
    chosen = one[[*order, last]]
    return name[kind[step[chosen]]], accepts[chosen]


@dataclass(frozen=True)
class _Edges:
    """source, target, label int64 [E], sorted by source, at least one for each of the Q states; begins [Q], where each
    state's edges begin; out [Q D], each state's edges, filled up with E; sets bool [K V], the tokens of each label."""

    source: np.ndarray
    target: np.ndarray
    label: np.ndarray
    begins: np.ndarray
    out: np.ndarray
    sets: np.ndarray


class Automaton:
    """A deterministic automaton over the tokens of one tokenizer.

    Args:
        automaton: over bytes.
        pieces: the bytes of each token, [V]; None for a token that no matching text may have.
    """

    def __init__(self, automaton: ByteAutomaton, pieces: Sequence[bytes | None]):
        states = len(automaton.step)
        step = np.full((states, len(pieces)), states - 1)
        spelled = [v for v, piece in enumerate(pieces) if piece]
        now = np.repeat(np.arange(states)[:, None], len(spelled), 1)
        lengths = np.array([len(pieces[v] or b"") for v in spelled])
        for i in range(int(lengths.max(initial=0))):
            going = np.flatnonzero(lengths > i)
            byte = np.array([(pieces[spelled[j]] or b"")[i] for j in going])
            now[:, going] = automaton.step[now[:, going], byte]
        step[:, spelled] = now
        self.step, self.accepts = minimal(step, automaton.accepts)
        self._feasible = [self.accepts]

    @classmethod
    def of_template(cls, tokens: np.ndarray, given: np.ndarray, vocabulary: int) -> Automaton:
        """The automaton of the texts of L tokens that have those ``given``, bool [L], of ``tokens``, int64 [L]."""
        length = len(tokens)
        step = np.full((length + 2, vocabulary), length + 1, dtype=np.int32)
        for i in range(length):
            step[i, tokens[i] if given[i] else slice(None)] = i + 1
        made = cls.__new__(cls)
        made.step, made.accepts = step, np.arange(length + 2) == length
        made._feasible = [made.accepts]
        return made

    def __len__(self) -> int:
        """Q."""
        return len(self.step) - 1

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.step.shape[1]

    @cached_property
    def edges(self) -> _Edges:
        """Its edges, tokens that lead from one state to the same other one being one edge."""
        states, names, sets = len(self), dict[bytes, int](), list[np.ndarray]()
        found = []
        for q in range(states):
            targets = np.setdiff1d(self.step[q], [states])
            # A state that leads nowhere has an edge that no token takes, so that every state has one.
            for target in targets.tolist() or [states]:
                tokens = (self.step[q] == target) & (target != states)
                label = names.setdefault(np.packbits(tokens).tobytes(), len(names))
                if label == len(sets):
                    sets.append(tokens)
                found.append((q, target, label))
        source, target, label = np.array(found).T
        begins = np.searchsorted(source, np.arange(states))
        degree = np.diff(np.append(begins, len(source)))
        slot = np.arange(degree.max())
        out = np.where(slot < degree[:, None], begins[:, None] + slot, len(source))
        return _Edges(source, target, label, begins, out, np.array(sets))

    # -- which texts there are ------------------------------------------------------------------------------------
    def feasible(self, length: int) -> np.ndarray:
        """From which states exactly ``length`` more tokens can complete a match, bool [Q + 1]."""
        target, begins = self.edges.target, self.edges.begins
        while len(self._feasible) <= length:
            ahead = self._feasible[-1]
            self._feasible.append(np.append(np.logical_or.reduceat(ahead[target], begins), False))
        return self._feasible[length]

    def lengths(self, longest: int, state: int = 0) -> list[int]:
        """Numbers of tokens, up to ``longest``, that can follow a state to complete a match."""
        return [n for n in range(longest + 1) if self.feasible(n)[state]]

    def walk(self, tokens: np.ndarray, state: int = 0) -> int:
        """The state after tokens int64 [n]; Q where no match can come of it."""
        for token in tokens.tolist():
            state = int(self.step[state, token])
        return state

    def matches(self, tokens: np.ndarray) -> np.ndarray:
        """Which texts int64 [B L] match, bool [B]."""
        state = np.zeros(len(tokens), dtype=np.int64)
        for column in tokens.T:
            state = self.step[state, column]
        return self.accepts[state]

    # -- sums over matching texts ---------------------------------------------------------------------------------
    def log_chance(self, log_p: np.ndarray, drafted: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Log of the chance that a text matches, float64 [B]; arguments as in `draw`."""
        return self._by_row(log_p, drafted, tokens, None)[0]

    def draw(
        self, log_p: np.ndarray, drafted: np.ndarray, tokens: np.ndarray, uniform: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A joint draw from the texts that match.

        Args:
            log_p: log-law of each drafted token, float64 [N V], normalised; -inf allowed.
            drafted: which positions these are, bool [B L].
            tokens: int64 [B L]: what stands at all others; -1 where anything may yet come, of whose law nothing is
                known: there, behind all drafted positions, it counts only whether a match is possible at all.
            uniform: in [0, 1), float64 [B L].
        Returns:
            the log of the chance that a text matches, [B], and for each drafted position the tokens among which it may
            be drawn from its own law, bool [N V]: given these sets the positions are independent. Rows without any
            match have empty sets.
        """
        chance, labels = self._by_row(log_p, drafted, tokens, uniform)
        assert labels is not None
        sets = np.concatenate((self.edges.sets, np.zeros((1, self.vocabulary), dtype=bool)))
        return chance, sets[labels[drafted]]

    def _by_row(
        self, log_p: np.ndarray, drafted: np.ndarray, tokens: np.ndarray, uniform: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        chance, labels = self._run(log_p, drafted, tokens, uniform, False)
        weak = np.flatnonzero(~(chance > SAFE))
        if len(weak):
            mine = np.isin(drafted.nonzero()[0], weak)
            part = None if uniform is None else uniform[weak]
            chance[weak], other = self._run(log_p[mine], drafted[weak], tokens[weak], part, True)
            if labels is not None:
                labels[weak] = other
        return chance, labels

    def _run(
        self, log_p: np.ndarray, drafted: np.ndarray, tokens: np.ndarray, uniform: np.ndarray | None, logs: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Backward messages, then, with ``uniform``, a draw from left to right: labels int64 [B L], K for none."""
        rows, length = tokens.shape
        known = drafted | (tokens >= 0)
        if ((~known).cumsum(1).astype(bool) & drafted).any():
            raise ValueError("positions of which nothing is known must come behind all that are drafted")
        # What is written on the left only says in which state the rest begins; of what is open on the right only the
        # number of positions counts.
        end = int(np.flatnonzero(known.any(0)).max(initial=-1)) + 1
        first = int(drafted.any(0).argmax()) if drafted.any() else end
        begin = first if (tokens[:, :first] >= 0).all() else 0
        state = np.zeros(rows, dtype=np.int64)
        for column in tokens[:, :begin].T:
            state = self.step[state, column]
        edges, states, ones = self.edges, len(self), np.arange(rows)
        weight = self._weights(log_p, drafted, tokens, begin, end, logs)  # [positions K B]
        nothing = -np.inf if logs else 0.0
        ahead = np.repeat(self.feasible(length - end)[:, None], rows, 1).astype(float)
        with np.errstate(divide="ignore"):
            messages = [np.log(ahead) if logs else ahead]
        scale = np.zeros(rows)
        for i in range(end - begin - 1, -1, -1):
            new = self._pull(weight[i], messages[-1], logs)
            vague = ~known[:, begin + i]
            if vague.any():
                # Open positions before given ones: what counts is whether any token leads to a match.
                new[:, vague] = np.where(new[:, vague] > nothing, 0.0 if logs else 1.0, nothing)
            top = new.max(0)
            some = top > nothing
            if logs:
                new[:, some] -= top[some]
                scale += top
            else:
                new[:, some] /= top[some]
                with np.errstate(divide="ignore"):
                    scale += np.log(top)
            messages.append(np.concatenate((new, np.full((1, rows), nothing))))
        messages.reverse()
        with np.errstate(divide="ignore"):
            start = messages[0][state, ones]
            chance = (start if logs else np.log(start)) + np.where(np.isnan(scale), -np.inf, scale)
        if uniform is None:
            return chance, None
        labels = np.full((rows, length), len(edges.sets))
        target, label = np.append(edges.target, states), np.append(edges.label, 0)
        for i in range(end - begin):
            out = np.where(
                (state < states)[:, None], edges.out[np.minimum(state, states - 1)], len(edges.label)
            )  # [B D]
            w = messages[i + 1][target[out], ones[:, None]]
            given = weight[i][label[out], ones[:, None]]
            if logs:
                w = w + given
                top = w.max(1, keepdims=True)
                w = np.exp(w - np.where(np.isfinite(top), top, 0.0))
            else:
                w = w * given
            total = w.cumsum(1)
            chosen = (total <= uniform[:, begin + i, None] * total[:, -1:]).sum(1)
            # Rounding must not choose behind the last edge with a chance (as in categorical.draw).
            chosen = np.minimum(chosen, w.shape[1] - 1 - (w[:, ::-1] > 0).argmax(1))
            edge = out[ones, chosen]
            some = total[:, -1] > 0
            labels[some, begin + i] = label[edge[some]]
            state = np.where(some, target[edge], states)
        return chance, labels

    def _pull(self, weight: np.ndarray, ahead: np.ndarray, logs: bool) -> np.ndarray:
        """Messages [Q B] from those of the next position [Q + 1, B] and the weights of the labels [K B]."""
        edges = self.edges
        if not logs:
            return np.add.reduceat(weight[edges.label] * ahead[edges.target], edges.begins)
        sums = weight[edges.label] + ahead[edges.target]
        top = np.maximum.reduceat(sums, edges.begins)
        top = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            return np.log(np.add.reduceat(np.exp(sums - top[edges.source]), edges.begins)) + top

    def _weights(
        self, log_p: np.ndarray, drafted: np.ndarray, tokens: np.ndarray, begin: int, end: int, logs: bool
    ) -> np.ndarray:
        """The chance of each label's tokens at the positions from begin to end, [positions K B], or its log."""
        sets = self.edges.sets
        span = tokens[:, begin:end]
        # At open positions every token will do.
        weight = np.where((span >= 0)[..., None], sets.T[span], sets.any(1)).astype(float)
        if logs:
            with np.errstate(divide="ignore"):
                weight = np.log(weight)
                weight[drafted[:, begin:end]] = np.stack([_log_sum(log_p[:, some]) for some in sets], 1)
        else:
            weight[drafted[:, begin:end]] = np.exp(log_p) @ sets.T.astype(float)
        return np.ascontiguousarray(weight.transpose(1, 2, 0))


def _log_sum(x: np.ndarray) -> np.ndarray:
    """log of the sum of exp over the last axis, which may be empty."""
    top = x.max(-1, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    return np.asarray(np.log(np.exp(x - top[..., None]).sum(-1)) + top)
