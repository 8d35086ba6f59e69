"""Plots that commands leave in the run folder: how it learnt, with samples on the way, and what fewer calls cost.

SVG with text as text, in the colours of the reader's choice: light, or dark where the page it is opened in is. Needs
the extra ``viz`` (matplotlib).
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiffusion.display.frames import one_line, visible
from textdiffusion.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "plots of this need matplotlib; install it with: pip install 'textdiffusion[viz]'"
# Each colour on white, and what it becomes on the dark ground.
PAGE, INK, SOFT, GRID, LINE, BEST = "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0b57d0", "#b3541e"
DARK = {PAGE: "#0d1117", INK: "#e6edf3", SOFT: "#9da7b3", GRID: "#30363d", LINE: "#8ab4f8", BEST: "#f0a868"}
SAMPLES, SAMPLE_CHARACTERS = 6, 92  # lines under the training curve, and how long they are


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_training(run: Path) -> Path | None:
    """Draw the validations of a run's metrics.jsonl, with samples on the way, into training.svg.

    Returns:
        The file, or None where fewer than two validations can be read.
    """
    rows = _validations(run)
    if len(rows) < 2:
        return None
    samples = [row for row in rows if row.get("sample")]
    shown = [samples[i] for i in _evenly(len(samples), SAMPLES)]
    figure, axes = _figure(5.0 + 0.26 * len(shown), 4.6)
    steps, bits = [row["step"] for row in rows], [row["bits_per_char"] for row in rows]
    errors = [row.get("standard_error") or 0.0 for row in rows]
    axes.fill_between(
        steps, [b - e for b, e in zip(bits, errors)], [b + e for b, e in zip(bits, errors)],
        color=LINE, alpha=0.2, linewidth=0,
    )  # fmt: skip
    axes.plot(steps, bits, color=LINE, marker="o", markersize=4)
    best = min(range(len(bits)), key=bits.__getitem__)
    kept = f"best, and kept: {bits[best]:.3f} at step {steps[best]:,}"
    axes.plot(steps[best], bits[best], color=BEST, marker="D", markersize=8, linestyle="none", label=kept)
    axes.legend(frameon=False, labelcolor=INK)
    minutes = rows[-1]["seconds"] / 60
    axes.set_xlabel(f"optimiser step ({steps[-1]:,} took {minutes:.1f} minutes)", color=SOFT)
    axes.set_ylabel("bits per character", color=SOFT)
    axes.set_title(f"{run.resolve().name}: held-out text while it learnt", color=INK, loc="left")
    lines = [f"{row['step']:>7,}  {_short(str(row['sample']))}" for row in shown]
    said = [_meaning(rows[-1]) + "; band: one standard error."]
    if lines:
        said.append("What the same noise became, after so many steps:")
    _caption(figure, axes, said, lines)
    return _save(figure, run / "training.svg")


def save_calls(result: Mapping[str, Any], run: Path) -> Path | None:
    """Draw what `eval --calls` measured (a report as a dict) into calls.svg.

    Returns:
        The file, or None where fewer than two numbers of calls have a figure.
    """
    rows = [row for row in result["by_calls"] if row["bits_per_char"] is not None and row["kind"] != "none"]
    if len({row["calls"] for row in rows}) < 2:
        return None
    figure, axes = _figure(4.6, 3.9)
    # A sampler may take other numbers of calls than it was asked for, and two may come to the same.
    points = sorted({int(row["calls"]): row for row in rows}.items())
    axes.errorbar([calls for calls, _ in points], [row["bits_per_char"] for _, row in points],
                  yerr=[row["standard_error"] or 0.0 for _, row in points], color=LINE, marker="o", markersize=5,
                  capsize=3, label=f"sampler: {rows[0]['sampler']}")  # fmt: skip
    if result["kind"] != "none" and result["bits_per_char"] is not None:
        many = "one call a token" if result["kind"] == "exact" else "in the limit of many calls"
        axes.axhline(result["bits_per_char"], color=BEST, linestyle="--", label=f"{result['bits_per_char']:.3f} {many}")
    axes.set_xscale("log", base=2)
    ticks = [calls for calls, _ in points]
    axes.set_xticks(ticks, [f"{calls:,}" for calls in ticks])
    axes.minorticks_off()
    axes.set_xlabel("network calls a text", color=SOFT)
    axes.set_ylabel("bits per character", color=SOFT)
    axes.set_title(f"{run.resolve().name}: what fewer calls cost", color=INK, loc="left")
    axes.legend(frameon=False, labelcolor=INK)
    _caption(figure, axes, [_meaning(rows[0]) + "; bars: one standard error.",
                            f"Text: {result['text']}, {result['characters']:,} characters."], [])  # fmt: skip
    return _save(figure, run / "calls.svg")


def _meaning(row: Mapping[str, Any]) -> str:
    return {
        "exact": "Held-out text, exact negative log-likelihood",
        "upper": "Held-out text, upper bound on the negative log-likelihood",
    }.get(str(row.get("kind")), "Held-out text, no likelihood")


def _validations(run: Path) -> list[dict[str, Any]]:
    found = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            found.append(
                row | {"step": int(row["step"])} | {key: float(row[key]) for key in ("seconds", "bits_per_char")}
            )
        except (ValueError, TypeError, KeyError):
            continue  # the last line may be torn
    return found


def _evenly(n: int, most: int) -> Sequence[int]:
    """At most so many of 0 .. n - 1, the first and the last among them."""
    return range(n) if n <= most else [round(i * (n - 1) / (most - 1)) for i in range(most)]


def _short(sample: str) -> str:
    line = visible(one_line(sample)).replace("\t", " ")
    return line if len(line) <= SAMPLE_CHARACTERS else line[: SAMPLE_CHARACTERS - 1] + "…"


def _figure(height: float, plot: float) -> tuple[Figure, Axes]:
    """A page ``height`` inches high, of which the upper ``plot`` are for the plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), facecolor=PAGE)
    axes = figure.add_axes((0.09, 1 - (plot - 0.6) / height, 0.88, (plot - 1.15) / height), facecolor=PAGE)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=SOFT)
    for side, spine in axes.spines.items():
        spine.set_color(GRID)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _caption(figure: Figure, axes: Axes, lines: Sequence[str], samples: Sequence[str]) -> None:
    """Lines under a plot, the samples among them in a face of one width."""
    height = figure.get_figheight()
    top = axes.get_position().y0 - 0.62 / height
    for number, line in enumerate([*lines, *samples]):
        mono = number >= len(lines)
        figure.text(0.03, top - number * 0.25 / height, line, color=INK if mono else SOFT, fontsize=8 if mono else 9,
                    family="monospace" if mono else "sans-serif", va="top", parse_math=False)  # fmt: skip


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib

    text = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "textdiffusion"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a symbol that matplotlib's own face lacks: the reader's has it
        figure.savefig(text, format="svg", facecolor=PAGE, metadata={"Date": None})
    rules = [
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    ]
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }} text {{ white-space: pre }}</style>"
    head, tag, rest = text.getvalue().partition("<defs>")
    write(path, f"{head}{style}{tag}{rest}")
    return path
