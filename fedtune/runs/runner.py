"""The loop of a run: from the recipe, or from where it was stopped, to summary.json, each round recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from fedtune.config import Recipe, render
from fedtune.config.recipe import method_of
from fedtune.errors import FedtuneError, RoundError, StoreError
from fedtune.methods import serialization
from fedtune.methods.settings import LinearSettings
from fedtune.model.settings import AdapterSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.rounds import buffer
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import Note, Phase, RoundFinished, Watch
from fedtune.rounds.journal import AsyncJournal, NullJournal
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.loop import run as run_rounds
from fedtune.rounds.record import RoundRecord, observations
from fedtune.rounds.selection import ends_early, kept_record
from fedtune.rounds.transport import Transport
from fedtune.runs.context import Door, RunContext, first_state
from fedtune.runs.recording import lost_states, record_base, record_round, write_result
from fedtune.runs.resume import load_resumed, resume_command
from fedtune.runs.start import first_round, saturation_notes, start_state
from fedtune.runs.summary import summary
from fedtune.store.history import has_begun
from fedtune.store.run_directory import write_partition, write_recipe, write_summary
from fedtune.store.run_journal import GROUP_S, RunJournal

FEW_ROUNDS_LEFT = 20
"""From so many rounds on it is noted how many the 32-bit sums of seed accumulators have room for."""
SLOW_TOKENS, SLOW_ENCODER = (0.005, "0.03 to 0.1"), (0.001, "0.003")
"""Learning rates below which virtual tokens, and P-tuning's encoder, hardly move, and usual ones."""


def run_recipe(
    context: RunContext,
    run: Path,
    transport: Transport,
    *,
    resume: bool = False,
    watch: Watch,
    began: float | None = None,
    until: int | None = None,
) -> Mapping[str, Any]:
    """Run the rounds, or those that are left, record each of them in the run directory, and return the summary.

    With `resume` a stopped run continues; one that was killed before its journal began starts.

    When a round cannot be completed, or on Ctrl-C, the completed rounds stay: their lines, the last adapter, and a
    summary with the reason; then the exception is raised again. The run can be resumed after that, and after any crash.

    Args:
        context: what the run is given.
        run: its directory.
        transport: reaches the clients.
        resume: see above.
        watch: called with each event.
        began: when the user started it, of `time.perf_counter`: loading counts in the time of a run. Now without it.
        until: of a trial of a search, the round after which it pauses; resumed, it goes on as if it never had.

    Raises:
        RoundError: if a round could not be completed.
        StoreError: if the run directory cannot be written or trusted.
        ConfigError: if a run to be resumed was started with another base or other data.
    """
    expected = saturation_notes(context.recipe, context.blueprint, list(context.fleet))
    for note in (*context.notes, *remarks(context.recipe), *expected):
        watch(Note(note))
    began, resumed = time.perf_counter() if began is None else began, resume and has_begun(run)
    # Over the link a client gets its receipt at once and may delete the update then: each is made durable by itself.
    group_s = 0.0 if context.door == "link" else GROUP_S
    opening = RunJournal.reopen if resumed else RunJournal.create
    with opening(run, group_s=group_s) as journal:
        # Everything that may be refused comes before anything of the run is changed.
        records, state = load_resumed(context, run, journal, watch) if resumed else ([], None)
        write_recipe(run, render(context.recipe))
        write_partition(run, context.partition)
        journal.begin(context.inputs)
        context.on_journal(journal)
        if records and records[-1].round:
            restore_result(context, run, journal, state, records)
        earlier = sum(record.seconds for record in records)

        def write(reason: str) -> Mapping[str, Any]:
            content = summary(
                context, run, records, reason=reason, elapsed=lambda: earlier + time.perf_counter() - began
            )
            write_summary(run, content)
            return content

        try:
            for record in recorded_rounds(context, run, transport, journal, state, tuple(records), watch, until):
                records.append(record)
                watch(RoundFinished(record))
        except (KeyboardInterrupt, FedtuneError) as stop:
            if records:
                with suppress(StoreError):  # on a full disk the error to report is the one that stopped the run
                    write("Ctrl-C" if isinstance(stop, KeyboardInterrupt) else str(stop))
            if until is None:  # else a search says how it is resumed
                watch(Note(stop_note(stop, context.door, run, records)))
            raise
        if until is not None and records[-1].round < context.recipe.rounds.count:
            # Its end is not noted: what a repetition of the last round needs stays until the next one begins.
            return write(f"paused after round {records[-1].round} of {context.recipe.rounds.count}, by a search")
        if context.recipe.evaluate.prompt or context.recipe.evaluate.prompts:
            watch(Phase("answering the prompts, before and after"))
        content = write("")
        journal.finish(records[-1].round)
        return content


