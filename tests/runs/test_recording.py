from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.lora.adapter import Factors
from fedtune.lora.lowrank import compress
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    ClientUpdate,
    DescendResult,
    DescendSeeds,
    Failure,
    LoraResult,
    Measured,
    Plan,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    SeedState,
    SeedTask,
    Traffic,
    Training,
    TrainLora,
    VerbChoice,
)
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.record import ModuleRecord, RoundRecord, observations
from fedtune.rounds.transport import UnsolicitedReply
from fedtune.runs.context import ModelScores
from fedtune.runs.recording import client_record, record_base, round_record
from fedtune.runs.summary import failures
from fedtune.store.round_records import append_round, read_rounds
from tests.test_crash import setting

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


def record() -> RoundRecord:
    adapter = {"x": Factors(a=np.diag([1.0, 1.0]).astype(np.float32), b=np.diag([3.0, 4.0]).astype(np.float32))}
    return round_record(
        result(),
        decomposed=compress(adapter),
        energy_kept={"x": 0.9},
        state_energy_kept={"x": 0.8},
        figures={"sum_abs": 3},
        scores=ModelScores(test={"loss": 1.0}),
    )


def test_a_planner_observes_the_same_from_a_round_and_from_its_line() -> None:
    """A resumed run reads the lines: another plan would follow from another observation."""
    finished = result()
    arm = PlannedClient(replace(PLAN, ranks=(0, 2), back=0.5), down_rank=1, top=0.5, share=0.25)
    other = PlannedClient(replace(PLAN, client="bob", ranks=(1, 2), base_dtype="nf4", view="deployed"))
    measured = Measured(peak_bytes=7, loss_before=2.0, loss_after=1.0, whole_loss_before=3.0, whole_loss_after=2.5)
    update = ClientUpdate("ann", 1, 30, LoraResult({}), measured=measured)
    finished = replace(
        finished,
        planned={**finished.planned, "ann": arm, "bob": other},
        outcomes={**finished.outcomes, "ann": AdmittedUpdate(update)},
    )
    line = round_record(
        finished, decomposed={}, energy_kept={}, state_energy_kept={}, figures={}, scores=ModelScores(test=None)
    )
    assert observations(line) == finished.observations
    ann, bob, _ = finished.observations
    assert (ann.top, ann.share, ann.back, ann.down_rank, ann.ranks) == (0.5, 0.25, 0.5, 1, ())
    assert (bob.ranks, bob.base_dtype, bob.view, ann.whole_loss_after) == ((1, 2), "nf4", "deployed", 2.5)


def test_losses_are_means_by_examples_over_the_updates_that_were_used() -> None:
    assert record().loss_before == pytest.approx((4.0 * 30 + 2.0 * 10) / 40)
    assert record().loss_after == pytest.approx((2.0 * 30 + 1.0 * 10) / 40)


PROBE = ProbeSeeds("hadamard", 4, 1, 24, 4, 8, SeedState("whole", 0, b"", 1, bytes(32)))
FALLBACK = Training(batch=1, learning_rate=1e-4, steps=20)
DESCEND = DescendSeeds(PROBE, 4, 9, fallback=FALLBACK)
MOVED, PROBED = DescendResult(np.ones(4, np.int8), 0), ProbeResult(np.ones(20, np.int8))


def round_of_seeds() -> RoundResult:
    """Return a round of clients that may descend: what each was asked, and what it did."""
    first = replace(PROBE, calibrate=True)
    cases: dict[str, tuple[VerbChoice, SeedTask, Any]] = {
        "ann": ("descend", DESCEND, MOVED),
        "bob": ("auto", DESCEND, PROBED),
        "cyd": ("probe", PROBE, PROBED),
        "dan": ("auto", first, ProbeResult(np.ones(0, np.int8), rms=1.0)),
        "eve": ("auto", DESCEND, None),
    }
    return replace(
        result(),
        examples=dict.fromkeys(cases, 10),
        planned={n: PlannedClient(replace(PLAN, client=n), verb=v, probing=FALLBACK) for n, (v, _, _) in cases.items()},
        assignments={n: Assignment("fedkseed", 1, 0, replace(PLAN, client=n), t) for n, (_, t, _) in cases.items()},
        outcomes={
            name: AdmittedUpdate(ClientUpdate(name, 1, 10, one)) if one else Failure.from_text(name, "no memory")
            for name, (_, _, one) in cases.items()
        },
        norms={},
        traffic={name: Traffic(down=100, up=10) for name in cases},
    )


