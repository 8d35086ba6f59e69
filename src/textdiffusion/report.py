"""What `textdiffusion eval` says of a run: likelihood of held-out text, and what its samples are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from textdiffusion.data import DataConfig, evaluation_windows, load_corpus, tokenize, word_set
from textdiffusion.errors import UserError
from textdiffusion.evaluation import Report, TextStatistics, evaluate, text_statistics
from textdiffusion.model import Model


@dataclass(frozen=True)
class RunReport:
    """Figures of a run on a text."""

    run: str
    text: str
    likelihood: Report
    unseen: int  # held-out tokens that the tokenizer cannot express
    samples: TextStatistics | None
    calls: int  # network calls a sample

    def as_dict(self) -> dict[str, Any]:
        body = {"run": self.run, "text": self.text} | self.likelihood.as_dict() | {"unseen": self.unseen}
        return body | {"samples": None if self.samples is None else asdict(self.samples) | {"calls": self.calls}}

    def lines(self) -> list[str]:
        """For people."""
        like, head = self.likelihood, self.likelihood.figure
        kind = {"exact": "exact", "upper": "upper bound, in expectation over the noise", "none": "no likelihood"}
        out = [
            f"text            {self.text}: {like.characters:,} characters in {like.windows:,} windows",
            f"likelihood      {head}   ({kind[head.kind]})",
        ]
        for figure in like.by_calls:
            out.append(f"  at {figure.calls:>4} calls  {figure}   (sampler: {figure.sampler})")
        if self.unseen:
            out.append(
                f"  {self.unseen:,} held-out symbols are unknown to the tokenizer; they are scored as one symbol"
            )
        s = self.samples
        if s is not None:
            out += [
                f"samples         {s.words:,} words, {self.calls} calls a text",
                f"  {s.valid_words:.1%} of the words occur in the training text",
                f"  entropy {s.entropy:.2f} bits a word; distinct "
                + ", ".join(f"{n}-grams {v:.2f}" for n, v in s.distinct.items())
                + "; repeated within a text "
                + ", ".join(f"{n}-grams {v:.2f}" for n, v in s.repetition.items()),
                f"  {s.copied:.1%} of the runs of {s.copy_length} characters are copied from the training text",
            ]
        return out


def report(
    model: Model, *, data: str | None, calls: Sequence[int], tokens: int | None, draws: int, samples: int, seed: int
) -> RunReport:
    """Evaluate a model.

    Args:
        data: another text, all of which is read; None takes the held-out part of the run's own.
        calls: budgets to measure the bound for. tokens: about how many held-out tokens to read, None for all.
        draws: noisy copies of a window. samples: texts to write for the statistics, 0 for none.
    Raises:
        UserError: unusable text.
    """
    own = load_corpus(model.config.data)
    if data is None:
        corpus, name = own, f"held-out part of {own.name}"
    else:
        corpus = load_corpus(DataConfig(source=data, text_field=model.config.data.text_field))
        corpus.validation = corpus.train + corpus.validation + corpus.test
        name = corpus.name
    held_out = tokenize(corpus, model.tokenizer)["validation"]
    windows = evaluation_windows(held_out, model.window, limit=tokens)
    if not windows:
        raise UserError(f"{name} has no text to evaluate on")
    likelihood = evaluate(
        model.process, windows, model.tokenizer.characters, calls=calls, draws=draws, seed=seed, device=model.device
    )
    unknown = model.tokenizer.unknown
    unseen = 0 if unknown is None else int(sum((w == unknown).sum() for w in windows))
    statistics, made = None, 0
    if samples:
        texts, counted = model.sample_counted(samples, seed=seed)
        made = max(counted)
        statistics = text_statistics(texts, word_set(own), own.train)
    return RunReport(str(model.config.family), name, likelihood, unseen, statistics, made)
