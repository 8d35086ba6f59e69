"""Measure every sampler at several numbers of network calls: quality of what it writes, seconds, and bits/char.

    python benchmarks/samplers.py RUN ... --judge RUN --texts runs/samplers.jsonl     (goes on where it was stopped)
    python benchmarks/samplers.py RUN ... --judge RUN --texts FILE --minutes 25 --parts 4
    python benchmarks/samplers.py --page    (measures nothing: writes page, plot and table)

All runs must be of the same text, and the judge a left-to-right run of it. Texts are written in parts of 32, each by
its own seed: first one part by every sampler, then a second one, and so on, so that it can be stopped at any time. What
follows from them goes to benchmarks/samplers.json, from which docs/samplers.md, docs/samplers.svg and the table that
`--sampler auto` reads are made (samplers_page.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samplers_page import write_page

import textdiffusion as td
from textdiffusion.errors import UserError
from textdiffusion.evaluation.measures import evaluate, whole_words
from textdiffusion.mathematics.grids import GRIDS
from textdiffusion.text.data import tokenize, word_set
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.training.preparation import prepare

HERE = Path(__file__).parent
PART = 32  # texts
CALLS = (8, 16, 32, 64)
BOUND_TOKENS = 2048  # that likelihoods are measured on


def cases(model: td.Model, calls: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """(sampler, grid, calls): every sampler on the grid that is its default, and the first one and `spread`, whose
    order is not the random one that the optimal grid is optimal for, on all grids."""
    first, *others = model.process.steps
    names = [first, *reversed(others)]  # those that were added last are of most interest
    for name in names:
        pace = model.process.steps[name].pace
        for budget in calls if pace != "each" else calls[-1:]:
            yield name, model.grid().name, budget
    for grid in GRIDS if model.grid().name == "optimal" else GRIDS[:-1]:
        for name in (name for name in (first, "spread") if name in names):
            if grid != model.grid().name and model.process.steps[name].pace != "each":
                for budget in calls:
                    yield name, grid, budget


def write_texts(runs: dict[str, td.Model], path: Path, parts: int, calls: Sequence[int], until: float) -> None:
    """Add what is missing to the file of texts, part by part, until the clock says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {tuple(r[k] for k in ("run", "sampler", "grid", "calls", "part")) for r in read(path)}
    for part, other_grids in itertools.product(range(parts), (False, True)):
        for run, model in runs.items():
            for sampler, grid, budget in cases(model, calls):
                if other_grids == (grid == model.grid().name):
                    continue
                if (run, sampler, grid, budget, part) in known:
                    continue
                if time.monotonic() > until:
                    return
                begin, cpu = time.perf_counter(), time.process_time()
                texts, made = model.sample_counted(PART, None, budget, sampler=sampler, grid=grid, seed=part)
                record = {
                    "run": run, "family": model.config.family, "length": model.window, "sampler": sampler, "grid": grid,
                    "calls": budget, "part": part, "made": max(made), "texts": texts,
                    "seconds": (time.perf_counter() - begin) / PART,
                    "processor_seconds": (time.process_time() - cpu) / PART,
                }  # fmt: skip
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{run} {sampler} {grid} {budget} part {part}: {record['seconds']:.2f} s a text", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Records of the file of texts; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def grams(texts: Sequence[str], n: int) -> Counter[str]:
    """Character n-grams."""
    return Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))


def entropy(counts: Counter[str]) -> float:
    """Bits."""
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def divergence(a: Counter[str], b: Counter[str]) -> float:
    """Jensen-Shannon, bits."""
    both = Counter({g: a[g] / a.total() / 2 + b[g] / b.total() / 2 for g in a.keys() | b.keys()})
    mixed = -sum(p * math.log2(p) for p in both.values())
    return mixed - (entropy(a) + entropy(b)) / 2


def quality(texts: Sequence[str], held_out: Sequence[str], words: set[str], judge: td.Model) -> dict[str, float]:
    """Of texts, beside as much held-out text: entropy and divergence are larger and smaller the more text there is."""
    by_text = [(sum(w in words for w in ws), len(ws)) for ws in map(whole_words, texts)]
    right, every = (sum(column) for column in zip(*by_text))
    share = right / max(every, 1)
    spread = math.sqrt(sum((r - share * n) ** 2 for r, n in by_text)) / max(every, 1)
    # An end of text is one token, and its sign several characters.
    windows = [np.asarray(judge.tokenizer.encode(text))[: judge.window] for text in texts]
    with torch.inference_mode():
        judged = evaluate(judge.process, windows, judge.tokenizer.characters, judge.tokenizer.spelling).figure
    return {
        "valid_words": share, "valid_words_error": spread, "judge": judged.bits_per_char,
        "judge_error": judged.standard_error or math.nan, "entropy": entropy(grams(texts, 3)),
        "real_entropy": entropy(grams(held_out, 3)),
        "divergence": divergence(grams(texts, 3), grams(held_out, 3)),
    }  # fmt: skip


