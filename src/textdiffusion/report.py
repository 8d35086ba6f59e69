"""What `textdiffusion eval` says of a run: likelihood of held-out text, and what its samples are like."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from textdiffusion.errors import UserError
from textdiffusion.evaluation.dead_codes import dead_codes
from textdiffusion.evaluation.measures import Figure, Report, TextStatistics, evaluate, text_statistics
from textdiffusion.loading import load
from textdiffusion.model import Model
from textdiffusion.run import Run
from textdiffusion.sampling.pacing import measure_costs
from textdiffusion.text.data import Corpus, tokenize, whole_text, word_set
from textdiffusion.text.shards import is_prepared, training_text
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.windows import evaluation_labels, evaluation_windows
from textdiffusion.training.preparation import prepare

# Of a short text so many noisy copies are read that figures for different numbers of calls can be told apart.
MOST_EXAMPLES = 8192  # noisy windows that the optimal grid is measured on
EXAMPLES, MOST_DRAWS = 32, 64  # examples for each number of hidden tokens; copies of a window


@dataclass(frozen=True)
class RunReport:
    """Figures of a run on a text."""

    family: str
    text: str
    likelihood: Report
    unlabelled: Figure | None  # of a labelled run: what the text costs without its labels
    unseen: int  # held-out tokens that the tokenizer cannot express
    pieces: bool  # tokens are of several characters: the likelihood is of the text cut into them in the usual way
    samples: TextStatistics | None
    calls: int  # network calls a sample
    seconds: float  # that writing all samples took
    grid: str = "time"  # of the figures at so many calls
    used: tuple[str, str] = ("", "")  # sampler and grid of the samples
    dead_codes: float | None = None  # share of the last call's law on codes of no token, where that can be
    kept: bool = False  # the optimal grid has been measured, and is now in the run

    def as_dict(self) -> dict[str, Any]:
        body = {"family": self.family, "text": self.text} | self.likelihood.as_dict() | {"unseen": self.unseen}
        body |= {"grid": self.grid, "pieces": self.pieces}
        if self.dead_codes is not None:
            body |= {"dead_codes": self.dead_codes}
        if self.unlabelled is not None:
            body |= {"unlabelled": vars(self.unlabelled)}
        if self.samples is None:
            return body | {"samples": None}
        return body | {
            "samples": asdict(self.samples)
            | {"sampler": self.used[0], "grid": self.used[1], "calls": self.calls, "seconds": round(self.seconds, 2)}
        }

    def lines(self) -> list[str]:
        """For people."""
        like, head = self.likelihood, self.likelihood.figure
        kind = {
            "exact": "exact, at one network call a token",
            "upper": "upper bound, in expectation over the noise",
            "none": "no likelihood",
        }
        out = [
            f"text            {self.text}: {like.characters:,} characters in {like.windows:,} windows",
            f"likelihood      {head}   ({kind[head.kind]})",
        ]
        if self.unlabelled is not None:
            out.append(f"  that is given the label of each window; without it  {self.unlabelled}")
        for figure in like.by_calls:
            how = f"{'exact; ' if figure.kind == 'exact' else ''}sampler: {figure.sampler}, grid: {self.grid}"
            out.append(f"  at {figure.calls:>4} calls  {figure}   ({how})")
        if self.dead_codes is not None:
            out.append(
                f"dead codes      {self.dead_codes:.2%} of the last call's law is on codes that stand for no token"
            )
        if self.kept:
            out.append("grid            measured, and kept in the run: it is on the optimal grid from now on")
        if head.kind == "none":
            out.append(
                "  no likelihood: the tokenizer does not keep all of the text, or the family claims none as it is set"
            )
        elif self.unseen:
            out.append(f"  {self.unseen:,} symbols that training never saw are charged 20 bits each, to be spelled out")
        if self.pieces and any(figure.kind == "exact" for figure in (head, *like.by_calls)):
            out.append("  exact for these tokens; for the text, which can be cut in other ways, an upper bound")
        s = self.samples
        if s is not None:
            out += [
                f"samples         {s.words:,} words, {self.calls} calls a text (sampler: {self.used[0]}, grid: "
                f"{self.used[1]}); written in {self.seconds:.1f} s",
                f"  {s.valid_words:.1%} of the words occur in the training text",
                f"  entropy {s.entropy:.2f} bits a word; distinct "
                + ", ".join(f"{n}-grams {v:.2f}" for n, v in s.distinct.items())
                + "; repeated within a text "
                + ", ".join(f"{n}-grams {v:.2f}" for n, v in s.repetition.items()),
                f"  {s.copied:.1%} of the runs of {s.copy_length} characters are copied from the training text",
            ]
        return out


def report(
    model: Model,
    *,
    data: str | None,
    split: str,
    calls: Sequence[int],
    sampler: str | None,
    tokens: int | None,
    draws: int | None,
    samples: int,
    seed: int,
    grid: str | None = None,
    keep: Path | None = None,
    **how: Any,
) -> RunReport:
    """Evaluate a model.

    Args:
        data: another text, all of which is read; None takes the held-out part ``split`` of the run's own.
        split: "validation" or "test".
        calls: budgets to measure the bound for, of ``sampler``. tokens: about how many to read, None for all.
        draws: noisy copies of a window; None: 2, and more of a short text.
        samples: texts to write for the statistics, 0 for none.
        grid: of those budgets and of the texts. keep: the run directory in which to keep the optimal grid, measured on
            the windows of this text.
        how: they are written, as in ``Model.stream``: length, temperature, top_p.
    Raises:
        UserError: unusable text, or not the text that the run was trained on.
    """
    known = bool(model.config.data.source)
    if data is None and not known:
        raise UserError("this model was made elsewhere, from a text that is not known here; name one with --data")
    own, _, _ = prepare(model.config, model.tokenizer) if data is None or (samples and known) else (None, None, None)
    prepared = is_prepared(model.config.data.source)
    if prepared and own is not None:
        samples = 0  # the words of the training text are not there to compare with
    if data is None and prepared:
        assert own is not None
        if split == "test":
            raise UserError("prepared corpora have no test part; leave out --split test")
        if keep is not None:
            raise UserError("--keep-grid is not measured on prepared corpora; train on them leaves a grid by itself")
        return _of_prepared(model, calls, sampler, tokens, draws, seed, grid)
    if data is not None:
        corpus = whole_text(replace(model.config.data, source=data))
        split, name = "validation", corpus.name
    else:
        assert own is not None
        corpus, name = own, f"{split} part of {own.name}"
    if split == "test" and not corpus.test:
        raise UserError(f"{name}: this text has no test part; text8 and enwik8 have one")
    held_out = tokenize(corpus, model.tokenizer)[split]
    windows = evaluation_windows(held_out, model.window, limit=tokens)
    if draws is None:
        draws = min(max(2, EXAMPLES * model.window // max(len(windows), 1)), MOST_DRAWS)
    measured: tuple[float, ...] = ()
    if keep is not None:
        examples = min(16 * model.window * max(1, len(windows)), MOST_EXAMPLES)
        measured = measure_costs(model.process, windows, examples=examples, device=model.device)
        if not measured:
            raise UserError(
                "--keep-grid has nothing to measure: this family makes one call a token, or the text is short"
            )
        if model.group.main:
            Run.open(keep).save_grid(measured, examples)
        model.group.together(None)  # it is there for all
        model = load(keep, model.device, model.precision, model.group)
    labels = evaluation_labels(held_out, model.window, limit=tokens)
    process = model.process.on(model.grid(grid))
    likelihood = evaluate(
        process, windows, model.tokenizer.characters, model.tokenizer.spelling, calls=calls, sampler=sampler,
        labels=labels,
        draws=draws, seed=seed, device=model.device, group=model.group,
    )  # fmt: skip
    unlabelled = None
    if labels is not None:
        unlabelled = evaluate(
            process, windows, model.tokenizer.characters, model.tokenizer.spelling, draws=draws, seed=seed,
            device=model.device, what="held-out text without its labels",
        ).figure  # fmt: skip
    unknown = model.tokenizer.unknown
    unseen = 0 if unknown is None else int(sum((w == unknown).sum() for w in windows))
    if lossy(model.tokenizer, corpus):
        likelihood = without_kind(likelihood)
    statistics, made, spent, used, begin = None, 0, 0.0, ("", ""), time.perf_counter()
    if samples and own is not None:
        texts, counted = model.sample_counted(samples, seed=seed, grid=grid, sampler=sampler, **how)
        made, used = max(counted), model.used
        spent = time.perf_counter() - begin
        statistics = text_statistics(texts, word_set(own), own.train)
    pieces = model.tokenizer.kind not in ("char", "byte")
    return RunReport(
        model.config.family, name, likelihood, unlabelled, unseen, pieces, statistics, made, spent,
        model.grid(grid).name, used, dead_codes(process, windows, made or model.window, seed=seed, device=model.device),
        bool(measured),
    )  # fmt: skip


def _of_prepared(
    model: Model,
    calls: Sequence[int],
    sampler: str | None,
    tokens: int | None,
    draws: int | None,
    seed: int,
    grid: str | None,
) -> RunReport:
    """The likelihood of the held-out part of prepared corpora."""
    source = model.config.data.source
    windows = training_text(source, model.window, 0, tokens).held_out
    likelihood = evaluate(
        model.process.on(model.grid(grid)), windows, model.tokenizer.characters, model.tokenizer.spelling, calls=calls,
        sampler=sampler, draws=draws or 2, seed=seed, device=model.device, group=model.group,
    )  # fmt: skip
    if model.tokenizer.kind.startswith("hf:"):
        likelihood = without_kind(likelihood)  # whether it kept all of the text is no longer known
    pieces = model.tokenizer.kind not in ("char", "byte")
    unknown = model.tokenizer.unknown
    unseen = 0 if unknown is None else int(sum((w == unknown).sum() for w in windows))
    return RunReport(
        model.config.family, f"validation part of {source}", likelihood, None, unseen, pieces, None, 0, 0.0,
        model.grid(grid).name,
    )  # fmt: skip


def lossy(tokenizer: Tokenizer, corpus: Corpus) -> bool:
    """Whether a Hugging Face tokenizer changes text (case, spaces, unknown words), as ours do not."""
    if not tokenizer.kind.startswith("hf:"):
        return False
    return any(tokenizer.decode(tokenizer.encode(text[:20_000])) != text[:20_000] for text in corpus.validation[:50])


def without_kind(report: Report) -> Report:
    """The same figures, no longer called a likelihood: the tokens do not say all of the text."""
    return replace(
        report,
        figure=replace(report.figure, kind="none"),
        by_calls=[replace(figure, kind="none") for figure in report.by_calls],
    )