def test_what_a_client_did_that_was_to_descend_is_recorded_with_its_reason() -> None:
    finished = round_of_seeds()
    clients = {name: client_record(finished, name) for name in finished.outcomes}
    assert {name: one.verb for name, one in clients.items()} == {
        "ann": "descend",
        "bob": "probe",
        "cyd": "",
        "dan": "probe",
        "eve": "descend",
    }
    assert clients["bob"].why == "probed in place of descending, as its order allows; its own log says what it lacked"
    assert clients["dan"].why == "measures the step of a scalar, as all do first"
    assert [clients[name].steps for name in ("ann", "bob", "cyd", "eve")] == [3, 20, 3, 3]


def test_a_planner_observes_the_same_of_clients_that_descend_from_a_round_and_from_its_line(tmp_path: Path) -> None:
    finished = round_of_seeds()
    written = round_record(
        finished, decomposed={}, energy_kept={}, state_energy_kept={}, figures={}, scores=ModelScores()
    )
    append_round(tmp_path, replace(written, round=0))
    (again,) = read_rounds(tmp_path)
    assert again == replace(written, round=0)
    assert observations(again) == finished.observations


def test_a_failed_client_keeps_its_reason_and_its_bytes() -> None:
    failed = record().clients["cyd"]
    assert (failed.status, failed.reason, failed.bytes_down) == ("failed", "no memory", 100)
    assert (failed.loss_after, failed.seconds, failed.norm) == (None, None, None)
    assert record().bytes_down == 300
    assert record().used == 2


def test_a_reply_that_the_round_did_not_wait_for_is_recorded() -> None:
    (reply,) = record().unsolicited
    assert (reply.client, reply.kind, reply.num_bytes) == ("dan", "late", 7)


def test_a_client_that_is_refused_while_others_score_is_recorded(tmp_path: Path) -> None:
    refused = UnsolicitedReply("eve", "refused: expected a site file; got no such file", kind="refused")
    late = replace(refused, client="fay", kind="late")
    context = replace(setting(), score=lambda tuned, **options: ModelScores(unsolicited=[refused]))
    record_base(context, tmp_path)
    assert failures(read_rounds(tmp_path)) == [
        {"round": 0, "client": "eve", "kind": "refused", "reason": "refused: expected a site file; got no such file"}
    ]
    scored = ModelScores(unsolicited=[refused, late])
    later = round_record(result(), decomposed={}, energy_kept={}, state_energy_kept={}, figures={}, scores=scored)
    assert [(reply.client, reply.kind) for reply in later.unsolicited] == [
        *(("dan", "late"), ("eve", "refused"), ("fay", "late"))
    ]


def test_a_modules_spectrum_by_hand() -> None:
    assert record().modules == {
        "x": ModuleRecord(rank=2, norm=5.0, singular_values=(4.0, 3.0), energy_kept=0.9, state_energy_kept=0.8)
    }


def test_a_figure_that_is_no_number_leaves_a_line_that_can_be_read(tmp_path: Path) -> None:
    figures = {"rms": float("nan"), "left": 3}
    record = round_record(
        result(), decomposed={}, energy_kept={}, state_energy_kept={}, figures=figures, scores=ModelScores()
    )
    append_round(tmp_path, replace(record, round=0))
    assert read_rounds(tmp_path)[0].figures == {"left": 3}
