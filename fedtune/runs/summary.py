"""summary.json and the provenance inside a result's folder, computed from the records of the rounds."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune.config import digest
from fedtune.config.recipe import method_of
from fedtune.messages import ProbeSeeds
from fedtune.methods.method import GlobalModel
from fedtune.rounds.record import COUNTS, Metrics, RoundRecord
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.selection import best_record, ends_early, kept_record, score_of
from fedtune.rounds.worst_tenth import worst_tenths
from fedtune.runs.context import RunContext, no_samples, versions
from fedtune.runs.personal_summary import personal_summary
from fedtune.store import result


def summary(
    context: RunContext, run: Path, records: Sequence[RoundRecord], *, reason: str, elapsed: Callable[[], float]
) -> Mapping[str, Any]:
    """Return the content of summary.json.

    Args:
        context: what the run was given.
        run: its directory, whose adapter is described.
        records: of all rounds, round 0 first.
        reason: why the run stopped before its last round; empty for a finished one.
        elapsed: returns the wall seconds of all processes of the run; called once its answers are there.
    """
    recipe, first, last = context.recipe, records[0], records[-1]
    tuned = result.read(run)[0] if result.folder(run).exists() else None
    # First, for they take part of the time that is stated.
    scores = after(context, tuned, records, score=not reason)
    samples = context.sample(tuned) if tuned and not reason else no_samples(GlobalModel())
    return {
        "name": recipe.name,
        "method": recipe.method.name,
        "seed": recipe.seed,
        "rounds": last.round,
        "state": "interrupted" if reason else "finished",
        "reason": reason,
        "state_digest": last.state_digest,
        "base": context.base,
        "trainable": num_trainable(context, tuned),
        "before": evaluation(first.test, first.held_out),
        "after": scores,
        "selection": selection(recipe.rounds, records),
        **personal_summary(recipe.personal, records),
        "clients": client_totals(records, context.fleet),
        "bytes_down": sum(record.bytes_down for record in records),
        "bytes_up": sum(record.bytes_up for record in records),
        "seconds": elapsed(),
        **samples,
        "failures": failures(records),
        "recipe_digest": digest(recipe),
        "adapter_digest": result.digest(tuned) if tuned else "",
        "clock_s": last.clock_s,
        "deployed": next((record.deployed for record in reversed(records) if record.deployed), None),
        "devices": dict(context.devices),
        "versions": versions(),
        "machine": {**context.machine, "platform": platform.platform()},
    }


def after(
    context: RunContext, tuned: GlobalModel | None, records: Sequence[RoundRecord], *, score: bool
) -> Mapping[str, Any]:
    """Return the scores of the model that is the result: of the last round, or of the best one where that is kept.

    The clients' held-out rows are scored after the last round alone; for another one they are scored now, if asked.
    """
    chosen, last = kept_record(context.recipe.rounds, records), records[-1]
    if chosen is last:
        tested = next((record for record in reversed(records) if record.test is not None), last)
        return evaluation(tested.test, last.held_out)
    held_out = chosen.held_out
    if not held_out and tuned and score and context.door == "simulate":
        held_out = context.score(tuned, round=chosen.round, test=False, clients=True).held_out
    return evaluation(chosen.test, held_out)


def selection(rounds: Schedule, records: Sequence[RoundRecord]) -> Mapping[str, Any]:
    """Return which round's model is the result, and the best and the last round with their scores and states."""
    best = best_record(records, rounds.metric)
    named = {
        name: None
        if record is None or not record.round
        else {
            "round": record.round,
            "score": score_of(record, rounds.metric),
            "state_digest": record.state_digest,
        }
        for name, record in (("best", best), ("last", records[-1]))
    }
    return {
        "keep": rounds.keep,
        "metric": rounds.metric,
        "round": kept_record(rounds, records).round,
        **named,
        "ended": ends_early(rounds, records),
    }


