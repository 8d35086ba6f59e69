"""Two processes of a group, started as torchrun starts them, without waiting for torchrun itself to load torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def two(*command: object, **more: str) -> Iterator[list[subprocess.Popen]]:
    """A Python command in two processes that find each other, by rank; what is left of them in the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"} | more
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def said(processes: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, once all have ended."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(processes)) as pool:  # all are read, else one waits for its reader
        found = list(pool.map(lambda process: process.communicate(timeout=timeout), processes))
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]
