"""One run served over the link: the Flower server app over a grid of gRPC clients, every step told and kept."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, render
from fedtune.deployment.server_setup import check_overrides, expected_clients, server_context
from fedtune.flower.link_grid import LinkGrid
from fedtune.flower.server_app import Connect, Scalar, server_app
from fedtune.flower.shim import context
from fedtune.link import uploads
from fedtune.link.audit_log import Audit, RecordEvent, both
from fedtune.link.pki.identity import Identity, load, renewal
from fedtune.link.pki.roster import RosterFile
from fedtune.link.rejections import one_line
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.dispatcher import Dispatcher, RunInfo
from fedtune.link.server.metrics import Metrics, health
from fedtune.link.server.server import serve_link
from fedtune.link.settings import LinkSettings
from fedtune.messages import AdmittedUpdate, Blueprint, Failure, ProbeSeeds, TrainLora
from fedtune.rounds.admission import largest_update
from fedtune.rounds.loop import ClientFinished, Event, Note, RoundFinished, RoundStarted
from fedtune.runs.runner import check_resumable, run_recipe
from fedtune.store import journal
from fedtune.store.files import store_errors, write_text
from fedtune.store.history import has_begun
from fedtune.store.journal import Record
from fedtune.store.lock import lock_run
from fedtune.store.run_directory import check_vacant, write_recipe
from fedtune.store.run_journal import RunJournal
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb
from fedtune.wire.v1 import round_pb2

LINK, AUDIT, ID, SPOOL, BARRED = "link", "audit", "id", "spool", "barred"
"""Below a run directory: the folder of the link, and what lies in it."""
UNREADY_DISK = "less disk free than link.free_mib"


def coordinate(
    recipe: Recipe,
    run: Path,
    settings: LinkSettings,
    root: Path,
    *,
    resume: bool = False,
    expect: int | None = None,
    tell: RecordEvent,
    started: Callable[[int], None] = lambda port: None,
) -> Mapping[str, Any]:
    """Serve a recipe's rounds, or those that are left, to the clients of a federation, and return the run's summary.

    Args:
        recipe: what is run.
        run: its directory.
        settings: of the link.
        root: folder that `settings.identity` is relative to.
        resume: whether the run has begun already.
        expect: clients that the first round waits for; none: its cohort, or everybody in the roster.
        tell: told what happens, beside the audit log.
        started: told the port when clients may dial.

    Raises:
        ConfigError: if something must be changed before this can begin.
        RoundError: if a round could not be completed.
        StoreError: if the run directory cannot be written or trusted.
    """
    identity = load((root / settings.identity).resolve(), role="coordinator", now=int(time.time()))
    roster = RosterFile(identity.folder / "roster", identity.root)
    if resume:
        check_resumable(run, recipe)
    else:
        check_vacant(run)
        write_recipe(run, render(recipe))  # first of all: with it the run can be gone on with, whenever this ends
    folder = run / LINK
    with store_errors(folder), ExitStack() as stack:
        folder.mkdir(exist_ok=True)
        stack.enter_context(lock_run(folder))
        audit = Audit(folder / AUDIT, failed=lambda error: tell("warning", text=str(error)))
        stack.callback(audit.close)
        metrics = Metrics(names=settings.metrics_names)
        told = both(audit.tell, metrics.tell, tell)
        hub = create_dispatcher(recipe, run, settings, identity, told)
        metrics.gauge(hub, roster_version=lambda: roster.current().version, certificate_until=identity.not_after)
        if warning := renewal(identity, int(time.time())):
            told("warning", text=warning)
        if settings.health:
            port = stack.enter_context(health(settings.health, metrics, unready=lambda: readiness_fault(hub, roster)))
            told("health", address=settings.health, port=port)
        running = stack.enter_context(serve_link(hub, identity, roster, tell=told))
        started(running.port)
        summary = dict[str, Any]()

        def rounds(connect: Connect, run_config: Mapping[str, Scalar]) -> None:
            transport = connect(
                expected=expect or first_cohort_size(recipe, roster),
                least=recipe.rounds.min_clients,
                note=lambda text: told("note", text=text),
                patience_s=settings.patience_s,
                sleep=grid.doze,
            )
            conducted = server_context(recipe, transport, door="link", opened=lambda ledger: note_journal(hub, ledger))
            hub.base = bytes.fromhex(conducted.base["digest"])
            hub.limit = lambda front: max_update_bytes(front, conducted.blueprint)
            check_overrides(recipe, conducted.fleet, lambda text: told("note", text=text))
            summary.update(
                run_recipe(conducted, run, transport, resume=resume, watch=lambda event: on_event(hub, told, event))
            )

        grid = LinkGrid(hub)
        server_app(rounds)(grid, context({}))
        hub.stop(pb.Stop.FINISHED)
        return summary


def create_dispatcher(
    recipe: Recipe, run: Path, settings: LinkSettings, identity: Identity, tell: RecordEvent
) -> Dispatcher:
    """Return the hub of a run, which knows what an earlier process has promised."""
    accepted, ended = accepted_updates(run)
    described = RunInfo(identity.federation, run_id(run), render(recipe).encode(), identity.name, identity.key)
    folder = run / LINK
    tell("serving", run=described.run, recipe=described.recipe_digest.hex(), rounds=recipe.rounds.count, ended=ended)
    return Dispatcher(
        described, settings, folder / SPOOL, Blocklist(folder / BARRED), accepted=accepted, ended=ended, tell=tell
    )


def run_id(run: Path) -> str:
    """Return the run's number, which is drawn when it is served for the first time: answers of another never fit."""
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
        if record.kind in ("accept", "close"):  # over the link each update has a blob of its own, named by its digest
            for client, offset, _ in record.fields["updates"]:
                if not offset:
                    accepted[record.fields["round"], client] = record.fields["blob"]
        elif record.kind == "commit":
            committed = record.fields["round"]

    journal.read(run / "journal", take)
    return accepted, committed


