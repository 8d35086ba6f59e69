"""The Python API: a trained run that samples, infills, edits and scores."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from textdiffusion.config import RunConfig
from textdiffusion.diffusion.drafts import HasDraft
from textdiffusion.diffusion.guidance import Guidance
from textdiffusion.display.frames import TextFrame, revises, written
from textdiffusion.display.replay.canvas import save_replay as write_replay
from textdiffusion.display.replay.recording import Panel, Recording, recorded
from textdiffusion.display.watching import watch
from textdiffusion.errors import UserError
from textdiffusion.evaluation.measures import Figure, evaluate
from textdiffusion.evaluation.ranking import rank
from textdiffusion.families import family, names
from textdiffusion.machine import fastest_precision, tune_allocator
from textdiffusion.mathematics.automaton import Automaton
from textdiffusion.mathematics.grids import Grid
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.network import TextNetwork
from textdiffusion.parallel.distributed import ALONE, Group
from textdiffusion.process import Process
from textdiffusion.sampling.constraints import Hold, hold_gaps, refusal
from textdiffusion.sampling.editing import Edit, mend
from textdiffusion.sampling.pacing import levels_of
from textdiffusion.sampling.recommendation import recommend
from textdiffusion.sampling.reverse import sample
from textdiffusion.sampling.steering import Reward, steer_by
from textdiffusion.settings import LONGEST, Precision, check_label, check_replay, check_writing
from textdiffusion.text.patterns import Pattern, read_words
from textdiffusion.text.template import Template, encode, gaps, prompt
from textdiffusion.text.tokenizer import Tokenizer

BATCH = 32  # texts denoised together
GAP_PARTICLES = 16  # of a text whose gaps are filled from left to right
FIXED_BATCH = 8  # the same, where shapes must not depend on how many texts are asked for


class Model:
    """A run, loaded. Made by `load` or `train`.

    ``process`` computes likelihoods, in float32; ``writer`` samples, in the precision asked for. ``used`` says what
    sampler and grid "auto" came to in the texts written last.
    """

    def __init__(
        self,
        process: Process,
        tokenizer: Tokenizer,
        config: RunConfig,
        device: str = "cpu",
        precision: Precision = "auto",
        group: Group = ALONE,
    ):
        self.process, self.tokenizer, self.config, self.device = process, tokenizer, config, device
        if precision not in get_args(Precision):
            raise UserError(f"--precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
        self.precision, self.group = precision, group
        self._automata: dict[Pattern, Automaton] = {}
        self.used = ("", "")  # sampler and grid of the texts written last
        tune_allocator()

    @cached_property
    def writer(self) -> Process:
        """The process that samples: with weights in bfloat16 where that is faster, or asked for."""
        precision = self.precision
        if precision == "auto":
            precision = fastest_precision(torch.device(self.device))
        network = self.process.network
        if precision == "fp32" or not isinstance(network, TextNetwork):
            return self.process
        return self.process.over(copy.deepcopy(network).hold(torch.bfloat16))

    def grid(self, name: str | None = None) -> Grid:
        """The grid of that name; None or "auto" is the optimal one if the run holds it.

        Raises:
            UserError: no such grid, or "optimal" where what it takes has not been measured.
        """
        if name in (None, "auto"):
            return self.process.grid
        if name != "optimal":
            return Grid(str(name))
        if self.process.grid.name == "optimal":
            return self.process.grid
        if not levels_of(self.process, self.window):
            raise UserError(f"the {self.config.family} family makes one call a token, on no grid; leave out --grid")
        raise UserError(
            "--grid optimal takes what tokens cost at each noise level, which this run does not hold; measure it with "
            "`textdiffusion eval RUN --keep-grid`"
        )

    def recommended(self, calls: int, free: int, held: bool = False) -> tuple[str, str]:
        """The names of the sampler and grid that "auto" means for ``calls`` calls and so many tokens to write;
        ``held``: to a pattern, which not every sampler can be."""
        able = [name for name, step in self.process.steps.items() if not held or isinstance(step, HasDraft)]
        return recommend(self.config.family, calls / max(free, 1), able or list(self.process.steps))  # refused later

    @property
    def window(self) -> int:
        """Longest text seen in training, in tokens."""
        return int(self.config.network["window"])

    @property
    def bounded(self) -> bool:
        """No text longer than the training window."""
        return self.process.bounded and not getattr(self.process.network, "endless", False)

    def _check_length(self, length: int) -> None:
        check_writing(length=length)
        if self.bounded and length > self.window:
            free = [n for n in names() if not family(n).bounded]
            raise UserError(
                f"this {self.config.family} run was trained on {self.window} tokens and cannot write {length}; "
                f"ask for fewer, train with --length {length}, or use a family without that bound: {', '.join(free)}"
            )

    def _template(self, length: int | None, begin: str | None, infill: str | None) -> Template | None:
        if infill is not None:
            return gaps(infill, self.tokenizer)
        if begin:
            return prompt(begin, self.window if length is None else length, self.tokenizer)
        return None

    def _hold(self, pattern: Pattern, length: int, template: Template | None, particles: int) -> Hold | None:
        if pattern == Pattern():
            return None
        if pattern not in self._automata:
            self._automata = {pattern: pattern.automaton(self.tokenizer)}
        automaton = self._automata[pattern]
        if template is None:
            template = Template(torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.bool))
        longest = self.window if self.bounded else max(2 * length, 256)
        if reason := refusal(automaton, pattern.flags, template.tokens, template.given, longest):
            raise UserError(reason)
        return Hold(automaton, particles)

    def stream(
        self,
        n: int = 1,
        length: int | None = None,
        calls: int | None = None,
        *,
        sampler: str | None = None,
        grid: str | None = None,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        prompt: str | None = None,
        infill: str | None = None,
        stop: bool = False,
        regex: str | None = None,
        must_contain: str | Sequence[str] = (),
        words: str | Path | Iterable[str] | None = None,
        acrostic: str | None = None,
        particles: int | None = None,
        label: str | None = None,
        guidance: float = 0.0,
        ramp: float = 0.0,
        reward: Reward | None = None,
        edit: str | None = None,
        strength: float = 0.4,
        first_row: int = 0,
    ) -> Iterator[TextFrame]:
        """Denoise n texts together, frame by frame.

        Args:
            n: texts.
            length: tokens; the training window unless given. A template has its own length.
            calls: network calls a text; as many as tokens unless given, the best that masked ones can do.
            sampler: one of ``model.process.steps``, or None (or "auto") for the one that was measured to be the best at
                about so many calls (recommendation.py).
            grid: where the calls stand, one of grids.GRIDS; None (or "auto") for "optimal" if the run holds what that
                takes, and "time" if not.
            temperature, top_p, top_k: sharpen or cut the law of each token.
            seed: the same seed gives the same draws, whatever n.
            prompt: a given beginning. infill: a text in which each underscore is a free token.
            stop: end a text where a document ends, and write nothing behind it; for families from left to right.
            regex: what the whole text matches. must_contain: text, or several, that occurs in it. words: the only words
                that it has, or a file of them. acrostic: letters with which its lines begin. All at once, if several.
            particles: runs from which each such text is drawn by weight; with many, texts have the model's law given
                the pattern, with one, as by default, they only match it (constraints.py). Families from left to right
                fill gaps that way too, by default with GAP_PARTICLES, for they see what follows a gap only so.
            label: of the texts, one of those the run was trained with. guidance: how much more of it than the model has
                learnt, at two network calls for one; ramp: the share of the run over which that grows (guidance.py).
            reward: texts to how much oftener they are wanted than the model writes them, in nats (steering.py); it may
                be handed beginnings of texts. Goes with particles, and with a pattern if there is one.
            edit: a text to rewrite, in the place of noise; strength: how much of it is made noise, from 0, which
                leaves it as it is, to 1, which leaves nothing (editing.py).
            first_row: number of the first text, from which its draws follow.
        Raises:
            UserError: a value out of range, or something that the family cannot do.
        """
        check_writing(n, None, calls, temperature, top_p, prompt, infill, top_k, edit)
        check_label(label, self.config.labels, guidance, ramp)
        if particles is not None and not 1 <= particles <= LONGEST:
            raise UserError(f"--particles must be from 1 to {LONGEST:,}, not {particles}")
        if stop and self.process.infills:
            able = [name for name in names() if not family(name).infills]
            raise UserError(
                f"the {self.config.family} family writes all of a text at once and cannot stop at its end; leave out "
                f"--stop, or use a run of: {', '.join(able)}"
            )
        whole = template = self._template(length, prompt, infill)
        hold: Hold | None
        old = None if edit is None else encode(edit, self.tokenizer)
        if old is not None and length is not None and length != len(old):
            raise UserError(f"a text that is edited keeps its length, here {len(old)} tokens; leave out --length")
        if old is not None:
            length = len(old)
        elif template is not None:
            length = len(template)
        elif length is None:
            length = self.window
        self._check_length(length)
        pattern = Pattern.of(regex, must_contain, words, acrostic)
        particles = particles or self.particles_for(template)
        if template is not None and not self.process.infills and template.gapped:
            if pattern != Pattern():
                raise UserError(
                    f"the {self.config.family} family fills gaps by being held to what is around them, and cannot be "
                    "held to a pattern as well; leave one of them out"
                )
            template, hold = hold_gaps(template, self.process.vocabulary, particles)
        else:
            hold = self._hold(pattern, length, template, particles)
        steer = None if reward is None else steer_by(reward, self.tokenizer.decode, particles)
        if particles != 1 and hold is None and steer is None:
            what = "a pattern (--regex, --must-contain, --words, --acrostic), a reward, or gaps from left to right"
            raise UserError(f"--particles goes with {what} that something stands behind")
        if (hold is not None or steer is not None) and stop:
            raise UserError("patterns, gaps and rewards are of whole texts of a given length; leave out --stop")
        noise = Noise(seed, np.arange(first_row, first_row + n), n, device=self.device)
        tokens = given = None
        known = torch.zeros(n, length, dtype=torch.bool) if whole is None else whole.given.expand(n, -1)
        if template is not None:
            tokens = template.tokens.to(self.device).expand(n, -1)
            given = template.given.to(self.device).expand(n, -1)
        free = length if template is None else int((~template.given).sum())
        condition = None if label is None else torch.full((n,), self.config.labels.index(label), device=self.device)
        twice = 2 if condition is not None and guidance != 0 else 1
        calls = calls or twice * max(free, 1)
        if sampler is None or sampler == "auto":
            sampler, best = self.recommended(max(1, calls // twice), free, held=hold is not None)
            grid = best if grid in (None, "auto") else grid
        chosen = self.grid(grid)
        self.used = (sampler, chosen.name)
        for frame in sample(
            self.writer.on(chosen), noise, length, calls, sampler=sampler, tokens=tokens, given=given,
            temperature=temperature, top_p=top_p, top_k=top_k, hold=hold, condition=condition,
            guidance=Guidance(guidance, ramp), steer=steer, until=self.tokenizer.end_of_text if stop else None,
            edit=None if old is None else Edit(old.to(self.device).expand(n, -1), strength),
        ):  # fmt: skip
            if whole is not None and whole is not template:
                # What is given behind gaps is seen from the start, though written later.
                tokens = frame.tokens
                ahead = known.to(tokens.device) & (tokens < 0)
                frame = replace(frame, tokens=torch.where(ahead, whole.tokens.to(tokens.device), tokens))
            yield TextFrame(frame, known, self.tokenizer, stop, revises(self.process))

    def sample(self, n: int = 4, length: int | None = None, calls: int | None = None, **how: Any) -> list[str]:
        """Write n texts; arguments as in `stream`."""
        return self.sample_counted(n, length, calls, **how)[0]

    def sample_counted(
        self,
        n: int = 4,
        length: int | None = None,
        calls: int | None = None,
        *,
        reproducible: bool = False,
        **how: Any,
    ) -> tuple[list[str], list[int]]:
        """The same, with the network calls that each text took.

        Args:
            reproducible: text number i is the same, bit for bit, for any n on the same machine: in float32, and in
                batches of exactly eight, of which what is not asked for is thrown away. Else only the draws are the
                same, and a draw that falls on the edge between two tokens may go either way.
        """
        check_writing(n)
        if reproducible and self.precision != "fp32":
            exact = Model(self.process, self.tokenizer, self.config, self.device, "fp32", self.group)
            made_exact = exact.sample_counted(n, length, calls, reproducible=True, **how)
            self.used = exact.used
            return made_exact
        if how.get("words") is not None:
            how["words"] = read_words(how["words"])  # once, for all batches
        texts: list[str] = []
        made: list[int] = []
        size = self._together(length, how, FIXED_BATCH if reproducible else BATCH)
        if not reproducible:
            size = min(size, self.group.most(n))
        for number, first in enumerate(range(0, n, size)):
            if number % self.group.size != self.group.rank:
                continue  # another process writes those
            part = size if reproducible else min(size, n - first)
            frames = self.stream(part, length, calls, **how, first_row=first)
            last = written(frames, first / n, min(1.0, (first + part) / n))
            texts += last.texts
            made += last.frame.calls.tolist()
        if self.group.size > 1:
            rows = self.group.in_turn(list(zip(texts, made)), size, n)
            texts, made = [text for text, _ in rows], [calls for _, calls in rows]
        return texts[:n], made[:n]

    def _together(self, length: int | None, how: dict[str, Any], most: int) -> int:
        """Texts to denoise together, at most ``most``, for the memory that they take."""
        # Families that draw all positions anew hold several numbers for every symbol at each.
        width = self.tokenizer.vocabulary * (length or self.window)
        size = min(most, max(1, 2**24 // width))
        template = None if how.get("infill") is None else gaps(how["infill"], self.tokenizer)
        return max(1, size // max(how.get("particles") or self.particles_for(template), 1))

    def particles_for(self, template: Template | None) -> int:
        """Particles of each text, unless it is said: several where a family from left to right fills gaps."""
        return GAP_PARTICLES if template is not None and template.gapped and not self.process.infills else 1

    def best(self, k: int, n: int = 8, draws: int = 64, **how: Any) -> list[tuple[str, Figure]]:
        """Of n texts, written as in `stream`, the k that the model finds likeliest, with their bits a character: by
        their likelihood or its bound (ranking.py), given the label if there is one.

        Raises:
            UserError: fewer than k texts.
        """
        check_writing(n)
        if not 1 <= k <= n:
            raise UserError(f"--best must be from 1 to {n}, the number of texts (-n), not {k}")
        if how.get("words") is not None:
            how["words"] = read_words(how["words"])
        size = self._together(how.get("length"), how, BATCH)
        cuts = itertools.pairwise([*range(0, n, size), n])
        parts = [written(self.stream(b - a, **how, first_row=a), a / n, b / n) for a, b in cuts]
        texts, tokens = [text for part in parts for text in part.texts], torch.cat([p.frame.tokens for p in parts])
        label = None if (name := how.get("label")) is None else self.config.labels.index(name)
        seed, tokenizer = how.get("seed", 0), self.tokenizer
        order = rank(self.process, tokens, tokenizer.characters, self.window, label=label, draws=draws, seed=seed)
        return [(texts[number], figure) for number, figure in order[:k]]

    def edit(self, text: str, strength: float = 0.4, n: int = 1, calls: int | None = None, **how: Any) -> list[str]:
        """Rewrite a text n times: a ``strength`` of it is made noise, and written anew."""
        return self.sample(n, None, calls, edit=text, strength=strength, **how)

    def infill(self, template: str, n: int = 1, calls: int | None = None, **how: Any) -> list[str]:
        """Fill the gaps of a template, n times; each underscore is one free token, and \\_ a literal one."""
        return self.sample(n, None, calls, infill=template, **how)

    def proofread(self, text: str, strength: float = 0.05, calls: int = 8) -> str:
        """The text, of at most a window, mended where it looks wrong without being told where (editing.mend): the share
        of wrong tokens to expect, and network calls at most.

        Raises:
            UserError: a family whose noise only hides tokens, an impossible strength, or a text that is too long.
        """
        ids = encode(text, self.tokenizer).numpy()
        return self.tokenizer.decode(self.proofread_tokens(ids, strength, calls).tolist())

    def proofread_tokens(self, ids: np.ndarray, strength: float = 0.05, calls: int = 8) -> np.ndarray:
        """The same for tokens, int64 [L]."""
        x = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(self.device)
        return mend(self.writer, x, strength, calls, self.window).cpu().numpy()

    def watch(
        self, n: int = 1, length: int | None = None, calls: int | None = None, *, seconds: float = 4.0,
        save_replay: str | Path | None = None, **how: Any,
    ) -> list[str]:  # fmt: skip
        """Show the denoising live, in a terminal or a notebook, or as plain lines over a pipe; returns the texts.

        Args:
            seconds: what it is slowed down to, about. save_replay: an .html file that plays it again, offline.
        Raises:
            UserError: as in `stream`, or a file that cannot hold a replay.
        """
        check_replay(save_replay, n)
        panel = Panel(self.config.family)
        texts = watch(self.stream(n, length, calls, **how), seconds=seconds, panel=panel)
        if save_replay is not None:
            write_replay(self._recording(panel, how), Path(save_replay))
        return texts

    def record(self, n: int = 1, length: int | None = None, calls: int | None = None, **how: Any) -> Recording:
        """Write n texts and keep all that happened; arguments as in `stream`."""
        panel = Panel(self.config.family)
        for _ in recorded(self.stream(n, length, calls, **how), panel):
            pass
        return self._recording(panel, how)

    def _recording(self, panel: Panel, how: dict[str, Any]) -> Recording:
        panel.title += f" · {self.used[0]}"
        return Recording([panel], {key: str(value) for key, value in how.items() if value not in (None, ())})

    def score(self, text: str, draws: int = 64, seed: int = 0) -> float:
        """Bits per character of a text: exact or an upper bound in expectation, as the family's likelihood is.

        The text is cut into windows as in evaluation.

        Raises:
            UserError: no text, or symbols that the tokenizer cannot express.
        """
        ids = np.asarray(self.tokenizer.encode(text), dtype=np.int64)
        if not len(ids):
            raise UserError("there is no text to score")
        if unseen := self.tokenizer.unseen(text):
            raise UserError(f"this run's tokenizer has never seen {unseen!r}: it has no likelihood for such a text")
        windows = [ids[i : i + self.window] for i in range(0, len(ids), self.window)]
        report = evaluate(self.process, windows, self.tokenizer.characters, draws=draws, seed=seed, device=self.device)
        return report.figure.bits_per_char
