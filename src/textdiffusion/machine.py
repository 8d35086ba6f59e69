"""What this machine does fast: its number type, how much of a batch at a time, and how freed memory is kept."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import time
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F

from textdiffusion.files import cache_folder


def last_cache() -> int:
    """Bytes of the processor's last cache; 32 MB where the system does not say."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii").strip()
        return int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**25


def micro_batch_for(
    length: int, vocabulary: int, width: int, device: torch.device | str = "cpu", cache: int | None = None
) -> int:
    """Windows of ``length`` tokens for one forward and backward pass.

    As many as keep the widest activation, 4 ``width`` of 2 bytes a token, in a quarter of the last cache: with 105 MB
    whole batches of 8,192 tokens were 1.4 times as fast as 2,048 at a time (benchmarks/), and on a Zen 5 with less a
    prototype had found the contrary. At most 2^26 logits everywhere, for the memory; on a GPU nothing else counts.
    """
    tokens = 2**26 // vocabulary
    if torch.device(device).type == "cpu":
        tokens = min(tokens, (cache or last_cache()) // (32 * width))
    return max(1, tokens // length)


def tune_allocator() -> None:
    """Let the C library keep freed memory: fresh pages cost more than the arithmetic done on them (benchmarks/)."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc: nothing to tune
    m_mmap_threshold, m_trim_threshold = -3, -1
    # Older C libraries take no threshold above 32 MB; where none is taken, the rest is better left as it is.
    if mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25):
        mallopt(m_trim_threshold, (1 << 31) - 1)


def processor_name() -> str:
    """What the system calls its processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fastest_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """Measure, in a few milliseconds, whether this machine multiplies bfloat16 clearly faster than float32.

    The answer is remembered in the cache folder for this processor and torch, so that the same command chooses the
    same precision however busy the machine is.
    """
    place = cache_folder() / "precision.json"
    # By its name: of two processors of one capability, one may have units for bfloat16 products and one may not.
    key = f"{processor_name()} {torch.backends.cpu.get_cpu_capability()} {torch.__version__} {device}"
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
        if known[key] in ("bf16", "fp32"):
            return cast(Literal["bf16", "fp32"], known[key])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, w = (torch.ones(n, 256, device=device, dtype=dtype) for n in (1024, 1024))
        runs = []
        for _ in range(15):
            begin = time.perf_counter()
            F.linear(x, w).sum().item()
            runs.append(time.perf_counter() - begin)
        seconds[name] = min(runs)
    # A narrow win is not worth the lost digits.
    answer: Literal["bf16", "fp32"] = "bf16" if seconds["bf16"] * 1.5 < seconds["fp32"] else "fp32"
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        temporary.write_text(json.dumps((known if isinstance(known, dict) else {}) | {key: answer}), encoding="utf-8")
        os.replace(temporary, place)
    return answer