def recorded_rounds(
    context: RunContext,
    run: Path,
    transport: Transport,
    journal: RunJournal,
    state: Any | None,
    earlier: Sequence[RoundRecord],
    watch: Watch,
    until: int | None = None,
) -> Iterator[RoundRecord]:
    """Yield the record of each round that is left, once it is on the disk; of a new run, first that of the base.

    With `until`, those up to that round are left.
    """
    records = list(earlier)
    if records and until is not None and records[-1].round >= until:
        return
    if not records:
        watch(Phase("scoring the base"))
        records.append(record_base(context, run))
        yield records[-1]
    elif records[-1].round == context.recipe.rounds.count:
        watch(Note(f"nothing is left to do up to round {records[-1].round}; set rounds.count for more"))
    if reason := ends_early(context.recipe.rounds, records):
        watch(Note(f"the run ended after round {records[-1].round}: {reason}"))
        return
    for finished in run_rounds_of(
        context, transport, journal=journal, start=state, records=tuple(records), watch=watch
    ):
        records.append(record_round(context, run, finished, records))
        keep_best(context, journal, records)
        if lost := lost_states(records[-1], records[:-1]):
            missing = "started from the server's values: their personal state of an earlier round is missing"
            watch(Note(f"round {records[-1].round}: {', '.join(lost)} {missing}"))
        yield records[-1]
        if records[-1].round == until:
            return
        if (left := records[-1].figures.get("rounds_left", FEW_ROUNDS_LEFT + 1)) <= FEW_ROUNDS_LEFT:
            watch(Note(f"sums of 32 bits have room for {left} more rounds in the worst case"))
        if reason := ends_early(context.recipe.rounds, records):
            watch(Note(f"ends after round {records[-1].round} of {context.recipe.rounds.count}: {reason}"))
            return


def keep_best(context: RunContext, journal: RunJournal, records: Sequence[RoundRecord]) -> None:
    """Keep the last round's state if the recipe keeps the best one and it is that; before the next round begins."""
    rounds = context.recipe.rounds
    if rounds.keep == "best" and kept_record(rounds, records) is records[-1]:
        journal.keep(records[-1].round)


def restore_result(
    context: RunContext, run: Path, journal: RunJournal, state: Any, records: Sequence[RoundRecord]
) -> None:
    """Write the result of a run that is resumed: after a crash, or a change by hand, it may be another round's."""
    keep_best(context, journal, records)
    chosen = kept_record(context.recipe.rounds, records)
    if chosen is not records[-1]:
        first = first_state(context.recipe, context.blueprint)
        state = serialization.decode(journal.state(chosen.round), first)
    write_result(context, run, state, records[: chosen.round + 1])


def stop_note(stop: BaseException, door: Door, run: Path, records: Sequence[RoundRecord]) -> str:
    """Return the note on a stopped run: the rounds that are complete, and how to resume it."""
    complete = f"after round {records[-1].round}" if records else "before its first round"
    final = isinstance(stop, RoundError) and stop.final
    return f"stopped {complete}" + ("" if final else f"; resume with: {resume_command(door, run)}")


def run_rounds_of(
    context: RunContext,
    transport: Transport,
    *,
    journal: AsyncJournal | None = None,
    start: Any | None = None,
    records: Sequence[RoundRecord] = (),
    watch: Watch = lambda event: None,
) -> Iterator[RoundResult]:
    """Yield the recipe's rounds, from a state or from the first one; without a journal none of them can be resumed.

    From the records of earlier rounds the planner learns again what it knew.
    """
    if start is None and context.recipe.adapter.start is not None:
        start = start_state(context.recipe, context.blueprint)
    rounds = RoundContext(
        method=method_of(context.recipe),
        first=first_round(context.recipe, context.blueprint, context.labels),
        settings=context.recipe.method,
        planner=context.planner,
        transport=transport,
        schedule=context.recipe.rounds,
        blueprint=context.blueprint,
        base=context.base["digest"],
        labels=tuple(context.sent_labels),
        date=context.sent_date,
        journal=journal or NullJournal(),
        clock=context.clock,
        prober=context.prober,
        asynchronous=context.recipe.asynchronous,
        live=context.door != "simulate",
        watch=watch,
    )
    clock_s = records[-1].clock_s if records else 0.0
    if rounds.asynchronous is not None:
        return buffer.run(rounds, start=start, clock_s=clock_s)
    history = [observations(record) for record in records if record.round]
    return run_rounds(rounds, start=start, history=history, clock_s=clock_s)


def remarks(recipe: Recipe) -> Iterator[str]:
    """Yield what is allowed and seldom intended."""
    if recipe.search is not None:
        yield "the table [search] is ignored here; fedtune search tries what it lists"
    if recipe.adapter.start is not None:
        yield f"starts from the adapter {recipe.adapter.start}: round 0 is its score, not that of the base alone"
    if not getattr(recipe.planner, "learning_rates", ()):
        yield from slow_tokens(recipe.adapter, recipe.client.learning_rate)
    planner, ratios = recipe.planner, [override.ratio for override in recipe.override]
    if recipe.pruning is not None and isinstance(planner, FixedSettings) and not planner.ratio and not any(ratios):
        yield "no client is pruned in training: planner.ratio is 0; the deployed model is pruned afterwards"
    if isinstance(recipe.method, LinearSettings) and recipe.method.server_learning_rate == 1:
        rule = recipe.method.server_optimizer.name
        if rule in ("fedadam", "fedyogi"):
            yield f"method.server_learning_rate is 1, by which {rule} may move every number in a round; 0.01 is usual"


def slow_tokens(adapter: AdapterSettings, rate: float | Literal["auto"]) -> Iterator[str]:
    """Yield that virtual tokens hardly move at a learning rate that is usual for factors."""
    least, usual = SLOW_ENCODER if adapter.send == "encoder" else SLOW_TOKENS
    if adapter.kind != "lora" and rate != "auto" and rate < least:
        yield (
            f"client.learning_rate is {rate:g}, by which virtual tokens hardly move; "
            f"with adapter.kind = {adapter.kind!r} {usual} is usual"
        )
