"""What a round's line and a run's summary say, built from results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fedtune.lora.adapter import Adapter
from fedtune.lora.lowrank import LowRank, compress
from fedtune.messages import Failure, PlannedClient, TrainLora
from fedtune.planning.planner import ClientObservation
from fedtune.rounds.loop import RoundResult

Metrics = Mapping[str, float]

COUNTS = ("examples", "tokens", "generated")
"""Metrics that say how much was scored, of which a mean over clients says nothing."""

SPECTRUM = 64
"""Singular values kept per module in a round's line; the largest ones."""


def base_record(test: Metrics | None, held_out: Mapping[str, Metrics], seconds: float) -> Mapping[str, Any]:
    """Return the line of round 0: the base before any training."""
    return {
        "round": 0,
        "state_digest": "",
        "seconds": seconds,
        "cohort": [],
        "loss_before": None,
        "loss_after": None,
        "test": test,
        "held_out": held_out,
        "clients": {},
        "aside": [],
        "bytes_down": 0,
        "bytes_up": 0,
        "modules": {},
        "figures": {},
        "clock_s": 0.0,
    }


def round_record(
    result: RoundResult,
    adapter: Adapter,
    *,
    energy_kept: Mapping[str, float],
    figures: Mapping[str, Any],
    test: Metrics | None,
    held_out: Mapping[str, Metrics],
    deployed: Metrics | None = None,
) -> Mapping[str, Any]:
    """Return the line of one round.

    Args:
        result: of the round.
        adapter: the global model's change after the round.
        energy_kept: share of squared singular values that the next broadcast keeps, by module.
        figures: what the method notes of its state.
        test: scores on the test data, or None if not scored in this round.
        held_out: scores by client.
        deployed: scores on the test data of the model as it is deployed, where that is a smaller one.
    """
    clients = {name: client_record(result, name) for name in result.outcomes}
    return {
        "round": result.round,
        "state_digest": result.digest,
        "seconds": result.seconds,
        "cohort": list(result.outcomes),
        "loss_before": mean_loss(clients, "loss_before"),
        "loss_after": mean_loss(clients, "loss_after"),
        "test": test,
        "held_out": held_out,
        "clients": clients,
        "aside": [asdict(each) for each in result.unsolicited],
        "bytes_down": sum(client["bytes_down"] for client in clients.values()),
        "bytes_up": sum(client["bytes_up"] for client in clients.values()),
        "modules": {name: module_record(low, energy_kept.get(name)) for name, low in sorted(compress(adapter).items())},
        "figures": figures,
        "clock_s": result.clock_s,
        **({} if deployed is None else {"deployed": deployed}),
    }


def client_record(result: RoundResult, name: str) -> Mapping[str, Any]:
    outcome, planned, traffic = result.outcomes[name], result.planned.get(name), result.traffic[name]
    record: dict[str, Any] = {
        "status": "ok",
        "reason": "",
        "rank": None,
        "steps": None,
        "examples": result.examples[name],
        "bytes_down": traffic.down,
        "bytes_up": traffic.up,
    }
    if planned is not None:  # a client without a feasible plan is asked nothing
        plan, task = result.assignments[name].plan, result.assignments[name].task
        trains = isinstance(task, TrainLora)
        record |= {"steps": plan.training.steps, "rank": plan.rank if trains else None}
        record |= plan_fields(planned, pruned=isinstance(task, TrainLora) and task.pruning is not None)
    if (spent := result.spent.get(name)) is not None:
        record |= {"compute_s": spent.compute_s, "transfer_s": spent.transfer_s, "overhead_s": spent.overhead_s}
    if isinstance(outcome, Failure):
        return record | {"status": outcome.kind, "reason": outcome.reason}
    measured = outcome.measured
    return record | {
        "loss_before": measured.loss_before,
        "loss_after": measured.loss_after,
        "seconds": measured.seconds,
        "peak_bytes": measured.peak_bytes,
        "tokens": measured.tokens,
        "norm": result.norms.get(name),
        **({} if measured.importance is None else {"importance": measured.importance}),
    }


