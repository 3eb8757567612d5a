"""The files of a base: where they are, and why some cannot be used, each with what to do about it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, snapshot_download
from transformers import CONFIG_MAPPING

from fedtune.errors import ConfigError, Fault
from fedtune.model import embedded
from fedtune.model.base_paths import local_base
from fedtune.model.gguf import convert_once, find_gguf
from fedtune.model.settings import ModelSettings

OTHER_WEIGHTS: Mapping[str, str] = {
    "*.bin": "a pickle, which can run code as it is read",
    "*.pth": "a pickle, which can run code as it is read",
    "*.pt": "a pickle, which can run code as it is read",
    "*.h5": "of TensorFlow",
    "*.msgpack": "of Flax",
}
"""Weights that are no safetensors, and what they are."""
QUANTISERS: Mapping[str, str] = {
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "aqlm": "aqlm",
    "quanto": "optimum.quanto",
    "eetq": "kernels",
    "higgs": "flute",
    "hqq": "hqq",
    "compressed-tensors": "compressed_tensors",
    "fbgemm_fp8": "kernels",
    "torchao": "torchao",
    "vptq": "vptq",
    "spqr": "spqr_quant",
    "quark": "quark",
    "auto-round": "auto_round",
    "bitnet": "",
    "fp8": "kernels",
    "mxfp4": "",
}
"""By method of quantisation, the module that reads such weights; empty where transformers does it alone."""
LFS = b"version https://git-lfs"
REACH_S = 3.0
"""How long the hub is waited for; its library would try for half a minute, for each file anew."""


def locate(settings: ModelSettings, root: Path) -> str | Path:
    """Return the folder of a local base, relative to the recipe, or the name of a hub model.

    A GGUF file is converted first, where that has not been done before.

    Raises:
        ConfigError: if it cannot be converted, or there is nothing where a path leads.
        ExtraError: if that needs a package that is not installed.
    """
    if settings.base == "embedded":
        return embedded.path()
    local = root / Path(settings.base).expanduser()
    if file := find_gguf(local):
        return convert_once(file)
    return local_base(settings, root) or settings.base


def readable(path: str | Path, revision: str | None) -> str | Path:
    """Return what the libraries read a located base from: the cached files of a hub model if the hub is out of reach.

    Raises:
        OSError: if the model is not cached either.
    """
    if Path(path).is_dir() or constants.HF_HUB_OFFLINE or hub_reachable(constants.ENDPOINT):
        return path
    try:
        return Path(snapshot_download(str(path), revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        host = urlsplit(constants.ENDPOINT).hostname
        raise OSError(
            f"{host} cannot be reached, and the model is not in the cache {constants.HF_HUB_CACHE}"
        ) from error


@lru_cache(maxsize=1)
def hub_reachable(endpoint: str) -> bool:
    """Return whether a connection to the hub, or to the proxy before it, can be opened."""
    proxies, parts = getproxies(), urlsplit(endpoint)
    if proxy := proxies.get(parts.scheme) or proxies.get("all"):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    opened = threading.Event()

    def connect() -> None:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=REACH_S).close()
        except OSError:
            return
        opened.set()

    # In a thread: looking up the name heeds no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_S + 1)
    return opened.is_set()


def not_found(settings: ModelSettings, error: Exception) -> ConfigError:
    """Return the error of a base that cannot be loaded, with the library's own reason."""
    # What follows the first sentence is the libraries' own advice.
    reason = " ".join(str(error).split()).partition(". ")[0][:160]
    expected = "a folder with config.json, tokenizer and safetensors, a GGUF file, or a reachable hub name"
    hint = "check the files, or download them again"
    if not Path(settings.base).is_absolute():  # a hub name, or a folder that is not there
        hint = "give a local path, or download the model once and set HF_HOME"
    return ConfigError(Fault("model.base", expected, f"{settings.base!r} ({reason})", hint))


def check_folder(settings: ModelSettings, path: str | Path, *, weights: bool = True) -> None:
    """Refuse a base's folder that cannot be loaded, before any of it is; hub names are left to the libraries.

    Without `weights` a folder that holds none yet is taken: its sizes follow from config.json.

    Raises:
        ConfigError: with what is wrong, and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    names = sorted(each.name for each in folder.iterdir())
    if "adapter_config.json" in names:
        raise ConfigError(adapter_fault(folder, also_model="config.json" in names))
    if "config.json" not in names:
        inside = f"{', '.join(names[:6])}{', ...' * (len(names) > 6)}" or "nothing"
        expected, hint = f"a config.json in {folder}", "give the folder that transformers' save_pretrained wrote"
        raise ConfigError(Fault("model.base", expected, inside, hint))
    pointers = [name for name in names if is_pointer(folder / name)]
    if pointers:
        expected, got = f"the files themselves in {folder}", f"pointers of Git LFS in place of {', '.join(pointers)}"
        raise ConfigError(Fault("model.base", expected, got, "fetch them with git lfs pull"))
    check_config(read_json(folder / "config.json"), folder)
    if weights or has_weights(folder):
        check_weights(folder, names)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights of any kind, or an index that names some."""
    patterns = ("*.safetensors", "*.index.json", *OTHER_WEIGHTS)
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def adapter_fault(folder: Path, *, also_model: bool) -> Fault:
    """Return the fault of a folder that holds an adapter."""
    try:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    except ConfigError:
        base = None
    if also_model:
        hint = f"move adapter_config.json and adapter_model.safetensors out of {folder}"
        return Fault("model.base", "a model without an adapter beside it", f"both in {folder}", hint)
    hint = f"set model.base = {json.dumps(base)}" if base else "give the model that it was trained on"
    return Fault("model.base", "a whole model", f"an adapter in {folder}", hint)


