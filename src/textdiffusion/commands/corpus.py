"""The verb `prepare`: it needs no torch."""

from __future__ import annotations

import argparse
import json
import time

from rich.console import Console

from textdiffusion.errors import UserError
from textdiffusion.text.data import check_source
from textdiffusion.text.preparing import check_preparing, prepare_corpus


def prepare(args: argparse.Namespace) -> int:
    """Prepare a corpus, and say how far it is; returns the exit code."""
    check_preparing(args.out, args.validation_share, args.workers or 1, args.tokenizer)
    if args.source == "pydoc":
        raise UserError("the built-in text needs no preparing: textdiffusion train --data pydoc")
    check_source(args.source)
    console, last = Console(stderr=args.json), [0.0]

    def progress(done: int, tokens: int) -> None:
        if not args.json and time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            console.print(f"{done:,} pieces, {tokens:,} tokens", highlight=False)

    done = prepare_corpus(
        args.source, args.out, tokenizer=args.tokenizer, text_field=args.text_field,
        validation_share=args.validation_share, workers=args.workers, progress=progress,
    )  # fmt: skip
    if args.json:
        print(json.dumps(vars(done)))
    else:
        print(f"prepared {done.folder}: {done.tokens:,} tokens to learn from, {done.validation_tokens:,} held out")
        if done.tokens and done.validation_tokens:
            print(f"train with: textdiffusion train --data {done.folder}")
        else:
            print("training needs both: give more text, or prepare it in a new folder with another --validation-share")
    return 0
