"""A run served over the link: the Flower server app over a grid of gRPC clients, with an audit log of every event."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, render
from fedtune.deployment.link_events import on_event, refusal_of
from fedtune.deployment.server_setup import check_overrides, expected_clients, server_context
from fedtune.flower.link_grid import LinkGrid
from fedtune.flower.server_app import Connect, Scalar, server_app
from fedtune.flower.shim import context
from fedtune.link import audit_log, uploads
from fedtune.link.audit_log import AuditLog, RecordEvent, log_event, record_to_all
from fedtune.link.pki.identity import Identity, load_identity, renewal_warning
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.metrics import Metrics, serve_health
from fedtune.link.server.run_info import RunInfo
from fedtune.link.server.server import serve_link
from fedtune.link.settings import LinkSettings
from fedtune.messages import Blueprint, Failure, ProbeSeeds, TrainLora
from fedtune.rounds.admission import largest_update
from fedtune.runs.resume import check_resumable
from fedtune.runs.runner import run_recipe
from fedtune.store import journal, result, seeds
from fedtune.store.files import store_errors, write_text
from fedtune.store.history import has_begun
from fedtune.store.journal import Record
from fedtune.store.lock import lock_run
from fedtune.store.run_directory import check_vacant, write_recipe
from fedtune.store.verify import status as run_status
from fedtune.wire.codec import parse
from fedtune.wire.scores import MAX_SCORES_BYTES
from fedtune.wire.v1 import round_pb2

LINK, AUDIT, ID, SPOOL, BARRED, BASE = "link", "audit", "id", "spool", "barred", "base"
"""Names below a run directory: the folder of the link, and the files in it."""
UNREADY_DISK = "less disk free than link.free_mib"


def coordinate(
    recipe: Recipe,
    run: Path,
    settings: LinkSettings,
    root: Path,
    *,
    resume: bool = False,
    fresh: bool = False,
    expect: int | None = None,
    record: RecordEvent,
    on_start: Callable[[int], None] = lambda port: None,
) -> tuple[Path, Mapping[str, Any]]:
    """Serve a recipe's rounds, or those that are left, to the clients of a federation.

    Returns run directory and summary.

    Args:
        recipe: of the run.
        run: its directory.
        settings: of the link.
        root: folder that `settings.identity` is relative to.
        resume: whether the run has begun already.
        fresh: whether a new run lies beside `run` where that is taken.
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
        run = check_vacant(run, fresh=fresh)
        # First of all: with it the run can be resumed, whenever this process ends.
        write_recipe(run, render(recipe))
    folder = run / LINK
    # Left in reverse order: the server stops first, and the audit log last, with every event in it.
    with store_errors(folder), ExitStack() as stack:
        folder.mkdir(exist_ok=True)
        # Two servers of one run would each give receipts for other updates.
        stack.enter_context(lock_run(folder))
        record_all, metrics = open_records(stack, folder, settings, record)
        dispatcher = create_dispatcher(recipe, run, settings, identity, record_all)
        dispatcher.set_enrolled(partial(enrolled_clients, roster))
        record_all("enrolled", clients=" ".join(enrolled_clients(roster)))
        watch_health(stack, dispatcher, roster, identity, metrics, record_all)
        running = stack.enter_context(serve_link(dispatcher, identity, roster, record=record_all))
        on_start(running.port)
        summary = complete_summary(run, recipe) if resume else None
        if summary is None:
            summary = serve_rounds(recipe, run, dispatcher, roster, resume=resume, expect=expect, record=record_all)
        # Reached only when all rounds are over: after an error `serve_link` has the clients wait for the next process.
        end_run(dispatcher, run, int(summary["rounds"]), record_all)
        return run, summary


def open_records(
    stack: ExitStack, folder: Path, settings: LinkSettings, record: RecordEvent
) -> tuple[RecordEvent, Metrics]:
    """Return what records an event everywhere, and the metrics; closed with the stack."""
    audit = AuditLog(folder / AUDIT, on_failure=lambda error: record("warning", text=str(error)))
    stack.callback(audit.close)
    metrics = Metrics(names=settings.metrics_names)
    # The audit log is first: an event is in it even if a later recorder fails.
    return record_to_all(audit.record, metrics.record, log_event, record), metrics


