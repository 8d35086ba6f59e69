"""The plots of a comparison, drawn by matplotlib: as SVG and PNG files, and as SVG for the page in its own colours."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINE = "autoregressive"
INKS = ["#2463b0", "#c4560f", "#0d8577", "#8a46b8", "#b3246c", "#6f6f12", "#35803a"]  # page.css has those of the dark
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


@dataclass(frozen=True)
class Palette:
    """Colours of a plot; those of the page are names that its style sheet fills in."""

    ink: str
    muted: str
    grid: str
    paper: str
    families: list[str]


LIGHT = Palette("#1c1b22", "#62606c", "#e4e2ea", "#ffffff", INKS)
# Colours that occur nowhere else, to be put in place of by the page's.
NAMED = Palette("#010203", "#010204", "#010205", "#010206", [f"#0102{i:02x}" for i in range(16, 16 + len(INKS))])


def looks(families: Sequence[str]) -> dict[str, int | None]:
    """The colour and marker number of each family; the baseline has the ink's."""
    others = [name for name in families if name != BASELINE]
    return {name: None if name == BASELINE else others.index(name) % len(INKS) for name in families}


class _Plot:
    """One plot under way: axes in the house style."""

    def __init__(self, palette: Palette, results: Mapping[str, Any]):
        matplotlib = importlib.import_module("matplotlib")
        figure_class = importlib.import_module("matplotlib.figure").Figure
        self.palette, self.results = palette, results
        self.looks = looks(list(results["rows"]))
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "textdiffusion"  # the same file for the same figures
        matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
        self.figure = figure_class(figsize=(5.4, 4.1), facecolor=palette.paper, layout="constrained")
        self.axes = self.figure.add_subplot(facecolor=palette.paper)
        self.axes.grid(True, color=palette.grid, linewidth=0.8)
        self.axes.set_axisbelow(True)
        for side, spine in self.axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(palette.muted)
        self.axes.tick_params(colors=palette.muted, which="both", labelsize=9)

    def style(self, family: str) -> dict[str, Any]:
        """How a family's line is drawn."""
        number = self.looks[family]
        if number is None:
            return {"color": self.palette.ink, "marker": "*", "linestyle": "--", "label": family}
        return {"color": self.palette.families[number], "marker": MARKERS[number], "label": family}

    def finish(self, across: str, up: str) -> None:
        """Name the axes, and what is drawn."""
        self.axes.set_xlabel(across, color=self.palette.ink, fontsize=10)
        self.axes.set_ylabel(up, color=self.palette.ink, fontsize=10)
        handles, labels = self.axes.get_legend_handles_labels()
        if handles:
            self.figure.legend(
                handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9,
                labelcolor=self.palette.ink, handlelength=2.4, columnspacing=1.4,
            )  # fmt: skip

    def svg(self) -> str:
        file = io.StringIO()
        self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()

    def png(self, path: Path) -> None:
        self.figure.savefig(path, format="png", dpi=160, metadata={"Software": None})

    def plain(self, axis: str) -> None:
        """A log scale with plain numbers: 0.1, 0.15, 0.2, 0.3, ..."""
        ticker = importlib.import_module("matplotlib.ticker")
        if axis == "x":
            self.axes.set_xscale("log")
            scale = self.axes.xaxis
        else:
            self.axes.set_yscale("log")
            scale = self.axes.yaxis
        scale.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        scale.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_locator(ticker.NullLocator())

    def ticks(self, numbers: Sequence[float], log: bool = True) -> None:
        """Plain numbers across, on a scale of powers of two."""
        if log:
            self.axes.set_xscale("log", base=2)
        self.axes.set_xticks(list(numbers), [f"{n:g}" for n in numbers])
        self.axes.minorticks_off()


def _learning(plot: _Plot) -> None:
    _learnt(plot, lambda training, point: point["seconds"] / 60, "minutes of training")


def _arithmetic(plot: _Plot) -> None:
    _learnt(plot, lambda training, point: training["flops"] * point["step"] / training["steps"], "FLOPs of training")


def _learnt(plot: _Plot, across: Callable[[Mapping[str, Any], Mapping[str, Any]], float], name: str) -> None:
    low, high = [], []
    for family, row in plot.results["rows"].items():
        curve = row["training"]["learning"]
        up = [point["bits_per_char"] for point in curve]
        at = [across(row["training"], point) for point in curve]
        plot.axes.plot(at, up, markersize=3.5, linewidth=1.5, **plot.style(family))
        low.append(min(up))
        high.append(up[1] if len(up) > 3 else up[0])  # the first of many would flatten all that follows
    plot.axes.set_ylim(min(low) - 0.1, max(high) + 0.2)
    plot.finish(name, "held-out bits per character")


def _calls(plot: _Plot) -> None:
    best, every = [], {1}
    for name, row in plot.results["rows"].items():
        body = row["likelihood"]
        if body["kind"] == "exact":
            top = max(plot.results["plan"]["calls"][-1], body["calls"])
            style = plot.style(name)
            plot.axes.plot([body["calls"], top], [body["bits_per_char"]] * 2, markersize=9, linewidth=1.6, **style)
            best.append(body["bits_per_char"])
            every |= {top}
            continue
        points = {f["calls"]: f for f in body["by_calls"] if f["kind"] != "none"}
        across = sorted(points)
        up = [points[t]["bits_per_char"] for t in across]
        error = [2 * (points[t]["standard_error"] or 0) for t in across]
        plot.axes.errorbar(across, up, yerr=error, markersize=4, linewidth=1.6, elinewidth=1, **plot.style(name))
        best.append(min(up, default=0))
        every |= set(across)
    plot.axes.set_ylim(min(best) - 0.15, max(best) + 1.6)
    plot.ticks([2**k for k in range(max(every).bit_length())])
    plot.finish("network calls a text", "bits per character, at most")


