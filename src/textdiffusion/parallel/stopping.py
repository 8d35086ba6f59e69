"""Ctrl-C and SIGTERM, noted so that what has been done can be saved first."""

from __future__ import annotations

import signal
from types import FrameType

from textdiffusion.parallel.distributed import Group
from textdiffusion.parallel.launching import launched


class Signals:
    """Notes SIGINT and SIGTERM while training, so that a checkpoint can be saved first; a second one stops at once, but
    for several processes, which torchrun signals again when one of them has been."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.received: int | None = None
        self.before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if launched() == 1:
            self._restore()

    def agreed(self) -> int | None:
        """The signal that any of the processes has received."""
        if self.group.size == 1:
            return self.received
        known = (signal.SIGINT, signal.SIGTERM)
        counts = self.group.total([float(self.received == number) for number in known])
        return next((int(number) for number, count in zip(known, counts, strict=True) if count), None)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.before = {}

    def __enter__(self) -> Signals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread: signals are someone else's business
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()
