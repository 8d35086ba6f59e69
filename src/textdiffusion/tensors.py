"""Tensors in safetensors files that say their own checksum, and are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.files import place

CANNOT = (OSError, SafetensorError)  # what writing and reading files raises


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU, their names, types and shapes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that says its own checksum, all of it or nothing.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    metadata = {"format": "pt", "sha256": digest(tensors)}

    def save(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=metadata)
        _in_order(temporary)

    try:
        place(path, save)
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error


def _in_order(path: Path) -> None:
    """Sort what a safetensors file says of itself, which is written in an order of chance: the same weights are to be
    the same file, byte for byte."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        body = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(body) <= size:
            file.seek(8)
            file.write(body.ljust(size))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, and check it against its checksum if it has one.

    Raises:
        UserError: missing or damaged.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
        if expected not in (None, digest(tensors)):
            raise ValueError("its checksum does not agree")
        return tensors
    except FileNotFoundError:
        if others := [p.name for p in path.parent.glob("*") if p.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl")]:
            raise UserError(
                f"{path} is missing, and {others[0]} is not read, for reading such files can run code; whoever made it "
                'can export it: safetensors.torch.save_file(weights, "model.safetensors")'
            ) from None
        raise UserError(f"{path} is missing; train the run first, or copy the file back") from None
    except (*CANNOT, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or resume the run from its checkpoints") from None
