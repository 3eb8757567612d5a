"""PEFT adapters that others trained: read with the scale folded in, or refused where they are more than two factors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from fedtune.errors import ConfigError, Fault, ShapeError, type_of
from fedtune.lora.adapter import Adapter, Factors, pack
from fedtune.store import manifest, peft_prompt
from fedtune.store.manifest import ResultFolder
from fedtune.store.peft import CONFIG, PREFIX, WEIGHTS, Target
from fedtune.tensors import Array, Tensors
from fedtune.tensors import digest as tensors_digest

DTYPES: Mapping[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
"""Number formats of adapters, as safetensors names them."""
FILES = (WEIGHTS, CONFIG)
VIEW = "view"
"""Key of a manifest whose adapter is of a pruned model alone: "deployed"."""


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter as its folder describes it."""

    path: Path
    adapter: Adapter
    """Of scale 1, float32."""
    saved: Tensors
    """modules_to_save, or virtual tokens, by parameter name, float32."""
    target: Target
    base_digest: str
    """Of the base, where fedtune wrote the adapter; else empty."""
    manifest: str = ""
    """SHA-256 (hex) of its manifest; empty where there is none, as in an adapter of others."""
    remark: str = ""
    """Why its files are not checked, where fedtune wrote it and they are not."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what it changes."""
        return tensors_digest({**pack(self.adapter), **self.saved})

    @property
    def rank(self) -> int:
        """The largest of its modules' ranks; 0 of virtual tokens."""
        return max((factors.rank for factors in self.adapter.values()), default=0)


def read_adapter(path: Path) -> ForeignAdapter:
    """Read a folder in PEFT's format, fedtune's or another's; of a run directory, its adapter.

    Raises:
        ConfigError: naming folder and key, if it is no LoRA adapter or one with parts that are no pair of factors.
        StoreError: if a file cannot be read, or is another one than fedtune wrote.
    """
    is_run = (path / "recipe.toml").is_file()
    folder = path / "adapter" if is_run else path
    check_files(folder)
    # Adapters of others have no manifest; of a run's own, and wherever one lies, it must hold.
    ours = is_run or os.path.lexists(folder / manifest.NAME)
    opened = manifest.open_folder(folder) if ours else ResultFolder(folder, {})
    if opened.facts.get(VIEW, "whole") != "whole":
        got = f"one of a pruned model alone: {folder} holds the repair adapter of its run"
        raise ConfigError(Fault("adapter", "an adapter of the whole base", got, "name the run's own folder instead"))
    config = parse_config(opened.read(CONFIG), folder)
    if faults := list(config_faults(config, folder)):
        raise ConfigError(faults)
    tensors = parse_tensors(opened.read(WEIGHTS), folder)
    if config["peft_type"] in peft_prompt.TYPES:
        adapter: Adapter = {}
        saved = read_virtual(opened, config, tensors)
    else:
        adapter, saved = split(tensors, config, folder)
    remark = opened.remark if ours else ""
    base = base_digest(opened.facts)
    return ForeignAdapter(folder, adapter, saved, target_of(config), base, opened.digest, remark)


