"""Models by name: a run directory here, a folder or packed file of another system, or a repository of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from textdiffusion.config import RUNS
from textdiffusion.errors import UserError
from textdiffusion.exchange.packed import packed_file, unpacked

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ("*.json", "*.safetensors", "*.bin", "*.yaml", "*.txt", "README.md")  # never code


def fetch(name: str | Path) -> Path:
    """The path itself; of a packed model (GGUF), or the short name of one that a package brings, the folder that it is
    unpacked into; or, if there is nothing there and it looks like USER/NAME, that model's folder, downloaded.

    Raises:
        UserError: it cannot be unpacked, or downloaded.
    """
    if (file := packed_file(name)) is not None:
        return unpacked(file)
    path = Path(name).expanduser()
    text = str(name).removeprefix("hf:")
    wanted = str(name).startswith("hf:") or (HUB_NAME.fullmatch(text) and not Path(text).parent.exists())
    if path.exists() or not wanted or Path(text).parts[:1] in ((), (RUNS.name,)):
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=list(FILES)))
    except Exception as error:  # whatever the network or the hub's client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{text} is no folder here, and cannot be fetched from the hub: {reason}") from error


def facts(path: Path) -> dict[str, Any]:
    """What a folder's config.json says; nothing if there is none, or none that can be read."""
    try:
        body = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def is_foreign(path: Path) -> bool:
    """Whether a folder or file holds a model of another system (rather than a run, or nothing)."""
    if path.is_file():
        return True
    if not (path / "config.json").exists():
        return any((path / name).is_file() for name in ("config.yaml", ".hydra/config.yaml"))
    body = facts(path)
    return bool(body) and body.get("model_type") != "textdiffusion" and "family" not in body
