"""The pages of docs/ that show commands and code: every one is run, or marked ```text; what they name exists."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from textdiffusion.commands.cli import main
from textdiffusion.families import names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The others have tests of their own.
PAGES = [DOCS / f"{name}.md" for name in ("start", "scaling", "troubleshooting", "ecosystem")]
PAGES += sorted((DOCS / "families").glob("*.md"))
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. Once upon a time, "
SETUP = ("make ", "source ", "pip ")
SMALL = "--depth 1 --length 24 --steps 2 --set training.batch=4 --set network.width=16 --set network.heads=1"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.partition("  #")[0].strip() for body in blocks(page, "bash") for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith((*SETUP, "#"))]


def quickly(command: str) -> list[str]:
    """The same command with next to nothing to learn, and few calls."""
    if command.startswith("textdiffusion train") and "--resume" not in command and "--dry-run" not in command:
        small = "--steps 2 --set training.batch=4" if "--init-from runs/" in command else SMALL  # its shape is kept
        command = re.sub(r"--(minutes|steps|depth|length) [\d.]+", "", command) + " " + small
    if command.startswith("textdiffusion eval"):
        command = re.sub(r"--eval-tokens \d+", "--eval-tokens 60", command)
    return shlex.split(command)[1:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text and the runs that pages take for granted."""
    home = tmp_path_factory.mktemp("docs")
    (home / "my.txt").write_text(TEXT * 60)
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()):
        assert main(quickly("textdiffusion train --data my.txt --out runs/mine")) == 0
    return home


# What pages show of a family differs in its name: one of them, and the others where minutes may be spent.
LATER = [
    pytest.param(page, marks=pytest.mark.slow)
    for page in PAGES
    if page.parent.name == "families" and page.stem != "masked"
]
SOONER = [page for page in PAGES if page.parent.name != "families" or page.stem == "masked"]


@pytest.mark.parametrize("page", [*SOONER, *LATER], ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    found = commands(page)
    assert found
    for command in found:
        if "tensorboard" in command:
            pytest.importorskip("tensorboard")
        if "--out runs/mine " in command:
            continue  # made already
        assert main(quickly(command)) == 0, (command, capsys.readouterr().err)


@pytest.mark.parametrize("page", [DOCS / "ecosystem.md"], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, home, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(home)
    for body in blocks(page, "python"):
        exec(compile(body, page.name, "exec"), {})


def test_from_noise_to_text_in_a_hundred_lines(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    program = "\n".join(blocks(DOCS / "learn.md", "python"))
    lines = [line for line in program.splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert 50 <= len(lines) <= 100, len(lines)
    shown: dict[str, object] = {}
    program = program.replace('data="my.txt", steps=20', f'data="my.txt", steps=2, settings={SMALL.split()[7::2]!r}')
    exec(compile(program, "learn.md", "exec"), shown)
    out = capsys.readouterr().out
    # It learns: what it claims of itself is far below the price of a character at random, log2 of 17.
    assert shown["bits"] < 1.5, out
    assert len(shown["sample"]) == 24 and "_" not in shown["sample"] + shown["filled"]
    assert shown["filled"].startswith("the cat ") and shown["filled"].endswith(" on the mat. ")
    assert "t = 1.0  " + "_" * 24 in out


def test_every_family_has_its_page():
    assert {page.stem for page in (DOCS / "families").glob("*.md")} == set(names())


@pytest.mark.parametrize("name", names())
def test_the_code_and_the_tests_that_a_page_names_exist(name):
    text = (DOCS / "families" / f"{name}.md").read_text(encoding="utf-8")
    code, proofs = re.findall(r"`([\w/]+\.py):([\w.]+)`", text), re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(code) >= 3 and len(proofs) >= 3
    for path, symbol in code:
        assert symbol in defined(ROOT / "src/textdiffusion" / path), f"{path}:{symbol}"
    for path, test in proofs:
        assert test in defined(ROOT / "tests" / path), f"{path}::{test}"


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and those within classes as Class.name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_modules_that_pages_name_exist():
    source = ROOT / "src/textdiffusion"
    folders = "|".join(path.parent.name for path in source.glob("*/__init__.py"))
    named = re.compile(rf"`((?:{folders})(?:\.\w+)+\.[A-Z]\w*)`")
    found = {name for page in DOCS.rglob("*.md") for name in named.findall(page.read_text(encoding="utf-8"))}
    assert len(found) >= 2
    for name in found:
        module, symbol = name.rsplit(".", 1)
        assert symbol in defined(source / (module.replace(".", "/") + ".py")), name


def test_links_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
