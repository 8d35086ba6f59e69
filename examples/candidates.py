"""What k weighted candidates a position bring: Sparse Distribution Diffusion beside masked diffusion and left to right.

    python examples/candidates.py OUT --data war_and_peace.txt --sub-words tiny_stories.txt

Parts, all of one seed (--only PART does some of them):

  sizes       sparse distribution, masked and autoregressive (with n-grams, which 4.2 million of its weights are for) at
              each of --depths and --steps: equal steps; the column of CPU seconds says what is equal minutes
  candidates  their number, none, what share of training sees the network's own, every slot a key; at the middle size
  passes      the same run, evaluated with more refining passes a call, and with candidates of the call before; how much
              more than with two, on the same windows
  noise       the middle size under other noise: swapped tokens, noisy embeddings, and beliefs in their place
  writing     the largest sparse run: temperature, top-p, orders, hiding again; beside held-out text, and masked
              diffusion and left to right at two of these settings
  sub-words   the same three families, and other k, where a vocabulary is larger; their texts in the part writing. Left
              to right without n-grams, and a row with them

Figures: bits a character and their standard error, of the limit of many calls and, where a curve gives them, of 8 and
64 network calls; CPU seconds of the command that trained; of samples, the share of words that occur in the text,
how often words and runs of two and four repeat within a text, distinct pairs of words, entropy of words in bits.
OUT/rows.jsonl has the rows, of which none is measured again, OUT/table.md the tables.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows, markdown, trained, verb

import textdiffusion as td
from textdiffusion.evaluation.measures import text_statistics
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Process
from textdiffusion.text.data import load_corpus, tokenize, word_set
from textdiffusion.text.windows import evaluation_windows

SPARSE, MASKED, LEFT = "sparse_distribution", "masked", "autoregressive"
CALLS = (8, 64)
PARTS = ("candidates", "passes", "noise", "sub-words", "sizes", "writing")
COLUMNS = [
    "symbols", "name", "family", "depth", "steps", "kind", "bits_per_char", "standard_error", "more", "more_error",
    "at_8", "at_64", "cpu_seconds", "valid_words", "repetition_1", "repetition_2", "repetition_4", "distinct_2",
    "entropy",
]  # fmt: skip
K = (1, 2, 4, 16)  # beside the default, 8
CANDIDATES = {
    "as it is": [],
    **{f"k = {k}": [f"process.candidates={k}"] for k in K},
    "no candidates": ["process.passes=1"],
    "own on every example": ["process.refined=1.0"],
    "own on a quarter": ["process.refined=0.25"],
    "every slot a key": ["process.attention=slots"],
}
NOISE = {
    "candidates": (SPARSE, []),
    "hidden": (MASKED, []),
    "swapped": ("uniform", []),
    "noisy embeddings": ("gaussian_embedding", ["process.input=reals"]),
    "beliefs": ("gaussian_embedding", []),
}
# Of left to right: else what it has would depend on text and steps. No counts, which no other family has.
NGRAMS, NO_NGRAMS = ({SPARSE: [], MASKED: [], LEFT: [f"network.ngrams={n}", "network.counts=0"]} for n in (5, 0))
WRITING: list[dict[str, Any]] = [
    {"sampler": "random"},
    *({"sampler": "random", "temperature": t} for t in (0.7, 0.85, 1.15)),
    *({"sampler": "random", "top_p": p} for p in (0.8, 0.9, 0.95)),
    *({"sampler": s} for s in ("confidence", "margin", "entropy", "spread", "first_hitting", "remask", "psi")),
    {"sampler": "carried"},
    {"sampler": "confidence", "temperature": 0.0},
]


def trained_row(run: Path, how: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a run, which is trained if it is not there."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    begun, fresh, note = cpu(), not (run / "config.json").exists(), run / "cpu_seconds"
    trained(run, *how)
    if fresh:
        note.write_text(f"{cpu() - begun:.1f}")
    words = ["eval", str(run), "--samples", str(options.samples), "--eval-tokens", str(options.eval_tokens)]
    if td.load(run).process.infills:
        words += ["--calls", ",".join(map(str, CALLS))]
    said = verb(*words)
    found = {
        "kind": said["kind"], "bits_per_char": said["bits_per_char"], "standard_error": said["standard_error"],
        "cpu_seconds": float(note.read_text()) if note.exists() else None, "entropy": said["samples"]["entropy"],
        "valid_words": said["samples"]["valid_words"], "repetition_1": said["samples"]["repetition"]["1"],
    }  # fmt: skip
    return found | {f"at_{f['calls']}": f["bits_per_char"] for f in said["by_calls"]}


def passes(run: Path, options: argparse.Namespace, number: int | None) -> dict[str, Any]:
    """The bound of a run with so many passes a call; None: candidates are those of the call before. And what it is more
    than with as many passes as were trained for, on the same windows, and but for carried ones with the same draws."""
    model = td.load(run)
    made, config = model.process, model.process.config
    windows = evaluation_windows(
        tokenize(load_corpus(model.config.data), model.tokenizer)["validation"], model.window, options.eval_tokens
    )
    x = torch.from_numpy(np.stack([w for w in windows if len(w) == model.window]).astype(np.int64))

    def bits(process: Process) -> torch.Tensor:
        """One draw of the bound of each window; a token is a character here."""
        rows = np.arange(len(x))
        parts = [rows[i : i + 64] for i in range(0, len(x), 64)]
        with torch.inference_mode():
            nats = [process.nll(x[part], Noise(1, part, len(x))).total.double() for part in parts]
        return torch.cat(nats) / math.log(2) / model.window

    other = replace(config, passes=number or config.passes)
    process = type(made)(made.network, other, made.vocabulary, start=made.start)
    found = bits(process if number is not None else process.by("carried"))
    more = found - bits(made)
    return {
        "kind": "upper", "bits_per_char": float(found.mean()), "standard_error": error_of(found),
        "more": float(more.mean()), "more_error": error_of(more),
    }  # fmt: skip


def error_of(values: torch.Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std() / len(values) ** 0.5)


def measures(texts: list[str], words: set[str]) -> dict[str, float]:
    """Of texts, however they came about."""
    found = text_statistics(texts, words)
    repetition = {f"repetition_{n}": found.repetition[n] for n in (1, 2, 4)}
    return {"valid_words": found.valid_words} | repetition | {
        "distinct_2": found.distinct[2], "entropy": found.entropy,
    }  # fmt: skip


def written(run: Path, words: set[str], options: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    """What a run writes."""
    texts = td.load(run).sample(n=options.samples, calls=options.calls, seed=1, **how)
    return measures(texts, words) | {"text": texts[0]}


def held_out(run: Path, words: set[str], options: argparse.Namespace) -> dict[str, Any]:
    """The same of held-out windows, as many and as long."""
    model = td.load(run)
    windows = evaluation_windows(tokenize(load_corpus(model.config.data), model.tokenizer)["validation"], model.window)
    texts = [model.tokenizer.decode(w.tolist()) for w in windows if len(w) == model.window]
    texts = texts[:: max(1, len(texts) // options.samples)][: options.samples]
    return measures(texts, words) | {"text": texts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--sub-words", help="a text for the part of that name; in its own tokenizer, bpe:1024")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 600, 1200])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--calls", type=int, default=64, help="of the part writing")
    parser.add_argument("--eval-tokens", type=int, default=40_000)
    parser.add_argument("--set", action="append", default=[], dest="settings", help="of all runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "rows.jsonl", vars(options), ("depths", "steps"))
    sub_words = ("--data", str(options.sub_words), "--tokenizer", "bpe:1024")
    depth, steps = options.depths[len(options.depths) // 2], options.steps[len(options.steps) // 2]

    def train(part: str, name: str, family: str, settings: list[str], depth: int, steps: int, *text: str) -> Path:
        """A row of a run; rows of equal settings share it."""
        text = text or ("--data", options.data)
        where = "-".join(["sub-words" if len(text) > 2 else "", family, *settings, str(depth), str(steps)]).strip("-")
        how = ["--family", family, *text, "--length", str(options.length), "--depth", str(depth)]
        how += ["--steps", str(steps)]
        how += [word for setting in (*options.settings, *settings) for word in ("--set", setting)]
        key = {"part": part, "name": name, "family": family, "depth": depth, "steps": steps}
        rows.row(key, trained_row, options.out / where, how, options)
        return options.out / where

    def compare(sparse: Path, masked: Path, left: Path, symbols: str) -> None:
        """Texts of three runs, and held-out ones."""
        words = word_set(load_corpus(td.load(sparse).config.data))
        key = {"part": "writing", "symbols": symbols}
        rows.row(key | {"name": "held-out text"}, held_out, sparse, words, options)
        for run, family in ((left, LEFT), (masked, MASKED)):
            rows.row(key | {"name": family}, written, run, words, options, {})
            rows.row(key | {"name": f"{family}, top_p 0.9"}, written, run, words, options, {"top_p": 0.9})
        for how in WRITING:
            name = ", ".join(f"{k} {v}" if k != "sampler" else v for k, v in how.items())
            rows.row(key | {"name": name}, written, sparse, words, options, how)

    def table() -> None:
        text = []
        for part in dict.fromkeys(row["part"] for row in rows.found):
            some = rows.of(part=part)
            columns = [c for c in COLUMNS if any(row.get(c) is not None for row in some)]
            text.append(f"## {part}\n\n{markdown(some, columns)}")
        (options.out / "table.md").write_text("\n".join(text), encoding="utf-8")

    def do(part: str) -> None:
        if part == "candidates":
            for name, settings in CANDIDATES.items():
                train(part, name, SPARSE, settings, depth, steps)
        elif part == "passes":
            run = train("candidates", "as it is", SPARSE, [], depth, steps)
            for number in (1, 2, 3, 4, None):
                name = "carried" if number is None else f"{number} passes"
                rows.row({"part": part, "name": name}, passes, run, options, number)
        elif part == "noise":
            for name, (family, settings) in NOISE.items():
                train(part, name, family, settings, depth, steps)
        elif part == "sub-words" and options.sub_words:
            for family, settings in NO_NGRAMS.items():
                train(part, family, family, settings, depth, steps, *sub_words)
            train(part, "autoregressive, n-grams", LEFT, NGRAMS[LEFT], depth, steps, *sub_words)
            for k in (1, 32):
                train(part, f"k = {k}", SPARSE, [f"process.candidates={k}"], depth, steps, *sub_words)
            train(part, "no candidates", SPARSE, ["process.passes=1"], depth, steps, *sub_words)
        elif part == "sizes":
            for long in options.steps:
                for size in options.depths:
                    for family, settings in NGRAMS.items():
                        train(part, family, family, settings, size, long)
        elif part == "writing":
            size, long = options.depths[-1], options.steps[-1]
            compare(*(train("sizes", f, f, s, size, long) for f, s in NGRAMS.items()), "characters")
            if options.sub_words:
                runs = (train("sub-words", f, f, s, depth, steps, *sub_words) for f, s in NO_NGRAMS.items())
                compare(*runs, "sub-words")

    for part in options.only:
        do(part)
        table()
    print((options.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except td.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
