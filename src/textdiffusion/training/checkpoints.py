"""Checkpoints: what a training needs to go on exactly where it was, kept so that none is ever lost or half there.

  checkpoints/step-000001200/state.safetensors    weights, their average, optimisers; several files if they are shards
                             state.json           counters
                             checksums.json       SHA-256 of every other file

A checkpoint is written beside, named when it is whole, and read only if its checksums agree; if not, the one before it
is. What is in one does not depend on how many processes wrote it, so any number can read it. The files are
safetensors and JSON: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.files import checksum, flush, place, write
from textdiffusion.parallel.distributed import ALONE, Group
from textdiffusion.parallel.sharding import local
from textdiffusion.tensors import CANNOT, load_tensors
from textdiffusion.training.learning import Learner

KEEP = 2  # whole checkpoints
UNREADABLE = (UserError, *CANNOT, ValueError, TypeError, KeyError, RuntimeError)


@final
class Checkpoints:
    """The checkpoints of a run, in a folder that all processes of the group see."""

    def __init__(self, folder: Path, group: Group = ALONE):
        self.folder, self.group = folder, group
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.trouble: str | None = None  # with shards

    def whole(self) -> list[Path]:
        """Those that have been named, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def save(self, learner: Learner, more: Mapping[str, float]) -> str | None:
        """Write a checkpoint; shards at once, all else while training goes on. All processes must ask.

        Returns what went wrong with the one before it, if anything did: older ones are still there.
        """
        trouble = self.finish()
        numbers = {**learner.numbers(), **more}
        if learner.spread.shard:
            self.trouble = self._save_shards(learner, numbers)
            return trouble
        if self.group.main:
            tensors = {name: tensor.clone() for name, tensor in _cuttable(learner).items()}
            self.pending = self.writer.submit(self._write, learner.step, tensors, numbers)
        return trouble

    def finish(self) -> str | None:
        """Wait for what is being written. Returns what went wrong, if anything did. All processes must ask."""
        pending, self.pending = self.pending, None
        trouble, self.trouble = self.trouble, None
        return trouble or self._attempt(lambda: None if pending is None else pending.result())

    def _attempt(self, act: Callable[[], object]) -> str | None:
        """Do it; returns what went wrong, on this process or on another."""
        line = None
        try:
            act()
        except UserError as error:
            line = str(error)
        except OSError as error:
            line = error.strerror or str(error)
        except UNREADABLE as error:
            line = " ".join(str(error).split())[:200] or type(error).__name__
        try:
            self.group.together(line)
        except UserError as error:
            line = str(error)
        return line

    def _begin(self) -> Path:
        """A new folder to write into; what a process left that was killed while it wrote is removed."""
        self.folder.mkdir(exist_ok=True)
        for left in self.folder.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = self.folder / f".writing-{os.getpid()}"
        temporary.mkdir()
        return temporary

    def _write(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        _check_finite(tensors)
        temporary = self._begin()
        try:
            place(temporary / "state.safetensors", lambda file: save_file(tensors, file, metadata={"format": "pt"}))
            self._seal(temporary, step, numbers)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _save_shards(self, learner: Learner, numbers: dict[str, float]) -> str | None:
        """Have every process write its shards; returns what went wrong, on any of them."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        tensors, begun = _apart(_cuttable(learner)), [""]

        def begin() -> None:
            _check_finite(tensors)
            if self.group.main:
                begun[0] = str(self._begin())

        def save() -> None:
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            with _told_as_errors():
                dcp.save(tensors, storage_writer=writer)

        trouble = self._attempt(begin)
        temporary = Path(self.group.told(begun[0]))
        trouble = trouble or self._attempt(save)
        trouble = trouble or self._attempt(
            lambda: self._seal(temporary, learner.step, numbers) if self.group.main else None
        )
        if begun[0]:
            shutil.rmtree(temporary, ignore_errors=True)
        return trouble

    def _seal(self, temporary: Path, step: int, numbers: dict[str, float]) -> None:
        """Add counters and checksums, give the checkpoint its name, and let go of the oldest."""
        write(temporary / "state.json", json.dumps(numbers) + "\n")
        sums = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
        write(temporary / "checksums.json", json.dumps(sums, indent=1) + "\n")
        for file in temporary.iterdir():
            flush(file)
        final = self.folder / f"step-{step:09d}"
        if final.exists():
            _remove(final)
        os.rename(temporary, final)
        flush(self.folder)
        for old in [*self.whole()[:-KEEP], *self.folder.glob("damaged-*")]:
            _remove(old)

    # -- reading --------------------------------------------------------------------------------------------------
    def restore(self, learner: Learner) -> tuple[dict[str, float] | None, list[str]]:
        """Load the newest checkpoint that is whole into ``learner``; all processes must ask.

        Returns its numbers, None if there is none at all, and what was wrong with newer ones, which are put aside.

        Raises:
            UserError: there are checkpoints, and none can be read.
        """
        wrong: list[str] = []
        paths = json.loads(self.group.told(json.dumps([str(path) for path in reversed(self.whole())])))
        for path in map(Path, paths):
            numbers: dict[str, float] = {}

            def load(path: Path = path, numbers: dict[str, float] = numbers) -> None:
                numbers.update(json.loads((path / "state.json").read_text(encoding="utf-8")))
                self._load(path, learner, numbers)

            line = self._attempt(lambda path=path: verify(path) if self.group.main else None)  # type: ignore[misc]
            line = line or self._attempt(load)
            if line is None:
                return numbers, wrong
            wrong.append(f"{path.name} is damaged ({line})")
            if self.group.main:
                with contextlib.suppress(OSError):
                    shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
                    os.rename(path, path.with_name(f"damaged-{path.name}"))
        if wrong:
            if self.group.main:
                for path in self.folder.glob("damaged-step-*"):
                    with contextlib.suppress(OSError):
                        os.rename(path, path.with_name(path.name.removeprefix("damaged-")))
            raise UserError(f"no checkpoint in {self.folder} can be read; restore one, or delete them to begin anew")
        return None, []

    def _load(self, path: Path, learner: Learner, numbers: dict[str, float]) -> None:
        single = path / "state.safetensors"
        read = load_tensors(single) if single.exists() and not learner.spread.shard else _resharded(path, learner)
        # Counters are written with a dimension, along which they could be cut.
        learner.restore({k: v.reshape(()) if k.endswith(".step") else v for k, v in read.items()}, numbers)


def _remove(path: Path) -> None:
    """Remove a checkpoint; its name goes first, so that what has one is whole also where this is not finished."""
    gone = path.with_name(f".writing-{path.name}")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def verify(path: Path) -> None:
    """Check a checkpoint against its checksums.

    Raises:
        UserError: it is not whole, or not what was written.
    """
    try:
        sums: Any = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        assert isinstance(sums, dict)
    except (OSError, ValueError, AssertionError):
        raise UserError("its checksums are missing or cannot be read") from None
    there = {file.name for file in path.iterdir()} - {"checksums.json"}
    if there != sums.keys():
        raise UserError(f"it should have the files {', '.join(sorted(sums))}")
    for name, expected in sums.items():
        if checksum(path / name) != expected:
            raise UserError(f"the checksum of {name} does not agree")


def _resharded(path: Path, learner: Learner) -> dict[str, Tensor]:
    """The tensors of a checkpoint that other processes wrote, in this one's shards."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    there = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    here, wanted = _cuttable(learner), {}
    parameters = [group["params"] for optimizer in learner.optimizers for group in optimizer.param_groups]
    for name, entry in there.items():
        assert isinstance(entry, TensorStorageMetadata)
        like = here.get(name)
        if like is None and not name.startswith("optimizer."):
            continue  # the table of counts, which was once held twice
        if like is None:  # of an optimiser that has not made a step yet
            _, i, j, _ = name.split(".", 3)
            like = parameters[int(i)][int(j)].detach()
        fits = like.shape == entry.size
        wanted[name] = torch.empty_like(like) if fits else torch.empty(entry.size, dtype=entry.properties.dtype)
    with _told_as_errors():
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=learner.group.size == 1)
    return wanted


@contextlib.contextmanager
def _told_as_errors() -> Iterator[None]:
    """What goes wrong on some process while torch writes or reads shards is no Exception there; here it is one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as failed:
        first = next(iter(failed.failures.values()))[0]
        raise RuntimeError(str(first)) from None


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save what no training can go on from."""
    if not all(bool(torch.isfinite(local(tensor)).all()) for tensor in tensors.values()):
        raise UserError("a weight is no longer a number")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with a copy of what has a second name (a head that is its embedding): files hold every name."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        place = local(tensor).untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return out


def _cuttable(learner: Learner) -> dict[str, Tensor]:
    """The tensors of a learner, each with a dimension along which it can be cut."""
    return {name: tensor if tensor.dim() else tensor.reshape(1) for name, tensor in learner.tensors().items()}