def first_cohort_size(recipe: Recipe, roster: RosterFile) -> int:
    """Return how many clients the first round waits for: its cohort, or all of the roster where that is all."""
    if recipe.rounds.cohort is not None:
        return expected_clients(recipe)
    members = roster.current().members.values()
    enrolled = sum(one.role == "client" and one.state == "active" for one in members)
    return max(recipe.rounds.min_clients, enrolled)


def note_journal(hub: Dispatcher, ledger: RunJournal) -> None:
    hub.journal_end = lambda: ledger.end


def max_update_bytes(front: bytes, blueprint: Blueprint) -> int:
    """Return the bytes beyond which no honest answer to an encoded assignment goes."""
    message = parse(round_pb2.Assignment(), front)
    task = ProbeSeeds if message.verb == round_pb2.PROBE else TrainLora
    return largest_update(task, rank=max(1, message.plan.rank), steps=message.probe.steps, blueprint=blueprint)


def on_event(hub: Dispatcher, tell: RecordEvent, event: Event) -> None:
    """Tell what happens in the rounds, and let the hub tell each client what became of its answer."""
    match event:
        case RoundStarted(round, rounds, cohort):
            hub.opened(cohort)
            tell("round", round=round, rounds=rounds, clients=" ".join(cohort))
        case ClientFinished(round, AdmittedUpdate() as update, traffic):
            hub.settle(update.client, round, None)
            tell(
                "used",
                client=update.client,
                round=round,
                examples=update.num_examples,
                up=traffic.up,
                down=traffic.down,
            )
        case ClientFinished(round, Failure() as failure, _):
            if failure.kind == "refused":
                hub.settle(failure.client, round, refusal(failure))
            tell("unused", client=failure.client, round=round, why=failure.kind, reason=failure.reason)
        case RoundFinished(record) if record["round"]:
            hub.end(record["round"])
            used = sum(client["status"] == "ok" for client in record["clients"].values())
            tell(
                "committed",
                round=record["round"],
                updates=used,
                asked=len(record["cohort"]),
                state=record["state_digest"],
                up=record["bytes_up"],
                down=record["bytes_down"],
                ms=int(1000 * record["seconds"]),
            )
        case Note(text):
            tell("note", text=text)
        case _:
            pass


def refusal(failure: Failure) -> pb.Refusal:
    """Return why an update was refused, as it travels to its author."""
    if not failure.expected:
        return pb.Refusal(reason=failure.code or "MALFORMED", field=one_line(failure.reason))
    found = "; ".join(part for part in (failure.got, failure.hint) if part)
    return pb.Refusal(
        reason=failure.code or "MALFORMED",
        field=one_line(failure.where),
        expected=one_line(failure.expected),
        found=one_line(found),
    )


def readiness_fault(hub: Dispatcher, roster: RosterFile) -> str:
    """Return why the server could not take an update now; empty if it could."""
    if time.time() > roster.current().valid_until:
        return "the roster has expired: fedtune roster renew, then install it here"
    if roster.problem:
        return roster.problem
    if uploads.free_bytes(hub.folder) < hub.settings.free_mib * 2**20:
        return UNREADY_DISK
    return ""
