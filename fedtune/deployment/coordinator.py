"""A run served over the link: the Flower server app over a grid of gRPC clients, with an audit log of every event."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, render
from fedtune.deployment.server_setup import check_overrides, expected_clients, server_context
from fedtune.flower.link_grid import LinkGrid
from fedtune.flower.server_app import Connect, Scalar, server_app
from fedtune.flower.shim import context
from fedtune.link import uploads
from fedtune.link.audit_log import AuditLog, RecordEvent, log_event, record_to_all
from fedtune.link.pki.identity import Identity, load_identity, renewal_warning
from fedtune.link.pki.roster import RosterFile
from fedtune.link.rejections import one_line
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.metrics import Metrics, serve_health
from fedtune.link.server.run_info import RunInfo
from fedtune.link.server.server import serve_link
from fedtune.link.settings import LinkSettings
from fedtune.messages import AdmittedUpdate, Blueprint, Failure, ProbeSeeds, TrainLora
from fedtune.rounds.admission import largest_update
from fedtune.rounds.events import ClientFinished, Event, Note, RoundFinished, RoundStarted
from fedtune.runs.resume import check_resumable
from fedtune.runs.runner import run_recipe
from fedtune.store import journal
from fedtune.store.files import store_errors, write_text
from fedtune.store.history import has_begun
from fedtune.store.journal import Record
from fedtune.store.lock import lock_run
from fedtune.store.run_directory import check_vacant, write_recipe
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb
from fedtune.wire.v1 import round_pb2

LINK, AUDIT, ID, SPOOL, BARRED = "link", "audit", "id", "spool", "barred"
"""Names below a run directory: the folder of the link, and the files in it."""
UNREADY_DISK = "less disk free than link.free_mib"


def coordinate(
    recipe: Recipe,
    run: Path,
    settings: LinkSettings,
    root: Path,
    *,
    resume: bool = False,
    expect: int | None = None,
    record: RecordEvent,
    on_start: Callable[[int], None] = lambda port: None,
) -> Mapping[str, Any]:
    """Serve a recipe's rounds, or those that are left, to the clients of a federation, and return the run's summary.

    Args:
        recipe: of the run.
        run: its directory.
        settings: of the link.
        root: folder that `settings.identity` is relative to.
        resume: whether the run has begun already.
        expect: clients that the first round waits for; None: its cohort, or all clients of the roster.
        record: receives the events, beside the audit log.
        on_start: called with the port when clients may dial.

    Raises:
        ConfigError: if something must be changed before this can begin.
        RoundError: if a round could not be completed.
        StoreError: if the run directory cannot be written or trusted.
    """
    identity = load_identity((root / settings.identity).resolve(), role="coordinator", now=int(time.time()))
    roster = RosterFile(identity.folder / "roster", identity.root)
    if resume:
        check_resumable(run, recipe)
    else:
        check_vacant(run)
        # First of all: with it the run can be resumed, whenever this process ends.
        write_recipe(run, render(recipe))
    folder = run / LINK
    # Left in reverse order: the server stops first, and the audit log last, with every event in it.
    with store_errors(folder), ExitStack() as stack:
        folder.mkdir(exist_ok=True)
        # Two servers of one run would each give receipts for other updates.
        stack.enter_context(lock_run(folder))
        audit = AuditLog(folder / AUDIT, on_failure=lambda error: record("warning", text=str(error)))
        stack.callback(audit.close)
        metrics = Metrics(names=settings.metrics_names)
        # The audit log is first: an event is in it even if a later recorder fails.
        record_all = record_to_all(audit.record, metrics.record, log_event, record)
        dispatcher = create_dispatcher(recipe, run, settings, identity, record_all)
        metrics.add_gauges(
            dispatcher, roster_version=lambda: roster.current().version, certificate_until=identity.not_after
        )
        if warning := renewal_warning(identity, int(time.time())):
            record_all("warning", text=warning)
        if settings.health:
            unready = partial(readiness_fault, dispatcher, roster)
            port = stack.enter_context(serve_health(settings.health, metrics, unready=unready))
            record_all("health", address=settings.health, port=port)
        running = stack.enter_context(serve_link(dispatcher, identity, roster, record=record_all))
        on_start(running.port)
        summary = dict[str, Any]()

        def rounds(connect: Connect, run_config: Mapping[str, Scalar]) -> None:
            transport = connect(
                expected=expect or first_cohort_size(recipe, roster),
                least=recipe.rounds.min_clients,
                note=lambda text: record_all("note", text=text),
                patience_s=settings.patience_s,
                sleep=grid.wait,
            )
            run_context = server_context(
                recipe,
                transport,
                door="link",
                on_journal=lambda journal: dispatcher.set_journal_end(lambda: journal.end),
            )
            # Not before: the base is what the profiles of most clients say.
            dispatcher.base = bytes.fromhex(run_context.base["digest"])
            dispatcher.max_reply_bytes = lambda front: max_update_bytes(front, run_context.blueprint)
            check_overrides(recipe, run_context.fleet, lambda text: record_all("note", text=text))
            summary.update(
                run_recipe(run_context, run, transport, resume=resume, watch=partial(on_event, dispatcher, record_all))
            )

        grid = LinkGrid(dispatcher)
        server_app(rounds)(grid, context({}))
        # Reached only when all rounds are over: after an error `serve_link` has the clients wait for the next process.
        dispatcher.stop(pb.Stop.FINISHED)
        return summary


def create_dispatcher(
    recipe: Recipe, run: Path, settings: LinkSettings, identity: Identity, record: RecordEvent
) -> Dispatcher:
    """Return the dispatcher of a run, which goes on from what its journal holds."""
    accepted, ended = accepted_updates(run)
    info = RunInfo(identity.federation, run_id(run), render(recipe).encode(), identity.name, identity.key)
    folder = run / LINK
    record("serving", run=info.run, recipe=info.recipe_digest.hex(), rounds=recipe.rounds.count, ended=ended)
    blocklist = Blocklist(folder / BARRED)
    return Dispatcher(info, settings, folder / SPOOL, blocklist, accepted=accepted, ended=ended, record=record)


def run_id(run: Path) -> str:
    """Return the run's id, drawn when it is served for the first time: replies of another run never match it."""
    path = run / LINK / ID
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text().strip()


