from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.deployment.link_events import on_event, refusal_of, scores_text
from fedtune.messages import AdmittedUpdate, ClientUpdate, Failure, LoraResult, Traffic
from fedtune.rounds.events import ClientFinished, Note, RoundFinished, RoundStarted
from fedtune.rounds.record import Metrics, RoundRecord
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import make_harness, signed_reply

RECORD = RoundRecord(round=1, seconds=0.1, state_digest="ab", bytes_up=1, bytes_down=2)


def test_each_client_has_a_receipt_of_its_update(tmp_path: Path) -> None:
    harness, events = make_harness(tmp_path), list[tuple[str, Mapping[str, Any]]]()

    def record(kind: str, **fields: int | str) -> None:
        events.append((kind, fields))

    on_event(harness.dispatcher, record, RoundStarted(1, 3, ("anna", "bob", "carl")))
    sent = {}
    for name in ("anna", "bob", "carl"):
        _, task, task_digest = harness.post(name)
        assert task.cohort == 3
        sent[name] = signed_reply(name, task, task_digest, b"data")
        if name != "carl":
            harness.submit(name, sent[name], b"data")
    on_event(
        harness.dispatcher,
        record,
        ClientFinished(1, AdmittedUpdate(ClientUpdate("anna", 1, 10, LoraResult({}))), Traffic(3, 4)),
    )
    bad = Failure.from_text(
        "bob", "q.a: expected finite numbers; got 1 of 10 that are not", kind="refused", code="NOT_FINITE"
    )
    on_event(harness.dispatcher, record, ClientFinished(1, bad, Traffic(3, 4)))
    on_event(harness.dispatcher, record, RoundFinished(RECORD))
    on_event(harness.dispatcher, record, RoundFinished(replace(RECORD, round=0)))
    on_event(harness.dispatcher, record, Note("a remark"))
    receipts = {}
    for name in sent:
        reply = harness.submit(name, sent[name])
        assert reply is not None
        receipts[name] = pb.Header.FromString(reply.receipt.header).receipt
    assert [receipts[name].verdict for name in sorted(receipts)] == [pb.ACCEPTED, pb.REFUSED, pb.LATE]
    assert receipts["bob"].refusal == refusal_of(bad)
    assert [kind for kind, _ in events] == ["round", "used", "unused", "committed", "note"]


def test_a_reason_in_words_is_taken_apart_for_the_schema() -> None:
    result = refusal_of(
        Failure.from_text("bob", "q.a: expected shape (2, 5); got (3, 5)", kind="refused", code="TENSOR_SHAPE")
    )
    assert (result.reason, result.field, result.expected, result.found) == (
        pb.TENSOR_SHAPE,
        "q.a",
        "shape (2, 5)",
        "(3, 5)",
    )
    assert refusal_of(Failure.from_text("bob", "odd", kind="refused")).reason == pb.MALFORMED


def test_scores_are_told_with_their_spread_over_the_sites() -> None:
    own: dict[str, Metrics] = {"anna": {"loss": 3.25, "examples": 2}, "bob": {"loss": 3.5, "examples": 2}}
    record = replace(RECORD, test={"loss": 3.375, "accuracy": 0.5, "examples": 4}, held_out=own)
    assert scores_text(record) == "held-out loss 3.375 (3.250 to 3.500 over 2 sites), accuracy 0.500"
    assert scores_text(replace(record, held_out={"anna": own["anna"]})).startswith("held-out loss 3.375 (1 site)")
    assert scores_text(RECORD) == ""


def test_the_base_has_a_line_where_the_sites_score_it(tmp_path: Path) -> None:
    events, dispatcher = list[tuple[str, Mapping[str, Any]]](), make_harness(tmp_path).dispatcher

    def record(kind: str, **fields: int | str) -> None:
        events.append((kind, fields))

    base = replace(RECORD, round=0, test={"loss": 3.5}, held_out={"anna": {"loss": 3.5}})
    on_event(dispatcher, record, RoundFinished(base))
    on_event(dispatcher, record, RoundFinished(replace(base, test=None, held_out={})))
    on_event(dispatcher, record, RoundFinished(replace(base, round=1)))
    assert [(kind, fields["scores"]) for kind, fields in events] == [
        ("base", "held-out loss 3.500 (1 site)"),
        ("committed", "held-out loss 3.500 (1 site)"),
    ]


def test_orders_of_an_asynchronous_round_promise_no_cohort_and_outlast_it(tmp_path: Path) -> None:
    """A site that asks for others in a round must not be promised those who may end up in another buffer."""
    harness = make_harness(tmp_path)

    def record(kind: str, **fields: int | str) -> None: ...

    on_event(harness.dispatcher, record, RoundStarted(1, 3, ("anna", "bob"), overlaps=True))
    tasks = {name: harness.post(name) for name in ("anna", "bob")}
    assert [task.cohort for _, task, _ in tasks.values()] == [1, 1]
    on_event(harness.dispatcher, record, RoundFinished(replace(RECORD, working=("bob",))))
    message_id, task, task_digest = tasks["bob"]
    sent = signed_reply("bob", task, task_digest, b"data")
    harness.submit("bob", sent, b"data")
    assert list(harness.dispatcher.collect([message_id])) == [message_id]
    on_event(harness.dispatcher, record, ClientFinished(1, admitted("bob"), Traffic()))
    reply = harness.submit("bob", sent)
    assert reply is not None
    assert pb.Header.FromString(reply.receipt.header).receipt.verdict == pb.ACCEPTED
    # Anna's order went with the round.
    late = harness.submit("anna", signed_reply("anna", *tasks["anna"][1:], b"data"), b"data")
    assert late is not None
    assert pb.Header.FromString(late.receipt.header).receipt.verdict == pb.LATE


def admitted(name: str) -> AdmittedUpdate:
    return AdmittedUpdate(ClientUpdate(name, 1, 10, LoraResult({})))
