from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.lora.adapter import Factors
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    ClientUpdate,
    Failure,
    LoraResult,
    Measured,
    Plan,
    PlannedClient,
    Traffic,
    Training,
    TrainLora,
)
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.transport import UnsolicitedReply
from fedtune.store import round_records

PLAN = Plan("ann", 2, 2.0, Training(batch=1, learning_rate=0.1, steps=3))


def result() -> RoundResult:
    measured = Measured(seconds=1.5, peak_bytes=10, tokens=20, loss_before=4.0, loss_after=2.0)
    later = replace(measured, loss_before=2.0, loss_after=1.0)
    names = ("ann", "bob", "cyd")
    return RoundResult(
        round=1,
        state=None,
        digest="d" * 64,
        examples={"ann": 30, "bob": 10, "cyd": 5},
        unsolicited=[UnsolicitedReply("dan", "answered round 0 after its end; dropped", 7)],
        planned={n: PlannedClient(replace(PLAN, client=n)) for n in names},
        assignments={n: Assignment("flora", 1, 0, replace(PLAN, client=n), TrainLora(a_key=0)) for n in names},
        outcomes={
            "ann": AdmittedUpdate(ClientUpdate("ann", 1, 30, LoraResult({}), measured=measured)),
            "bob": AdmittedUpdate(ClientUpdate("bob", 1, 10, LoraResult({}), measured=later)),
            "cyd": Failure.from_text("cyd", "no memory"),
        },
        norms={"ann": 0.5, "bob": 0.25},
        traffic={name: Traffic(down=100, up=10) for name in names},
        seconds=3.0,
    )


def line() -> dict[str, object]:
    adapter = {"x": Factors(a=np.diag([1.0, 1.0]).astype(np.float32), b=np.diag([3.0, 4.0]).astype(np.float32))}
    return dict(
        round_records.round_record(
            result(), adapter, energy_kept={"x": 0.9}, figures={"sum_abs": 3}, test={"loss": 1.0}, held_out={}
        )
    )


def test_losses_are_means_by_examples_over_the_updates_that_were_used() -> None:
    assert line()["loss_before"] == pytest.approx((4.0 * 30 + 2.0 * 10) / 40)
    assert line()["loss_after"] == pytest.approx((2.0 * 30 + 1.0 * 10) / 40)


def test_a_failed_client_keeps_its_reason_and_its_bytes() -> None:
    clients = line()["clients"]
    assert isinstance(clients, dict)
    assert clients["cyd"]["status"] == "failed"
    assert clients["cyd"]["reason"] == "no memory"
    assert line()["bytes_down"] == 300
    assert round_records.failures([line()]) == [
        {"round": 1, "client": "cyd", "kind": "failed", "reason": "no memory"},
        {"round": 1, "client": "dan", "kind": "late", "reason": "answered round 0 after its end; dropped"},
    ]


def test_a_modules_spectrum_by_hand() -> None:
    assert line()["modules"] == {"x": {"rank": 2, "norm": 5.0, "singular_values": [4.0, 3.0], "energy_kept": 0.9}}


def test_mean_and_worst_client_by_hand() -> None:
    held_out = {
        "ann": {"loss": 1.0, "accuracy": 0.5, "examples": 3},
        "bob": {"loss": 3.0, "accuracy": 0.7, "examples": 4},
    }
    scores = round_records.scores({"loss": 2.0}, held_out)
    assert scores["mean"] == {"loss": 2.0, "accuracy": pytest.approx(0.6)}
    assert scores["worst"] == {"client": "bob", "loss": 3.0, "accuracy": 0.7, "examples": 4}
    assert round_records.scores(None, {}) == {"test": None, "held_out": {}, "mean": {}, "worst": {}}


def test_totals_add_up_over_rounds_and_absent_clients_have_none() -> None:
    totals = round_records.clients_summary([line(), line()], {"ann": 30, "bob": 10, "cyd": 5, "dan": 7})
    assert totals["ann"] == {
        "examples": 30,
        "rank": 2,
        "bytes_down": 200,
        "bytes_up": 20,
        "seconds": 3.0,
        "failures": 0,
    }
    assert totals["cyd"]["failures"] == 2
    assert totals["dan"]["rank"] is None
