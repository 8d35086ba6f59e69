"""The experiments of the continuous families, one after the other: which choice buys what?

    python examples/continuous.py OUT --data war_and_peace.txt --minutes 3

Every row is a run in OUT, trained for so many minutes (or --steps) and evaluated; one that is done is not done again,
so the script may be stopped and started. OUT/rows.jsonl holds the figures, OUT/table.md what is made of them, and
OUT/*.svg the curves (with the extra `viz`). ``--only GROUP`` does one group of rows.

Groups: schedule, times, depth, target, estimate (self-conditioning), parts (each mend removed in turn), codes, calls
(quality against sampling steps), delta (the first system's asymmetric intervals, of 2,000 steps), speed (training
against the autoregressive model).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import textdiffusion as td
from textdiffusion.data import load_corpus, word_set
from textdiffusion.evaluation import text_statistics

EMBEDDING, BITS = "gaussian_embedding", "analog_bits"
# (group, name, family, settings)
ROWS = [
    *(("schedule", s, EMBEDDING, [f"process.schedule={s}"]) for s in ("adaptive", "cosine", "linear", "rectified")),
    ("schedule", "sqrt", EMBEDDING, ["process.schedule=sqrt"]),
    *(("times", str(n), EMBEDDING, ["process.schedule=cosine", f"process.times={n}"]) for n in (100, 500, 1000)),
    *(("depth", str(n), EMBEDDING, [f"network.depth={n}"]) for n in (4, 8, 12, 16)),
    # Reals for all: a belief does not say where within its noise a position is, which eps and flow have to.
    *(("target", t, EMBEDDING, [f"process.target={t}", "process.input=reals"])
      for t in ("tokens", "x_0", "eps", "v", "flow")),
    *(("estimate", f"{f}, {share}", f, [f"process.self_conditioning={share}"])
      for f in (EMBEDDING, BITS) for share in (0.0, 0.5)),
    ("parts", "as it is", BITS, []),
    ("parts", "without the evidence", BITS, ["process.evidence=false"]),
    ("parts", "reals for beliefs", BITS, ["process.input=reals"]),
    ("parts", "noise told at every layer", BITS, ["process.time=true"]),
    ("parts", "cosine for the learned clock", BITS, ["process.schedule=cosine"]),
    ("parts", "without self-conditioning", BITS, ["process.self_conditioning=0.0"]),
    ("parts", "bits for the softmax", BITS, ["process.output=bits"]),
    *(("codes", b, BITS, [f"process.book={b}"]) for b in ("binary", "gray", "random")),
    ("codes", "random, 16 bits", BITS, ["process.book=random", "process.bits=16"]),
    ("speed", "autoregressive", "autoregressive", ["network.ngrams=0"]),
    ("speed", EMBEDDING, EMBEDDING, []),
    ("speed", BITS, BITS, []),
]  # fmt: skip
CALLS = (10, 25, 50, 100, 250, 500)
DELTAS = (0, 1, 2, 5, 10, 20, 50)
OF_DELTAS = 2000  # sampling steps


def verb(*words: str) -> dict[str, object]:
    """Run a command of textdiffusion and read the last line of its --json."""
    done = subprocess.run(
        [sys.executable, "-m", "textdiffusion", *words, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise td.UserError(done.stderr.strip().splitlines()[-1])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def trained(out: Path, family: str, settings: list[str], options: argparse.Namespace) -> Path:
    """The run of these settings, trained if it is not there; rows of equal settings share it."""
    name = "-".join([family, *(s.replace("/", "_") for s in settings)]) or family
    run = out / name
    how = ["--steps", str(options.steps)] if options.steps else ["--minutes", str(options.minutes)]
    if (run / "config.json").exists():
        verb("train", "--resume", "--out", str(run))  # where it was stopped; a finished one stays as it is
    else:
        every = [word for s in settings for word in ("--set", s)]
        verb("train", "--family", family, "--data", options.data, "--length", str(options.length), "--out", str(run),
             *how, *every)  # fmt: skip
    return run


def row(out: Path, family: str, settings: list[str], options: argparse.Namespace) -> dict[str, object]:
    """Figures of a run."""
    run = trained(out, family, settings, options)
    said = verb("eval", str(run), "--samples", str(options.samples), "--eval-tokens", str(options.eval_tokens))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    return {
        "kind": said["kind"], "bits_per_char": said["bits_per_char"], "standard_error": said["standard_error"],
        "valid_words": said["samples"]["valid_words"], "steps": last["step"], "seconds": last["seconds"],
    }  # fmt: skip


def words(run: Path, options: argparse.Namespace, calls: int, sampler: str, **changes: float) -> dict[str, float]:
    """Valid words, repetition and entropy of samples; ``changes`` are of the sampling options of the family."""
    model = td.load(run)
    for name, value in changes.items():
        setattr(model.process.config, name, value)
    model.process = type(model.process)(model.process.network, model.process.config, model.process.vocabulary)
    texts = model.sample(n=options.samples, calls=calls, sampler=sampler, seed=1)
    found = text_statistics(texts, word_set(load_corpus(model.config.data)))
    return {
        "valid_words": found.valid_words, "repetition": found.repetition[1], "entropy": found.entropy,
    }  # fmt: skip


def jobs(out: Path, options: argparse.Namespace):
    """(group, name, function that gives the figures)."""
    for group, name, family, settings in ROWS:
        yield group, name, lambda family=family, settings=settings: row(out, family, settings, options)
    for sampler in ("ancestral", "ddim", "dpm", "churn"):
        for calls in CALLS:
            yield (
                "calls",
                f"{sampler}, {calls}",
                lambda sampler=sampler, calls=calls: words(
                    trained(out, EMBEDDING, [], options), options, calls, sampler
                ),
            )
    for share in (0.0, 0.5):
        for delta in DELTAS:
            yield "delta", f"self-conditioning {share}, {delta}", lambda share=share, delta=delta: words(
                trained(out, BITS, [f"process.self_conditioning={share}"], options), options, OF_DELTAS, "ddim",
                delta=float(delta),
            )  # fmt: skip


def table(rows: list[dict[str, object]]) -> str:
    """All figures as Markdown."""
    lines = []
    for group in dict.fromkeys(r["group"] for r in rows):
        some = [r for r in rows if r["group"] == group]
        names = [n for n in some[0] if n not in ("group", "name")]
        lines += [f"### {group}", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for r in some:
            cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (r[n] for n in names)]
            lines.append(f"| {r['name']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def curves(out: Path, rows: list[dict[str, object]]) -> None:
    """Word validity against calls, and with repetition against delta."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no curves drawn: pip install 'textdiffusion[viz]'", file=sys.stderr)
        return
    for group, figures in (("calls", ["valid_words"]), ("delta", ["valid_words", "repetition"])):
        some = [r for r in rows if r["group"] == group]
        if not some:
            continue
        figure, axes = plt.subplots(1, len(figures), figsize=(5 * len(figures), 3.5), squeeze=False)
        for axis, name in zip(axes[0], figures, strict=True):
            for line in dict.fromkeys(str(r["name"]).rsplit(", ", 1)[0] for r in some):
                points = [(float(str(r["name"]).rsplit(", ", 1)[1]), r[name]) for r in some
                          if str(r["name"]).rsplit(", ", 1)[0] == line]  # fmt: skip
                axis.plot(*zip(*points, strict=True), marker="o", label=line)
            axis.set_xlabel("network calls" if group == "calls" else f"delta, in steps of {OF_DELTAS:,}")
            axis.set_ylabel(name.replace("_", " "))
            axis.set_xscale("log" if group == "calls" else "symlog")
            axis.legend()
        figure.tight_layout()
        figure.savefig(out / f"{group}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-tokens", type=int, default=160_000)
    parser.add_argument("--only", action="append", help="a group, or several")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    notes = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    for group, name, measure in jobs(options.out, options):
        if options.only and group not in options.only:
            continue
        if any(r["group"] == group and r["name"] == name for r in rows):
            continue
        print(f"{group}: {name}", flush=True)
        rows.append({"group": group, "name": name} | measure())
        with notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    curves(options.out, rows)
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except td.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
