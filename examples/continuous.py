"""The experiments of the continuous families, one after the other: which choice buys what?

    python examples/continuous.py OUT --data war_and_peace.txt --minutes 3

Every row is a run in OUT, trained for so many minutes (or --steps) and evaluated; one that is done is not done again,
so the script may be stopped and started. OUT/rows.jsonl holds the figures, OUT/table.md what is made of them, and
OUT/*.svg the curves (with the extra `viz`). ``--only GROUP`` does one group of rows.

Groups: schedule, times, depth, target, estimate (self-conditioning), parts (each mend removed in turn), codes, network
(the U-Net beside the transformer), given (gaps filled by networks that were told which tokens are given, and by plain
replacement), bias (how far plain replacement is from the law that is meant, on a world that is known), calls (quality
against sampling steps), delta (the first system's asymmetric intervals, of 2,000 steps), speed (training against the
autoregressive model). examples/second_system.py has the second system's own settings.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rows import Rows, markdown, trained, verb

import textdiffusion as td
from textdiffusion.evaluation.measures import TextStatistics, text_statistics
from textdiffusion.families import family as family_named
from textdiffusion.families.analog_bits import AnalogBits, AnalogBitsConfig
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import Table
from textdiffusion.presets import configure
from textdiffusion.sampling.reverse import sample
from textdiffusion.text.data import load_corpus, tokenize, word_set
from textdiffusion.text.windows import evaluation_windows
from textdiffusion.verification import Subject

EMBEDDING, BITS = "gaussian_embedding", "analog_bits"
# (group, name, family, settings)
ROWS = [
    *(("schedule", s, EMBEDDING, [f"process.schedule={s}"]) for s in ("adaptive", "cosine", "linear", "rectified")),
    ("schedule", "sqrt", EMBEDDING, ["process.schedule=sqrt"]),
    # Without self-conditioning, with which the bound of a chain takes as many passes over the text as it has moves.
    *(("times", str(n or "all"), EMBEDDING,
       ["process.schedule=cosine", "process.self_conditioning=0.0", f"process.times={n}"])
      for n in (100, 500, 1000, 0)),
    *(("depth", str(n), EMBEDDING, [f"network.depth={n}"]) for n in (4, 8, 12, 16)),
    # Reals for all, since beliefs do not say where within its noise a position is; and no learned clock, which goes by
    # the law of tokens.
    *(("target", t, EMBEDDING, [f"process.target={t}", "process.input=reals", "process.schedule=cosine"])
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
    ("network", "transformer", BITS, []),
    ("network", "U-Net", BITS, ["network.body=unet"]),
    ("network", "U-Net, bits, told the noise (the first system's)", BITS,
     ["network.body=unet", "process.output=bits", "process.input=reals", "process.schedule=cosine",
      "process.evidence=false", "process.given=0.0"]),
    ("speed", "autoregressive", "autoregressive", ["network.ngrams=0", "network.counts=0"]),
    ("speed", EMBEDDING, EMBEDDING, []),
    ("speed", BITS, BITS, []),
]  # fmt: skip
GROUPS = (*dict.fromkeys(group for group, *_ in ROWS), "given", "bias", "calls", "delta")
CALLS = (10, 25, 50, 100, 250, 500)
DELTAS = (*range(11), 20, 50)


def fields(family: str, settings: list[str]) -> dict[str, object]:
    """All that can be set of network and process, defaults and all."""
    config = configure(family=family, settings=settings)
    process = asdict(family_named(family).Config(**config.process))
    return {f"network.{k}": v for k, v in config.network.items()} | {f"process.{k}": v for k, v in process.items()}


def run_of(out: Path, family: str, settings: list[str], options: argparse.Namespace) -> Path:
    """The run of these settings; rows of equal settings, of which some only name a default, share it."""
    plain, made = fields(family, options.settings), fields(family, [*options.settings, *settings])
    settings = [s for s in settings if made[s.split("=")[0]] != plain.get(s.split("=")[0])]
    run = out / "-".join([family, *(s.replace("/", "_") for s in settings)])
    how = ["--family", family, "--data", options.data, "--length", str(options.length)]
    how += ["--steps", str(options.steps)] if options.steps else ["--minutes", str(options.minutes)]
    return trained(run, *how, *(word for s in (*options.settings, *settings) for word in ("--set", s)))


def row(out: Path, family: str, settings: list[str], options: argparse.Namespace) -> dict[str, object]:
    """Figures of a run."""
    run = run_of(out, family, settings, options)
    # Trained at so many noise levels: the bound is of their chain.
    levels = fields(family, settings).get("process.times")
    asked = ["--calls", str(levels)] if levels else []
    said = verb("eval", str(run), "--samples", str(options.samples), "--eval-tokens", str(options.eval_tokens), *asked)
    said |= said["by_calls"][0] if levels else {}
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last, training = json.loads(lines[-1]), td.load(run).config.training
    return {
        "kind": said["kind"], "calls": said["calls"],
        "bits_per_char": said["bits_per_char"], "standard_error": said["standard_error"],
        "valid_words": said["samples"]["valid_words"], "steps": last["step"],
        "dead_codes": said.get("dead_codes"), "seconds": last["seconds"],
        "tokens_a_second": last["step"] * training.batch * options.length / last["seconds"],
    }  # fmt: skip


def words(
    run: Path, options: argparse.Namespace, calls: int, sampler: str, grid: str | None = None, settings: tuple = ()
) -> dict[str, float]:
    """Valid words, repetition and entropy of samples; ``settings`` are of the sampling."""
    model = td.load(run, settings=settings)
    texts = model.sample(n=options.samples, calls=calls, sampler=sampler, grid=grid, seed=1)
    found = text_statistics(texts, word_set(load_corpus(model.config.data)))
    return valid(found) | {"repetition": found.repetition[1], "entropy": found.entropy}


def valid(found: TextStatistics) -> dict[str, float]:
    """The share of words that occur in the text, and its standard error."""
    share = found.valid_words
    return {"valid_words": share, "words_error": (share * (1 - share) / max(found.words, 1)) ** 0.5}


def filled(run: Path, options: argparse.Namespace) -> dict[str, float]:
    """Held-out windows, their middle third written anew: how many tokens come back as they were, and the words."""
    model = td.load(run)
    corpus = load_corpus(model.config.data)
    windows = evaluation_windows(tokenize(corpus, model.tokenizer)["validation"], model.window)
    full = [w for w in windows if len(w) == model.window][: options.samples]
    x = torch.from_numpy(np.stack(full).astype(np.int64))
    given = torch.ones(model.window, dtype=torch.bool)
    given[model.window // 3 : 2 * model.window // 3] = False
    *_, last = sample(
        model.process, Noise.of(1, len(x)), model.window, model.window, tokens=x, given=given.expand(len(x), -1)
    )
    found = text_statistics([model.tokenizer.decode(ids) for ids in last.tokens.tolist()], word_set(corpus))
    right = (last.tokens == x)[:, ~given].double().mean(-1)
    return {"as_it_was": float(right.mean()), "its_error": float(right.std() / len(right) ** 0.5)} | valid(found)


def bias(conditioning: str, calls: int, texts: int = 40_000) -> dict[str, float]:
    """Two tokens that are alike nine times of ten, the first of them given, the exact posterior in the network's place:
    how often the second is written alike."""
    world = Table(torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.float64))
    config = AnalogBitsConfig(schedule="cosine", self_conditioning=0.0, conditioning=conditioning)
    process = Subject(AnalogBits, config).ideal(world)
    given = torch.tensor([True, False]).expand(texts, -1)
    tokens = torch.zeros(texts, 2, dtype=torch.long)
    *_, last = sample(process, Noise.of(1, texts), 2, calls, tokens=tokens, given=given)
    alike = float((last.tokens[:, 1] == 0).double().mean())
    return {"alike": alike, "should_be": 0.9, "standard_error": (alike * (1 - alike) / texts) ** 0.5}


def jobs(out: Path, options: argparse.Namespace):
    """(group, name, function that gives the figures)."""
    for group, name, family, settings in ROWS:
        yield group, name, lambda family=family, settings=settings: row(out, family, settings, options)
    for conditioning in ("clean", "replacement"):
        settings = ["process.self_conditioning=0.0", f"process.conditioning={conditioning}"]
        yield "given", conditioning, lambda settings=settings: filled(run_of(out, BITS, settings, options), options)
        for calls in (1, 4, 16, 64):
            yield "bias", f"{conditioning}, {calls}", lambda how=conditioning, calls=calls: bias(how, calls)
    for sampler in ("ancestral", "ddim", "dpm", "churn"):
        for calls in CALLS:
            yield (
                "calls",
                f"{sampler}, {calls}",
                lambda sampler=sampler, calls=calls: words(
                    run_of(out, EMBEDDING, [], options), options, calls, sampler
                ),
            )
    for share in (0.0, 0.5):
        for delta in options.deltas:
            settings = [f"process.self_conditioning={share}"]
            yield (
                "delta",
                f"self-conditioning {share}, {delta}",
                lambda settings=settings, delta=delta: words(
                    run_of(out, BITS, settings, options),
                    options,
                    options.delta_calls,
                    "ddim",
                    "time",
                    (f"process.delta={delta}",),
                ),
            )


def table(rows: Rows) -> str:
    """All figures as Markdown."""
    parts = {row["group"]: rows.of(group=row["group"]) for row in rows.found}
    return "\n".join(
        f"### {group}\n\n{markdown(some, [n for n in some[0] if n != 'group'])}" for group, some in parts.items()
    )


def curves(out: Path, rows: Rows, delta_calls: int) -> None:
    """Word validity against calls; and with repetition and entropy against delta."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no curves drawn: pip install 'textdiffusion[viz]'", file=sys.stderr)
        return
    for group, figures in (("calls", ["valid_words"]), ("delta", ["valid_words", "repetition", "entropy"])):
        some = rows.of(group=group)
        if not some:
            continue
        figure, axes = plt.subplots(1, len(figures), figsize=(5 * len(figures), 3.5), squeeze=False)
        for axis, name in zip(axes[0], figures, strict=True):
            for line in dict.fromkeys(str(r["name"]).rsplit(", ", 1)[0] for r in some):
                points = [(float(str(r["name"]).rsplit(", ", 1)[1]), r[name]) for r in some
                          if str(r["name"]).rsplit(", ", 1)[0] == line]  # fmt: skip
                axis.plot(*zip(*points, strict=True), marker="o", label=line)
            axis.set_xlabel("network calls" if group == "calls" else f"delta, of {delta_calls:,} steps")
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
    parser.add_argument("--delta-calls", type=int, default=2000, help="sampling steps of the group delta")
    parser.add_argument("--deltas", type=int, nargs="+", default=DELTAS, help="of the group delta")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PART.KEY=VALUE", help="of all")
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group; may be given again")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "rows.jsonl", vars(options), in_keys=("deltas",))
    for group, name, measure in jobs(options.out, options):
        if options.only and group not in options.only:
            continue
        rows.row({"group": group, "name": name}, measure)
        (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    curves(options.out, rows, options.delta_calls)
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except td.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
