"""docs/samplers.md, docs/samplers.svg and what `--sampler auto` reads, made from benchmarks/samplers.json alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Of the entropy of as much held-out text: what writes less varied text is not compared, however well it reads.
MATCHED = 0.98
HEAD = """# Samplers

What a sampler is for is the best text for a number of network calls. `textdiffusion families NAME` lists those of a
family, `--sampler` takes one, `--calls` the budget, and `--grid` says where the calls stand between noise and text.
With `--sampler auto`, the default, the one that was measured to write best at about so many calls a token is taken, and
with `--grid auto` the run's own grid, the optimal one if it holds it, unless on another it wrote clearly better.

| sampler | noise | what it does |
|---|---|---|
| `random` | hiding, blocks | exact numbers of random positions; has a bound for every number of calls |
| `first_hitting` | hiding | one random position a call, so always as many calls as positions (2409.02908) |
| `ancestral` | hiding | each position on its own, as the reversed noise says; has a bound |
| `remask`, `psi` | hiding; `psi` any | ancestral, and a share is drawn anew, by one rule (2503.00307, 2602.21185) |
| `margin`, `confidence` | hiding, blocks | where the best token leads most, or is surest; exact likelihood |
| `entropy` | hiding | as many of the least entropy as a limit on its sum allows (2505.24857); the same |
| `threshold` | hiding | those surer than a threshold that rises with their number (2505.22618); the same |
| `dilated` | hiding | evenly spaced positions, first coarsely, then between them (2506.19037); the same |
| `spread` | hiding | those of least entropy, no two of a call near to each other; the same |
| `bridge`, `tweedie` | replacing | the reversed chain; has a bound |
| `gibbs` | replacing | some positions are drawn anew given all others |
| `euler` | replacing | jumps by rates |
| `ancestral`, `ddim`, `dpm`, `churn` | Gaussian | the chain (has a bound); the flow; to second order; noised |
| `bridge` | Gaussian | the chain by drawn tokens, not their mean; can be held to a pattern |

`entropy` and `threshold` set their limit in every call so that, were the doubts to stay as they are, the calls that are
left would do: they make as many calls as they are asked for. Where positions follow from what is written by a rule, a
text comes about in one way only, and `textdiffusion eval RUN --sampler margin --calls 16` gives its exact likelihood
(DUEL, 2603.01367), at as many calls a window as writing it takes.

Temperature, `--top-p` and `--top-k` act on what all *other* positions say of a token, where noise replaces tokens;
what a family remembers of a call is what it predicted, before any of these. Where a network says the mean of a code
itself (plain bits, real targets), the mean of a move is of no law, and they act on the last call alone.

## Grids

