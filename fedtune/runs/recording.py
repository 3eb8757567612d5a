"""What a run writes after each round: scores, the global model, and the line of rounds.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config import Recipe
from fedtune.config.recipe import method_of
from fedtune.lora.dense import Summed, energy
from fedtune.lora.lowrank import compress
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.messages import (
    VERBS,
    Assignment,
    ClientUpdate,
    Failure,
    LoraResult,
    Outcome,
    PlannedClient,
    ProbeResult,
    SumClasses,
    TrainLora,
)
from fedtune.methods.method import GlobalModel
from fedtune.planning.verbs import DESCENDING
from fedtune.pruning.structure import ModelStructure
from fedtune.rounds.loop import RoundResult, arm_of, probe_fields, steps_done
from fedtune.rounds.record import ClientRecord, ModuleRecord, PersonalRecord, RoundRecord, UnsolicitedRecord
from fedtune.rounds.selection import ends_early, kept_record
from fedtune.rounds.transport import UnsolicitedReply
from fedtune.runs.context import ModelScores, RunContext
from fedtune.runs.start import start_state
from fedtune.runs.summary import provenance
from fedtune.store import result
from fedtune.store.round_records import append_round

SPECTRUM = 64
"""Singular values per module in a line, the largest ones: as many as the report draws."""


def record_base(context: RunContext, run: Path) -> RoundRecord:
    """Score the base, with the adapter that the run starts from, and write and return the record of round 0."""
    began = time.perf_counter()
    recipe = context.recipe
    start = GlobalModel(saved=context.blueprint.saved)
    if recipe.adapter.start is not None:
        start = method_of(recipe).global_model(start_state(recipe, context.blueprint))
    scores = context.score(start, round=0, test=True, clients=True)
    record = RoundRecord(
        round=0,
        seconds=time.perf_counter() - began,
        test=scores.test,
        held_out=scores.held_out,
        unsolicited=unsolicited_records(scores.unsolicited),
        bytes_down=scores.traffic.down,
        bytes_up=scores.traffic.up,
    )
    append_round(run, record)
    return record


def record_round(context: RunContext, run: Path, finished: RoundResult, earlier: Sequence[RoundRecord]) -> RoundRecord:
    """Score the state as the recipe asks, write the global model if it is the one to keep, then the round's line.

    The line comes last: once it is there, a resumed run does not repeat the round, so the model must be on the disk.
    """
    recipe, method = context.recipe, method_of(context.recipe)
    tuned = method.global_model(finished.state)
    last, every = finished.round == recipe.rounds.count, recipe.evaluate.every
    test = last or (every > 0 and finished.round % every == 0)
    structure = deployed_structure(recipe, finished.state)
    clients = last or finished.round in context.scored_rounds
    scores = context.score(tuned, round=finished.round, test=test, clients=clients, structure=structure)
    scored = RoundRecord(finished.round, 0.0, test=scores.test, held_out=scores.held_out)
    if not last and not scores.held_out and ends_early(recipe.rounds, [*earlier, scored]):
        at_end = context.score(tuned, round=finished.round, test=False, clients=True)
        unsolicited = [*scores.unsolicited, *at_end.unsolicited]
        scores = replace(scores, held_out=at_end.held_out, personal=at_end.personal, unsolicited=unsolicited)
    record = round_record(
        finished,
        decomposed=method.decomposed(finished.state) if method.decomposed else compress(tuned.adapter),
        energy_kept=method.energy_kept(finished.state),
        state_energy_kept=method.state_energy_kept(finished.state),
        figures=method.figures(finished.state),
        scores=scores,
        expected=context.expected,
    )
    if kept_record(recipe.rounds, [*earlier, record]) is record:
        write_result(context, run, finished.state, [*earlier, record])
    append_round(run, record)
    return record


def deployed_structure(recipe: Recipe, state: Any) -> ModelStructure | None:
    """Return the structure that is deployed in the end; None for the whole model, or where it is not known yet."""
    if recipe.pruning is None or not recipe.pruning.target:
        return None
    return method_of(recipe).structure(state, recipe.pruning.target)


def write_result(context: RunContext, run: Path, state: Any, records: Sequence[RoundRecord]) -> None:
    """Write the global model of the state after the last of the records, with its provenance."""
    tuned = method_of(context.recipe).global_model(state)
    result.write(run, tuned, context.target, provenance(context, tuned, records))


def round_record(
    finished: RoundResult,
    *,
    decomposed: Mapping[str, Summed],
    energy_kept: Mapping[str, float],
    state_energy_kept: Mapping[str, float],
    figures: Mapping[str, Any],
    scores: ModelScores,
    expected: Callable[[PlannedClient], Mapping[str, float]] = lambda planned: {},
) -> RoundRecord:
    """Return the record of one round.

    Args:
        finished: the round's result.
        decomposed: the global model's change after the round, by module.
        energy_kept: share of squared singular values that the next broadcast keeps, by module.
        state_energy_kept: share of them that the server has kept of all it has summed, by module.
        figures: numbers that the method reports about its state.
        scores: of the global model after the round.
        expected: see `RunContext`.
    """
    clients = {name: client_record(finished, name) for name in finished.outcomes}
    for name, planned in finished.planned.items():
        costs = expected(planned)
        clients[name] = replace(
            clients[name], planned_s=costs.get("planned_s"), planned_bytes=costs.get("planned_bytes")
        )
    return RoundRecord(
        round=finished.round,
        seconds=finished.seconds,
        state_digest=finished.digest,
        cohort=tuple(finished.outcomes),
        loss_before=mean_loss([(client, client.loss_before) for client in clients.values()]),
        loss_after=mean_loss([(client, client.loss_after) for client in clients.values()]),
        test=scores.test,
        held_out=scores.held_out,
        clients=clients,
        unsolicited=unsolicited_records([*finished.unsolicited, *scores.unsolicited]),
        bytes_down=sum(client.bytes_down for client in clients.values()) + scores.traffic.down,
        bytes_up=sum(client.bytes_up for client in clients.values()) + scores.traffic.up,
        modules={
            name: module_record(low, energy_kept.get(name), state_energy_kept.get(name))
            for name, low in sorted(decomposed.items())
            if low.rank
        },
        # NaN would become null in the line, which no reader takes for a number: the run could not be resumed.
        figures={name: value for name, value in figures.items() if np.isfinite(value)},
        clock_s=finished.clock_s,
        rate_share=finished.rate_share,
        deployed=scores.deployed,
        personal=scores.personal,
        working=tuple(finished.working),
    )


def unsolicited_records(replies: Sequence[UnsolicitedReply]) -> tuple[UnsolicitedRecord, ...]:
    return tuple(UnsolicitedRecord(reply.client, reply.reason, reply.num_bytes, reply.kind) for reply in replies)


def client_record(finished: RoundResult, name: str) -> ClientRecord:
    outcome, planned = finished.outcomes[name], finished.planned.get(name)
    traffic, device = finished.traffic[name], finished.times.get(name)
    virtual = are_virtual(getattr(finished.state, "saved", ()))  # tokens, which have no rank
    record = ClientRecord(
        status="ok",
        examples=finished.examples[name],
        counted=finished.counted.get(name),
        bytes_down=traffic.down,
        bytes_up=traffic.up,
        **probe_fields(finished.probes.get(name)),
    )
    if planned is not None:  # a client without a feasible plan has no assignment
        plan, task = finished.assignments[name].plan, finished.assignments[name].task
        record = replace(
            record,
            rank=plan.rank if isinstance(task, TrainLora) and not virtual else None,
            steps=steps_done(finished.assignments[name], outcome),
            ratio=plan.ratio if isinstance(task, TrainLora) and task.pruning is not None else None,
            deadline_s=planned.deadline_s,
            **{"why": planned.why, **verb_of(planned, finished.assignments[name], outcome)},
            **arm_of(planned),
        )
    if device is not None:
        times = {key: getattr(device, key) for key in ("compute_s", "transfer_s", "overhead_s", "down_s", "joules")}
        record = replace(record, **times)
    if isinstance(outcome, Failure):
        return replace(record, status=outcome.kind, reason=outcome.reason)
    measured = outcome.measured
    return replace(
        record,
        loss_before=measured.loss_before,
        loss_after=measured.loss_after,
        seconds=measured.seconds,
        peak_bytes=measured.peak_bytes,
        tokens=measured.tokens,
        norm=finished.norms.get(name),
        importance=measured.importance,
        skipped_steps=measured.skipped_steps,
        whole_loss_before=measured.whole_loss_before,
        whole_loss_after=measured.whole_loss_after,
        module_importance=measured.module_importance,
        staleness=finished.staleness.get(name, 0),
        discount=finished.discounts.get(name, 1.0),
        personal=personal_record(outcome.update),
    )


def personal_record(update: ClientUpdate) -> PersonalRecord | None:
    """Return what an update says of the client's personal state; None where it says nothing."""
    trace = update.result.personal if isinstance(update.result, LoraResult) else None
    return None if trace is None else PersonalRecord(trace.before.hex(), trace.after.hex())


