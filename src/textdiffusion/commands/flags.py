"""The command line's verbs and flags, and what each is for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from textdiffusion import __version__

DEMO_MINUTES = 2.0


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and flags by their whole names: what is given is looked for by name (cli.py)."""

    def __init__(self, **how: Any):
        super().__init__(**how, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` lists what it takes)\n")


def parser_of(acts: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser; ``acts`` says what each verb does."""
    parser = _Parser(
        prog="textdiffusion",
        description="Diffusion language models: train one, watch it write, infill, evaluate.",
        epilog="New here? `textdiffusion demo` trains a small model in two minutes and shows text appear out of noise.",
    )
    parser.add_argument("--version", action="version", version=f"textdiffusion {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, text: str, json_flag: bool = True) -> Any:
        p = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        p.set_defaults(act=acts[name])
        p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
        if json_flag:
            p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        return p

    def run_of(p: Any) -> None:
        which = "run directory (default: the newest under runs/, or one that comes with the package)"
        p.add_argument("run", nargs="?", type=Path, metavar="RUN", help=which)

    def grid_of(p: Any) -> None:
        grids = "time, rate, log_snr, quadratic, cosine or optimal: where the calls stand between noise and text"
        p.add_argument("--grid", default="auto", help=f"{grids} (default: optimal if the run holds it, else time)")

    p = verb("demo", "train a small model on built-in text and watch it write (about two minutes)", False)
    p.add_argument("--minutes", type=float, default=DEMO_MINUTES, help="minutes of training (default: 2)")
    p.add_argument("--out", type=Path, help="run directory (default: runs/demo)")
    p.add_argument("--seed", type=int, default=0, help="another number, other draws (default: 0)")

    p = verb("train", "train a model")
    p.add_argument("--family", default="masked", help="see `textdiffusion families` (default: masked)")
    p.add_argument("--data", default="pydoc", metavar="pydoc|PATH|hf:NAME",
                   help="built-in text; .txt, .jsonl, .csv, .parquet file, folder or glob; a hub name; what `prepare` "
                   "made, or mix:FOLDER=WEIGHT,...")  # fmt: skip
    p.add_argument("--text-field", default="text", help="field of the text in .jsonl, .csv, .parquet and hub data")
    p.add_argument("--label", metavar="FIELD",
                   help="learn with labels: a field of each record, or file or folder, what it is in")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="RUN", help="run directory (default: a new one under runs/)")
    p.add_argument(
        "--preset", choices=["tiny", "small", "base"], help="size: 3, 6 or 12 blocks (default: what fits the minutes)"
    )
    p.add_argument("--depth", type=int, help="blocks; width, heads and learning rate follow")
    p.add_argument("--tokenizer", default="char", metavar="char|byte|bpe:N|hf:NAME", help="(default: char)")
    p.add_argument("--length", type=int, help="longest text, in tokens (default: 64)")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="optimiser steps")
    budget.add_argument("--minutes", type=float, help="minutes of wall clock (default: 5)")
    p.add_argument("--seed", type=int, default=0, help="another number, other draws (default: 0)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out (default: the newest)")
    p.add_argument("--init-from", metavar="MODEL",
                   help="begin with a run, a published checkpoint, or a model of transformers: "
                        "a folder, a GGUF file, USER/NAME, or smollm2")  # fmt: skip
    p.add_argument("--set", action="append", default=[], metavar="PART.KEY=VALUE", dest="settings",
                   help="any field of network, process, training or data; may be repeated")  # fmt: skip
    p.add_argument("--track", choices=["tensorboard", "wandb"], help="figures there, besides metrics.jsonl")
    p.add_argument("--compile", action="store_true", help="compile the network: half a minute, then faster steps")
    p.add_argument("--parallel", choices=["auto", "ddp", "fsdp"], default="auto",
                   help="over the processes that torchrun starts: whole networks (ddp), or shards (default: auto, "
                   "ddp where a GPU can hold it)")  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="say what would be trained, and train nothing")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="of the dry run: on so many GPUs or machines")

    p = verb("prepare", "tokenize a corpus of any size into shards that `train --data` reads, by several processes")
    p.add_argument("source", metavar="SRC", help="what `train --data` takes: files, a folder, a glob, or hf:NAME")
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder; or one that was begun, to finish or mend it")
    p.add_argument("--tokenizer", default="bpe:8192", metavar="char|byte|bpe:N|hf:NAME", help="(default: bpe:8192)")
    p.add_argument("--text-field", default="text", help="field of the text in .jsonl, .csv, .parquet and hub data")
    p.add_argument("--validation-share", type=float, default=0.01, help="held out (default: 0.01)")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core)")

    p = verb("sample", "write text")
    run_of(p)
    p.add_argument("-n", type=int, default=4, help="texts (default: 4)")
    p.add_argument("--length", type=int, help="tokens (default: the training window)")
    p.add_argument("--calls", type=int, metavar="T", help="network calls a text (default: one a token, the best)")
    p.add_argument("--sampler", default="auto",
                   help="auto, the best measured, or a name from `textdiffusion families NAME`")  # fmt: skip
    grid_of(p)
    p.add_argument("--set", action="append", default=[], metavar="process.KEY=VALUE", dest="settings",
                   help="a field that a sampler goes by, as process.delta=2 for ddim; may be repeated")  # fmt: skip
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this share")
    p.add_argument("--top-k", type=int, help="draw from so many likeliest tokens")
    p.add_argument("--seed", type=int, default=0, help="another number, other draws (default: 0)")
    p.add_argument("--prompt", metavar="TEXT", help="how the texts begin")
    p.add_argument("--infill", metavar="TEXT", help='text with gaps, one underscore a token: "The ____ sat"')
    p.add_argument("--regex", metavar="PATTERN", help="texts match this regular expression as a whole")
    p.add_argument("--must-contain", metavar="TEXT", action="append", default=[], help="it occurs; may be repeated")
    p.add_argument("--words", type=Path, metavar="FILE", help="texts have no other words than those of this file")
    p.add_argument("--acrostic", metavar="WORD", help="the texts' lines begin with its letters")
    p.add_argument(
        "--particles",
        type=int,
        metavar="N",
        help="draw each such text from N, by weight (default: 1; to fill gaps from left to right, 16)",
    )
    p.add_argument("--label", metavar="VALUE", help="write texts of this label, of a run trained with --label")
    p.add_argument("--guidance", type=float, default=0.0, metavar="W",
                   help="towards the label, at two calls for one (default: 0, the label as it was learnt)")  # fmt: skip
    p.add_argument("--ramp", type=float, default=0.0, help="share of the run over which guidance grows (default: 0)")
    p.add_argument("--best", type=int, metavar="K", help="of the n texts show the K likeliest, with their bits/char")
    p.add_argument("--edit", metavar="TEXT", help="rewrite this text: make it noisy, and denoise it")
    p.add_argument("--proofread", metavar="TEXT", help="mend this text instead, without being told where it is wrong")
    p.add_argument("--strength", type=float,
                   help="of --edit: how noisy, 0 to 1 (0.4); of --proofread: share of wrong tokens (0.05)")  # fmt: skip
    p.add_argument("--stop", action="store_true", help="end a text where a document ends (families from left to right)")
    p.add_argument("--watch", action="store_true", help="show the denoising")
    p.add_argument("--save-replay", type=Path, metavar="FILE",
                   help="keep the denoising as one .html file that plays it, without a network")  # fmt: skip
    p.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                   help="of the network (default: auto, what this machine multiplies faster)")  # fmt: skip
    p.add_argument("--reproducible", action="store_true",
                   help="the same texts bit for bit whatever -n: fp32, in batches of eight")  # fmt: skip

    p = verb("eval", "measure bits per character of held-out text")
    run_of(p)
    p.add_argument("--data", metavar="PATH", help="other text, all of it held out (default: the run's held-out part)")
    p.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="held-out part of the run's text"
    )
    p.add_argument("--calls", metavar="1,2,4,...", help="also of samplers with exactly so many network calls")
    p.add_argument("--sampler", help="whose figures --calls gives (default: the family's first); exact for those that "
                   "choose positions by a rule, as margin")  # fmt: skip
    grid_of(p)
    p.add_argument("--keep-grid", action="store_true",
                   help="measure what tokens cost at each noise level, and keep the optimal grid")  # fmt: skip
    p.add_argument("--eval-tokens", type=int, metavar="N", help="read about N tokens (default: all)")
    p.add_argument("--draws", type=int, help="noisy copies of each window (default: 2, and more of a short text)")
    p.add_argument(
        "--samples", type=int, default=64, metavar="N", help="texts written for the statistics (default: 64)"
    )
    p.add_argument("--length", type=int, help="their tokens (default: the training window)")
    p.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    p.add_argument("--top-p", type=float, help="of the samples")
    p.add_argument("--seed", type=int, default=0, help="another number, other draws (default: 0)")

    p = verb("compare", "train and measure several families alike, and write a page that says which to take")
    p.add_argument("--families", metavar="A,B,...", help="see `textdiffusion families` (default: all of them)")
    p.add_argument("--data", metavar="pydoc|PATH|hf:NAME", help="as for train (default: pydoc, built in)")
    p.add_argument("--text-field", help="field of the text in .jsonl, .csv, .parquet and hub data (default: text)")
    p.add_argument("--tokenizer", metavar="char|byte|bpe:N|hf:NAME", help="(default: char)")
    p.add_argument("--length", type=int, help="tokens of a window (default: 64)")
    p.add_argument("--depth", type=int, help="blocks of every network; width and heads follow (default: 3)")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="optimiser steps of each family")
    budget.add_argument("--minutes", type=float, help="minutes of training of each family (default: 5)")
    budget.add_argument("--flops", type=float, help="arithmetic of training of each family, such as 1e13")
    p.add_argument("--out", type=Path, metavar="REPORT", help="folder of the report, made or gone on with")
    p.add_argument("--calls", metavar="8,32,128", help="budgets of network calls to choose for (default: 8,32,128)")
    p.add_argument("--temperatures", metavar="0.5,...,1", help="of the frontier (default: 0.5,0.7,0.85,1)")
    p.add_argument("--samples", type=int, metavar="N", help="texts for each budget and temperature (default: 128)")
    p.add_argument("--eval-tokens", type=int, metavar="N", help="read about N held-out tokens (default: 16384)")
    p.add_argument("--draws", type=int, help="noisy copies of each window (default: 2)")
    p.add_argument("--judge", metavar="own|none|smollm2|hf:NAME|PATH",
                   help="of the samples: an autoregressive run of its own, or one there is (default: own)")  # fmt: skip
    p.add_argument("--seed", type=int, help="(default: 0)")
    p.add_argument("--set", action="append", metavar="PART.KEY=VALUE", dest="settings",
                   help="for every run; a process field for those families that have it; may be repeated")  # fmt: skip
    p.add_argument("--from", type=Path, metavar="RESULTS", dest="results",
                   help="do again what this results.json is of, and say what differs")  # fmt: skip

    p = verb("ui", "serve a page: write, edit, compare, look inside (needs the extra ui)", False)
    p.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run directories (default: the newest under runs/, or one that comes with the package)",
    )
    p.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    p.add_argument("--server-name", metavar="HOST", help="address to listen at (default: 127.0.0.1, this machine only)")
    p.add_argument("--share", action="store_true", help="make a public link, through gradio's servers")

    p = verb("convert", "make a run of a published checkpoint: SEDD, MDLM, BD3-LM, ddlm")
    p.add_argument("source", metavar="SRC", help="folder, file of weights, or USER/NAME on the hub")
    p.add_argument("out", type=Path, metavar="RUN", help="run directory to make")
    p.add_argument("--tokenizer", metavar="PATH|hf:NAME", help="of its tokens (default: its own, else GPT-2's)")

    p = verb("verify", "prove the mathematics of a family on worlds small enough to enumerate")
    p.add_argument("family", nargs="?", metavar="FAMILY|FILE.py",
                   help="a family, or your own in a .py file, which is run (default: all families)")  # fmt: skip

    p = verb("families", "list the families, or describe one")
    p.add_argument("name", nargs="?", metavar="NAME")
    verb("doctor", "describe this machine and what would be used on it")
    return parser