def read_virtual(opened: ResultFolder, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Return the virtual tokens of a folder, with their encoder where fedtune wrote one.

    Raises:
        ConfigError: if its tensors are not those that the configuration describes.
    """
    encoder: Tensors = {}
    if opened.facts and (opened.path / peft_prompt.ENCODER).is_file():
        encoder = parse_tensors(opened.read(peft_prompt.ENCODER), opened.path)
    try:
        return peft_prompt.virtual_tokens(config, tensors, encoder)
    except ShapeError as error:
        key, _, text = str(error).partition(": expected ")
        expected, _, got = text.partition("; got ")
        raise ConfigError(Fault(f"{opened.path}: {key}", expected, got)) from error


def check_files(folder: Path) -> None:
    """Refuse a folder without weights and configuration."""
    for name in FILES:
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            hint = "save it as safetensors: fedtune reads no pickles" if pickled and name == FILES[0] else ""
            got = "adapter_model.bin" if hint else f"no {name}"
            raise ConfigError(Fault(str(folder), "a PEFT adapter (adapter_config.json and its weights)", got, hint))


def parse_config(data: bytes, folder: Path) -> Mapping[str, Any]:
    """Return the content of adapter_config.json."""
    try:
        config = json.loads(data.decode("utf-8"))
    # RecursionError: brackets within brackets, thousands deep.
    except (ValueError, RecursionError) as error:
        raise ConfigError(Fault(str(folder / CONFIG), "JSON", str(error)[:100])) from None
    if not isinstance(config, dict):
        raise ConfigError(Fault(str(folder / FILES[1]), "a JSON object", type_of(config)))
    return config


def config_faults(config: Mapping[str, Any], folder: Path) -> Iterator[Fault]:
    """Yield why an adapter is more, or other, than a product of two factors over the base as it is."""
    where = str(folder)
    kind = config.get("peft_type")
    if kind in peft_prompt.TYPES:
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            yield Fault(where, "task_type CAUSAL_LM of virtual tokens", repr(config["task_type"]))
        if config.get("modules_to_save"):
            yield Fault(where, "virtual tokens alone", f"modules_to_save = {config['modules_to_save']!r}")
        if config.get("num_transformer_submodules") not in (None, 1):
            got = f"num_transformer_submodules = {config['num_transformer_submodules']!r}"
            yield Fault(where, "virtual tokens of one decoder", got)
        yield from type_faults(config, where)
        return
    if kind != "LORA":
        yield Fault(where, f"an adapter of peft_type LORA, {', '.join(peft_prompt.TYPES)}", repr(kind)[:100])
        return
    if type(config.get("r")) is not int or not is_number(config.get("lora_alpha")):
        yield Fault(where, "r and lora_alpha as numbers", f"{config.get('r')!r} and {config.get('lora_alpha')!r}")
    if config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        yield Fault(where, "task_type CAUSAL_LM or SEQ_CLS", repr(config["task_type"]))
    if config.get("use_dora"):
        got = "use_dora = true, which also rescales the base's weights"
        yield Fault(where, "factors alone", got, "merge it into its base instead")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        got = f"bias = {config.get('bias')!r}, lora_bias = {config.get('lora_bias')!r}"
        yield Fault(where, "no trained biases", got)
    if config.get("target_parameters"):
        yield Fault(where, "adapters of modules", f"target_parameters = {config['target_parameters']!r}")
    yield from type_faults(config, where)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        hint = "convert it with PEFT's path_initial_model_for_weight_conversion when you save it"
        got = f"init_lora_weights = {start!r}, which changes the base"
        yield Fault(where, "an adapter over the base as it is", got, hint)


def type_faults(config: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Yield the keys whose values have another type than PEFT writes, before anything is computed from them."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        yield Fault(where, "modules_to_save as a list of names", repr(saved)[:100])
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(is_number(value) for value in pattern.values()):
            yield Fault(where, f"{key} as numbers by name", repr(pattern)[:100])
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            yield Fault(where, f"{key} as text", repr(config[key])[:100])


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def target_of(config: Mapping[str, Any]) -> Target:
    """Return what an adapter's configuration says of its base."""
    return Target(
        base=str(config.get("base_model_name_or_path") or ""),
        revision=config.get("revision"),
        task="classification" if config.get("task_type") == "SEQ_CLS" else "causal",
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        saved_modules=tuple(config.get("modules_to_save") or ()),
    )


def base_digest(facts: Mapping[str, Any]) -> str:
    """Return the digest of the base that fedtune noted beside its adapters; empty for those of others."""
    base = facts.get("base")
    return str(base.get("digest", "")) if isinstance(base, dict) else ""


def parse_tensors(data: bytes, folder: Path) -> Tensors:
    """Return the tensors of an adapter as float32; bfloat16, which numpy lacks, included.

    Raises:
        ConfigError: if the file is torn, or holds numbers of another kind.
    """
    path = folder / WEIGHTS
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ConfigError(Fault(str(path), "a whole safetensors file", str(error))) from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise ConfigError(Fault(str(path), f"numbers of {', '.join(DTYPES)}", f"{entry['dtype']} in {name}"))
        values = np.frombuffer(entry["data"], np.dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])
        tensors[name] = values.astype(np.float32)
    return tensors


def split(tensors: Tensors, config: Mapping[str, Any], folder: Path) -> tuple[Adapter, Tensors]:
    """Return (adapter with the scale folded into b, modules_to_save)."""
    sides: dict[str, dict[str, Array]] = {}
    saved: dict[str, Array] = {}
    trained_whole = tuple(config.get("modules_to_save") or ())
    for key, array in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            sides.setdefault(match[1], {})[match[2].lower()] = array
        elif "lora_" in name or not set(name.split(".")) & set(trained_whole):
            expected = "factors lora_A and lora_B, and the modules that modules_to_save names"
            raise ConfigError(Fault(str(folder), expected, name, "train or save it without that part"))
        else:
            saved[name] = array
    adapter = {name: fold_scale(name, pair, config, folder) for name, pair in sorted(sides.items())}
    if not adapter:
        raise ConfigError(Fault(str(folder), "factors of at least one module", "none"))
    return adapter, saved


def fold_scale(name: str, pair: Mapping[str, Array], config: Mapping[str, Any], folder: Path) -> Factors:
    """Return the factors of one module, b times the scale that PEFT computes for it."""
    if pair.keys() != {"a", "b"}:
        raise ConfigError(Fault(str(folder), "both factors of every module", f"one of {name}"))
    a, b = pair["a"], pair["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ConfigError(Fault(str(folder), f"a (rank, in) and b (out, rank) of {name}", f"{a.shape} and {b.shape}"))
    rank = by_pattern(config.get("rank_pattern") or {}, name, config["r"])
    if rank != a.shape[0] or rank < 1:
        raise ConfigError(Fault(str(folder), f"rank {rank} of {name}, as adapter_config.json says", f"{a.shape[0]}"))
    alpha = by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    # In float64 and cast once, as the scale is no power of two in general.
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Factors(a=a, b=(scale * b.astype(np.float64)).astype(np.float32))


def by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT looks it up."""
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)
    except re.error as error:
        raise ConfigError(Fault("rank_pattern, alpha_pattern", "regular expressions", f"{error}")) from None


def same_base(adapters: Sequence[ForeignAdapter]) -> Iterator[Fault]:
    """Yield in what the bases of adapters differ; what cannot be known from their folders is not compared."""
    first = adapters[0]
    for other in adapters[1:]:
        for what, ours, theirs in (
            ("base", base_name(first.target.base), base_name(other.target.base)),
            ("base digest", first.base_digest, other.base_digest),
            ("revision", first.target.revision or "", other.target.revision or ""),
            ("task", first.target.task, other.target.task),
            ("fan_in_fan_out", str(first.target.fan_in_fan_out), str(other.target.fan_in_fan_out)),
        ):
            if ours and theirs and ours != theirs:
                hint = "give --base NAME if the names mean one model" if what == "base" else ""
                yield Fault(str(other.path), f"the {what} of {first.path}, {ours}", theirs, hint)


def base_name(name: str) -> str:
    """Return a base's name, a folder's as its absolute path."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name
