"""Files that are never half there, their checksums, and folders that one process writes to at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from textdiffusion.errors import UserError


def cache_folder() -> Path:
    """Where derived files are kept: $TEXTDIFFUSION_CACHE, else ~/.cache/textdiffusion."""
    return Path(os.environ.get("TEXTDIFFUSION_CACHE") or "~/.cache/textdiffusion").expanduser()


def place(path: Path, writer: Callable[[Path], object]) -> None:
    """Have a file written beside, and put in place when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        writer(temporary)
        with contextlib.suppress(OSError):  # some libraries write files for their owner alone
            os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: Path, text: str) -> None:
    """Write a text file so that it is either all there or not at all."""
    place(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While a process is in here, no other one is. The system lets go of the lock when the process ends, however.

    Raises:
        UserError: another one is.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {folder}; wait until it has ended, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    with contextlib.suppress(OSError):  # some file systems have no such thing for folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
