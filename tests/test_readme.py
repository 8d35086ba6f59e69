"""Everything that README.md shows is executed: its commands, its Python, its claims about files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from textdiffusion.commands.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
# Commands that set up a machine, or that this very test run is part of.
SETUP = ("make ", "pip ", "python -m venv", "git ")


def quickly(command: str) -> str:
    """The same command with less to learn: a budget of seconds, and a network of thousands."""
    if command.startswith("textdiffusion demo"):
        return command + " --minutes 0.05"
    if command.startswith("textdiffusion train") and "--resume" not in command and "--dry-run" not in command:
        command = re.sub(r"--(minutes|steps) [\d.]+", "", command)
        return command + " --steps 20 --set training.batch=8 --depth 1"
    return command


def serves(command: str, folder: Path, environment: dict[str, str]) -> None:
    """A command that serves a page: it answers, and ends with Ctrl-C."""
    server = subprocess.Popen(
        shlex.split(command), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a test run in the background ignores
    )  # fmt: skip
    patience = threading.Timer(300, server.kill)
    patience.start()
    try:
        line = server.stdout.readline()
        assert "http://127.0.0.1:" in line, (line, server.poll())
        for _ in range(1000):  # until the page itself has taken over from the one that says what is being loaded
            with urllib.request.urlopen(line.split()[4]) as answer:
                page = answer.read()
            assert b"textdiffusion" in page
            if b"gradio" in page:
                break
            time.sleep(0.25)
        assert b"gradio" in page
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        patience.cancel()
        server.kill()


def test_the_minute_of_use_runs_as_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(
        "It was a bright cold day in April, and the clocks were striking thirteen. Once upon a time, " * 400
    )
    (tmp_path / "books").mkdir()
    for name, line in (("war", "The prince rode out to the army. "), ("tales", "Once there was a little cat. ")):
        (tmp_path / "books" / f"{name}.txt").write_text(line * 200)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    ran = 0
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, body in BLOCKS:
        if language == "python":
            body = body.replace("minutes=5", "steps=20, depth=1")
            result = subprocess.run(
                [sys.executable, "-c", body], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
            )
            assert result.returncode == 0, (body, result.stderr)
            ran += 1
        elif language == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                command = line.partition("  #")[0].strip()
                if not command.startswith("textdiffusion"):
                    assert not command or command.startswith((*SETUP, "#", "source", ".venv")), command
                    continue
                if command.startswith("textdiffusion ui"):
                    serves(command, tmp_path, environment)
                    continue
                # In this process, which has torch already: of thirty commands that is half the time.
                assert main(shlex.split(quickly(command))[1:]) == 0, (command, capsys.readouterr().err)
                ran += 1
    assert ran >= 6


def test_what_the_readme_names_exists():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"README links to {link}, which is not there"
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in ci and "make test" in README
