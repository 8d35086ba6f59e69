"""The command line. Torch is not imported before all is refused that can be refused without it."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiffusion.commands.describing import make_converted, show_doctor, show_families, show_verify
from textdiffusion.commands.flags import parser_of
from textdiffusion.errors import ElsewhereError, UserError, lost
from textdiffusion.parallel.launching import rank
from textdiffusion.progress import shown
from textdiffusion.settings import check_device, check_grid, check_label, check_parallel, check_replay, check_writing

if TYPE_CHECKING:
    from rich.console import Console

    from textdiffusion.config import RunConfig
    from textdiffusion.model import Model
    from textdiffusion.training.fit import Stopped


_RANK = rank()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 if verify finds a fault; 2 for a mistake of the user's; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a symbol shows a question mark
    try:
        chosen = parser_of(ACTS).parse_args(arguments)
        raw = sys.argv[1:] if arguments is None else arguments
        chosen.given = [a.partition("=")[0] for a in raw if a.startswith("--")]
        check_device(chosen.device)
        code = int(chosen.act(chosen))
        sys.stdout.flush()  # here, where a reader that has gone can be dealt with
        return code
    except ElsewhereError:
        return 2
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
        if "home directory" in str(error):
            return _refuse("a path begins with ~ and the name of nobody on this machine; write it out")
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            if not lost(error):
                raise
            return _refuse(
                "another process has ended, and said why; --resume goes on with a training, and the same "
                "command with a comparison"
            )
        return _refuse(
            "this machine has not enough memory for that; ask for fewer or shorter texts, or a smaller network"
        )


def _refuse(line: str) -> int:
    who = "textdiffusion" if _RANK == 0 else f"textdiffusion, process {_RANK}"
    print(f"{who}: {' '.join(line.split())}", file=sys.stderr)
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
    from textdiffusion.commands.demo import demo

    return demo(args.minutes, args.seed, args.out, args.device)


# -- train --------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from textdiffusion.config import check_new, new_run_path
    from textdiffusion.presets import DEFAULT_LENGTH, configure
    from textdiffusion.text.data import check_source
    from textdiffusion.text.shards import is_prepared, open_mixture
    from textdiffusion.training.tracking import check as check_tracking

    check_tracking(args.track)
    check_parallel(args.parallel)
    if "--processes" in args.given and not args.dry_run:
        raise UserError("--processes belongs to --dry-run; a training has as many as torchrun starts")
    # Processes that torchrun starts again go on where they were.
    again = args.out is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if args.resume or (again and (args.out / "config.json").exists()):
        return _resume(args)
    if args.init_from and (Path(args.init_from) / "config.json").exists() and "--length" in args.given:
        from textdiffusion.exchange.fetching import is_foreign

        if not is_foreign(Path(args.init_from)):
            raise UserError(f"{args.init_from} is a run, whose windows are kept; leave out --length")
    if is_prepared(args.data):
        refused = [flag for flag in ("--tokenizer", "--text-field", "--label") if flag in args.given]
        if refused:
            raise UserError(f"{args.data} is prepared: {', '.join(refused)} belongs to `textdiffusion prepare`")
        open_mixture(args.data)
    else:
        check_source(args.data)
    if args.out is not None and not args.dry_run and _RANK == 0:
        check_new(args.out)
    config = configure(
        family=args.family, data=args.data, text_field=args.text_field, label=args.label, tokenizer=args.tokenizer,
        length=DEFAULT_LENGTH if args.length is None else args.length, preset=args.preset, depth=args.depth,
        steps=args.steps, minutes=args.minutes, seed=args.seed,
        settings=["training.compile=true"] * args.compile + args.settings, init_from=args.init_from,
    )  # fmt: skip
    if args.dry_run:
        return _dry_run(args, config)
    path = args.out or new_run_path(config.family, config.data.source)
    return _follow(args, config, path, False)


def _resume(args: argparse.Namespace) -> int:
    from textdiffusion.config import newest_run, read_config

    # A resumed run is what its config.json says: a flag that would change it is refused, not ignored.
    if args.resume:
        kept = ("--resume", "--out", "--device", "--json", "--parallel", "--track")
        _only(args, kept, "--resume goes on with a run as it was begun")
    path = args.out or newest_run()
    return _follow(args, read_config(path), path, True)


def _follow(args: argparse.Namespace, config: RunConfig, path: Path, resume: bool) -> int:
    from textdiffusion.loading import pick_device
    from textdiffusion.training.terminal import follow

    quiet, console = args.json or _RANK != 0, _console(args.json)
    device, track = pick_device(args.device), args.track if _RANK == 0 else None
    return _report(args, follow(config, path, resume, device, console, quiet, track, args.parallel))


def _report(args: argparse.Namespace, stopped: Stopped) -> int:
    from textdiffusion.training.terminal import leave_plot

    if _RANK:
        return 0 if stopped.signal is None else 128 + stopped.signal
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

    if not 1 <= args.processes <= 1_000_000:
        raise UserError(f"--processes must be from 1 to 1,000,000, not {args.processes}")
    plan = estimate(config, pick_device(args.device), args.processes)
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


# -- prepare ------------------------------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> int:
    from textdiffusion.commands.corpus import prepare

    return prepare(args)


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
    if args.best is not None and (args.watch or args.reproducible or args.save_replay or args.edit is not None):
        others = "--watch, --save-replay, --reproducible, --edit"
        raise UserError(f"--best chooses among texts once they are written; leave out {others}")
    path, config = _run(args)
    check_label(args.label, config.labels, args.guidance, args.ramp)
    from textdiffusion.loading import check_settings, load, pick_device
    from textdiffusion.parallel.distributed import joined

    with joined(pick_device(args.device)) as group:
        model = load(path, args.device, args.precision, group, args.settings)
        check_settings(model, args.settings, args.sampler)
        return _write(args, model)


def _write(args: argparse.Namespace, model: Model) -> int:
    if args.proofread is not None:
        return _proofread(args, model) if model.group.main else 0
    written = ("sampler", "grid", "temperature", "top_p", "top_k", "seed", "prompt", "infill", "stop", "edit")
    held = ("regex", "must_contain", "words", "acrostic", "particles", "label", "guidance", "ramp")
    how = {name: getattr(args, name) for name in (*written, *held)}
    if args.strength is not None:
        how["strength"] = args.strength
    if args.best is not None:
        from textdiffusion.parallel.distributed import ALONE

        main, model.group = model.group.main, ALONE  # chosen among by one
        return _best(args, model, how) if main else 0
    # What is shown, or kept as a replay, is one batch: it is not shared out.
    if ((args.watch and not args.json) or args.save_replay is not None) and not model.group.main:
        return 0
    if args.watch and not args.json:
        model.watch(args.n, args.length, args.calls, save_replay=args.save_replay, **how)
        return 0
    if args.save_replay is not None:
        from textdiffusion.display.replay.canvas import save_replay

        recording = model.record(args.n, args.length, args.calls, **how)
        save_replay(recording, args.save_replay)
        texts, calls = recording.panels[0].texts, recording.panels[0].steps[-1]["calls"]
    else:
        with shown(args.json or _RANK != 0):
            texts, calls = model.sample_counted(args.n, args.length, args.calls, reproducible=args.reproducible, **how)
    if not model.group.main:
        return 0
    found: list[dict[str, Any]] = [{"text": t, "calls": c} for t, c in zip(texts, calls)]
    if args.edit is not None:
        from textdiffusion.training.terminal import changes

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
    with shown(args.json):
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
    from textdiffusion.exchange.fetching import fetch, is_foreign

    path = fetch(args.run) if args.run else run_to_use()
    if args.run is None and path == SHIPPED:
        print(f"textdiffusion: {SHIPPED_INSTEAD}; train one with `textdiffusion train`", file=sys.stderr)
    return path, RunConfig() if is_foreign(path) else read_config(path)


def _proofread(args: argparse.Namespace, model: Model) -> int:
    from textdiffusion.training.terminal import changes

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
    from textdiffusion.config import SHIPPED

    if args.keep_grid and path == SHIPPED:
        raise UserError("--keep-grid writes into a run, and this one belongs to the package; name one of your own")
    if args.data is not None:
        from textdiffusion.text.data import check_source

        check_source(args.data)
    from textdiffusion.loading import load, pick_device
    from textdiffusion.parallel.distributed import joined

    with joined(pick_device(args.device)) as group:
        return _measure(args, path, load(path, args.device, group=group), calls)


def _measure(args: argparse.Namespace, path: Path, model: Model, calls: list[int]) -> int:
    from textdiffusion.report import report

    with shown(args.json or _RANK != 0):
        result = report(
            model, data=args.data, split=args.split, calls=calls, sampler=args.sampler, tokens=args.eval_tokens,
            draws=args.draws, samples=args.samples, seed=args.seed, length=args.length, temperature=args.temperature,
            top_p=args.top_p, grid=args.grid, keep=path if args.keep_grid else None,
        )  # fmt: skip
    if not model.group.main:
        return 0
    if args.json:
        print(json.dumps({"run": str(path)} | result.as_dict()))
    else:
        for line in result.lines():
            print(line)
    if calls:
        from textdiffusion.training.terminal import leave_plot

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


ACTS = {
    "demo": _demo, "train": _train, "prepare": _prepare, "sample": _sample, "eval": _eval, "compare": _compare,
    "ui": _ui, "verify": show_verify, "families": show_families, "doctor": show_doctor, "convert": make_converted,
}  # fmt: skip
