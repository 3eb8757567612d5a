"""A run served over the link: the Flower server app over a grid of gRPC clients, with an audit log of every event."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, render
from fedtune.config.trainer_checks import refuse_named
from fedtune.deployment.enrolment import Place, serving
from fedtune.deployment.link_events import on_event, refusal_of
from fedtune.deployment.served_run import (
    AUDIT,
    BARRED,
    LINK,
    SPOOL,
    accepted_updates,
    complete_summary,
    informed_clients,
    pin_base,
    pinned_base,
    plan_text,
    result_files,
    run_id,
    sign_result,
    unsettled_orders,
)
from fedtune.deployment.server_setup import check_overrides, expected_clients, server_context, with_day
from fedtune.deployment.watch import Watch, watching
from fedtune.flower.grid_transport import DEADLINE_S
from fedtune.flower.link_grid import LinkGrid
from fedtune.flower.server_app import Connect, Scalar, server_app
from fedtune.flower.shim import context
from fedtune.link import uploads
from fedtune.link.audit_log import AuditLog, RecordEvent, log_event, record_to_all
from fedtune.link.pki.identity import Identity, current_dates, load_identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.provenance import Signer
from fedtune.link.server.addresses import LISTEN_HINT, check_address, check_addresses, check_free
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.folding import FoldedEvents
from fedtune.link.server.metrics import Metrics, serve_health
from fedtune.link.server.run_info import RunInfo
from fedtune.link.server.server import serve_link
from fedtune.link.settings import EnrolmentSettings, LinkSettings
from fedtune.messages import Blueprint, DescendSeeds, Failure, ProbeSeeds, SumClasses, Task, TrainLora
from fedtune.rounds.admission import largest_update
from fedtune.rounds.events import Watch as RunWatch
from fedtune.rounds.events import watch_all
from fedtune.runs.resume import as_started, check_resumable, write_options
from fedtune.runs.runner import run_recipe
from fedtune.runs.tracked import track
from fedtune.store.files import make_private, store_errors
from fedtune.store.lock import lock_run
from fedtune.store.run_directory import check_vacant, write_recipe
from fedtune.tracking.packages import check_packages
from fedtune.tracking.tracker import TrackerName
from fedtune.wire.codec import parse
from fedtune.wire.scores import MAX_SCORES_BYTES
from fedtune.wire.v1 import round_pb2

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
    enrolment: EnrolmentSettings | None = None,
    options: Sequence[str] = (),
    record: RecordEvent,
    watch: RunWatch = lambda event: None,
    trackers: Sequence[TrackerName] = (),
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
        enrolment: how sites enrol over the network, and where requests for renewals are kept; None: they are refused.
        options: of the command line that say how to serve it, for the advice on how to resume it.
        record: receives the events, beside the audit log.
        watch: called with the events of the rounds.
        trackers: sent each round beside those of the recipe: the sites' recipe does not name them.
        on_start: called with the port when clients may dial.

    Raises:
        ConfigError: if something must be changed before this can begin.
        RoundError: if a round could not be completed.
        StoreError: if the run directory cannot be written or trusted.
    """
    refuse_named(recipe)
    identity = load_identity((root / settings.identity).resolve(), role="coordinator", now=int(time.time()))
    roster = RosterFile(identity.folder / "roster", identity.root)
    # Before the run directory is written: a mistyped address leaves nothing behind.
    check_addresses(settings)
    if enrolment is not None and enrolment.listen:
        check_address(enrolment.listen, key="enrolment.listen")
        check_free("enrolment.listen", enrolment.listen, LISTEN_HINT)
    check_packages((*recipe.report.trackers, *trackers))
    if resume:
        recipe = as_started(run, recipe)
        check_resumable(run, recipe)
    else:
        run = check_vacant(run, fresh=fresh)
        # Before the sites are given the recipe: updates name the digest of its text, which a resume must not change.
        recipe = with_day(recipe)
        # First of all: with it the run can be resumed, whenever this process ends.
        write_recipe(run, render(recipe))
    folder = run / LINK
    # Left in reverse order: the server stops first, and the audit log last, with every event in it.
    with store_errors(folder), ExitStack() as stack:
        # Updates arrive below it.
        make_private(folder, below=folder)
        # Two servers of one run would each give receipts for other updates.
        stack.enter_context(lock_run(folder))
        write_options(run, options)
        record_all, metrics = open_records(stack, folder, settings, record)
        dispatcher = create_dispatcher(recipe, run, settings, identity, record_all)
        dispatcher.set_enrolled(partial(enrolled_clients, roster))
        record_all("enrolled", clients=" ".join(enrolled_clients(roster)))
        watch_health(stack, folder, dispatcher, roster, identity, metrics, record_all)
        renew = None
        if enrolment is not None:
            place = Place(identity, enrolment, (root / enrolment.folder).resolve())
            renew = stack.enter_context(serving(place, roster, record_all)).renew
        running = stack.enter_context(serve_link(dispatcher, identity, roster, renew=renew, record=record_all))
        on_start(running.port)
        summary = complete_summary(run, recipe) if resume else None
        if summary is None:
            watch = watch_all(partial(on_event, dispatcher, record_all), watch)
            with track(run, recipe, watch, more=trackers) as observe:
                summary = serve_rounds(
                    recipe, run, dispatcher, roster, resume=resume, expect=expect, record=record_all, watch=observe
                )
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
    folded = FoldedEvents(record_to_all(audit.record, log_event, record))
    stack.callback(folded.flush)
    # The metrics count every event.
    return record_to_all(folded.record, metrics.record), metrics


