"""Frames into HTML as they come: at a pace that the page can follow, and only for as long as somebody wants them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from textdiffusion.display.frames import TextFrame
from textdiffusion.display.replay.canvas import canvas, error, player
from textdiffusion.display.replay.recording import Recording
from textdiffusion.errors import UserError

LONGEST = 120.0  # seconds of one visitor's sampling, so that the next one has a turn
OVERHEAD = 0.2  # at most this share of the time goes into showing
BYTES_A_SECOND = 250_000  # that a page is sent while it writes; a slow link still keeps up

_log = logging.getLogger(__name__)


@dataclass
class Pace:
    """When to show the next frame.

    Frames are shown at most every ``interval`` seconds; no faster than the link takes them; and so seldom that making,
    sending and waiting for them takes at most OVERHEAD of the time. Frames in between are not lost: the recording has
    them all.
    """

    interval: float = 0.08
    clock: Callable[[], float] = time.perf_counter
    spent: float = 0.0  # seconds of showing, in all
    _next: float = field(default=0.0, init=False)

    def due(self) -> bool:
        """Whether a frame may be shown now."""
        return self.clock() >= self._next

    def shown(self, begin: float, size: int) -> None:
        """A frame of ``size`` bytes was shown, from ``begin`` (by the clock) until now."""
        now = self.clock()
        self.spent += now - begin
        wait = max(self.interval, (now - begin) * (1 / OVERHEAD - 1), size / BYTES_A_SECOND)
        self._next = now + wait


class Jobs:
    """What is being written now, and for whom: a flag for each, so that stopping stops. Nothing is kept of the past."""

    def __init__(self) -> None:
        self._flags: dict[str, threading.Event] = {}

    def begin(self, visitor: str) -> threading.Event:
        """A new job of a visitor's; one that still runs is told to stop."""
        self.stop(visitor)
        self._flags[visitor] = flag = threading.Event()
        return flag

    def stop(self, visitor: str) -> None:
        if (flag := self._flags.get(visitor)) is not None:
            flag.set()

    def halt(self, visitor: str, patience: float = 5.0) -> None:
        """Stop a visitor's job, and wait until it has said so."""
        self.stop(visitor)
        end = time.monotonic() + patience
        while visitor in self._flags and time.monotonic() < end:
            time.sleep(0.02)

    def end(self, visitor: str, flag: threading.Event) -> None:
        if self._flags.get(visitor) is flag:
            del self._flags[visitor]

    def __len__(self) -> int:
        return len(self._flags)


def show(
    recording: Recording,
    streams: Sequence[Iterable[TextFrame]],
    stop: threading.Event,
    pace: Pace | None = None,
    finish: Callable[[Recording], str] | None = None,
) -> Iterator[str]:
    """HTML of panels that are written at once; the last one plays it all again.

    Each panel's next frame is made when it is the one that has come least far, so that panels with different numbers of
    steps end together; a panel's seconds are its own.

    Args:
        recording: with as many panels as streams.
        stop: once set, no further frame is asked for, and the network is called no more.
        finish: a note made of the recording when all is written.
    """
    pace = pace or Pace()
    open_streams = {i: iter(stream) for i, stream in enumerate(streams)}
    begin = time.perf_counter()
    while open_streams and not stop.is_set() and time.perf_counter() - begin < LONGEST:
        number = min(open_streams, key=lambda i: recording.panels[i].now.done if recording.panels[i].steps else -1.0)
        now = time.perf_counter()
        frame = next(open_streams[number], None)
        if frame is None:
            del open_streams[number]
            continue
        recording.panels[number].add(frame, time.perf_counter() - now)
        if pace.due():
            before = pace.clock()
            page = canvas(recording.panels)
            yield page
            pace.shown(before, len(page))
    if open_streams:
        reason = "Stopped" if stop.is_set() else f"Stopped after {LONGEST:.0f} s, so that others have a turn"
        recording.note = f"{reason}: what is not written yet is left as noise."
    elif finish is not None:
        recording.note = finish(recording)
    if all(panel.steps for panel in recording.panels):
        yield player(recording)


def told(pages: Callable[[threading.Event], Iterator[str]], stop: threading.Event) -> Iterator[str]:
    """What an act yields, with whatever goes wrong told in one line on the page."""
    try:
        yield from pages(stop)
    except UserError as mistake:
        yield error(in_words(str(mistake)))
    except Exception as fault:
        if "allocate" in str(fault) or isinstance(fault, MemoryError):
            yield error("this machine has not enough memory for that; ask for fewer or shorter texts")
            return
        _log.exception("a fault while writing for the page")
        yield error(f"something went wrong ({type(fault).__name__}); the terminal behind this page has the details")


def in_words(line: str) -> str:
    """An error that names flags of the command line, for a page that has none: --top-p becomes "top p"."""
    named = {"-n": "the number of texts"}
    words = []
    for word in line.split():
        bare = word.strip(",;:.()")
        if bare in named:
            word = word.replace(bare, named[bare])
        elif bare.startswith("--") and len(bare) > 2:
            word = word.replace(bare, bare[2:].replace("-", " "))
        words.append(word)
    return " ".join(words)