def watch_health(
    stack: ExitStack,
    dispatcher: Dispatcher,
    roster: RosterFile,
    identity: Identity,
    metrics: Metrics,
    record: RecordEvent,
) -> None:
    """Serve health and metrics where the settings ask for them, and warn of what will fail soon."""
    metrics.add_gauges(
        dispatcher, roster_version=lambda: roster.current().version, certificate_until=identity.not_after
    )
    if warning := renewal_warning(identity, int(time.time())):
        record("warning", text=warning)
    if address := dispatcher.settings.health:
        unready = partial(readiness_fault, dispatcher, roster)
        port = stack.enter_context(serve_health(address, metrics, unready=unready))
        record("health", address=address, port=port)


def serve_rounds(
    recipe: Recipe,
    run: Path,
    dispatcher: Dispatcher,
    roster: RosterFile,
    *,
    resume: bool,
    expect: int | None,
    record: RecordEvent,
) -> Mapping[str, Any]:
    """Run the rounds over the clients that connect, and return the run's summary."""
    summary, grid = dict[str, Any](), LinkGrid(dispatcher)

    def note(text: str) -> None:
        record("note", text=text)

    def rounds(connect: Connect, run_config: Mapping[str, Scalar]) -> None:
        transport = connect(
            expected=expect or first_cohort_size(recipe, roster),
            least=recipe.rounds.min_clients,
            base=recipe.model.digest or pinned_base(run),
            labels=recipe.data.labels,
            on_base=partial(pin_base, run),
            note=note,
            on_admitted=lambda client, examples: record("connected", client=client, examples=examples),
            on_refused=partial(refuse_client, dispatcher, record),
            patience_s=dispatcher.settings.patience_s,
            sleep=grid.wait,
        )
        run_context = server_context(
            recipe,
            transport,
            door="link",
            note=note,
            on_journal=lambda journal: dispatcher.set_journal_end(lambda: journal.end),
        )
        # Not before: the base is what the profiles of most clients say.
        dispatcher.base = bytes.fromhex(run_context.base["digest"])
        dispatcher.max_reply_bytes = lambda front: max_update_bytes(front, run_context.blueprint)
        check_overrides(recipe, run_context.fleet, note)
        watch = partial(on_event, dispatcher, record)
        summary.update(run_recipe(run_context, run, transport, resume=resume, watch=watch))

    server_app(rounds)(grid, context({}))
    return summary


def pinned_base(run: Path) -> str:
    """Return the digest (hex) of the base that the first client of a run had; empty before one has come."""
    path = run / LINK / BASE
    return path.read_text().strip() if path.exists() else ""


def pin_base(run: Path, digest: str) -> None:
    """Note which base a run is of, before anything is trained: after a restart no other one is taken either."""
    write_text(run / LINK / BASE, digest)


def refuse_client(dispatcher: Dispatcher, record: RecordEvent, client: str, reason: str, final: bool) -> None:
    """Record that a client takes no part, and tell it where only its operator can change that."""
    record("unfit", client=client, reason=reason)
    if final:
        dispatcher.refuse(client, refusal_of(Failure.from_text(client, reason, kind="refused", code="SITE_DIFFERS")))


def complete_summary(run: Path, recipe: Recipe) -> Mapping[str, Any] | None:
    """Return the summary of a run that has no round left; None if there is work."""
    status = run_status(run)
    if not status.finished:
        return None
    content: Mapping[str, Any] = json.loads((run / "summary.json").read_text())
    # A run may have ended before its last round (rounds.patience).
    ended = status.committed >= recipe.rounds.count or content.get("selection", {}).get("ended")
    return content if ended else None


