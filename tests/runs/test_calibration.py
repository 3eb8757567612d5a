from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.planning.policy import Arm
from fedtune.runs import calibration
from fedtune.runs.calibration import calibrate, fit
from fedtune.runs.local import prepare


def test_steps_are_measured_and_the_base_is_as_before(tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.02)
    experiment = prepare(bind(tables))
    before = {name: tensor.clone() for name, tensor in experiment.base.model.state_dict().items()}
    measured = calibrate(experiment)
    assert [step["rows"] for step in measured.steps] == [2.0, 4.0]
    assert measured.s_per_tflop > 0
    assert 1.0 <= measured.heap <= 3.0
    assert measured.runtime_bytes > 1e8
    assert all(step["predicted_bytes"] > 0 for step in measured.steps)
    after = experiment.base.model.state_dict()
    assert all((before[name] == after[name]).all() for name in before)


def test_two_sizes_give_what_a_step_costs_beside_its_operations(tables: dict[str, Any]) -> None:
    experiment = prepare(bind(tables), sizes_alone=True)
    fleet = experiment.devices
    footprint = fleet.footprint("client-0", Arm(0.0, 4), bind(tables).client)
    footprint = replace(footprint, runtime=1e8)
    usual = {"mean": 16.0, "longest": 16.0, "peak_bytes": 0.0}
    small = {**usual, "rows": 2.0, "tokens": 32.0, "seconds": 0.03}
    large = {**usual, "rows": 4.0, "tokens": 64.0, "seconds": 0.05}
    found = fit(fleet, "client-0", 4, [small, large], footprint, 1.0)
    assert found.step_s == pytest.approx(0.01)
    assert found.step_s + found.s_per_tflop * (0.02 / found.s_per_tflop) == pytest.approx(0.03)
    assert found.heap == 1.5  # no peak is known
    noisy = fit(fleet, "client-0", 4, [small, {**large, "seconds": 0.07}], footprint, 1.0)
    assert noisy.step_s == 0.0