def _seconds(plot: _Plot) -> None:
    for name, row in plot.results["rows"].items():
        found = sorted(
            (b["seconds_a_text"], b["divergence"]["integral"], b["calls"])
            for b in row["samples"]["by_calls"].values() if b
        )  # fmt: skip
        if not found:
            continue
        across, up, _ = zip(*found, strict=True)
        plot.axes.plot(across, up, markersize=5, linewidth=1.4, **plot.style(name))
        for x, y, made in found:
            plot.axes.annotate(
                f"{made}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=plot.palette.muted
            )
    plot.plain("x")
    _line(plot, plot.results["yardsticks"]["held-out text"]["divergence"]["integral"])
    plot.finish("seconds a text, log scale (beside each point: its network calls)", "n-gram divergence from text")


def _line(plot: _Plot, height: float) -> None:
    plot.axes.axhline(height, color=plot.palette.muted, linewidth=1, linestyle=":")
    plot.axes.annotate(
        "held-out text itself", (1, height), xycoords=("axes fraction", "data"), xytext=(-2, 4), ha="right",
        textcoords="offset points", fontsize=8, color=plot.palette.muted,
    )  # fmt: skip


def _frontier(plot: _Plot) -> None:
    for name, row in plot.results["rows"].items():
        found = row["temperatures"]["by_temperature"]
        points = [(found[t]["entropy"], found[t]["judged"]["perplexity"]) for t in sorted(found, key=float)]
        plot.axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1.4, **plot.style(name))
    for name, body in plot.results["yardsticks"].items():
        at = (body["entropy"], body["judged"]["perplexity"])
        text = name == "held-out text"
        plot.axes.plot(*at, marker="*" if text else "x", color=plot.palette.ink, markersize=11 if text else 7,
                       linestyle="none")  # fmt: skip
        plot.axes.annotate(
            name, at, xytext=(-8, -3) if text else (7, -3), textcoords="offset points", fontsize=8.5,
            color=plot.palette.ink, style="normal" if text else "italic", ha="right" if text else "left",
        )  # fmt: skip
    plot.plain("y")
    plot.axes.margins(x=0.12)
    plot.finish("entropy of the words, bits", "generative perplexity, log scale")


def _missed(plot: _Plot) -> None:
    middle = str(plot.results["plan"]["calls"][len(plot.results["plan"]["calls"]) // 2])
    for name, row in plot.results["rows"].items():
        able = [body for body in row["samples"]["by_calls"].values() if body]
        body = row["samples"]["by_calls"][middle] or (able[0] if able else None)
        if body:
            law = body["divergence"]
            plot.axes.plot(law["invented"], law["missed"], linewidth=1.6, **plot.style(name) | {"marker": ""})
    law = plot.results["yardsticks"]["held-out text"]["divergence"]
    plot.axes.plot(law["invented"], law["missed"], color=plot.palette.muted, linewidth=1.2, linestyle=":",
                   label="held-out text")  # fmt: skip
    plot.axes.set_xlim(left=0)
    plot.axes.set_ylim(bottom=0)
    plot.finish("n-grams that text does not have, nats", "n-grams of text that are missed, nats")


FIGURES: dict[str, tuple[str, str, Callable[[_Plot], None]]] = {
    "calls": (
        "Bits per character against network calls",
        "Of the family's first sampler, at exactly so many calls; bars are two standard errors. Left to right takes a "
        "call a token.",
        _calls,
    ),
    "learning": (
        "Learning",
        "Figures of the averaged weights on a part of the held-out text, while training.",
        _learning,
    ),
    "arithmetic": (
        "Learning for its arithmetic",
        "The same, against what the training has multiplied and added so far: some families do more in a step.",
        _arithmetic,
    ),
    "seconds": (
        "Quality against time",
        "Texts written together, at temperature 1. Lower is closer to text; the dotted line is how far as much "
        "held-out text is from the rest of it.",
        _seconds,
    ),
    "frontier": (
        "What a judge can be made to say",
        "Each line runs over the temperatures, the model's own law at its right end as a rule. Crosses are samplers "
        "without a parameter: low perplexity alone means nothing. Near the star is good.",
        _frontier,
    ),
    "divergence": (
        "What is invented, what is missed",
        "The divergence frontier of n-grams at the middle budget (or the fewest calls that a family needs): nearer the "
        "corner is closer to text.",
        _missed,
    ),
}  # fmt: skip


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write each figure as SVG and PNG into a folder; the SVG of each for the page, by name.

    A comparison without a judge has no frontier.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (_, _, act) in FIGURES.items():
        if name == "frontier" and results["yardsticks"]["held-out text"]["judged"] is None:
            continue
        light = _Plot(LIGHT, results)
        act(light)
        light.png(folder / f"{name}.png")
        named = _Plot(NAMED, results)
        act(named)
        svg = named.svg()
        found[name] = _for_page(svg, name)
        for there, here in zip(_colours(NAMED), _colours(LIGHT), strict=True):
            svg = svg.replace(there, here)
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    return found


def _colours(palette: Palette) -> list[str]:
    return [palette.ink, palette.muted, palette.grid, palette.paper, *palette.families]


def _for_page(svg: str, name: str) -> str:
    """An SVG as part of the page: its colours are the page's, its ids its own, its letters the page's."""
    svg = svg[svg.index("<svg") :]
    roles = ["ink", "muted", "grid", "paper", *(f"family-{i}" for i in range(len(INKS)))]
    for colour, role in zip(_colours(NAMED), roles, strict=True):
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("'DejaVu Sans'", "inherit")
    return re.sub(
        r'<svg([^>]*?) width="[^"]*"', r'<svg\1 role="img"', re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    )
