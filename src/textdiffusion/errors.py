"""The one exception type whose message is meant for the person at the keyboard."""

from __future__ import annotations

import os


class UserError(Exception):
    """Something the user can put right: a missing file, a bad setting, too little text.

    The message is one clear line that says what went wrong and what to do about it. The command line prints that
    line and exits with code 2; any other exception is a bug and keeps its traceback.
    """


class ElsewhereError(UserError):
    """The same, met by another of several processes, which says it."""


def lost(error: Exception) -> bool:
    """Whether an error says that another process of a group is gone."""
    said = str(error).lower()
    return "WORLD_SIZE" in os.environ and any(word in said for word in ("connection", "peer", "gloo", "nccl", "store"))