def end_run(dispatcher: Dispatcher, run: Path, rounds: int, record: RecordEvent) -> None:
    """Give every client the result, and tell it that the run is complete, as long as the server drains."""
    record("complete", rounds=rounds)
    dispatcher.finish(rounds, result_files(run))
    absent = sorted(set(dispatcher.uninformed_clients()) - dispatcher.fleet().keys())
    if absent:
        text = f"for up to {dispatcher.settings.drain_s:.0f} s other sites may still ask: {', '.join(absent)}"
        record("note", text=text)


def result_files(run: Path) -> Mapping[str, memoryview]:
    """Return the files of a run's result, by their names below the run directory; none if it has none.

    What the provenance says of each client, such as its number of examples, stays on the server.
    """
    folder = result.folder(run)
    paths = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    files = {f"{folder.name}/{path.name}": uploads.map_file(path) for path in paths}
    if (origin := folder / seeds.ORIGIN).exists():
        said = {key: value for key, value in json.loads(origin.read_text()).items() if key != "clients"}
        files[f"{folder.name}/{origin.name}"] = memoryview((json.dumps(said, indent=1) + "\n").encode())
    return files


def create_dispatcher(
    recipe: Recipe, run: Path, settings: LinkSettings, identity: Identity, record: RecordEvent
) -> Dispatcher:
    """Return the dispatcher of a run, which goes on from what its journal holds."""
    accepted, ended = accepted_updates(run)
    informed = informed_clients(run / LINK / AUDIT) if ended else ()
    info = RunInfo(identity.federation, run_id(run), plan_text(recipe, run).encode(), identity.name, identity.key)
    folder = run / LINK
    record("serving", run=info.run, recipe=info.recipe_digest.hex(), rounds=recipe.rounds.count, ended=ended)
    blocklist = Blocklist(folder / BARRED)
    return Dispatcher(
        info, settings, folder / SPOOL, blocklist, accepted=accepted, ended=ended, informed=informed, record=record
    )


def plan_text(recipe: Recipe, run: Path) -> str:
    """Return the recipe as sites get it: the same at a resume, although a base was pinned in the run's own meanwhile.

    Updates that a site has signed before name the digest of this text.
    """
    if pinned_base(run) == recipe.model.digest:
        recipe = replace(recipe, model=replace(recipe.model, digest=None))
    return render(recipe)


def informed_clients(path: Path) -> Collection[str]:
    """Return the clients that know by the audit log that the run is complete; none if more rounds have begun since."""
    informed = set[str]()
    for entry in audit_log.read_audit_log(path).entries if path.exists() else ():
        if entry.kind == "informed":
            informed.add(str(entry.fields["client"]))
        elif entry.kind == "round":
            informed.clear()
    return informed


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
    # Else a run would begin with the first clients that happen to connect.
    return max(recipe.rounds.min_clients, len(enrolled_clients(roster)))


def enrolled_clients(roster: RosterFile) -> Sequence[str]:
    """Return the names of the clients that the roster admits now."""
    parties = roster.current().parties.values()
    return sorted(party.name for party in parties if party.role == "client" and party.state == "active")


def max_update_bytes(front: bytes, blueprint: Blueprint) -> int:
    """Return the bytes that an honest reply to an encoded assignment has at most."""
    message = parse(round_pb2.Assignment(), front)
    if message.verb == round_pb2.SCORE:
        return MAX_SCORES_BYTES
    task = ProbeSeeds if message.verb == round_pb2.PROBE else TrainLora
    return largest_update(task, rank=max(1, message.plan.rank), steps=message.probe.steps, blueprint=blueprint)


def readiness_fault(dispatcher: Dispatcher, roster: RosterFile) -> str:
    """Return why the server could not take an update now; empty if it could."""
    if time.time() > roster.current().valid_until:
        return "the roster has expired: fedtune roster renew, then install it here"
    if roster.problem:
        return roster.problem
    if uploads.free_bytes(dispatcher.folder) < dispatcher.settings.free_mib * 2**20:
        return UNREADY_DISK
    return ""