`time` is even in the process's own time, `rate` in the share of noise, `log_snr` in log(signal / noise); `quadratic`
and `cosine` are known from elsewhere. `optimal` follows from what a token costs at each noise level, which is measured
at the end of training and kept in the run (`textdiffusion eval RUN --keep-grid` measures it again): the numbers of
positions to reveal for which the expected divergence from one position a call, sum_k m_k curve(n_k) - sum_n curve(n),
is least (2510.25544), by dynamic programming; for the other families, equal parts of the entropy. It is the default
where a run holds it. It is fitted, as the weights that are kept are chosen, on 8,192 held-out tokens, with noise
of its own: a bound on that grid is a bound, but on those windows a slightly flattered one (`--split test` has text that
nothing was chosen on, where a run's data has such a part).
"""


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose text is as varied as held-out text; all, if none is."""
    return [r for r in rows if r["entropy"] >= MATCHED * r["real_entropy"]] or list(rows)


def clear(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the judge's figures are two standard errors of their difference apart."""
    return bool(abs(one["judge"] - other["judge"]) >= 2 * (one["judge_error"] ** 2 + other["judge_error"] ** 2) ** 0.5)


def recommended(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """For each family and budget the sampler of lowest judged bits/char among those compared, and its grid: "auto", the
    run's own, unless one on another grid is clearly ahead."""
    out: dict[str, list[dict[str, Any]]] = {}
    for family in sorted({r["family"] for r in found["rows"]}):
        rows = [r for r in found["rows"] if r["family"] == family]
        own = rows[0]["grid"]  # cases begin with it
        for budget in sorted({r["calls"] for r in rows}):
            some = [r for r in rows if r["calls"] == budget]
            if len(some) < 2:
                continue  # nothing to compare
            on_own = [r for r in some if r["grid"] == own]
            best = min(compared(on_own), key=lambda r: r["judge"])
            other = min(compared(some), key=lambda r: r["judge"])
            best = other if other["judge"] < best["judge"] and clear(other, best) else best
            out.setdefault(family, []).append(
                {
                    "calls_a_token": budget / best["length"], "sampler": best["sampler"],
                    "grid": "auto" if best["grid"] == own else best["grid"], "judge": round(best["judge"], 3),
                }
            )  # fmt: skip
    return out


def write_up(found: dict[str, Any]) -> str:
    """The page."""
    best, parts = recommended(found), [HEAD, "## Measured\n"]
    parts.append(
        f"Text: {found['text']}. The judge is an {found['judge']} run of the same text, in bits/char; words are those "
        "of the book; entropy and divergence (Jensen-Shannon) are of the trigrams of characters, in bits, beside as "
        "much held-out text; seconds are of the processor, a text, on one busy core. `auto` is the sampler of lowest "
        f"judged bits/char among those whose entropy is at least {MATCHED:.0%} of that of held-out text (all, if none "
        "is), on another grid than the run's own only if two standard errors ahead, at temperature 1: **bold** where "
        "it is two standard errors ahead of all others, *slanted* where it is "
        "level with some, which would have done as well. It was chosen and is shown on the same texts of one run a "
        "family, so it is flattered; further than a factor of two from what was measured, `auto` is its first. "
        "So few texts have a divergence of their own, as that of held-out text from other held-out text shows. "
        "`python benchmarks/samplers.py RUN ... --judge RUN` measures this, and goes "
        "on where it was stopped; what is not in a table has not been measured, and a dash "
        "in the last column stands where no likelihood is known, or it has not been.\n\n"
        "![quality against calls](samplers.svg)\n"
    )
    for run in dict.fromkeys(r["run"] for r in found["rows"]):
        rows = [r for r in found["rows"] if r["run"] == run]
        length, likes = rows[0]["length"], found["likelihoods"].get(run, {})
        real = found["held_out"][run]
        parts.append(
            f"### `{rows[0]['family']}`, windows of {length}, {found['steps'][run]:,} steps\n\n"
            f"Held-out text itself, {real['texts']} texts: "
            f"{real['valid_words']:.1%} of the words, {real['judge']:.2f} judged bits/char, entropy "
            f"{real['entropy']:.2f}, divergence {real['divergence']:.3f}.\n\n"
            "| calls | sampler | grid | texts | words that occur | judge | entropy | "
            "divergence | seconds | bits/char at so many calls |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        lines = []
        for r in sorted(rows, key=lambda r: (r["calls"], r["judge"])):
            like = likes.get(f"{r['sampler']} {r['grid']} {r['calls']}")
            bound = "-" if like is None else f"{'<= ' if like[2] == 'upper' else ''}{like[0]:.3f} +- {like[1]:.3f}"
            auto = [b for b in best.get(r["family"], []) if b["calls_a_token"] == r["calls"] / length]
            grid, name = "auto" if r["grid"] == rows[0]["grid"] else r["grid"], f"`{r['sampler']}`"
            if any((b["sampler"], b["grid"]) == (r["sampler"], grid) for b in auto):
                others = [o for o in rows if o["calls"] == r["calls"] and o is not r]
                name = f"**{name}**" if all(clear(r, o) for o in others) else f"*{name}*"
            lines.append(
                f"| {r['made']} | {name} | {r['grid']} | {r['texts']} | {r['valid_words']:.1%} +- "
                f"{r['valid_words_error']:.1%} | {r['judge']:.2f} +- {r['judge_error']:.2f} | {r['entropy']:.2f} | "
                f"{r['divergence']:.3f} | {r['seconds']:.2f} | {bound} |"
            )
        parts[-1] += "\n" + "\n".join(lines) + "\n"
    return "\n".join(parts)


def plot(found: dict[str, Any], path: Path) -> None:
    """Judged bits/char and words that occur, against calls and against seconds, for every run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "textdiffusion"
    from matplotlib import pyplot

    best, runs = recommended(found), list(dict.fromkeys(r["run"] for r in found["rows"]))
    figure, axes = pyplot.subplots(len(runs), 3, figsize=(13, 3.4 * len(runs)), squeeze=False)
    for row, run in zip(axes, runs):
        rows = [r for r in found["rows"] if r["run"] == run]
        own = rows[0]["grid"]
        for name in dict.fromkeys(r["sampler"] for r in rows):
            some = sorted((r for r in rows if r["sampler"] == name and r["grid"] == own), key=lambda r: r["calls"])
            for axis, x, y in zip(row, ("made", "made", "seconds"), ("judge", "valid_words", "judge")):
                axis.plot([r[x] for r in some], [r[y] for r in some], marker="o", markersize=3, label=name)
        chosen = best.get(rows[0]["family"], [])
        auto = [
            r for b in chosen for r in rows
            if r["sampler"] == b["sampler"] and r["calls"] == b["calls_a_token"] * r["length"]
            and r["grid"] == (own if b["grid"] == "auto" else b["grid"])
        ]  # fmt: skip
        for axis, x, y in zip(row, ("made", "made", "seconds"), ("judge", "valid_words", "judge")):
            axis.plot([r[x] for r in auto], [r[y] for r in auto], color="black", linestyle="--", label="auto")
        for axis, x, y in zip(
            row, ("calls", "calls", "seconds a text"), ("judged bits/char", "words", "judged bits/char")
        ):
            axis.set(xlabel=x, ylabel=y, title=rows[0]["family"])
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        row[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_page(summary: Path, root: Path) -> None:
    """All three, from the file of what was measured."""
    found = json.loads(summary.read_text(encoding="utf-8"))
    assert all(math.isfinite(r["judge"]) for r in found["rows"])
    (root / "docs" / "samplers.md").write_text(write_up(found), encoding="utf-8")
    body = {
        "criterion": "lowest judged bits/char at matched entropy; docs/samplers.md",
        "recommended": recommended(found),
    }
    table = root / "src" / "textdiffusion" / "sampling" / "recommended.json"
    table.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    plot(found, root / "docs" / "samplers.svg")