def is_pointer(file: Path) -> bool:
    """Return whether a file is the text by which Git LFS stands in for it."""
    if not file.is_file() or file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(len(LFS)) == LFS


def read_json(file: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConfigError: if there is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            Fault("model.base", f"JSON in {file}", f"{type(error).__name__}: {error}", "download it again")
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(Fault("model.base", f"an object in {file}", type(content).__name__, "download it again"))
    return content


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a base by the content of its config.json: quantised without the library, or a model with two stacks.

    Raises:
        ConfigError: with what to do.
    """
    quantisation = config.get("quantization_config") or {}
    method = str(quantisation.get("quant_method", "")) if isinstance(quantisation, Mapping) else ""
    if not method and isinstance(quantisation, Mapping) and ("load_in_4bit" in quantisation):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        # Its codes have no digest in common with the base that others hold, and cannot be merged into.
        expected = "the original weights, which fedtune quantises itself as they are read"
        hint = 'give the original model, and set model.dtype = "nf4" or "int8": the codes are the same'
        raise ConfigError(Fault("model.base", expected, f"{where}, quantised by 'bitsandbytes' already", hint))
    if method:
        module = QUANTISERS.get(method)
        if module is None or (module and not is_installed(module)):
            needs = f"the package {module.replace('_', '-')}" if module else "a library that transformers does not know"
            expected = f"{needs}, which reads weights quantised by {method!r}"
            hint = "give the original model, whose weights are not quantised"
            if module:
                hint += (
                    f", or run pip install {module.replace('_', '-').replace('.', '-')} (untested, and most need a GPU)"
                )
            raise ConfigError(Fault("model.base", expected, f"{where} without it", hint))
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        hint = "choose a base of a type that this version knows, or upgrade transformers"
        got = f"{where} of type {kind!r}" + (", which comes with code of its own" if config.get("auto_map") else "")
        expected = "a model whose code is part of transformers: none that comes with a model is run"
        raise ConfigError(Fault("model.base", expected, got, hint))
    if config.get("is_encoder_decoder"):
        expected = "a decoder, or an encoder with model.task = 'classification'"
        got = f"{where}, an encoder-decoder ({kind})"
        hint = "choose another base, such as a Llama, Qwen or GPT-2"
        raise ConfigError(Fault("model.base", expected, got, hint))


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def check_weights(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder whose safetensors are missing, torn or not all there.

    Raises:
        ConfigError: naming the file.
    """
    if "model.safetensors" in names:
        check_safetensors(folder / "model.safetensors")
        return
    if "model.safetensors.index.json" in names:
        parts = read_json(folder / "model.safetensors.index.json").get("weight_map")
        files = sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else []
        if missing := [name for name in files if name not in names]:
            expected = f"all {len(files)} files that model.safetensors.index.json of {folder} names"
            raise ConfigError(Fault("model.base", expected, f"no {', '.join(missing[:4])}", "download them"))
        for name in files:
            check_safetensors(folder / name)
        return
    for pattern, kind in OTHER_WEIGHTS.items():
        if others := sorted(folder.glob(pattern)):
            expected, got = f"model.safetensors in {folder}", f"{others[0].name}, {kind}"
            hint = f"convert it once, if you trust it: from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
            raise ConfigError(Fault("model.base", expected, got, hint))
    got = f"no weights among {', '.join(names[:6])}"
    raise ConfigError(Fault("model.base", f"model.safetensors in {folder}", got, "download them"))


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file that ends before its last tensor, or has no header.

    Raises:
        ConfigError: naming it.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length <= min(size, 2**28) else b""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(text).items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ConfigError(
            Fault("model.base", f"safetensors in {file}", "no header of such a file", "download it again")
        ) from None
    if size < whole:
        got = f"the first {size:,} of its {whole:,} bytes"
        raise ConfigError(Fault("model.base", f"the whole file {file}", got, "download it again"))
