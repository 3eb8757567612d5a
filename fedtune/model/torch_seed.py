"""Torch's global generator, seeded inside a block for the few places that take no generator of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_seed(key: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block; afterwards CPU's and a CUDA device's are as they were before.

    Dropout and the initialisation of new layers in transformers draw from the global generator and take no other;
    everything else in fedtune passes generators explicitly.
    """
    # By default fork_rng saves the state of every CUDA device, and starts each of them for it.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key)
        yield
