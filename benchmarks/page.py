"""docs/speed.md and docs/speed.svg, made from benchmarks/results.json: no figure on the page is copied by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HEAD = """# Speed

Made from [benchmarks/results.json](../benchmarks/results.json) by `make bench`; what a figure means is said in
[benchmarks/bench.py](../benchmarks/bench.py), and what it is set against in [plain.py](../benchmarks/plain.py): plain
re-statements of what public repositories do, timed in turn with ours in one process. Compare ratios: the same code run
again on a shared machine has moved by a third.
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; None is left empty."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:g}%" for name, share in shares.items() if share >= 0.5)


def _training(found: dict[str, Any]) -> str:
    rows = [
        (setting, name, row["ms"], f"{row['tokens_per_second']:,}", row.get("times_plain_fp32"),
         row.get("times_plain_bf16"), f"{row['share_of_bf16_peak']:.1%}" if "share_of_bf16_peak" in row else None)
        for setting, entries in found.items() for name, row in entries.items() if name != "peak_gflops_per_second"
    ]  # fmt: skip
    peaks = [
        f"{setting}: {entries['peak_gflops_per_second']['bf16']:,} GFLOP/s in bfloat16, "
        f"{entries['peak_gflops_per_second']['fp32']:,} in float32"
        for setting, entries in found.items()
    ]
    columns = ("setting", "step", "ms", "tokens/s", "times plain fp32", "times plain bf16", "of the bf16 peak")
    return table(columns, rows) + "\n\nMatrix products at their best, measured beside it: " + "; ".join(peaks) + "."


def _sampling(found: dict[str, Any]) -> str:
    rows = [
        (setting, name, row["ms_a_call"], row["times_ours"])
        for setting, entries in found.items()
        for name, row in entries.items()
    ]
    return table(("setting", "sampler", "ms a call", "times ours"), rows)


def _profile(found: dict[str, Any]) -> str:
    training = [
        (setting, family, row["ms_a_step"], f"{row['tokens_per_second']:,}", percent(row["stages_percent"]),
         percent(row["kinds_percent"]))
        for setting, entries in found["training"].items() for family, row in entries.items()
    ]  # fmt: skip
    writing = [
        (setting, family, row["ms_a_call"], percent(row["parts_percent"]))
        for setting, entries in found["sampling"].items()
        for family, row in entries.items()
    ]
    columns = ("setting", "family", "ms a step", "tokens/s", "stages", "forward and backward by kind of operation")
    return (
        table(columns, training)
        + "\n\nSampling one text; kinds of noise that replace tokens ask about every position in every call.\n\n"
        + table(("vocabulary", "family", "ms a call", "where"), writing)
    )


def _sizes(found: dict[str, Any]) -> str:
    parts = []
    for part, first in (("training", "parameters"), ("sampling", "texts at a time")):
        names = list(found[part])
        rows = [(f"{int(x):,}", *(found[part][name][x] for name in names)) for x in found[part][names[0]]]
        unit = "tokens/s" if part == "training" else "ms a call"
        parts.append(table((first, *(f"{name}, {unit}" for name in names)), rows))
    return "![tokens a second against size, milliseconds a call against batch](speed.svg)\n\n" + "\n\n".join(parts)


def _long(found: dict[str, Any]) -> str:
    rows = [
        (setting, name, row["seconds"], row["gigaflops"], row["times_faster_than_masked"], row["times_fewer_flops"])
        for setting, entries in found.items()
        for name, row in entries.items()
    ]
    return table(("text", "family", "seconds", "GFLOP of the network", "times faster", "times fewer FLOPs"), rows)


def _memory(found: dict[str, Any]) -> str:
    rows = [
        (family, row["windows in a step"], row["training step"], *found["ceilings"][family][:1], row["sampling"],
         found["ceilings"][family][1])
        for family, row in found["megabytes"].items()
    ]  # fmt: skip
    columns = ("family", "windows in a step", "training step, MB", "ceiling", "sampling one text, MB", "ceiling")
    return table(columns, rows)


