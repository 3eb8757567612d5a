"""Where a base computes, and the number format of its weights there."""

from __future__ import annotations

import os
from collections.abc import Mapping

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