def plan_fields(planned: PlannedClient, *, pruned: bool) -> Mapping[str, Any]:
    """Return what a planner chose beyond rank and steps, and why."""
    record: dict[str, Any] = {"ratio": planned.plan.ratio} if pruned else {}
    if planned.deadline_s is not None:
        record["deadline_s"] = planned.deadline_s
    return record | ({"why": planned.why} if planned.why else {})


def observations(line: Mapping[str, Any]) -> Sequence[ClientObservation]:
    """Return what a planner learns from a round's line: the same as from the round itself."""
    return [
        ClientObservation(
            client=name,
            num_examples=client["examples"],
            ratio=client.get("ratio", 0.0),
            rank=client["rank"] or 0,
            status=client["status"],
            out_of_memory=out_of_memory(client),
            compute_s=client.get("compute_s"),
            transfer_s=client.get("transfer_s"),
            loss_before=client.get("loss_before"),
            loss_after=client.get("loss_after"),
            importance=client.get("importance"),
            bytes_down=client["bytes_down"],
            bytes_up=client["bytes_up"],
        )
        for name, client in line["clients"].items()
    ]


def out_of_memory(client: Mapping[str, Any]) -> bool:
    """Return whether a client's part of a line says that its memory ran out."""
    if client["status"] != "failed":
        return False
    return Failure.from_text("", client["reason"]).out_of_memory


def mean_loss(clients: Mapping[str, Mapping[str, Any]], key: str) -> float | None:
    """Return the mean over the clients whose update was used, weighted by their examples."""
    known = [(c[key], c["examples"]) for c in clients.values() if c["status"] == "ok" and c[key] is not None]
    return sum(loss * n for loss, n in known) / sum(n for _, n in known) if known else None


def module_record(change: LowRank, energy_kept: float | None) -> Mapping[str, Any]:
    record: dict[str, Any] = {
        "rank": change.rank,
        "norm": float(np.linalg.norm(change.s)),
        "singular_values": [float(f"{value:.6g}") for value in change.s[:SPECTRUM]],
    }
    return record if energy_kept is None else record | {"energy_kept": energy_kept}


def scores(test: Metrics | None, held_out: Mapping[str, Metrics]) -> Mapping[str, Any]:
    """Return test scores, each client's, their plain mean, and the client with the highest loss."""
    if not held_out:
        return {"test": test, "held_out": {}, "mean": {}, "worst": {}}
    first = next(iter(held_out.values()))
    keys = [key for key in first if key not in COUNTS and all(key in metrics for metrics in held_out.values())]
    worst = max(held_out, key=lambda name: held_out[name]["loss"])
    return {
        "test": test,
        "held_out": held_out,
        "mean": {key: sum(m[key] for m in held_out.values()) / len(held_out) for key in keys},
        "worst": {"client": worst, **held_out[worst]},
    }


def clients_summary(records: Sequence[Mapping[str, Any]], fleet: Mapping[str, int]) -> Mapping[str, Any]:
    """Return totals per client over the rounds' lines; a client that was never drawn has zeros and no rank."""
    totals = {name: empty_scores(examples) for name, examples in fleet.items()}
    for record in records:
        for name, client in record["clients"].items():
            total = totals.setdefault(name, empty_scores(client["examples"]))
            total["rank"] = client["rank"]
            total["bytes_down"] += client["bytes_down"]
            total["bytes_up"] += client["bytes_up"]
            total["seconds"] += client.get("seconds") or 0.0
            total["failures"] += client["status"] != "ok"
    return totals


def empty_scores(examples: int) -> dict[str, Any]:
    return {"examples": examples, "rank": None, "bytes_down": 0, "bytes_up": 0, "seconds": 0.0, "failures": 0}


def failures(records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return every failure of the run, and what came aside: round, client, kind, reason."""
    failed = [
        {"round": record["round"], "client": name, "kind": client["status"], "reason": client["reason"]}
        for record in records
        for name, client in record["clients"].items()
        if client["status"] != "ok"
    ]
    return failed + [
        {"round": record["round"], "client": each["client"], "kind": each["kind"], "reason": each["reason"]}
        for record in records
        for each in record["aside"]
    ]
