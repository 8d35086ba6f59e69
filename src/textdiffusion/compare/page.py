"""The report as one HTML file that needs nothing else: no network, no script; light or dark, as its reader likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from textdiffusion.compare.figures import BASELINE, FIGURES, looks
from textdiffusion.compare.plan import read_plan
from textdiffusion.compare.tables import control_table, main_table, samples_table
from textdiffusion.compare.verdict import Place, Ranking, by_likelihood, by_samples, lead

SHOWN = 240  # characters of a sample on the page


def page(results: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """The page of results as results.json holds them, with the plots' SVG by name."""
    plan, protocol = read_plan(results["plan"], "results.json"), results["protocol"]
    facts = [
        protocol["text"].rpartition("/")[2], f"{protocol['training_tokens']:,} tokens to learn from",
        f"{plan.tokenizer} tokenizer, {protocol['vocabulary']:,} tokens",
        f"windows of {plan.length} tokens", f"networks of {plan.depth} block{'s' * (plan.depth > 1)}",
        f"{plan.budget} each", protocol["machine"]["processor"],
    ]  # fmt: skip
    css = files("textdiffusion.compare").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{_number(len(results['rows']))} families of language model, side by side"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="generator" content="textdiffusion compare">',
        f"<title>{escape(title)}</title><style>{css}</style></head><body><main>",
        f"<header><h1>{escape(title)}</h1>",
        '<p class="lead">Trained on the same text, with the same tokenizer, the same network and the same budget, and '
        "measured alike.</p>",
        f'<ul class="chips">{"".join(f"<li>{escape(str(fact))}</li>" for fact in facts)}</ul></header>',
        _verdict(results),
        main_table(results, _swatch),
        _figures(plots),
        samples_table(results, _swatch),
        _texts(results),
        control_table(results, _swatch),
        _protocol(results),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _number(n: int) -> str:
    words = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]
    return words[n] if n < len(words) else str(n)


def _colour(results: Mapping[str, Any], family: str) -> str:
    number = looks(list(results["rows"])).get(family)
    return f"--c: var(--family-{'baseline' if number is None else number})"


def _swatch(results: Mapping[str, Any], family: str) -> str:
    return f'<i class="swatch" style="{_colour(results, family)}"></i>{escape(family)}'


# -- which family -------------------------------------------------------------------------------------------------


