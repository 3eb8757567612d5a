"""Adapters on disk in PEFT's format, which `PeftModel.from_pretrained` loads; written and read without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from fedtune.errors import ShapeError, StoreError
from fedtune.lora.adapter import Adapter, Factors, pack
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.store import manifest, peft_prompt
from fedtune.store.files import fill, new_folder, store_errors
from fedtune.tensors import Array, Tensors
from fedtune.tensors import digest as tensors_digest

PREFIX = "base_model.model."
"""Prefix of PEFT before the base model's own names."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Target:
    """The base model of an adapter, as adapter_config.json describes it."""

    base: str
    """Folder or hub name of the base."""
    revision: str | None
    task: str
    """causal | classification"""
    fan_in_fan_out: bool
    """Whether the adapted layers hold their weights as (in, out), as GPT-2's do."""
    saved_modules: Sequence[str]


def config(adapter: Adapter, saved: Tensors, target: Target) -> Mapping[str, Any]:
    """Return adapter_config.json of factors, or of virtual tokens."""
    about = {
        "task_type": "SEQ_CLS" if target.task == "classification" else "CAUSAL_LM",
        "base_model_name_or_path": target.base,
        "revision": target.revision,
    }
    own = peft_prompt.config(saved) if are_virtual(saved) else factors_config(adapter, target)
    return {"peft_type": own["peft_type"], **about, **own}


def factors_config(adapter: Adapter, target: Target) -> Mapping[str, Any]:
    """Return what it says of factors: r = alpha everywhere, so that PEFT's scale is 1 for every layer.

    Both patterns carry the same ranks: without alpha_pattern PEFT would scale each layer by r / its own rank.
    """
    ranks = {name: factors.rank for name, factors in sorted(adapter.items())}
    largest = max(ranks.values())
    # PEFT matches the keys as regular expressions behind any prefix.
    pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(target.saved_modules) or None,
        "bias": "none",
        "fan_in_fan_out": target.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }


def write(path: Path, adapter: Adapter, saved: Tensors, target: Target, provenance: Mapping[str, Any]) -> Path:
    """Write adapter_model.safetensors, adapter_config.json and their manifest in one step, and return the folder."""
    with new_folder(path) as folder:
        put(folder, adapter, saved, target)
        manifest.write(folder, provenance)
    return path


def put(folder: Path, adapter: Adapter, saved: Tensors, target: Target) -> None:
    """Write weights and configuration into a folder of `files.new_folder`, or one within it; no manifest yet.

    A module of rank 0 is left out, of the targets too; an adapter that changes nothing keeps its modules at rank 1.
    """
    if are_virtual(saved):
        peft_prompt.put(folder, WEIGHTS, saved)
        fill(folder / CONFIG, (json.dumps(config({}, saved, target), indent=1) + "\n").encode())
        return
    written = {name: factors for name, factors in adapter.items() if factors.rank > 0}
    if not written:  # PEFT loads no adapter without modules
        written = {name: Factors(a=zeros((1, f.shape[1])), b=zeros((f.shape[0], 1))) for name, f in adapter.items()}
    tensors = {f"{PREFIX}{name}": np.ascontiguousarray(array, np.float32) for name, array in saved.items()}
    for name, factors in written.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(factors.a, np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(factors.b, np.float32)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    fill(folder / CONFIG, (json.dumps(config(written, saved, target), indent=1) + "\n").encode())


def zeros(shape: tuple[int, int]) -> Array:
    return np.zeros(shape, np.float32)


def read(path: Path) -> tuple[Adapter, Tensors, Mapping[str, Any]]:
    """Return (adapter of scale 1, modules_to_save, provenance) of a folder that `write` made.

    Raises:
        StoreError: if a file is missing, torn, changed since it was written, or not fedtune's.
    """
    weights = path / WEIGHTS
    with store_errors(path):
        if not weights.is_file():
            raise StoreError(f"{path}: expected an adapter ({WEIGHTS}); run fedtune simulate first")
    opened = manifest.open_folder(path)
    data = opened.read(WEIGHTS)
    # Not read here, but by other programs and by the next export: an adapter is whole or refused.
    settings = manifest.json_object(opened.read(CONFIG), path / CONFIG)
    tensors = parse(data, weights)
    if settings.get("peft_type") in peft_prompt.TYPES:
        beside = path / peft_prompt.ENCODER
        encoder = parse(opened.read(peft_prompt.ENCODER), beside) if beside.is_file() else {}
        try:
            return {}, peft_prompt.virtual_tokens(settings, tensors, encoder), opened.facts
        except ShapeError as error:
            raise StoreError(f"{path}: {error}; {manifest.ADVICE}") from error
    sides: dict[str, dict[str, Array]] = {}
    saved: dict[str, Array] = {}
    for key, array in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match:
            sides.setdefault(match[1], {})[match[2].lower()] = array
        else:
            saved[key.removeprefix(PREFIX)] = array
    torn = sorted(name for name, pair in sides.items() if pair.keys() != {"a", "b"})
    if torn:
        raise StoreError(f"{weights}: expected both factors of every module; {torn[0]} has only one")
    return {name: Factors(**pair) for name, pair in sorted(sides.items())}, saved, opened.facts


def parse(data: bytes, path: Path) -> dict[str, Array]:
    """Return the tensors in a file of safetensors."""
    try:
        tensors: dict[str, Array] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: expected tensors in safetensors; {error}; {manifest.ADVICE}") from error
    return tensors


def digest(path: Path) -> str:
    """Return the SHA-256 (hex) of the tensors of an adapter folder."""
    adapter, saved, _ = read(path)
    return tensors_digest({**pack(adapter), **saved})


def read_target(path: Path) -> Target:
    """Return the target that the configuration of an adapter folder describes, to write another one of its base.

    Raises:
        StoreError: if a file is missing, torn, changed since it was written, or not fedtune's.
    """
    settings = manifest.json_object(manifest.open_folder(path).read(CONFIG), path / CONFIG)
    try:
        return target_of(settings)
    except (KeyError, TypeError) as error:
        expected = f"{path / CONFIG}: expected the keys that fedtune writes"
        raise StoreError(f"{expected}; got none or another value for {error}; {manifest.ADVICE}") from error


def target_of(settings: Mapping[str, Any]) -> Target:
    """Return the target that an adapter_config.json describes, to write another adapter of the same base."""
    return Target(
        base=settings["base_model_name_or_path"],
        revision=settings["revision"],
        task="classification" if settings["task_type"] == "SEQ_CLS" else "causal",
        fan_in_fan_out=settings["peft_type"] not in peft_prompt.TYPES and settings["fan_in_fan_out"],
        saved_modules=settings["modules_to_save"] or (),
    )
