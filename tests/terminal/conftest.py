"""A finished run's summary and the events of a run of three rounds, as the round loop and the store make them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from fedtune.messages import (
    AdmittedUpdate,
    ClientUpdate,
    Failure,
    LoraResult,
    Traffic,
)
from fedtune.rounds.events import ClientFinished, Event, Note, RoundFinished, RoundStarted
from fedtune.rounds.record import RoundRecord

HOSTILE = "[red]evil[/]\x1b[2J\u202e"


def metrics(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss), "examples": 40}


def record(round: int, *, test: float | None, seconds: float = 2.0) -> RoundRecord:
    return RoundRecord(
        round=round,
        seconds=seconds,
        loss_before=2.6 if round else None,
        loss_after=2.4 if round else None,
        test=None if test is None else metrics(test),
        bytes_down=2000 * bool(round),
        bytes_up=1000 * bool(round),
    )


def round_events(round: int, *, test: float | None, failures: Sequence[str] = ()) -> list[Event]:
    """Two clients answer, then the named ones fail."""
    fine = ("client-0", "client-1")
    update = {name: AdmittedUpdate(ClientUpdate(name, round, 3, LoraResult({}))) for name in fine}
    failed = {name: Failure.from_text(name, f"norm 41.2 > 10.0 for {name}", kind="refused") for name in failures}
    return [
        RoundStarted(round, 3, (*fine, *failures)),
        *(ClientFinished(round, outcome, Traffic(down=1000, up=500)) for outcome in (update | failed).values()),
        RoundFinished(record(round, test=test)),
    ]


@pytest.fixture
def events() -> list[Event]:
    return [
        Note("3 examples were dropped"),
        RoundFinished(record(0, test=2.8)),
        *round_events(1, test=2.5),
        *round_events(2, test=None, failures=[HOSTILE]),
        *round_events(3, test=2.7),
    ]


@pytest.fixture
def summary() -> Mapping[str, Any]:
    before, after = {HOSTILE: metrics(3.0), "client-1": metrics(2.5)}, {HOSTILE: metrics(2.9), "client-1": metrics(2.0)}
    totals = {"examples": 312, "rank": 16, "bytes_down": 2_000_000, "bytes_up": 1500, "seconds": 7.5, "failures": 1}
    return {
        "version": 1,
        "name": "tiny",
        "method": "flora",
        "seed": 3,
        "rounds": 3,
        "state": "finished",
        "before": {"test": metrics(2.8), "held_out": before, "mean": {"loss": 2.75}, "worst": {}},
        "after": {
            "test": metrics(2.3),
            "held_out": after,
            "mean": {"loss": 2.45},
            "worst": {"client": HOSTILE, **after[HOSTILE]},
        },
        "clients": {HOSTILE: totals, "client-1": totals, "never": totals | {"rank": None, "failures": 0}},
        "bytes_down": 6_000_000,
        "bytes_up": 4500,
        "seconds": 75.0,
        "sample": {"prompt": "Once", "before": "one\x1b[31m", "after": "upon\na time"},
        "failures": [],
    }
