"""Bases that come as one GGUF file: converted once into the user's cache, as a folder that every library reads."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fedtune.errors import ConfigError, ExtraError, Fault
from fedtune.model.libraries import quiet

MANIFEST = "fedtune.json"
"""File of a converted folder that holds the size and the SHA-256 of every other."""
ROTARY_FACTORS = "rope_freqs.weight"
"""Tensor by which GGUF stretches the rotary frequencies of Llama 3.1 and later; transformers drops it."""

READ_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, AssertionError, ImportError, MemoryError),
)
"""The errors that reading a file may end in whose bytes are not as its format says."""


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or that its folder holds in place of a config.json; None if there is none.

    Raises:
        ConfigError: if the folder holds several.
    """
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:6])
        raise ConfigError(
            Fault("model.base", "one GGUF file", f"{len(files)} in {path} ({names})", "give the path of one of them")
        )
    return files[0] if files else None


def convert_once(file: Path) -> Path:
    """Return the folder of a GGUF file's model: float32 safetensors, config and tokenizer, written on the first call.

    It lies in the user's cache under a name that depends on the file's bytes and on the version of transformers. Two
    processes may ask for it at once; a folder that is damaged is written again.

    Raises:
        ConfigError: if the file cannot be read, or holds what transformers would leave out.
        ExtraError: if the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise ExtraError(
            f'{file.name}: expected the package gguf, which reads such files; run pip install "fedtune[gguf]"'
        )
    try:
        status = file.stat()
        folder = cache() / cache_key(str(file.resolve()), status.st_size, status.st_mtime_ns)
        with exclusive(folder):
            if not intact(folder):
                convert(file, folder)
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or file})"
        hint = "free some space, or set XDG_CACHE_HOME to a folder that can be written"
        raise ConfigError(Fault("model.base", "a cache for the converted GGUF file", reason, hint)) from error
    return folder


def cache() -> Path:
    """Return the folder of converted bases."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fedtune" / "gguf"


@lru_cache(maxsize=8)
def cache_key(path: str, size: int, modified_ns: int) -> str:
    """Return the SHA-256 of a file's bytes and of the version that converts it; size and time are for this cache."""
    with open(path, "rb") as file:
        sha = hashlib.file_digest(file, "sha256")
    # Another version may convert otherwise: what an older one wrote must not pass for its work.
    sha.update(f"transformers {transformers.__version__}".encode())
    return sha.hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a cached folder inside the block; the kernel releases it with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def intact(folder: Path) -> bool:
    """Return whether a converted folder holds all of its files, to the byte."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        return bool(files) and all(file_facts(folder / name) == facts for name, facts in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def file_facts(file: Path) -> list[Any]:
    """Return a file's size and SHA-256."""
    status = file.stat()
    return [status.st_size, file_digest(str(file), status.st_size, status.st_mtime_ns)]


@lru_cache(maxsize=64)
def file_digest(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model to a folder, in one step."""
    model, tokenizer = read(file)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:12]}."))
    try:
        with quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        files = {each.name: file_facts(each) for each in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(files, indent=1) + "\n")
        if folder.exists():  # damaged; a process that has its files open keeps them
            shutil.rmtree(folder)
        part.chmod(0o755)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read(file: Path) -> tuple[Any, Any]:
    """Return a GGUF file's model in float32 and its tokenizer, both as stock ones of transformers.

    Raises:
        ConfigError: if transformers cannot read the file, or would leave out a tensor.
    """
    with file.open("rb") as opened:
        start = opened.read(64)
    if not start.startswith(b"GGUF"):
        got = "a pointer of Git LFS in its place" if start.startswith(b"version https://git-lfs") else "another file"
        raise ConfigError(Fault("model.base", f"a GGUF file at {file}", got, "download the file itself"))
    options = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        # Its progress bar heeds no setting.
        with quiet(), redirect_stderr(io.StringIO()):
            config = AutoConfig.from_pretrained(file.parent, **options)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        expected = "a whole GGUF file of a decoder that transformers reads"
        hint = "give the folder of the original model (config.json, tokenizer, safetensors) instead"
        raise ConfigError(Fault("model.base", expected, f"{file} ({type(error).__name__}: {reason})", hint)) from error
    if missing := sorted(info["missing_keys"]):
        expected, got = "all of the model's tensors", f"{file} without {', '.join(missing[:3])}"
        raise ConfigError(Fault("model.base", expected, got, "give the folder of the original model instead"))
    check_tensors(file, model)
    # What it was converted from: with it, transformers would take the float32 weights for quantised ones.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = ""
    return model, tokenizer


def check_tensors(file: Path, model: Any) -> None:
    """Refuse a file with tensors that the model did not take up; the rotary factors go into its config, in place.

    Raises:
        ConfigError: naming file and tensor.
    """
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    sizes = {name: int(tensor.n_elements) for name, tensor in tensors.items()}
    if factors := tensors.get(ROTARY_FACTORS):
        stretch(model, torch.from_numpy(dequantize(factors.data, factors.tensor_type).copy()), file)
        sizes.pop(ROTARY_FACTORS)
    if model.config.tie_word_embeddings:
        sizes.pop("output.weight", None)
    has = sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values())
    if sum(sizes.values()) != has:
        got = f"{sum(sizes.values()):,} weights in {file.name}, of which transformers loads {has:,}"
        expected = "a GGUF file whose every tensor transformers loads"
        raise ConfigError(Fault("model.base", expected, got, "give the folder of the original model instead"))


def stretch(model: Any, factors: torch.Tensor, file: Path) -> None:
    """Write the rotary factors of a GGUF file into the model's config, as Llama 3.1's rule of which they are values.

    Raises:
        ConfigError: if they are of another rule.
    """
    config = model.config
    plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    scaled = {
        **plain,
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    width = config.head_dim
    default = 1.0 / plain["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    config.rope_parameters = scaled
    rule, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if len(factors) != len(default) or not torch.allclose(rule, default / factors, rtol=1e-3):
        expected = "rotary factors of Llama 3.1's rule, or none"
        hint = "give the folder of the original model instead"
        raise ConfigError(Fault("model.base", expected, f"others in {ROTARY_FACTORS} of {file.name}", hint))