def lost_states(record: RoundRecord, earlier: Sequence[RoundRecord]) -> Sequence[str]:
    """Return the clients that had stored a model of their own in an earlier round, and had none in this one."""
    stored = {
        name for past in earlier for name, client in past.clients.items() if client.personal and client.personal.after
    }
    return [
        name
        for name, client in record.clients.items()
        if client.personal and not client.personal.before and name in stored
    ]


def verb_of(planned: PlannedClient, order: Assignment, outcome: Outcome) -> Mapping[str, Any]:
    """Return the fields of a client that was asked, or meant, to descend: what it did, and why if that is another."""
    if isinstance(order.task, SumClasses):
        return {}
    asked, result = VERBS[type(order.task)], None if isinstance(outcome, Failure) else outcome.update.result
    if asked != "descend":
        # Without an order to descend only the round that measures the step of a scalar differs from the plan.
        why = "measures the step of a scalar, as all do first"
        return {} if planned.verb not in DESCENDING else {"verb": asked, "why": with_reason(planned.why, why)}
    if not isinstance(result, ProbeResult):
        return {"verb": asked}
    why = "probed in place of descending, as its order allows; its own log says what it lacked"
    return {"verb": "probe", "why": with_reason(planned.why, why)}


def with_reason(why: str, reason: str) -> str:
    return f"{why}; {reason}" if why else reason


def mean_loss(losses: Sequence[tuple[ClientRecord, float | None]]) -> float | None:
    """Return the mean over the clients whose update was used, weighted by what they count; None for none."""
    known = [
        (loss, client.counted or client.examples)
        for client, loss in losses
        if client.status == "ok" and loss is not None
    ]
    return sum(loss * n for loss, n in known) / sum(n for _, n in known) if known else None


def module_record(change: Summed, energy_kept: float | None, state_energy_kept: float | None) -> ModuleRecord:
    return ModuleRecord(
        rank=change.rank,
        norm=float(np.sqrt(energy(change))),
        # Six digits: the last bits of a decomposition depend on the machine and would only lengthen every line.
        singular_values=tuple(float(f"{value:.6g}") for value in change.s[:SPECTRUM]),
        energy_kept=energy_kept,
        state_energy_kept=state_energy_kept,
    )
