"""What the events of a served run mean for its clients: entries of the log, and receipts of their updates."""

from __future__ import annotations

from fedtune.link.audit_log import RecordEvent
from fedtune.link.rejections import one_line
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.messages import AdmittedUpdate, Failure
from fedtune.rounds.events import ClientFinished, Event, Note, RoundFinished, RoundStarted
from fedtune.rounds.record import RoundRecord
from fedtune.wire.v1 import link_pb2 as pb

SHOWN = ("accuracy", "macro_f1")
"""Metrics that stand beside the loss in a line, of those that a run has."""


def on_event(dispatcher: Dispatcher, record: RecordEvent, event: Event) -> None:
    """Record an event of the rounds, and have the dispatcher give each client the receipt of its update."""
    match event:
        case RoundStarted(round, rounds, cohort, overlaps):
            # An order promises no cohort whose updates are added up together where that is not known yet.
            dispatcher.begin_round(() if overlaps else cohort)
            record("round", round=round, rounds=rounds, clients=" ".join(cohort))
        case ClientFinished(round, AdmittedUpdate() as update, traffic):
            # The journal holds the update by now: a receipt promises that no crash loses it.
            dispatcher.settle(update.client, round, None)
            record(
                "used",
                client=update.client,
                round=round,
                examples=update.num_examples,
                up=traffic.up,
                down=traffic.down,
            )
        case ClientFinished(round, Failure() as failure, _):
            if failure.kind == "refused":
                dispatcher.settle(failure.client, round, refusal_of(failure))
            record("unused", client=failure.client, round=round, why=failure.kind, reason=failure.reason)
        # Round 0 is the evaluation before the first round, in which no client trains.
        case RoundFinished(line) if not line.round:
            if text := scores_text(line):
                record("base", scores=text)
        case RoundFinished(line):
            dispatcher.end_round(line.round, working=line.working)
            record(
                "committed",
                round=line.round,
                updates=line.used,
                asked=len(line.cohort),
                state=line.state_digest,
                up=line.bytes_up,
                down=line.bytes_down,
                ms=int(1000 * line.seconds),
                scores=scores_text(line),
            )
        case Note(text):
            record("note", text=text)
        case _:
            pass


def scores_text(record: RoundRecord) -> str:
    """Return what the global model scores on the clients' held-out rows, and how far they differ; empty if unknown."""
    loss, own = (record.test or {}).get("loss"), [metrics.get("loss") for metrics in record.held_out.values()]
    losses = [value for value in own if value is not None]
    if loss is None or not losses:
        return ""
    sites = f"{len(losses)} site{'s' * (len(losses) > 1)}"
    spread = f"{min(losses):.3f} to {max(losses):.3f} over {sites}" if len(losses) > 1 else sites
    others = [f"{name} {value:.3f}" for name in SHOWN if (value := (record.test or {}).get(name)) is not None]
    return ", ".join([f"held-out loss {loss:.3f} ({spread})", *others])


def refusal_of(failure: Failure) -> pb.Refusal:
    """Return why an update was refused, as it travels to its author."""
    if not failure.expected:
        return pb.Refusal(reason=failure.code or "MALFORMED", field=one_line(failure.reason))
    got = "; ".join(part for part in (failure.got, failure.hint) if part)
    return pb.Refusal(
        reason=failure.code or "MALFORMED",
        field=one_line(failure.where),
        expected=one_line(failure.expected),
        found=one_line(got),
    )
