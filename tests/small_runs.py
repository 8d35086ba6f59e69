"""Runs that cost nothing: a network as it is before training, a tokenizer of a sentence or two, and a card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import textdiffusion as td
from textdiffusion.presets import configure
from textdiffusion.run import Run, build
from textdiffusion.text.data import Corpus
from textdiffusion.text.tokenizer import build as build_tokenizer
from textdiffusion.training.card import write_card
from textdiffusion.ui.loaded import Loaded

TEXT = "It was a bright cold day in April, and the clocks were striking 13; The_\\ first of xyz!\n"


def small_run(path: Path, family: str, length: int, tokenizer: str = "char") -> Loaded:
    """A run directory with an untrained network of one block, loaded."""
    symbols = build_tokenizer(tokenizer, [TEXT])
    settings = ["network.width=32", "network.heads=2"]
    config = configure(family=family, length=length, depth=1, steps=1, tokenizer=tokenizer, settings=settings)
    config = replace(config, vocabulary=symbols.vocabulary, start=symbols.end_of_text)
    run = Run.create(path, config, symbols)
    run.save_weights(build(config).network.state_dict())
    for step in (1, 2):
        run.log({"step": step, "seconds": 60.0 * step, "bits_per_char": 7.0 - step})
    write_card(run, 5.0, 2, 120.0, Corpus("a sentence", [TEXT], [TEXT]))
    return Loaded(path.name, path, td.load(path, "cpu", "fp32"))
