"""The bytes of steps along seeds: what the formula of the numbers says, and a header of some dozens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.directions.seed_ledger import describe_base
from fedtune.messages import Blueprint, Plan, PlannedClient, Training
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.runs.seed_bytes import measuring_bytes_up, seed_bytes

LAYERS = dict.fromkeys("abc", (8, 8))
BASE = describe_base(
    {**{f"{name}.weight": np.zeros((8, 8), np.float32) for name in LAYERS}, "norm": np.zeros(8, np.float32)}
)
BLUEPRINT = Blueprint(LAYERS, {}, max_rank=1, seed=0, manifest=BASE.encode(), verbs=("descend", "probe"))
PROBING = PlannedClient(Plan("ann", 1, 1.0, Training(steps=7, learning_rate=2e-4)), verb="probe")
DESCENT = PlannedClient(
    Plan("ann", 1, 1.0, Training(steps=7, learning_rate=0.02)), verb="auto", probing=PROBING.plan.training
)


@pytest.mark.parametrize(
    ("changes", "banks", "groups"),
    [
        ({}, 1, 1),
        ({"groups": 4}, 1, 4),
        ({"groups": 4, "redraw": 4}, 3, 4),
        ({"bank": "kron", "groups": "tensor"}, 1, 3),
        ({"groups": "tensor"}, 1, 4),  # the norm too, which is no layer
        ({"groups": "tensor", "trainable": ["?.weight"]}, 1, 3),
        ({"scalar_bits": 2}, 1, 1),
    ],
)
def test_by_hand_the_numbers_of_a_round(changes: dict[str, Any], banks: int, groups: int) -> None:
    settings = FedKSeedSettings(**{"seeds": 256, "scalar_step": 1e-4, **changes})
    down, up = seed_bytes(settings, BLUEPRINT, DESCENT, rounds=9, examples=100)
    sums, numbers = 4 * 256 * groups * banks, 256 * groups * settings.scalar_bits // 8
    assert sums < down < sums + 300
    assert numbers < up < numbers + 100
    probing = seed_bytes(settings, BLUEPRINT, PROBING, rounds=9, examples=100)
    assert sums < probing[0] < sums + 300
    assert 7 < probing[1] < 7 + 100  # a byte for each direction, whatever groups there are


def test_runs_that_only_probe_are_counted_as_before() -> None:
    alone = replace(BLUEPRINT, verbs=())
    down, up = seed_bytes(FedKSeedSettings(seeds=1024), alone, PROBING, rounds=30, examples=100)
    assert 4 * 1024 < down < 4 * 1024 + 1024
    assert up < 7 + 512


def test_the_round_that_measures_a_rate_sends_two_floats_for_each_of_sixteen_directions() -> None:
    assert 2 * 16 * 4 < measuring_bytes_up(FedKSeedSettings(seeds=256), "ann", 100) < 2 * 16 * 4 + 100
    assert 2 * 4 * 4 < measuring_bytes_up(FedKSeedSettings(seeds=4), "ann", 100) < 2 * 4 * 4 + 100
