"""The state of FedKSeed by itself: units, ledger, and the messages that it makes of its integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.directions import downlink
from fedtune.directions.seed_ledger import decode_ledger, describe_base
from fedtune.messages import Blueprint
from fedtune.methods.fedkseed import METHOD
from fedtune.methods.fedkseed_state import FINE, PROVISIONAL, FedKSeedSettings, FedKSeedState, units
from fedtune.tensors import Array

BASE = describe_base({"layer.weight": np.zeros((6, 10), np.float32)})


def state(sums: Array | None = None, **settings: object) -> FedKSeedState:
    blueprint = Blueprint({"layer": (6, 10)}, {}, max_rank=1, seed=3, manifest=BASE.encode())
    first: FedKSeedState = METHOD.init(blueprint, FedKSeedSettings(**{"seeds": 16, **settings}))  # type: ignore[arg-type]
    return first if sums is None else replace(first, round=5, accumulators={"a": sums.astype(np.int32)})


@pytest.mark.parametrize(
    ("step", "perturbation", "expected"),
    [
        ("auto", 5e-4, (PROVISIONAL, 0)),
        (2.0**-22, 5e-4, (26, 0)),  # the spec's example: U = 2^-22, four bits of fraction
        (2.0**-10, 5e-4, (15, 1)),  # 16 units of a perturbation need e = 15; the step then is 2^(4 + 1 - 15)
        (2.0**-40, 2.0**-11, (38, 0)),  # finer units would not leave the perturbation room in 32 bits
    ],
)
def test_units_fit_the_step_and_the_perturbation(
    step: float | str, perturbation: float, expected: tuple[int, int]
) -> None:
    settings = FedKSeedSettings(perturbation=perturbation)
    assert units(settings, step) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("perturbation", [1e-6, 5e-4, 0.3, 1.0])
def test_a_perturbation_is_what_was_asked_for_within_a_32nd(perturbation: float) -> None:
    for step in (1e-12, 1e-7, 1e-3):
        made = state(perturbation=perturbation, scalar_step=step)
        assert made.perturbation >= FINE
        assert made.perturbation * 2.0**-made.exponent == pytest.approx(perturbation, rel=1 / 32)


def test_the_ledger_is_the_state_in_60_and_4_k_bytes() -> None:
    made = state(np.arange(16))
    assert len(made.ledger.encode()) == 60 + 4 * 16
    read = decode_ledger(made.ledger.encode())
    assert read.digest == made.digest
    assert (read.manifest, read.round, read.accumulators.tolist()) == (BASE.digest, 5, list(range(16)))


def test_every_form_gives_the_same_integers() -> None:
    sums = np.zeros(16, np.int64)
    sums[3] = -70_000
    for sync, form in (("auto", "changed"), ("whole", "whole")):
        sent = state(sums, sync=sync).message_since(0)
        known = np.zeros(16, np.int32)
        read = downlink.decode_changed(sent.data, known) if form == "changed" else downlink.decode_whole(sent.data, 16)
        assert (sent.form, sent.round, read.tolist()) == (form, 5, sums.tolist())
        assert sent.digest == state(sums, sync=sync).digest


def test_levels_are_sent_for_pro_alone() -> None:
    assert state().levels == b""
    assert state(sampling="pro").levels == bytes([255] * 16)
