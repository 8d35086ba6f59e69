"""A visitor's pattern, tried first in a process of its own, which can be ended.

`(a|b)*a(a|b){30}` is short, and has more states than a machine has room for.
"""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache

from textdiffusion.errors import UserError

LONGEST_PATTERN = 200  # characters
SECONDS, MEGABYTES = 2, 512  # of the processor, and of memory, that a trial may take
MOST_CELLS = 2**23  # states times tokens
_TRIAL = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
    resource.setrlimit(resource.RLIMIT_AS, ({MEGABYTES} << 20, {MEGABYTES} << 20))
except ImportError:
    pass  # Windows: the clock alone ends it
from interegular import parse_pattern
try:
    print(len(parse_pattern(sys.argv[1]).to_fsm().states))
except MemoryError:
    sys.exit(3)
except Exception:
    print(0)  # no pattern at all: the library says why
"""


@lru_cache(maxsize=64)
def states_of(pattern: str) -> int | None:
    """States of the automaton of a regular expression; 0 where it is none, None where there are too many to count."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL, pattern], capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return int(done.stdout) if done.returncode == 0 else None


def check_pattern(pattern: str, vocabulary: int) -> None:
    """Refuse a pattern that would take the machine down; whether it is one at all is for the library to say.

    Raises:
        UserError: it is too long, or has too many states for so large a vocabulary.
    """
    if len(pattern) > LONGEST_PATTERN or "\0" in pattern:
        raise UserError(f"a pattern on this page has at most {LONGEST_PATTERN} characters; shorten it")
    states = states_of(pattern)
    if states is None or states * vocabulary > MOST_CELLS:
        raise UserError("this pattern has too many states to be followed on this page; write it in a simpler way")
