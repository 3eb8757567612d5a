"""What a plan says of a split: how many rows each client holds, of which labels, and how unlike the clients are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.data.federation import Federation
from fedtune.data.mix import Mix, distances, mean_distance
from fedtune.data.partition_file import ClientRows, division_digest


def split_of(federation: Federation, kind: str) -> Mapping[str, Any]:
    """Return a federation's split as numbers under names; nothing for data that are not here."""
    division = federation.division
    if division is None:
        return {}
    mix = {} if federation.mix is None else {"mix": mix_numbers(federation.mix)}
    return {
        "kind": kind,
        "digest": division_digest(division),
        "clients": {name: row_counts(own) for name, own in division.clients.items()},
        "left_out": len(division.left_out),
        **mix,
    }


def row_counts(own: ClientRows) -> Mapping[str, int]:
    """Return how many rows a client trains on, holds out and, where the test data are divided, is tested on."""
    held_out = 0 if own.held_out is None else len(own.held_out)
    return {"train": len(own.rows), "held_out": held_out} | ({} if own.test is None else {"test": len(own.test)})


def mix_numbers(mix: Mix) -> Mapping[str, Any]:
    return {
        "label": mix.label,
        "labels": list(mix.labels),
        "counts": {name: list(own) for name, own in mix.counts.items()},
        "distances": dict(distances(mix)),
        "mean_distance": mean_distance(mix),
    }