def likelihoods(model: td.Model, windows: Sequence[np.ndarray], wanted: set[tuple[str, str, int]]) -> dict[str, Any]:
    """Bits/char of the samplers that have a bound or an exact likelihood, by "sampler grid calls"."""
    out: dict[str, Any] = {}
    for sampler, grid, budget in sorted(wanted):
        try:
            found = evaluate(
                model.process.on(model.grid(grid)), windows, model.tokenizer.characters, model.tokenizer.spelling,
                calls=[budget], sampler=sampler, draws=4, device=model.device,
            )  # fmt: skip
        except UserError:
            continue  # none is known
        figure = found.by_calls[0] if found.by_calls else found.figure
        if figure.kind != "none" and figure.sampler.startswith(sampler):
            out[f"{sampler} {grid} {budget}"] = [figure.bits_per_char, figure.standard_error, figure.kind]
    return out


def summarise(
    runs: dict[str, td.Model], path: Path, judge: td.Model, bounds: bool, old: dict[str, Any]
) -> dict[str, Any]:
    """All that the page shows; families that none of the runs is of stay as they were measured before."""
    first = next(iter(runs.values()))
    corpus, _, _ = prepare(first.config, first.tokenizer)
    words, text = word_set(corpus), "".join(corpus.validation)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in read(path):
        key = tuple(record[k] for k in ("run", "family", "length", "sampler", "grid", "calls"))
        groups.setdefault(key, []).append(record)

    def cut(length: int, n: int, half: int) -> list[str]:
        """Windows from all over the text; those of the other half share no character with them."""
        step = len(text) // n
        assert step // 2 >= length, "too short a text to be compared with itself"
        return [text[i * step + half * (step // 2) :][:length] for i in range(n)]

    new = {model.config.family for model in runs.values()}
    rows = [r for r in old.get("rows", ()) if r["family"] not in new]
    kept = {r["run"] for r in rows}
    likes = {run: found for run, found in old.get("likelihoods", {}).items() if run in kept | runs.keys()}
    real = {run: found for run, found in old.get("held_out", {}).items() if run in kept}
    steps = {run: n for run, n in old.get("steps", {}).items() if run in kept}
    steps |= {run: model.config.training.steps for run, model in runs.items()}
    for run, model in runs.items():
        n = model.window
        real[run] = quality(cut(n, PART, 1), cut(n, PART, 0), words, judge) | {"texts": PART}
    for key, records in groups.items():
        texts = [text for record in records for text in record["texts"]]
        row = dict(zip(("run", "family", "length", "sampler", "grid", "calls"), key))
        row |= {"texts": len(texts), "made": max(r["made"] for r in records)}
        row |= {"seconds": float(np.median([r["processor_seconds"] for r in records]))}
        rows.append(row | quality(texts, cut(key[2], len(texts), 0), words, judge))
    if bounds:
        for run, model in runs.items():
            windows = evaluation_windows(
                tokenize(corpus, model.tokenizer)["validation"], model.window, limit=BOUND_TOKENS
            )
            wanted = {(r["sampler"], r["grid"], r["calls"]) for r in rows if r["run"] == run}
            likes[run] = likelihoods(model, windows, wanted)
    name = Path(corpus.name).name
    return {
        "text": name,
        "judge": judge.config.family,
        "held_out": real,
        "steps": steps,
        "rows": rows,
        "likelihoods": likes,
    }


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--texts", type=Path, default=Path("runs/samplers.jsonl"))
    parser.add_argument("--calls", default=",".join(map(str, CALLS)))
    parser.add_argument("--parts", type=int, default=8, help=f"of {PART} texts each")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--summary", type=Path, default=HERE / "samplers.json")
    parser.add_argument("--no-bounds", action="store_true")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if not args.page:
        runs = {path.name: td.load(path, "cpu") for path in args.runs}
        calls = [int(part) for part in args.calls.split(",")]
        write_texts(runs, args.texts, args.parts, calls, time.monotonic() + 60 * args.minutes)
        old = json.loads(args.summary.read_text(encoding="utf-8")) if args.summary.exists() else {}
        found = summarise(runs, args.texts, td.load(args.judge, "cpu"), not args.no_bounds, old)
        args.summary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.page or args.summary == HERE / "samplers.json":
        write_page(args.summary, HERE.parent)


if __name__ == "__main__":
    main()
