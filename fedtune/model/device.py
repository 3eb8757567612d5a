"""Where a base computes, and the number format of its weights there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from fedtune.errors import ConfigError, Fault
from fedtune.model.settings import ModelSettings, NumberFormat

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device: cuda, else mps, else cpu for `auto`.

    Raises:
        ConfigError: if the named device is not there.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(Fault("model.device", f"one of auto, {', '.join(available)}", repr(name), "leave it at auto"))
    return device


def share_devices(settings: ModelSettings) -> Sequence[str]:
    """Return the devices of the processes that train together, the first of which is the one that asks.

    Raises:
        ConfigError: if there are fewer devices than processes, or the machine has none that can share.
    """
    if (count := settings.processes) == 1:
        return [settings.device]
    device = choose_device(settings.device)
    if device.type == "cuda" and device.index is None:
        if (there := torch.cuda.device_count()) < count:
            raise ConfigError(Fault("model.processes", f"at most {there}, the GPUs of this machine", str(count)))
        return [f"cuda:{place}" for place in range(count)]
    if settings.device == "cpu":
        there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if there < count:
            raise ConfigError(Fault("model.processes", f"at most {there}, the cores of this process", str(count)))
        return ["cpu"] * count
    if device.type == "cuda":
        expected, hint = f"1 with model.device = {settings.device!r}, which names one GPU", 'set model.device = "cuda"'
    else:
        expected = "1 on a machine without CUDA"
        hint = 'leave it out, or set model.device = "cpu" for processes that share the cores'
    raise ConfigError(Fault("model.processes", expected, str(count), hint))


def number_format(settings: ModelSettings) -> NumberFormat:
    """Return the number format of a base; for `auto`, bfloat16 where the device is fast at it, else float32.

    Raises:
        ConfigError: if the device does not exist.
    """
    device = choose_device(settings.device)
    if settings.dtype != "auto":
        return settings.dtype
    # Compute capability 8.0 is Ampere, the first with bf16 in its tensor cores.
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if fast else "float32"


def name_of(dtype: torch.dtype) -> NumberFormat:
    """Return the name of a number format, as recipes have it; float32 for one that they have not."""
    names: Mapping[torch.dtype, NumberFormat] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return names.get(dtype, "float32")


def memory_bytes(device: torch.device) -> int:
    """Return the size of the memory that a base on this device uses: the accelerator's own, or the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