def provenance(context: RunContext, tuned: GlobalModel, records: Sequence[RoundRecord]) -> Mapping[str, Any]:
    """Return what travels inside a result's folder: the run it is of, and what training cost."""
    recipe, last = context.recipe, records[-1]
    return {
        "fedtune": version("fedtune"),
        "name": recipe.name,
        "recipe": digest(recipe),
        "method": recipe.method.name,
        "seed": recipe.seed,
        "round": last.round,
        "state_digest": last.state_digest,
        "base": {"name": context.base["name"], "digest": context.base["digest"]},
        "model": {
            "task": recipe.model.task,
            "dtype": recipe.model.dtype,
            "revision": recipe.model.revision,
            **({"pooling": recipe.model.pooling} if recipe.model.pooling != "auto" else {}),
        },
        # Chat puts questions as the rows were; most runs are of instructions.
        **({"form": "text"} if context.form == "text" and recipe.model.task == "causal" else {}),
        "labels": list(context.labels),
        "modules_to_save": list(recipe.adapter.modules_to_save),
        "clients": {
            name: {"examples": total["examples"], "rank": total["rank"]}
            for name, total in client_totals(records, context.fleet).items()
        },
        "modules": {name: factors.rank for name, factors in sorted(tuned.adapter.items())},
        "bytes_down": sum(record.bytes_down for record in records),
        "bytes_up": sum(record.bytes_up for record in records),
    }


def num_trainable(context: RunContext, tuned: GlobalModel | None) -> int:
    """Return how many numbers are trained: of the largest adapter and modules_to_save, or of the tensors seeds move."""
    blueprint = context.blueprint
    if method_of(context.recipe).task is ProbeSeeds:
        seeds = tuned.seeds if tuned else None
        return sum(seeds.manifest.entries[ordinal].num_parameters for ordinal in seeds.trainable) if seeds else 0
    return blueprint.max_rank * sum(m + n for m, n in blueprint.modules.values()) + sum(
        array.size for array in blueprint.saved.values()
    )


def evaluation(test: Metrics | None, held_out: Mapping[str, Metrics]) -> Mapping[str, Any]:
    """Return test scores, each client's, their plain mean, the client with the highest loss, and the worst tenth."""
    if not held_out:
        return {"test": test, "held_out": {}, "mean": {}, "worst": {}}
    first = next(iter(held_out.values()))
    keys = [key for key in first if key not in COUNTS and all(key in metrics for metrics in held_out.values())]
    worst = max(held_out, key=lambda name: _number(held_out[name]["loss"]))
    return {
        "test": test,
        "held_out": held_out,
        "mean": {key: sum(_number(m[key]) for m in held_out.values()) / len(held_out) for key in keys},
        "worst": {"client": worst, **held_out[worst]},
        # Of ten clients or fewer the tenth is the one above.
        **({"worst_tenth": worst_tenths(held_out)} if len(held_out) > 10 else {}),
    }


def _number(value: float | None) -> float:
    # rounds.jsonl holds null for NaN: a resumed run must write the summary that an uninterrupted one does.
    return math.nan if value is None else value


def client_totals(records: Sequence[RoundRecord], fleet: Mapping[str, int]) -> Mapping[str, Any]:
    """Return totals per client over the rounds; a client that was never in a cohort has zeros and no rank."""
    totals = {name: no_totals(examples) for name, examples in fleet.items()}
    for record in records:
        for name, client in record.clients.items():
            total = totals.setdefault(name, no_totals(client.examples))
            total["rank"] = client.rank
            total["bytes_down"] += client.bytes_down
            total["bytes_up"] += client.bytes_up
            total["seconds"] += client.seconds or 0.0
            total["failures"] += client.status != "ok"
            if client.verb:
                total["verb"] = client.verb
    # Of a run in which some descend, also of those whose plan was to probe; other runs have no such key.
    if any("verb" in total for total in totals.values()):
        totals = {name: {**total, "verb": total.get("verb", "probe")} for name, total in totals.items()}
    return totals


def no_totals(examples: int) -> dict[str, Any]:
    return {"examples": examples, "rank": None, "bytes_down": 0, "bytes_up": 0, "seconds": 0.0, "failures": 0}


def failures(records: Sequence[RoundRecord]) -> Sequence[Mapping[str, Any]]:
    """Return every failure of the run, then every unsolicited reply: round, client, kind, reason."""
    failed = [
        {"round": record.round, "client": name, "kind": client.status, "reason": client.reason}
        for record in records
        for name, client in record.clients.items()
        if client.status != "ok"
    ]
    return failed + [
        {"round": record.round, "client": reply.client, "kind": reply.kind, "reason": reply.reason}
        for record in records
        for reply in record.unsolicited
    ]
