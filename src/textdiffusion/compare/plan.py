"""What is compared, and with what: all that decides the figures but the machine. Without torch.

A plan stands in REPORT/plan.json before anything is trained, so that an interrupted comparison goes on with the same
one, and in results.json, from which it is run again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textdiffusion.config import RunConfig
from textdiffusion.errors import UserError
from textdiffusion.exchange.packed import PACKAGED, packed_file
from textdiffusion.families import check, names
from textdiffusion.presets import configure
from textdiffusion.settings import check_writing, with_fields

MINUTES = 5.0  # of training for each family, unless a budget is given
JUDGE = "judge"  # the judge's run, beside the families'


@dataclass
class Plan:
    """A comparison. One of steps, minutes and flops is the training budget of each family."""

    families: list[str] = field(default_factory=names)
    data: str = "pydoc"
    text_field: str = "text"
    tokenizer: str = "char"
    length: int = 64  # tokens of a window
    depth: int = 3  # blocks; width and heads follow
    steps: int | None = None
    minutes: float | None = None
    flops: float | None = None  # of training, forward and backward, as torch counts them
    seed: int = 0
    calls: list[int] = field(default_factory=lambda: [8, 32, 128])  # budgets of network calls a text to choose for
    samples: int = 128  # texts for each budget and temperature
    temperatures: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.85, 1.0])
    eval_tokens: int = 16384  # of held-out text
    draws: int = 2  # noisy copies of each held-out window
    judge: str = "own"  # or "none", one of PACKAGED, a folder, a packed file, hf:NAME
    settings: list[str] = field(default_factory=list)  # --set of every run

    def __post_init__(self) -> None:
        if not self.families:
            raise UserError("--families names no family; leave it out for all of them")
        for name in self.families:
            check(name)
        if len(set(self.families)) < len(self.families):
            raise UserError(f"--families names one twice: {', '.join(self.families)}")
        if sum(budget is not None for budget in (self.steps, self.minutes, self.flops)) != 1:
            raise UserError("give one of --steps, --minutes and --flops")
        if self.flops is not None and not 0 < self.flops < 1e30:
            raise UserError(f"--flops must be above 0, such as 1e13, not {self.flops:g}")
        for flag, value, low, high in (
            ("--samples", self.samples, 2, 10**6), ("--eval-tokens", self.eval_tokens, 1, 10**12),
            ("--draws", self.draws, 1, 10**4), ("--length", self.length, 8, 10**6),
        ):  # fmt: skip
            if not low <= value <= high:
                raise UserError(f"{flag} must be from {low:,} to {high:,}, not {value}")
        for name, numbers in (("--calls", self.calls), ("--temperatures", self.temperatures)):
            if not numbers or numbers != sorted(set(numbers)):
                raise UserError(f"{name} takes different numbers, in rising order, not {numbers}")
        for calls in self.calls:
            check_writing(calls=calls)
        for temperature in self.temperatures:
            check_writing(temperature=temperature)
        if 1.0 not in self.temperatures:
            raise UserError("--temperatures must hold 1, the model's own law")
        named = self.judge in ("own", "none", *PACKAGED) or self.judge.startswith("hf:")
        if not named and not packed_file(self.judge) and not (Path(self.judge) / "config.json").exists():
            where = "a folder of a causal model of transformers"
            raise UserError(f"--judge must be own, none, {', '.join(PACKAGED)}, hf:NAME or {where}, not {self.judge!r}")
        for name in self.families:
            self.config(name, None if self.flops is None else 1)

    @property
    def budget(self) -> str:
        """For people."""
        if self.steps is not None:
            return f"{self.steps:,} steps"
        if self.minutes is not None:
            return f"{self.minutes:g} minutes" if self.minutes != 1 else "1 minute"
        return f"{self.flops:.3g} FLOPs"

    @property
    def ladder(self) -> list[int]:
        """Numbers of calls for which the bound is measured: powers of two, and the budgets."""
        powers = [2**k for k in range(self.calls[-1].bit_length()) if 2**k <= self.calls[-1]]
        return sorted({*powers, *self.calls})

    @property
    def middle(self) -> int:
        """The budget of calls at which temperatures are swept."""
        return self.calls[len(self.calls) // 2]

    def config(
        self, family: str, steps: int | None = None, seed: int | None = None, own_priors: bool = False
    ) -> RunConfig:
        """The config of a run; ``steps`` in place of the budget.

        The network is the same for all: without n-gram embeddings and counts, unless --set says otherwise, or
        ``own_priors`` that it has those which a training of its own would have (networks/ngrams.py, counts.py).
        """
        settings = [setting for setting in self.settings if not setting.startswith("process.")]
        settings += [s for s in self.settings if s.startswith("process.") and self._is_for(family, s)]
        for name in () if own_priors else ("network.ngrams", "network.counts"):
            if not any(setting.startswith(name) for setting in settings):
                settings.append(f"{name}=0")
        if steps is None:
            steps = self.steps
        return configure(
            family=family, data=self.data, text_field=self.text_field, tokenizer=self.tokenizer, length=self.length,
            depth=self.depth, steps=steps, minutes=None if steps is not None else self.minutes,
            seed=self.seed if seed is None else seed, settings=settings,
        )  # fmt: skip

    def _is_for(self, family: str, setting: str) -> bool:
        """Whether the family has the field; one that none of them has is refused."""
        from textdiffusion.families import family as find

        key = setting.partition("=")[0].removeprefix("process.")
        has = {name: key in {f.name for f in dataclasses.fields(find(name).Config)} for name in self.families}
        if not any(has.values()):
            raise UserError(f"none of the families has the field process.{key}; leave out --set {setting}")
        return has.get(family, False)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def command(self, out: str = "REPORT") -> str:
        """The command line that makes this comparison, with every setting that is not what it would be anyway."""
        import shlex

        usual = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        words = ["textdiffusion", "compare", "--families", ",".join(self.families), "--out", out]
        for name, value in self.as_dict().items():
            if name in ("families", "settings") or value is None or (name in usual and usual[name] == value):
                continue
            text = ",".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        for setting in self.settings:
            words += ["--set", setting]
        return shlex.join(words)


def read_plan(body: Any, where: str) -> Plan:
    """A plan from JSON.

    Raises:
        UserError: it is none.
    """
    if not isinstance(body, dict):
        raise UserError(f"{where} is no plan of a comparison; give a results.json that `textdiffusion compare` wrote")
    plan: Plan = with_fields(Plan, body, where)
    return plan


def settle(plan: Plan, out: Path) -> None:
    """Take a folder for the comparison, or go on in one that holds the same.

    Raises:
        UserError: it holds another comparison, or something else.
    """
    file = out / "plan.json"
    if file.exists():
        try:
            before = read_plan(json.loads(file.read_text(encoding="utf-8")), str(file)).as_dict()
        except ValueError:
            raise UserError(f"{file} is damaged; restore it, or choose another --out") from None
        for name, value in plan.as_dict().items():
            # Others may be added to a comparison: what is there is measured in the same way.
            if name != "families" and before[name] != value:
                raise UserError(
                    f"{out} holds a comparison with other settings: {name} is {before[name]!r} there and {value!r} "
                    "here; choose another --out"
                )
    elif out.exists() and (not out.is_dir() or any(p.name != "runs" and p.name[0] != "." for p in out.iterdir())):
        raise UserError(f"{out} is there and no comparison; choose an empty or a new folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(plan.as_dict(), indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file so that it is all there or not at all; without torch, which run.py needs."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
