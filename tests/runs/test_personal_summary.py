from __future__ import annotations

from fedtune.messages import Personal
from fedtune.rounds.record import ClientRecord, Metrics, PersonalRecord, RoundRecord
from fedtune.runs.personal_summary import personal_summary

NAMES = [f"client-{number:02}" for number in range(12)]


def scores(shift: float) -> dict[str, Metrics]:
    return {name: {"loss": shift + place, "examples": 2} for place, name in enumerate(NAMES)}


def test_by_hand_the_three_models_are_compared_on_the_same_clients() -> None:
    state = PersonalRecord("", "00" * 8)
    records = [
        RoundRecord(0, 1.0, held_out=scores(2.0)),
        RoundRecord(
            1, 1.0, clients={"client-00": ClientRecord("ok", personal=state), "client-01": ClientRecord("late")}
        ),
        RoundRecord(2, 1.0, held_out=scores(1.0), personal={name: scores(0.0)[name] for name in NAMES[:-1]}),
    ]
    own = personal_summary(Personal("ditto"), records)["personal"]
    assert {key: own[key] for key in ("kind", "round", "clients", "examples", "stored")} == {
        "kind": "ditto",
        "round": 2,
        "clients": 11,  # the twelfth has scored the global model alone
        "examples": 22,
        "stored": 1,
    }
    tenth = {"loss": 9.5, "clients": 2, "examples": 4}
    assert own["own"] == {"mean": {"loss": 5.0}, "worst_tenth": tenth}
    assert own["server"] == {"mean": {"loss": 6.0}, "worst_tenth": {**tenth, "loss": 10.5}}
    assert own["base"] == {"mean": {"loss": 7.0}, "worst_tenth": {**tenth, "loss": 11.5}}


def test_nothing_is_said_where_no_client_has_a_model_of_its_own() -> None:
    records = [RoundRecord(0, 1.0, held_out=scores(2.0)), RoundRecord(1, 1.0, held_out=scores(1.0))]
    assert personal_summary(None, records) == {}
    assert personal_summary(Personal("ditto"), records) == {}  # stopped before its last round


def test_of_a_metric_that_a_client_has_not_nothing_is_said() -> None:
    own = {**scores(0.0), "client-00": {"loss": None, "examples": 2}}
    records = [RoundRecord(0, 1.0, held_out=scores(2.0)), RoundRecord(1, 1.0, held_out=scores(1.0), personal=own)]
    summary = personal_summary(Personal("finetune"), records)["personal"]
    assert summary["own"]["mean"] == {}
    assert summary["server"]["mean"] == {"loss": 6.5}
    assert summary["stored"] is None
