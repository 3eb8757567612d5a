"""What summary.json says of clients' own models: their scores beside those of the global model and the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.messages import Personal
from fedtune.rounds.record import COUNTS, Metrics, RoundRecord
from fedtune.rounds.worst_tenth import worst_tenths


def personal_summary(personal: Personal | None, records: Sequence[RoundRecord]) -> Mapping[str, Any]:
    """Return the entry `personal` of summary.json: mean and worst tenth of the clients whose own model was scored.

    All three models are scored on the same rows of the same clients. Empty where no client's own model was scored.

    Args:
        personal: of the recipe.
        records: of all rounds, round 0 first.
    """
    scored = next((record for record in reversed(records) if record.personal), None)
    if personal is None or scored is None:
        return {}
    base = records[0].held_out
    clients = [name for name in scored.personal if name in scored.held_out and name in base]
    models = {"base": base, "server": scored.held_out, "own": scored.personal}
    stored = {
        name
        for record in records
        for name, client in record.clients.items()
        if client.personal and client.personal.after
    }
    rows = sum(int(scored.personal[name].get("examples") or 0) for name in clients)
    return {
        "personal": {
            "kind": personal.kind,
            "round": scored.round,
            "clients": len(clients),
            "examples": rows,
            # The others' own model is the global one.
            "stored": len(stored) if personal.has_state else None,
            **{name: of_model({client: scores[client] for client in clients}) for name, scores in models.items()},
        }
    }


def of_model(scores: Mapping[str, Metrics]) -> Mapping[str, Any]:
    """Return a model's plain mean over clients, and its worst tenth of them, by metric."""
    first: Metrics = next(iter(scores.values()), {})
    keys = [key for key in first if key not in COUNTS and all(own.get(key) is not None for own in scores.values())]
    mean = {key: sum(float(own[key] or 0.0) for own in scores.values()) / len(scores) for key in keys}
    return {"mean": mean, "worst_tenth": worst_tenths(scores)}
