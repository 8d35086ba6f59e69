"""Trains what is not trained, measures what is not measured, and gathers it in results.json.

REPORT/plan.json           what is compared
REPORT/runs/NAME           the runs, as `textdiffusion train` makes them; finished ones are taken as they are
REPORT/measured/NAME.json  figures of a run, kept part by part; shared.json: what belongs to no run
REPORT/results.json        all figures, the plan, and what they were made with
REPORT/index.html          the page; REPORT/figures has its plots

Of several processes each trains and measures whole families, one after another, whichever is next: nothing is sent
between them, and what a family is does not depend on how many there are. The main one gathers the report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from textdiffusion.compare.judging import Judge, OwnJudge, PublicJudge
from textdiffusion.compare.measuring import PARTS, UNDISTURBED, Bench, check_text, cost, yardsticks
from textdiffusion.compare.plan import JUDGE, Plan, write
from textdiffusion.config import RunConfig, read_config
from textdiffusion.doctor import machine
from textdiffusion.errors import UserError
from textdiffusion.loading import load
from textdiffusion.machine import fastest_precision
from textdiffusion.mathematics.noise import Noise
from textdiffusion.parallel.distributed import ALONE, Group
from textdiffusion.process import count_parameters
from textdiffusion.run import Run, build
from textdiffusion.settings import Precision
from textdiffusion.text.data import fingerprint
from textdiffusion.training.preparation import prepare
from textdiffusion.training.terminal import clock, follow

FORMAT = 1
PATIENCE = timedelta(days=90)  # that a process without work waits for those that train
SHARED = "shared"  # among what is measured: what belongs to no run


class Interrupted(Exception):
    """A signal came while a run was trained; what is there is kept."""

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


@dataclass
class Comparison:
    """A comparison under way in a folder."""

    plan: Plan
    out: Path
    device: str
    console: Console
    quiet: bool = False
    group: Group = ALONE
    precision: Precision = "auto"

    def say(self, line: str) -> None:
        """To people; what another than the main process does is said to be its."""
        if not self.quiet:
            who = "" if self.group.main else f"process {self.group.rank}: "
            self.console.print(f"{who}{line}", highlight=False, soft_wrap=True, markup=False)

    def run(self) -> dict[str, Any] | None:
        """Do what is left to do; returns what results.json holds, on the main process.

        Raises:
            UserError: unusable text or settings.
            Interrupted: by a signal, after saving.
        """
        plan, group, begin = self.plan, self.group, time.perf_counter()
        failure = None
        try:
            if group.main:
                self._begin()
        except UserError as error:
            failure = str(error)
        group.together(failure)
        # What is fast is measured, and can come out differently on a busy machine: once, for all.
        self.precision = self._part(SHARED, "precision", self._fastest)["precision"]
        runs = self._runs()
        for number in group.take("training", len(runs)):
            name, family, config = runs[number]
            self.say(f"[{number + 1} of {len(runs)}] {name}")
            self._train(name, family, config)
        group.together(None)
        first = Run.open(self._path(plan.families[0]))
        corpus, tokenizer, _ = prepare(first.config, first.tokenizer)
        bench = Bench.of(plan, corpus, tokenizer, self._judge())
        at_once = [part for part in PARTS if group.size == 1 or part not in UNDISTURBED]
        for number in group.take("measuring", len(plan.families) + 1):
            if number < len(plan.families):
                self._measure(plan.families[number], bench, at_once)
            else:
                self._part(SHARED, "yardsticks", partial(yardsticks, bench))
        group.together(None)
        if not group.main:
            return None
        rows = {}
        for name in plan.families:
            self._measure(name, bench, PARTS)
            rows[name] = {part: body for part, body in self._kept(name).items() if part in ("training", *PARTS)}
        found = self._kept(SHARED)["yardsticks"]
        results = {"format": FORMAT, "plan": plan.as_dict(), "protocol": self._protocol(bench), "rows": rows}
        results |= {"yardsticks": found, "cost": cost(plan)}
        write(self.out / "results.json", json.dumps(results, indent=1) + "\n")
        self.say(f"measured in {clock(time.perf_counter() - begin)}")
        return results

    def _begin(self) -> None:
        """Say what will be done, and refuse what cannot be."""
        plan, bounds = self.plan, cost(self.plan)
        self.say(
            f"{len(plan.families)} families, {plan.budget} of training each; then of each {bounds['texts_written']:,} "
            f"texts, in at most {bounds['sampling_calls']:,} network calls, and its likelihood, in about "
            f"{bounds['likelihood_calls']:,}"
        )
        if self.group.size > 1:
            self.say(f"{self.group.size} processes, each of which trains and measures whole families")
            if plan.minutes is not None and self.device == "cpu":
                self.say(
                    "processes on one machine share its processors: a family's minutes are worth what the others leave "
                    "of them, which need not be the same for all; --steps or --flops are"
                )
        self._part(SHARED, "precision", self._fastest)
        self._part(SHARED, "held_out", partial(check_text, plan, self._runs()[0][2]))

    def _runs(self) -> list[tuple[str, str, RunConfig]]:
        """Name, family and config of all that is trained."""
        runs = [(name, name, self._config(name)) for name in self.plan.families]
        if self.plan.judge == "own":
            runs.append((JUDGE, "autoregressive", self._judge_config()))
        return runs

    def _fastest(self) -> dict[str, Any]:
        asked = self.plan.config(self.plan.families[0], 1).training.precision
        return {"precision": fastest_precision(torch.device(self.device)) if asked == "auto" else asked}

    # -- training -------------------------------------------------------------------------------------------------
    def _path(self, name: str) -> Path:
        return self.out / "runs" / name

    def _config(self, family: str) -> RunConfig:
        if self.plan.flops is None:
            return self.plan.config(family)
        return self.plan.config(family, self._steps(family))

    def _judge_config(self) -> RunConfig:
        # Another seed: a model must not be its own judge. With the priors of a training of its own it is a better one.
        steps = None if self.plan.flops is None else self._steps("autoregressive")
        config = self.plan.config("autoregressive", steps, self.plan.seed + 1, own_priors=True)
        return replace(config, network=prepare(config, device=self.device)[2].network)

    def _steps(self, family: str) -> int:
        """Optimiser steps that hold the budget of arithmetic: one is counted, none is made."""
        config = self.plan.config(family, 1)
        _, _, config = prepare(config)
        flops = flops_of_a_step(config)
        assert self.plan.flops is not None
        if flops > self.plan.flops:
            raise UserError(f"a step of {family} is {flops:.3g} FLOPs; give --flops of many times that")
        return int(self.plan.flops // flops)

    def _train(self, name: str, family: str, config: RunConfig) -> None:
        if self._kept(name).get("training") is not None:
            return
        path = self._path(name)
        resume = (path / "config.json").exists()
        if resume:
            there = read_config(path)
            for field in ("family", "tokenizer", "network"):
                old, new = getattr(there, field), getattr(config, field)
                if field == "network":  # what its text decides is in the run's alone
                    old = {name: value for name, value in old.items() if name in new}
                if old != new:
                    raise UserError(f"{path} is a run with another {field}, {old} and not {new}; choose another --out")
            if there.data != config.data:
                raise UserError(f"{path} is a run on another text, {there.data.source}; choose another --out")
        if config.training.precision == "auto":
            config = replace(config, training=replace(config.training, precision=self.precision))
        quiet, alone = self.quiet or not self.group.main, Group(device=self.device)
        stopped = follow(config, path, resume, self.device, self.console, quiet, group=alone)
        if stopped.signal is not None:
            raise Interrupted(stopped.signal)
        if not self.group.main:
            self.say(f"{name}: {stopped.step:,} steps in {clock(stopped.seconds)}, {stopped.best:.3f} bits/char")
        config = read_config(path)
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        learning = [json.loads(line) for line in lines]
        keep = ("step", "seconds", "bits_per_char", "objective", "kind")
        self._keep(
            name,
            "training",
            {
                "family": family,
                "parameters": count_parameters(build(config).network),
                "steps": stopped.step,
                "seconds": stopped.seconds,
                "precision": config.training.precision,
                "batch": config.training.batch,
                "processes": self.group.size,
                "flops": flops_of_a_step(config) * stopped.step,
                "network": config.network,
                "process": config.process,
                "settings": asdict(config.training),
                "learning": [{k: line[k] for k in keep} for line in learning],
            },
        )

    # -- measuring ------------------------------------------------------------------------------------------------
    def _judge(self) -> Judge | None:
        if self.plan.judge == "none":
            return None
        if self.plan.judge != "own":
            return PublicJudge(self.plan.judge, self.device)
        return OwnJudge(load(self._path(JUDGE), self.device, "fp32"))

    def _measure(self, name: str, bench: Bench, parts: Iterable[str]) -> None:
        """Those of the parts that have not been measured."""
        left = [part for part in parts if self._kept(name).get(part) is None]
        if not left:
            return
        model = load(self._path(name), self.device, self.precision)
        if model.config.text != fingerprint(bench.corpus):
            raise UserError(f"{self._path(name)} was trained on another text; choose another --out")
        if model.tokenizer.to_json() != bench.tokenizer.to_json():
            raise UserError(f"{self._path(name)} has a tokenizer of its own; choose another --out")
        for part in left:
            self.say(f"{name}: {part}")
            self._part(name, part, partial(PARTS[part], model, bench))

    def _kept(self, name: str) -> dict[str, Any]:
        file = self.out / "measured" / f"{name}.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(f"{file} is damaged; delete it, and what it held is measured again") from None

    def _keep(self, name: str, part: str, body: dict[str, Any]) -> None:
        (self.out / "measured").mkdir(exist_ok=True)
        write(self.out / "measured" / f"{name}.json", json.dumps(self._kept(name) | {part: body}, indent=1) + "\n")

    def _part(self, name: str, part: str, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        kept = self._kept(name).get(part)
        if kept is None:
            kept = act()
            self._keep(name, part, kept)
        return dict(kept)

    def _protocol(self, bench: Bench) -> dict[str, Any]:
        plan, corpus = self.plan, bench.corpus
        return {
            "text": corpus.name,
            "provenance": corpus.provenance,
            "fingerprint": fingerprint(corpus),
            "training_tokens": len(bench.training),
            "tokenizer": bench.tokenizer.describe(),
            "vocabulary": bench.tokenizer.vocabulary,
            "packing": (
                "windows of one length cut from the text, documents end to end with an end-of-text token between"
                if corpus.has_documents
                else "windows of one length cut from the text"
            ),
            "length": plan.length,
            "held_out": {
                "windows": len(bench.windows),
                "tokens": int(sum(map(len, bench.windows))),
                "reading": "windows do not overlap, no context is carried over, each starts from an end-of-text token",
            },
            "bounds": "exact or an upper bound, as each figure says; bounds for T calls are of the sampler named there",
            "time_sampling": f"stratified over windows; {plan.draws} noisy copies of each, or as many as a curve needs",
            "sampling_precision": f"network in {self.precision}, draws in float64 by inverse law",
            "training_precision": sorted({str(self._kept(n)["training"]["precision"]) for n in plan.families}),
            "seeds": {"training": plan.seed, "judge": plan.seed + 1, "sampling": plan.seed},
            "judge": None if bench.judge is None else bench.judge.name,
            "calls": "network evaluations, counted",
            "samplers": "bounds are of a family's first sampler; samples of the one recommended at so many calls",
            "machine": machine(self.device),
            "command": plan.command(),
        }


def flops_of_a_step(config: RunConfig) -> float:
    """Multiplications and additions of one optimiser step, forward and backward, as torch counts them."""
    process = build(config)
    rows = min(config.training.batch, 2)
    x = torch.zeros(rows, int(config.network["window"]), dtype=torch.long)
    # The fused attention of a CPU is not counted; its plain form is the same arithmetic.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        process.loss(x, Noise.of(0, rows)).mean().backward()
    return counter.get_total_flops() * config.training.batch / rows
