"""The page's tables: every figure, with what it is, and what is suspicious about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from textdiffusion.compare.verdict import by_likelihood

Swatch = Callable[[Mapping[str, Any], str], str]
SIGN = {"exact": "", "upper": "≤ ", "none": "~ "}
# How far from held-out text a figure may be before it is marked: shares, and bits of entropy.
SHARE, BITS = 0.05, 0.5


def _cell(text: str, mark: str = "", title: str = "") -> str:
    kind = f' class="{mark}"' if mark else ""
    hint = f' title="{escape(title)}"' if title else ""
    return f"<td{kind}{hint}>{text}</td>"


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<div class="scroll panel {kind}" tabindex="0"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10<sup>{int(exponent)}</sup>"


def _plus(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" <small>± {error:.{digits}f}</small>")


def main_table(results: Mapping[str, Any], swatch: Swatch) -> str:
    """A row a family: likelihood, perplexity, hidden tokens, time, and bits per character at each budget."""
    budgets = results["plan"]["calls"]
    rows_of = results["rows"]
    first = next(iter(rows_of.values()))["speed"]["tokens"]
    at = {budget: {p.family: p for p in by_likelihood(results, budget).places} for budget in budgets}
    best = {budget: min((p.figure for p in places.values()), default=None) for budget, places in at.items()}
    rows = []
    for name, row in rows_of.items():
        like, learnt, speed, guess = row["likelihood"], row["training"], row["speed"], row["accuracy"]
        sign = SIGN[like["kind"]]
        cells = [
            f'<th scope="row">{swatch(results, name)}</th>',
            _cell(f"{learnt['parameters'] / 1e6:.2f} M <small>parameters</small>"),
            _cell(f"{learnt['steps']:,} <small>in {learnt['seconds'] / 60:.1f} min</small>"),
            _cell(_power(learnt["flops"])),
            _cell(sign + _plus(like["bits_per_char"], like["standard_error"], 3)),
            _cell(f"{sign}{2 ** like['bits_per_token']:.2f}"),
            _cell(
                f"{guess['accuracy']:.1%} <small>± {guess['standard_error']:.1%}</small>", "", f"sees {guess['seen']}"
            ),
            _cell(f"{speed['seconds']:.3g} s <small>{speed['calls']} calls</small>"),
        ]
        for budget in budgets:
            place = at[budget].get(name)
            if place is None:
                cells.append(_cell("–", "", by_likelihood(results, budget).unable.get(name, "")))
            else:
                top = "top" if place.figure == best[budget] else ""
                cells.append(_cell(SIGN[place.kind] + _plus(place.figure, place.error, 3), top, f"{place.calls} calls"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = ["family", "size", "steps", "FLOPs of training", "bits/char, many calls", "perplexity a token",
            "hidden tokens guessed", f"one text of {first} tokens"]  # fmt: skip
    head += [f"bits/char, {budget} calls" for budget in budgets]
    least = min(row["likelihood"]["windows_for_calls"] for row in rows_of.values())
    windows = results["protocol"]["held_out"]["windows"]
    fewer = (
        f" Where a step remembers the one before, bounds for T calls are measured on fewer windows, {least:,} at the "
        f"least of {windows:,}, at the cost of the others'."
        if least < windows
        else ""
    )
    return (
        "<section><h2>All families</h2>"
        "<p>Bits per character and perplexity are exact where no sign stands before them. Hidden tokens are guessed in "
        "one call, where the state says nothing of them: from a random half of the window, or, from left to right, "
        "from what stands before; so those two kinds of accuracy are not one measure.</p>"
        + _table(head, rows, "stacked")
        + f'<p class="note">In green the best of a column; ± is one standard error over windows.{fewer}</p></section>'
    )


def samples_table(results: Mapping[str, Any], swatch: Swatch) -> str:
    """What samples are like, every figure beside those that show how it may have come about."""
    middle = results["plan"]["calls"][len(results["plan"]["calls"]) // 2]
    text = results["yardsticks"]["held-out text"]
    judged = text["judged"] is not None
    head = ["texts", "calls", "n-gram divergence", "words that are words", "entropy of words, bits", "distinct 2-grams",
            "repeated 2-grams", f"copied runs of {text['copy_length']}"]  # fmt: skip
    head += ["generative perplexity"] if judged else []
    rows = []
    for name, row in results["rows"].items():
        for budget, body in row["samples"]["by_calls"].items():
            # The middle budget; of families that need more, the first that they can do with.
            if body and (int(budget) == middle or not row["samples"]["by_calls"][str(middle)]):
                rows.append(
                    f"<tr><th scope='row'>{swatch(results, name)}</th>{_described(body, body['calls'], text)}</tr>"
                )
                break
    for number, (name, body) in enumerate(results["yardsticks"].items()):
        kind = "yardstick first-yardstick" if number == 0 else "yardstick"
        label = f"{escape(name)}<br><small>{escape(body['what'])}</small>"
        rows.append(f"<tr class='{kind}'><th scope='row'>{label}</th>{_described(body, None, text)}</tr>")
    judge = (
        f" Generative perplexity is that of {escape(str(results['protocol']['judge']))}: it falls for whoever writes "
        "less, and the three samplers without a parameter get it low by copying or repeating, so it is no measure "
        "alone."
        if judged
        else ""
    )
    return (
        "<section><h2>What the samples are like</h2>"
        f"<p>{results['plan']['samples']} texts of each family, at temperature 1, at the middle budget or the fewest "
        f"calls that it needs.{judge}</p>"
        + _table(head, rows)
        + f'<p class="note">In red what is further from held-out text than {SHARE:.0%} of words, n-grams or runs, or '
        f"{BITS} bits of entropy, on the side of samplers without merit; or a perplexity below that of held-out text."
        "</p></section>"
    )


def _described(body: Mapping[str, Any], calls: int | None, text: Mapping[str, Any]) -> str:
    def flag(bad: bool) -> str:
        return "flag" if bad else ""

    law = body["divergence"]
    cells = [
        _cell("" if calls is None else f"{calls} <small>{escape(body['sampler'])}</small>"),
        _cell(_plus(law["integral"], law["standard_error"], 3)),
        _cell(f"{body['valid_words']:.1%}", flag(body["valid_words"] < text["valid_words"] - SHARE)),
        _cell(f"{body['entropy']:.2f}", flag(body["entropy"] < text["entropy"] - BITS)),
        _cell(f"{body['distinct']['2']:.2f}", flag(body["distinct"]["2"] < text["distinct"]["2"] - SHARE)),
        _cell(f"{body['repetition']['2']:.1%}", flag(body["repetition"]["2"] > text["repetition"]["2"] + SHARE)),
        _cell(f"{body['copied']:.1%}", flag(body["copied"] > text["copied"] + SHARE)),
    ]
    if text["judged"] is not None:
        nats = body["judged"]
        low = nats["nats_a_token"] < text["judged"]["nats_a_token"] - 2 * nats["standard_error"]
        cells.append(_cell(f"{nats['perplexity']:.3g}", flag(low)))
    return "".join(cells)


def control_table(results: Mapping[str, Any], swatch: Swatch) -> str:
    """Gaps filled exactly, and texts held to contain a word."""
    rows, word = [], None
    for name, row in results["rows"].items():
        fill, held, samples = row["control"]["infilling"], row["control"]["held"], row["samples"]
        word = samples["word"]
        middle = str(results["plan"]["calls"][len(results["plan"]["calls"]) // 2])
        free = next((b for b in (samples["by_calls"][middle], *samples["by_calls"].values()) if b), None)
        chance = "–" if free is None or "contain_word" not in free else f"{free['contain_word']:.0%}"
        cells = [
            f'<th scope="row">{swatch(results, name)}</th>',
            _cell(f"{fill['exact']:.1%} <small>± {fill['standard_error']:.1%}</small>"),
            _cell(fill["seen"]),
            _cell(chance),
        ]
        if held is None:
            cells += [_cell("cannot", "", row["control"]["why_not"] or "no word to ask for"), _cell("–"), _cell("–")]
        else:
            law, free_law = held["divergence"]["integral"], free["divergence"]["integral"] if free else None
            cells += [
                _cell(f"{held['satisfied']:.0%}", "top" if held["satisfied"] == 1 else "flag"),
                _cell(f"{held['valid_words']:.1%}"),
                _cell(f"{law:.3f}" + ("" if free_law is None else f" <small>free {free_law:.3f}</small>")),
            ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    fill = next(iter(results["rows"].values()))["control"]["infilling"]
    asked = f" Texts are held to contain “{escape(word)}”, a common word of the text." if word else ""
    head = ["family", f"gaps of {fill['tokens']} tokens filled word for word", "seeing", "the word is there, unasked",
            "asked", "words that are words", "n-gram divergence"]  # fmt: skip
    return (
        f"<section><h2>Control</h2><p>{fill['gaps']} gaps in held-out text are filled at temperature 0. A family from "
        f"left to right sees only what stands before the gap.{asked}</p>" + _table(head, rows) + "</section>"
    )
