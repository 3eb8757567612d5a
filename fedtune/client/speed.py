"""How fast this machine computes: a fixed matrix product, measured when a client checks in."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fedtune.rounds.probe import FIRST_LIMIT_S, PROBE_TFLOP

SIZE = 512
"""Rows and columns of the matrices: about as wide as a small model's layers."""


def seconds_per_tflop(
    device: torch.device, *, limit_s: float = FIRST_LIMIT_S, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds for 1e12 operations, of products of float32 matrices until enough are done or time is over."""
    left, right = (torch.full((SIZE, SIZE), 0.5, device=device) for _ in range(2))
    per_product = 2 * SIZE**3 / 1e12
    finish(torch.mm(left, right))  # the first one also loads what it needs
    began, done = clock(), 0.0
    while True:
        finish(torch.mm(left, right))
        done, spent = done + per_product, clock() - began
        if done >= PROBE_TFLOP or spent >= limit_s:
            return max(spent, 1e-9) / done


def finish(product: torch.Tensor) -> None:
    """Wait for a product: on a GPU it may only have been queued."""
    float(product[0, 0])