def accepted_updates(run: Path) -> tuple[Mapping[tuple[int, str], str], int]:
    """Return the digests (hex) of the updates that a run's journal accepts, by round and client, and its last round."""
    accepted, committed = dict[tuple[int, str], str](), 0
    if not has_begun(run):
        return accepted, committed

    def take(record: Record) -> None:
        nonlocal committed
        # Over the link each update has a blob of its own, named by its digest.
        if record.kind in ("accept", "close"):
            for client, offset, _ in record.fields["updates"]:
                if not offset:
                    accepted[record.fields["round"], client] = record.fields["blob"]
        elif record.kind == "commit":
            committed = record.fields["round"]

    journal.read(run / "journal", take)
    return accepted, committed


def first_cohort_size(recipe: Recipe, roster: RosterFile) -> int:
    """Return how many clients the first round waits for: its cohort, or without one all clients of the roster."""
    if recipe.rounds.cohort is not None:
        return expected_clients(recipe)
    parties = roster.current().parties.values()
    enrolled = sum(party.role == "client" and party.state == "active" for party in parties)
    # Else a run would begin with the first clients that happen to connect.
    return max(recipe.rounds.min_clients, enrolled)


def max_update_bytes(front: bytes, blueprint: Blueprint) -> int:
    """Return the bytes that an honest reply to an encoded assignment has at most."""
    message = parse(round_pb2.Assignment(), front)
    task = ProbeSeeds if message.verb == round_pb2.PROBE else TrainLora
    return largest_update(task, rank=max(1, message.plan.rank), steps=message.probe.steps, blueprint=blueprint)


def on_event(dispatcher: Dispatcher, record: RecordEvent, event: Event) -> None:
    """Record an event of the rounds, and have the dispatcher give each client the receipt of its update."""
    match event:
        case RoundStarted(round, rounds, cohort):
            dispatcher.begin_round(cohort)
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
        # Round 0 is the evaluation before the first round, for which no client has a task.
        case RoundFinished(line) if line.round:
            dispatcher.end_round(line.round)
            record(
                "committed",
                round=line.round,
                updates=line.used,
                asked=len(line.cohort),
                state=line.state_digest,
                up=line.bytes_up,
                down=line.bytes_down,
                ms=int(1000 * line.seconds),
            )
        case Note(text):
            record("note", text=text)
        case _:
            pass


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


def readiness_fault(dispatcher: Dispatcher, roster: RosterFile) -> str:
    """Return why the server could not take an update now; empty if it could."""
    if time.time() > roster.current().valid_until:
        return "the roster has expired: fedtune roster renew, then install it here"
    if roster.problem:
        return roster.problem
    if uploads.free_bytes(dispatcher.folder) < dispatcher.settings.free_mib * 2**20:
        return UNREADY_DISK
    return ""
