"""Plots that commands leave behind: what is in them is what was measured, and they can be read light and dark."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from small_runs import small_run
from textdiffusion.commands.cli import main
from textdiffusion.display import plots

pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "masked", "masked", 16).path


def words(path) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter(f"{SVG}text")]


def log(run, count) -> None:
    rows = [
        {"step": 10 * i, "seconds": 6.0 * i, "bits_per_char": 4.0 - i / 10, "standard_error": 0.01, "kind": "upper",
         "sample": f"sample {i} $x$ <&>\n\x1b日" if i % 2 == 0 else None}
        for i in range(1, count + 1)
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"step": 99, "torn')


def test_training_is_drawn_with_its_samples(run):
    log(run, 20)
    found = words(plots.save_training(run))
    assert "bits per character" in found and any("200 took 2.0 minutes" in word for word in found)
    assert any("2.000 at step 200" in word for word in found) and any("upper bound" in word for word in found)
    shown = [word for word in found if "sample " in word]
    assert len(shown) == plots.SAMPLES and "sample 2 $x$ <&>⏎\N{REPLACEMENT CHARACTER}日" in shown[0]
    assert "sample 20" in shown[-1]
    log(run, 1)
    assert plots.save_training(run) is None


def test_fewer_calls_are_drawn_with_what_they_cost(run, capsys):
    arguments = ["eval", str(run), "--device", "cpu", "--data", str(run / "text.txt"), "--samples", "0"]
    (run / "text.txt").write_text("It was a bright cold day in April. " * 20)
    assert main([*arguments, "--calls", "1,4,16", "--json"]) == 0
    out = capsys.readouterr()
    body = json.loads(out.out)
    assert out.err == ""
    text = (run / "calls.svg").read_text()
    found = words(run / "calls.svg")
    assert {"1", "4", "16", "network calls a text", "bits per character"} <= set(found)
    assert any(f"{body['bits_per_char']:.3f} in the limit" in word for word in found)
    assert any("700 characters" in word for word in found)
    # The same measurement gives the same file.
    assert plots.save_calls(body, run).read_text() == text
    assert plots.save_calls(body | {"by_calls": []}, run) is None
    (run / "calls.svg").unlink()
    assert main([*arguments, "--json"]) == 0 and not (run / "calls.svg").exists()


def test_every_colour_has_its_dark_one(run):
    log(run, 4)
    text = plots.save_training(run).read_text()
    light = text[text.index("</style>") :]
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", light))
    assert used <= set(plots.DARK), "a colour that stays light on a dark page"
    assert plots.PAGE in used and plots.INK in used

    def lightness(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear))

    def contrast(a, b):
        bright, dim = sorted((lightness(a), lightness(b)), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    for colour in (plots.INK, plots.SOFT, plots.LINE, plots.BEST):  # WCAG 2.1, AA
        assert contrast(colour, plots.PAGE) >= 4.5
        assert contrast(plots.DARK[colour], plots.DARK[plots.PAGE]) >= 4.5


def test_without_matplotlib_one_line_says_how_to_install_it(run, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(plots, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    (run / "text.txt").write_text("It was a bright cold day. " * 20)
    arguments = ["eval", str(run), "--device", "cpu", "--data", str(run / "text.txt"), "--samples", "0", "--calls", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr()
    assert out.err.count("\n") == 1 and "textdiffusion[viz]" in out.err and not (run / "calls.svg").exists()
    assert main([*arguments, "--json"]) == 0 and capsys.readouterr().err == ""