def _kernels(found: dict[str, Any]) -> str:
    rows = [(name, row["ms"], row["rival_ms"], row["ratio"]) for name, row in found.get("results", {}).items()]
    return table(("choice / rival", "ms", "rival's ms", "times faster"), rows)


def _start_up(found: dict[str, Any]) -> str:
    return table(("command", "seconds"), found.items())


def _reproducible(found: dict[str, Any]) -> str:
    columns = ("written at once", "seconds, as they come", "seconds, reproducible", "times as long")
    return table(columns, [(texts, *row.values()) for texts, row in found.items()])


def _precision(found: dict[str, Any]) -> str:
    rows = [(name, f"{r['bits_per_char']} +- {r['standard_error']}", r["seconds"]) for name, r in found.items()]
    return table(("training", "bits/char, at most", "seconds"), rows)


def _projection(found: dict[str, Any]) -> str:
    names = list(next(iter(found.values())))
    return table(("parameters", *names), ((size, *(f"{row[name]:,}" for name in names)) for size, row in found.items()))


SECTIONS = {
    "training": ("Training", _training),
    "sampling": ("Sampling", _sampling),
    "profile": ("Where the time goes", _profile),
    "sizes": ("By size and by batch", _sizes),
    "long": ("Long texts", _long),
    "memory": ("Memory at V = 50,257, L = 256", _memory),
    "kernels": ("Small choices", _kernels),
    "start-up": ("Start-up", _start_up),
    "reproducible": ("The same texts for any number of them", _reproducible),
    "precision": ("What bfloat16 costs in quality", _precision),
    "projection": ("Projection for H100s: arithmetic, not measured", _projection),
}
NOTES = {
    "training": "A whole step, optimiser and average included; 32 or 16 windows of 256 tokens. The share of the peak "
    "counts 6 FLOPs a weight of the blocks and a token, 12 L D a layer for attention, and the head on the rows that "
    "carry loss; of a causal network too, whose attention needs half of that. The matrix products of a masked step are "
    "also timed alone, in bfloat16, on tensors that do not lie in the nearest cache: no step with the same products is "
    "faster on this machine.",
    "reproducible": "Texts of 64 characters, 32 calls, the smallest preset. Reproducible texts are in float32, written "
    "in batches of a fixed size that are filled up where there are fewer.",
    "precision": "2,000 steps on the built-in text, two blocks of width 128, windows of 64: `python "
    "benchmarks/bench.py --only precision`.",
    "memory": "What the process grows by at its peak, one block of width 64: the vocabulary's share of it.",
    "projection": "From FLOPs and bandwidth alone: 989 TFLOP/s and 3.35 TB/s, of which 40% and 60% are assumed to be "
    "reached; nothing of this was run on such a machine.",
}


def write_up(results: dict[str, Any]) -> str:
    """The page for the parts that have been measured."""
    out = [HEAD]
    for name, (title, section) in SECTIONS.items():
        if name not in results:
            continue
        on = results[name]["measured_on"]
        out.append(f"## {title}\n")
        if name in NOTES:
            out.append(NOTES[name] + "\n")
        out.append(section(results[name]["results"]) + "\n")
        if name != "projection":
            out.append(
                f"Measured on {on['processor']}; torch {on['torch']}, Python {on['python']}, commit {on['commit']}, "
                f"load average at the start {on['load_average']}; {results[name]['seconds']} s.\n"
            )
    return "\n".join(out)


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens a second against size, milliseconds a call against batch."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "textdiffusion"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), constrained_layout=True)
    colours = {"masked": "#0072b2", "autoregressive": "#009e73", "masked, plain, bf16 autocast": "#d55e00"}
    for axes, part in ((left, "training"), (right, "sampling")):
        for name, points in found[part].items():
            x = [float(k) / (1e6 if part == "training" else 1) for k in points]
            axes.plot(x, list(points.values()), "o-", label=name, color=colours[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    left.set(xlabel="parameters (millions)", ylabel="tokens a second", title="training, windows of 64")
    right.set(xlabel="texts at a time", ylabel="milliseconds a call", title="sampling, 256 characters, 6 layers of 256")
    rows = list(next(iter(found["sampling"].values())))
    right.set_xticks([int(x) for x in rows], rows)
    left.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
