"""From the flags of `textdiffusion compare` to a report; all that can be refused is refused before torch is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiffusion.compare.differences import differences, read_results
from textdiffusion.compare.plan import JUDGE, MINUTES, Plan, read_plan, settle, write
from textdiffusion.errors import UserError
from textdiffusion.parallel.launching import launched, rank
from textdiffusion.text.data import check_source

if TYPE_CHECKING:
    from rich.console import Console

    from textdiffusion.parallel.distributed import Group

SHOWN = 40  # differences that are printed; all of them are in differences.json


def compare(args: argparse.Namespace, console: Console) -> int:
    """Make, or go on with, a comparison; returns the exit code.

    Raises:
        UserError: settings that make no sense, or a folder that holds something else.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the report's plots need matplotlib; install it with: pip install 'textdiffusion[viz]'")
    before = None if args.results is None else read_results(args.results)
    plan = _plan(args) if before is None else _again(args, before)
    out = args.out or _folder(args.results)
    refused = None
    try:
        if rank() == 0:
            settle(plan, out)
    except (UserError, OSError) as error:
        if launched() == 1:
            raise
        refused = str(error)  # which the others are told once they have met
    from textdiffusion.compare.driving import PATIENCE
    from textdiffusion.loading import pick_device
    from textdiffusion.parallel.distributed import joined

    device = pick_device(args.device)
    with joined(device, PATIENCE) as group:
        group.together(refused)
        return _together(args, plan, Path(group.told(str(out))), device, console, before, group)


def _together(
    args: argparse.Namespace,
    plan: Plan,
    out: Path,
    device: str,
    console: Console,
    before: dict[str, Any] | None,
    group: Group,
) -> int:
    from rich.console import Console

    from textdiffusion.compare.driving import Comparison, Interrupted
    from textdiffusion.compare.figures import draw
    from textdiffusion.compare.page import page

    if group.size > 1:
        console = Console(stderr=args.json, force_terminal=False)  # several write: no line may move under another
    comparison = Comparison(plan, out, device, console, args.json, group)
    try:
        results = comparison.run()
    except Interrupted as stop:
        comparison.say(f"stopped; the same command goes on where it was: what is there is in {out}")
        return 128 + stop.signal
    except KeyboardInterrupt:
        comparison.say(f"stopped; the same command goes on where it was: what is there is in {out}")
        return 130
    if results is None:  # the main process has them
        return 0
    write(out / "index.html", page(results, draw(results, out / "figures")))
    return _report(args, out, results, before)


def _report(args: argparse.Namespace, out: Path, results: dict[str, Any], before: dict[str, Any] | None) -> int:
    from textdiffusion.compare.verdict import by_likelihood, by_samples, sentence

    said = {
        str(budget): {
            "likelihood": sentence(by_likelihood(results, budget), "bits/char", 3),
            "samples": sentence(by_samples(results, budget), "of n-gram divergence", 3),
        }
        for budget in results["plan"]["calls"]
    }
    body: dict[str, Any] = {"report": str(out / "index.html"), "results": str(out / "results.json"), "take": said}
    found = [] if before is None else differences(before, results)
    if before is not None:
        body["differences"] = [vars(difference) for difference in found]
        write(out / "differences.json", json.dumps(body["differences"], indent=1) + "\n")
    if args.json:
        print(json.dumps(body))
        return 0
    for budget, answers in said.items():
        print(f"{budget} calls")
        for question, answer in answers.items():
            print(f"  {question:<12}{answer}")
    if before is not None:
        print(f"{len(found)} differences from {args.results}, times apart" + (":" if found else ""))
        for difference in found[:SHOWN]:
            print(f"  {difference}")
        if len(found) > SHOWN:
            print(f"  and {len(found) - SHOWN} more, in {out / 'differences.json'}")
    print(f"the page: {out / 'index.html'}")
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    fields = {f.name for f in dataclasses.fields(Plan)}
    given = {k: v for k, v in vars(args).items() if k in fields and v is not None}
    if "families" in given:
        given["families"] = [part.strip() for part in given["families"].split(",") if part.strip()]
    if JUDGE in given.get("families", ()):
        raise UserError(f"{JUDGE} is no family; leave it out: --judge says who judges")
    for name, kind in (("calls", int), ("temperatures", float)):
        if name in given:
            try:
                given[name] = [kind(part) for part in given[name].split(",")]
            except ValueError:
                raise UserError(f"--{name} takes numbers separated by commas, not {given[name]!r}") from None
    if not {"steps", "minutes", "flops"} & given.keys():
        given["minutes"] = MINUTES
    check_source(given.get("data", "pydoc"))
    return Plan(**given)


def _again(args: argparse.Namespace, before: dict[str, Any]) -> Plan:
    """The plan of earlier results; another flag would make another comparison."""
    kept = ("--from", "--out", "--device", "--json")
    if other := [flag for flag in args.given if not flag.startswith(kept)]:
        raise UserError(f"--from does again what was done, with the same settings; leave out {other[0]}")
    plan = read_plan(before["plan"], f"{args.results}: plan")
    check_source(plan.data)
    return plan


def _folder(results: Path | None) -> Path:
    """A new folder: under reports/, or beside the results that are made again."""
    if results is None:
        raise UserError("say with --out where the report goes, such as --out reports/first")
    folder = results if results.is_dir() else results.parent
    number = 1
    while (path := folder.with_name(f"{folder.resolve().name}-again{'' if number == 1 else f'-{number}'}")).exists():
        number += 1
    return path
