"""What is asked along seeds, and a few examples to measure on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedtune.messages import ProbeSeeds, SeedState, Training
from tests.model.conftest import examples as examples


def probe(bank: Any = "hadamard", **changes: Any) -> ProbeSeeds:
    """Return what to measure at e = 10: a scalar of one moves by 2^3, eps is 32 * 2^-10 = 1/32."""
    asked = ProbeSeeds(bank, 16, 0, exponent=10, shift=3, perturbation=32, state=SeedState("whole", 0, b"", 0, b""))
    return replace(asked, **changes)


def training(steps: int, *, batch: int = 1, learning_rate: float = 0.1) -> Training:
    return Training(batch=batch, learning_rate=learning_rate, steps=steps)
