"""A run that the page serves: its model, and what it can and cannot do, with the reasons."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from textdiffusion.catalogue import listing
from textdiffusion.config import run_to_use
from textdiffusion.errors import UserError
from textdiffusion.loading import load
from textdiffusion.model import Model
from textdiffusion.text.template import Template, gaps, prompt

MOST_TEXTS = 8
MOST_TOKENS = 8192  # of all texts that are written at once, particles and all
LONGEST_TEXT = 1024  # tokens, where the family itself has no bound
_GAP = re.compile(r"(?<!\\)_")


@dataclass(frozen=True)
class Loaded:
    """A run under the name that the page shows."""

    name: str
    path: Path
    model: Model

    @property
    def samplers(self) -> list[str]:
        """Names, the family's default first."""
        return list(self.model.process.steps)

    @property
    def longest(self) -> int:
        """Most tokens of a text on this page."""
        return self.model.window if self.model.bounded else max(self.model.window, LONGEST_TEXT)

    @property
    def takes_calls(self) -> bool:
        """Whether the number of network calls can be chosen."""
        free = torch.ones(4, dtype=torch.bool)
        plan = self.model.process.plan
        return len(plan(free, 1, self.samplers[0])) < len(plan(free, 4, self.samplers[0]))

    @property
    def stops(self) -> bool:
        """Whether a text can end where its document ends."""
        return not self.model.process.infills

    @property
    def no_proofreading(self) -> str:
        """Why it cannot mend a text without being told where; empty if it can."""
        if self.model.process.time_of(0.05) is not None:
            return ""
        return f"The noise of {self.name} only hides tokens, so it cannot tell wrong ones. Train with --family uniform."

    def describe(self) -> str:
        """One line: family, window, tokenizer."""
        config = self.model.config
        summary = next(row["summary"] for row in listing() if row["name"] == config.family)
        return f"**{config.family}**: {summary}. Window of {self.model.window} tokens; {config.tokenizer} tokenizer."

    def template(self, text: str, length: int) -> Template | None:
        """What a text in the page's box asks for: gaps if it has any, else a beginning; None for nothing at all.

        Raises:
            UserError: symbols that the tokenizer cannot express, or no room to write in.
        """
        if not text:
            return None
        if _GAP.search(text):
            return gaps(text, self.model.tokenizer)
        return prompt(text.replace("\\_", "_"), length, self.model.tokenizer)

    def asked(self, text: str) -> dict[str, str]:
        """The same, as arguments of `Model.stream`."""
        if not text:
            return {}
        return {"infill": text} if _GAP.search(text) else {"prompt": text.replace("\\_", "_")}

    def no_such_length(self, text: str, length: int) -> str:
        """Why this page does not write so many tokens; empty if it does, or if the text has a length of its own."""
        if _GAP.search(text) or 1 <= length <= self.longest:
            return ""
        return f"this page writes 1 to {self.longest:,} tokens with {self.name}, not {length:,}"

    def count(self, text: str, length: int) -> str:
        """A live count of what a text in the box asks for."""
        if reason := self.no_such_length(text, length):
            return reason
        try:
            template = self.template(text, length)
        except UserError as mistake:
            return str(mistake)
        if template is None:
            return f"Nothing given: {length} tokens to write."
        given = int(template.given.sum())
        own = " The template has its own length." if _GAP.search(text) else ""
        over = self.model.bounded and len(template) > self.model.window
        bound = f" Too long: this run knows texts of at most {self.model.window} tokens." if over else own
        return f"{given} token{'s' * (given != 1)} given, {len(template) - given} to write.{bound}"

    def examples(self) -> list[str]:
        """Templates to begin with, as far as the tokenizer has seen their symbols and the family can fill them."""
        tried = ["", "It was a ", "It was a ____ day", "The ______ of the ________ was ____ and the ______"]
        usable = []
        for text in tried:
            try:
                template = self.template(text, self.longest)
            except UserError:
                continue
            if template is None:
                usable.append(text)
                continue
            if len(template) <= self.longest:
                usable.append(text)
        return usable

    def card(self) -> str:
        """The run's model card, in Markdown."""
        try:
            text = (self.path / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return "This run has no card: it has not been trained to its end."
        return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)

    def metrics(self) -> list[dict[str, float]]:
        """Validations: step, minutes, bits_per_char; those that can be read."""
        found = []
        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        for line in lines:
            try:
                row = json.loads(line)
                found.append(
                    {
                        "step": float(row["step"]),
                        "minutes": float(row["seconds"]) / 60,
                        "bits_per_char": float(row["bits_per_char"]),
                    }
                )
            except (ValueError, TypeError, KeyError):
                continue  # the last line may be torn
        return found


def load_runs(paths: Sequence[Path], device: str) -> list[Loaded]:
    """Load the runs that a page is to serve; if none is named, the newest under runs/ or what comes with the package.

    Raises:
        UserError: there is no run, it is damaged, or it is named twice.
    """
    chosen = list(paths) or [run_to_use()]
    if twice := [path for path, times in Counter(p.resolve() for p in chosen).items() if times > 1]:
        raise UserError(f"{twice[0]} is named twice; name each run once")
    short = Counter(p.resolve().name for p in chosen)
    return [Loaded(p.resolve().name if short[p.resolve().name] == 1 else str(p), p, load(p, device)) for p in chosen]