def _verdict(results: Mapping[str, Any]) -> str:
    cards = []
    for budget in results["plan"]["calls"]:
        likelihood, samples = by_likelihood(results, budget), by_samples(results, budget)
        cards.append(
            f'<article class="card panel"><h3><b>{budget}</b>network call{"s" * (budget > 1)} a text, at most</h3>'
            + _question(results, "Which predicts held-out text best?", likelihood, "bits/char", 3)
            + _question(results, "Which writes most like it?", samples, "of n-gram divergence", 3)
            + "</article>"
        )
    return (
        "<section><h2>Which family to take</h2>"
        "<p>Lower is better throughout. Each family makes as many calls as it can within the budget. The line "
        "about each dot spans two standard errors to either side; a lead within two standard errors of the difference "
        "is called level; that error is taken over the same windows, and is often smaller than the lines suggest. "
        ' <span class="note">≤ is an upper bound: the family reaches at least that. Divergence is from '
        "0, as text, to 1, nothing in common.</span></p>"
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _question(results: Mapping[str, Any], ask: str, ranking: Ranking, unit: str, digits: int) -> str:
    body = [f'<div class="question"><p class="ask">{ask}</p>']
    if ranking.places:
        body.append(f'<p class="take">{_swatch(results, ranking.places[0].family)}</p>')
        words = lead(ranking, unit, digits)
        words = words[0].upper() + words[1:]
        body.append(f'<p class="why">{escape(words)}.{_infiller(ranking, digits)}{_words(results, ranking)}</p>')
        body.append(_dots(results, ranking.places, digits))
    else:
        body.append('<p class="take">None of them</p>')
    if ranking.unable:
        why: dict[str, list[str]] = {}
        for name, reason in ranking.unable.items():
            why.setdefault(reason, []).append(name)
        out = "; ".join(f"{', '.join(names)} {reason}" for reason, names in why.items())
        body.append(f'<p class="unable">Not among them: {escape(out)}.</p>')
    return "".join(body) + "</div>"


def _words(results: Mapping[str, Any], ranking: Ranking) -> str:
    share, text = ranking.places[0].words, results["yardsticks"]["held-out text"]
    return "" if share is None else f" {share:.0%} of its words are words; of held-out text, {text['valid_words']:.0%}."


def _infiller(ranking: Ranking, digits: int) -> str:
    best = ranking.best_infilling
    if best is None or best is ranking.places[0]:
        return ""
    behind = best.figure - ranking.places[0].figure
    return f" To fill gaps too: <b>{escape(best.family)}</b>, {behind:.{digits}f} behind."


def _dots(results: Mapping[str, Any], places: Sequence[Place], digits: int) -> str:
    low = min(p.figure - 2 * p.error for p in places)
    high = max(p.figure + 2 * p.error for p in places)
    scale = 92 / (high - low) if high > low else 0.0
    rows = []
    for rank, place in enumerate(places):
        at, half = 4 + (place.figure - low) * scale, 2 * place.error * scale
        sign = "≤ " if place.kind == "upper" else ""
        note = f"{place.calls} calls made" + ("" if place.seconds is None else f", {place.seconds:.3g} s a text")
        rows.append(
            f'<span class="name{" best" * (rank == 0)}">{escape(place.family)}</span>'
            f'<span class="track" style="{_colour(results, place.family)}">'
            f'<i class="whisker" style="left:{max(at - half, 0):.1f}%;width:{2 * half:.1f}%"></i>'
            f'<i class="dot" style="left:{at:.1f}%"></i></span>'
            f'<span class="value{" best" * (rank == 0)}" title="{escape(note)}">{sign}{place.figure:.{digits}f}</span>'
        )
    return f'<div class="plot">{"".join(rows)}</div>'


# -- plots and texts ----------------------------------------------------------------------------------------------


def _figures(plots: Mapping[str, str]) -> str:
    drawn = "".join(
        f'<figure class="panel"><figcaption><b>{escape(FIGURES[name][0])}</b>{escape(FIGURES[name][1])}</figcaption>'
        f"{svg}</figure>"
        for name, svg in plots.items()
    )
    return f'<section><h2>Curves</h2><div class="figures">{drawn}</div></section>'


def _texts(results: Mapping[str, Any]) -> str:
    columns = []
    for budget in results["plan"]["calls"]:
        body = [f'<section class="panel"><h3>{budget} calls</h3>']
        for name, row in results["rows"].items():
            found = row["samples"]["by_calls"][str(budget)]
            if found is None:
                needs = f": cannot; needs {row['samples']['fewest_calls']} calls"
                body.append(f'<div class="by unable-here">{_swatch(results, name)}{needs}</div>')
                continue
            made = f": {escape(found['sampler'])}" + (
                "" if found["calls"] == budget else f", {found['calls']} calls made"
            )
            body.append(f'<div class="by">{_swatch(results, name)}{made}</div>')
            for text in found["texts"][:2]:
                cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
                body.append(f'<div class="text" style="{_colour(results, name)}">{escape(cut)}</div>')
        columns.append("".join(body) + "</section>")
    return (
        "<section><h2>Samples side by side</h2><p>The first two texts of each, at temperature 1: drawn from the same "
        f'seed, and not chosen.</p><div class="texts">{"".join(columns)}</div></section>'
    )


# -- protocol -----------------------------------------------------------------------------------------------------


def _processes(rows: Mapping[str, Any]) -> str:
    """How many processes worked at the families at the same time."""
    numbers = sorted({row["training"].get("processes", 1) for row in rows.values()})
    if numbers == [1]:
        return "1"
    return (
        f"{' or '.join(map(str, numbers))}, each at a family of its own; on one machine they share its processors, so "
        "that minutes of training and seconds for a text in a batch depend on what the others did; a text written by "
        "itself is timed while they wait"
    )


def _protocol(results: Mapping[str, Any]) -> str:
    protocol, held = results["protocol"], results["protocol"]["held_out"]
    facts = {
        "text": f"{protocol['text']} (fingerprint {protocol['fingerprint']}); {protocol['provenance']}",
        "tokenizer": protocol["tokenizer"],
        "packing": protocol["packing"],
        "held out": f"{held['tokens']:,} tokens in {held['windows']:,} windows; {held['reading']}",
        "bounds": protocol["bounds"],
        "time sampling": protocol["time_sampling"],
        "samplers": protocol["samplers"],
        "network calls": protocol["calls"],
        "sampling precision": protocol["sampling_precision"],
        "training precision": ", ".join(protocol["training_precision"]),
        "processes": _processes(results["rows"]),
        "seeds": ", ".join(f"{name} {seed}" for name, seed in protocol["seeds"].items()),
        "judge": protocol["judge"] or "none",
        "most that measuring a family may take": ", ".join(
            f"{number:,} {name.replace('_', ' ')}" for name, number in results["cost"].items()
        ),
    } | protocol["machine"]
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    settings = "".join(
        f"<dt>{escape(name)}</dt><dd>"
        + "<br>".join(
            f"{part}: {escape(', '.join(f'{k} {v}' for k, v in row['training'][part].items()) or 'as it comes')}"
            for part in ("network", "process", "settings")
        )
        + "</dd>"
        for name, row in results["rows"].items()
    )
    baseline = BASELINE in results["rows"]
    return (
        "<section><h2>How it was made</h2><p>The command; the same page comes from results.json, beside it, with "
        "<code>textdiffusion compare --from results.json</code>, which says what differs.</p>"
        f"<pre>{escape(protocol['command'])}</pre>"
        f"<dl>{rows}</dl><details><summary>Every setting of each run</summary><dl>{settings}</dl></details>"
        + (
            '<p class="note">All networks are alike, also that of the baseline: n-gram embeddings, which '
            "<code>textdiffusion train</code> gives to families from left to right, are left out here.</p>"
            if baseline
            else ""
        )
        + "</section>"
    )