def watch_health(
    stack: ExitStack,
    folder: Path,
    dispatcher: Dispatcher,
    roster: RosterFile,
    identity: Identity,
    metrics: Metrics,
    record: RecordEvent,
) -> None:
    """Serve health and metrics where the settings ask for them, and warn of what will fail soon."""
    metrics.add_gauges(dispatcher, roster=roster.current, certificate_until=lambda: current_dates(identity)[1])
    stack.enter_context(watching(Watch(folder, dispatcher, identity, roster, record)))
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
    watch: RunWatch,
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
            organisation=partial(organisation_of, roster),
            may_come=dispatcher.may_call,
            on_base=partial(pin_base, run),
            note=note,
            on_admitted=lambda client, examples: record("connected", client=client, examples=examples),
            on_refused=partial(refuse_client, dispatcher, record),
            patience_s=dispatcher.settings.patience_s,
            deadline_s=DEADLINE_S,
            sleep=grid.wait,
        )
        run_context = server_context(
            recipe,
            transport,
            door="link",
            note=note,
            on_journal=lambda journal: dispatcher.set_journal_end(lambda: journal.end),
        )
        run_context = replace(run_context, number=dispatcher.run.run)
        # Not before: the base is what the profiles of most clients say.
        dispatcher.base = bytes.fromhex(run_context.base["digest"])
        dispatcher.max_reply_bytes = lambda front: max_update_bytes(front, run_context.blueprint)
        check_overrides(recipe, run_context.fleet, note)
        summary.update(run_recipe(run_context, run, transport, resume=resume, watch=watch))

    server_app(rounds)(grid, context({}))
    return summary


def refuse_client(dispatcher: Dispatcher, record: RecordEvent, client: str, reason: str, final: bool) -> None:
    """Record that a client takes no part, and tell it where only its operator can change that."""
    record("unfit", client=client, reason=reason)
    if final:
        dispatcher.refuse(client, refusal_of(Failure.from_text(client, reason, kind="refused", code="SITE_DIFFERS")))


def end_run(dispatcher: Dispatcher, run: Path, rounds: int, record: RecordEvent) -> None:
    """Give every client the result, and tell it that the run is complete, as long as the server drains."""
    record("complete", rounds=rounds)
    signer = Signer(dispatcher.run.federation, dispatcher.run.author, dispatcher.run.key)
    sign_result(run, signer)
    dispatcher.finish(rounds, result_files(run, signer))
    absent = sorted(set(dispatcher.uninformed_clients()) - dispatcher.fleet().keys())
    if absent:
        text = f"for up to {dispatcher.settings.drain_s:.0f} s other sites may still ask: {', '.join(absent)}"
        record("note", text=text)


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
        info,
        settings,
        folder / SPOOL,
        blocklist,
        accepted=accepted,
        ended=ended,
        unsettled=unsettled_orders(run),
        informed=informed,
        record=record,
    )


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


def organisation_of(roster: RosterFile, client: str) -> str:
    """Return the organisation that the roster assigns a client to; empty if it knows no such client."""
    party = roster.current().parties.get(client)
    return party.org if party is not None else ""


def max_update_bytes(front: bytes, blueprint: Blueprint) -> int:
    """Return the bytes that an honest reply to an encoded assignment has at most."""
    message = parse(round_pb2.Assignment(), front)
    if message.verb == round_pb2.SCORE:
        return MAX_SCORES_BYTES
    verbs: Mapping[int, type[Task]] = {
        round_pb2.PROBE: ProbeSeeds,
        round_pb2.DESCEND: DescendSeeds,
        round_pb2.SUM: SumClasses,
    }
    descend = message.descend
    scalars = (message.probe.steps, descend.probe.steps, -(-descend.count * descend.bits // 8))
    return largest_update(
        verbs.get(message.verb, TrainLora),
        rank=max(1, message.plan.rank),
        scalar_bytes=max(scalars),
        blueprint=blueprint,
        # Scores, and moments that may be larger than the factors, come with an answer to a task that prunes.
        pruned=message.HasField("surgery"),
        ranks=tuple(message.plan.ranks),
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
