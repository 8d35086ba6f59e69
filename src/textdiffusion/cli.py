"""The command line. Torch is not imported before all is refused that can be refused without it."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiffusion.errors import UserError
from textdiffusion.flags import parser_of
from textdiffusion.settings import check_device, check_grid, check_label, check_replay, check_writing

if TYPE_CHECKING:
    from rich.console import Console

    from textdiffusion.config import RunConfig
    from textdiffusion.fit import Stopped
    from textdiffusion.model import Model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 if verify finds a fault; 2 for a mistake of the user's; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a symbol shows a question mark
    try:
        chosen = parser_of(ACTS).parse_args(arguments)
        chosen.given = [a for a in (sys.argv[1:] if arguments is None else arguments) if a.startswith("--")]
        check_device(chosen.device)
        code = int(chosen.act(chosen))
        sys.stdout.flush()  # here, where a reader that has gone can be dealt with
        return code
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone (`| head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _refuse(f"{error.filename or 'a file'}: {error.strerror or error}; give another path, or make room")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return _refuse(
            "this machine has not enough memory for that; ask for fewer or shorter texts, or a smaller network"
        )


def _refuse(line: str) -> int:
    print(f"textdiffusion: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _only(args: argparse.Namespace, kept: tuple[str, ...], why: str) -> None:
    if other := [flag for flag in args.given if not flag.startswith(kept)]:
        raise UserError(f"{why}; leave out {other[0]}")


def _console(quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=quiet)


# -- demo ---------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from textdiffusion.presets import demo_config

    demo_config(args.minutes, args.seed)  # refuses what is out of range
    from textdiffusion.demo import demo

    return demo(args.minutes, args.seed, args.out, args.device)


# -- train --------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from textdiffusion.config import check_new, new_run_path
    from textdiffusion.data import check_source
    from textdiffusion.presets import DEFAULT_LENGTH, configure
    from textdiffusion.tracking import check as check_tracking

    check_tracking(args.track)
    if args.resume:
        return _resume(args)
    check_source(args.data)
    if args.out is not None and not args.dry_run:
        check_new(args.out)
    config = configure(
        family=args.family, data=args.data, text_field=args.text_field, label=args.label, tokenizer=args.tokenizer,
        length=DEFAULT_LENGTH if args.length is None else args.length, preset=args.preset, depth=args.depth,
        steps=args.steps, minutes=args.minutes, seed=args.seed,
        settings=["training.compile=true"] * args.compile + args.settings, init_from=args.init_from,
    )  # fmt: skip
    if args.dry_run:
        return _dry_run(args, config)
    from textdiffusion.loading import pick_device
    from textdiffusion.terminal import follow

    path = args.out or new_run_path(config.family, config.data.source)
    console = _console(args.json)
    return _report(args, follow(config, path, False, pick_device(args.device), console, args.json, args.track))


def _resume(args: argparse.Namespace) -> int:
    from textdiffusion.config import newest_run, read_config

    # A resumed run is what its config.json says: a flag that would change it is refused, not ignored.
    _only(args, ("--resume", "--out", "--device", "--json", "--track"), "--resume goes on with a run as it was begun")
    path = args.out or newest_run()
    config = read_config(path)
    from textdiffusion.loading import pick_device
    from textdiffusion.terminal import follow

    console = _console(args.json)
    return _report(args, follow(config, path, True, pick_device(args.device), console, args.json, args.track))


def _report(args: argparse.Namespace, stopped: Stopped) -> int:
    from textdiffusion.terminal import leave_plot

    if args.json:
        body = {k: v for k, v in vars(stopped).items() if k != "signal"} | {"run": str(stopped.run)}
        print(json.dumps(body | {"finished": stopped.signal is None}))
    elif stopped.signal is None:
        print(f"trained {stopped.run}; see it write: textdiffusion sample {stopped.run} --watch")
    leave_plot(stopped.run, lambda plots: plots.save_training(stopped.run), args.json)
    return 0 if stopped.signal is None else 128 + stopped.signal


def _dry_run(args: argparse.Namespace, config: RunConfig) -> int:
    from textdiffusion.doctor import estimate
    from textdiffusion.loading import pick_device

    plan = estimate(config, pick_device(args.device))
    if args.json:
        print(json.dumps(plan))
    else:
        for key, value in plan.items():
            print(
                f"{key.replace('_', ' '):<28}{value:,}"
                if isinstance(value, int)
                else f"{key.replace('_', ' '):<28}{value}"
            )
    return 0


# -- sample -------------------------------------------------------------------------------------------------------


def _sample(args: argparse.Namespace) -> int:
    if args.reproducible and (args.watch or args.save_replay is not None):
        one = "--watch" if args.watch else "--save-replay"
        raise UserError(f"{one} shows one batch as it is; leave out --reproducible, or {one}")
    check_writing(
        args.n, args.length, args.calls, args.temperature, args.top_p, args.prompt, args.infill, args.top_k, args.edit
    )
    check_grid(args.grid)
    check_replay(args.save_replay, args.n)
    if args.proofread is not None:
        kept = ("--proofread", "--strength", "--calls", "--json", "--device", "--precision")
        _only(args, kept, "--proofread mends the text that it is given")
    elif args.strength is not None and args.edit is None:
        raise UserError("--strength belongs to --edit and --proofread; give one of them, or leave it out")
    if args.best is not None and (args.watch or args.reproducible or args.edit is not None):
        raise UserError("--best chooses among texts once they are written; leave out --watch, --reproducible, --edit")
    path, config = _run(args)
    check_label(args.label, config.labels, args.guidance, args.ramp)
    from textdiffusion.loading import load

    model = load(path, args.device, args.precision)
    if args.proofread is not None:
        return _proofread(args, model)
    written = ("sampler", "grid", "temperature", "top_p", "top_k", "seed", "prompt", "infill", "stop", "edit")
    held = ("regex", "must_contain", "words", "acrostic", "particles", "label", "guidance", "ramp")
    how = {name: getattr(args, name) for name in (*written, *held)}
    if args.strength is not None:
        how["strength"] = args.strength
    if args.best is not None:
        return _best(args, model, how)
    if args.watch and not args.json:
        model.watch(args.n, args.length, args.calls, save_replay=args.save_replay, **how)
        return 0
    if args.save_replay is not None:
        from textdiffusion.replay.canvas import save_replay

        recording = model.record(args.n, args.length, args.calls, **how)
        save_replay(recording, args.save_replay)
        texts, calls = recording.panels[0].texts, recording.panels[0].steps[-1]["calls"]
    else:
        texts, calls = model.sample_counted(args.n, args.length, args.calls, reproducible=args.reproducible, **how)
    found: list[dict[str, Any]] = [{"text": t, "calls": c} for t, c in zip(texts, calls)]
    if args.edit is not None:
        from textdiffusion.terminal import changes

        for entry in found:
            entry["changes"] = changes(args.edit, entry["text"])
    if args.json:
        used = model.used  # what "auto" came to
        print(json.dumps({"samples": found, "calls": max(calls), "seed": args.seed, "sampler": used[0],
                          "grid": used[1]}, ensure_ascii=False))  # fmt: skip
        return 0
    for number, entry in enumerate(found, 1):
        print(entry["text"] if len(found) == 1 else f"--- {number}\n{entry['text']}")
        if args.edit is not None:
            print(_changed(entry["changes"]))
    return 0


def _best(args: argparse.Namespace, model: Model, how: dict[str, Any]) -> int:
    found = model.best(args.best, args.n, length=args.length, calls=args.calls, **how)
    if args.json:
        ranked = [{"text": text} | vars(figure) for text, figure in found]
        print(json.dumps({"samples": ranked, "of": args.n, "seed": args.seed}, ensure_ascii=False))
        return 0
    for number, (text, figure) in enumerate(found, 1):
        print(f"--- {number}  {figure}\n{text}")
    return 0


def _changed(pieces: Sequence[tuple[str, str]]) -> str:
    return "changed: " + (", ".join(f"{old!r} to {new!r}" for old, new in pieces) or "nothing")


def _run(args: argparse.Namespace) -> tuple[Path, RunConfig]:
    """The run that is meant, if there is one whose config can be read."""
    from textdiffusion.config import SHIPPED, SHIPPED_INSTEAD, RunConfig, read_config, run_to_use
    from textdiffusion.fetching import fetch, is_foreign

    path = fetch(args.run) if args.run else run_to_use()
    if args.run is None and path == SHIPPED:
        print(f"textdiffusion: {SHIPPED_INSTEAD}; train one with `textdiffusion train`", file=sys.stderr)
    return path, RunConfig() if is_foreign(path) else read_config(path)


def _proofread(args: argparse.Namespace, model: Model) -> int:
    from textdiffusion.terminal import changes

    strength = 0.05 if args.strength is None else args.strength
    mended = model.proofread(args.proofread, strength, 8 if args.calls is None else args.calls)
    found = changes(args.proofread, mended)
    if args.json:
        print(json.dumps({"samples": [{"text": mended}], "changes": found}, ensure_ascii=False))
    else:
        print(mended, _changed(found), sep="\n")
    return 0


# -- eval ---------------------------------------------------------------------------------------------------------


def _eval(args: argparse.Namespace) -> int:
    calls = _numbers(args.calls) if args.calls else []
    for name, value, least in (
        ("--eval-tokens", args.eval_tokens, 1),
        ("--draws", args.draws, 1),
        ("--samples", args.samples, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    check_writing(None, args.length, None, args.temperature, args.top_p)
    check_grid(args.grid)
    if args.keep_grid and args.data is not None:
        raise UserError("--keep-grid is measured on the run's own held-out text; leave out --data")
    path, _ = _run(args)
    if args.data is not None:
        from textdiffusion.data import check_source

        check_source(args.data)
    from textdiffusion.loading import load
    from textdiffusion.report import report

    model: Model = load(path, args.device)
    result = report(
        model, data=args.data, split=args.split, calls=calls, sampler=args.sampler, tokens=args.eval_tokens,
        draws=args.draws, samples=args.samples, seed=args.seed, length=args.length, temperature=args.temperature,
        top_p=args.top_p, grid=args.grid, keep=path if args.keep_grid else None,
    )  # fmt: skip
    if args.json:
        print(json.dumps(result.as_dict()))
    else:
        for line in result.lines():
            print(line)
    if calls:
        from textdiffusion.terminal import leave_plot

        leave_plot(path, lambda plots: plots.save_calls(result.as_dict(), path), args.json)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"--calls takes whole numbers from 1 up, separated by commas, not {text!r}")
    return found


# -- compare ------------------------------------------------------------------------------------------------------


def _compare(args: argparse.Namespace) -> int:
    from textdiffusion.compare.command import compare

    return compare(args, _console(args.json))


# -- ui -----------------------------------------------------------------------------------------------------------


def _ui(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UserError("the page needs gradio; install it with: pip install 'textdiffusion[ui]'")
    from textdiffusion.ui.serving import serve

    serve(args.runs, args.device, args.server_name, args.port, args.share)
    return 0


# -- verify, families, doctor, convert ----------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    from textdiffusion.families import load_family, names

    families = {name: load_family(name) for name in ([args.family] if args.family else names())}
    from textdiffusion.verification import verify

    found: dict[str, list[dict[str, Any]]] = {}
    failed = 0
    for name, family in families.items():
        found[name] = []
        if not args.json:
            print(f"{name}\n{'':6}{'figure':>10} {'at most':>9}  check", flush=True)
        for check in verify(family):
            failed += not check.passed
            numbers = {k: v if math.isfinite(v) else None for k, v in vars(check).items() if isinstance(v, float)}
            found[name].append(vars(check) | numbers | {"passed": check.passed})  # JSON has no infinity
            if not args.json:
                verdict = "ok" if check.passed else "FAIL"
                print(f"{verdict:<6}{check.figure:>10.3g} {check.tolerance:>9.2g}  {check.name}", flush=True)
                if not check.passed:
                    print(f"{'':27}{check.meaning}", flush=True)
    total = sum(len(checks) for checks in found.values())
    if args.json:
        print(json.dumps({"families": found, "checks": total, "failed": failed, "passed": not failed}))
    else:
        print(f"{total} checks, " + ("all passed" if not failed else f"{failed} failed"))
    return 1 if failed else 0


def _families(args: argparse.Namespace) -> int:
    from textdiffusion.catalogue import describe, listing

    rows = listing() if args.name is None else [describe(args.name)]
    if args.json:
        print(json.dumps(rows if args.name is None else rows[0]))
        return 0
    wide = max(16, 2 + max(len(row["name"]) for row in rows))
    for row in rows:
        print(f"{row['name']:<{wide}}{row['summary']}")
        if args.name is not None:
            print(f"{'paper':<{wide}}{row['paper']}")
            for part in ("fields", "samplers"):
                for key, text in row[part].items():
                    print(f"{part[:-1]:<{wide}}{key}: {text}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from textdiffusion.doctor import machine

    facts = machine(args.device)
    if args.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        print(f"{key:<14}{value}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from textdiffusion.config import check_new
    from textdiffusion.fetching import fetch

    check_new(args.out)
    source = fetch(args.source)
    if not source.exists():
        raise UserError(f"there is no {args.source}; give a folder, a file of weights, or USER/NAME on the hub")
    from textdiffusion.published import convert

    found = convert(source, args.out, args.tokenizer)
    body = {"run": str(args.out), "system": found.what, "family": found.config.family}
    said = "made {run}, a {family} run, of a {system} checkpoint; see it write: textdiffusion sample {run} --watch"
    print(json.dumps(body) if args.json else said.format(**body))
    return 0


ACTS = {
    "demo": _demo, "train": _train, "sample": _sample, "eval": _eval, "compare": _compare, "ui": _ui, "verify": _verify,
    "families": _families, "doctor": _doctor, "convert": _convert,
}  # fmt: skip
