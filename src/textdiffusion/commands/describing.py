"""The verbs that describe, and the one that makes a run of what came from elsewhere: `verify`, `families`, `doctor`,
`convert`."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from textdiffusion.errors import UserError


def show_verify(args: argparse.Namespace) -> int:
    """Prove families right, and print each check; returns the exit code, 1 if one fails."""
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


def show_families(args: argparse.Namespace) -> int:
    """List the families, or describe one."""
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


def show_doctor(args: argparse.Namespace) -> int:
    """Describe the machine."""
    from textdiffusion.doctor import machine

    facts = machine(args.device)
    if args.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        print(f"{key:<14}{value}")
    return 0


def make_converted(args: argparse.Namespace) -> int:
    """Make a run of a published checkpoint."""
    from textdiffusion.config import check_new
    from textdiffusion.exchange.fetching import fetch

    check_new(args.out)
    source = fetch(args.source)
    if not source.exists():
        raise UserError(f"there is no {args.source}; give a folder, a file of weights, or USER/NAME on the hub")
    from textdiffusion.exchange.published import convert

    found = convert(source, args.out, args.tokenizer)
    body = {"run": str(args.out), "system": found.what, "family": found.config.family}
    said = "made {run}, a {family} run, of a {system} checkpoint; see it write: textdiffusion sample {run} --watch"
    print(json.dumps(body) if args.json else said.format(**body))
    return 0
