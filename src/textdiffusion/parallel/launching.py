"""How many processes torchrun has started, and which of them this is: from the environment, without torch."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    try:
        return max(1, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError:
        return 1


def rank() -> int:
    """The number of this process among them, from 0: the first speaks for all."""
    found = os.environ.get("RANK", "")
    return int(found) if found.isdecimal() and launched() > 1 else 0
