"""What of an order follows from the server's state, within its bounds and out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fedtune.config.order_rules import FREE
from fedtune.messages import SeedState
from fedtune.number_formats import to_wire
from fedtune.tensors import cast
from tests.config.test_consent import ORDERS, SAVED, UP, keys, put


def wide(name: str, rows: int, columns: int) -> Mapping[str, Any]:
    return {"local": {name: np.zeros((rows, columns), np.float32)}, "saved": SAVED}


def coded(rank: int, columns: int) -> Mapping[str, Any]:
    """Return A of a layer in codes, with its scales."""
    return to_wire({f"{UP}.a": np.ones((rank, columns), np.float32)}, "int8")


OUT_OF_BOUNDS: Mapping[str, Sequence[tuple[str, str, Any]]] = {
    "Assignment.labels": [("adapters", "labels", ("a", "a")), ("adapters", "labels", ("a", "b"))],
    "Assignment.date": [("adapters", "date", "2026-11-29")],
    "Plan.rank": [("adapters", "plan.rank", rank) for rank in (1, 3, 8, 2**31)],
    "Plan.ratio": [("adapters", "plan.ratio", ratio) for ratio in (0.125, 0.75, 0.875)],
    "TrainLora.blobs": [
        ("adapters", "task.blobs", blobs)
        for blobs in (
            {},
            {"secret": {}, "saved": SAVED},
            {"saved": {"embed_tokens.weight": np.zeros((9, 8), np.float32)}},
            {"saved": {**SAVED, "embed_tokens.weight": np.zeros((9, 8), np.float32)}},
            {"saved": {"norm.weight": np.zeros(9, np.float32)}},
            {"saved": cast(SAVED, "fp16")},
            wide("embed_tokens.a", 4, 8),
            wide(f"{UP}.c", 4, 8),
            wide(f"{UP}.a", 5, 8),
            wide(f"{UP}.a", 4, 9),
            {"local": {f"{UP}.a": np.zeros(8, np.float32)}, "saved": SAVED},
            {"local": {f"{UP}.a": np.zeros((4, 8), np.int8)}, "saved": SAVED},
            {"local": {f"{UP}.a.scales": np.zeros((4, 1), ml_dtypes.bfloat16)}, "saved": SAVED},
            {"local": {**coded(4, 8), f"{UP}.a.scales": np.zeros((4, 1), np.float32)}, "saved": SAVED},
            {"local": {**coded(4, 8), f"{UP}.a.scales": np.zeros((4, 2), ml_dtypes.bfloat16)}, "saved": SAVED},
            {"local": {**coded(4, 8), f"{UP}.a": np.zeros((4, 8), np.float32)}, "saved": SAVED},
            {"local": coded(5, 8), "saved": SAVED},
            {"local": {**coded(4, 8), "x.scales": np.zeros((4, 1), ml_dtypes.bfloat16)}, "saved": SAVED},
            {"global": {f"{UP}.w": np.zeros((33, 8), np.float32)}, "saved": SAVED},
        )
    ],
    "Pruning.stages": [
        ("pruned", "task.pruning.stages", stages)
        for stages in ((b"x",), (b"\xff" * 5,) * 3, (b"\0" * 5,), (b"\x3f\0\0\0\0",))
    ]
    + [("adapters", "task.pruning.stages", (b"\xff" * 5,))],
    "Pruning.previous": [("pruned", "task.pruning.previous", b"x")],
    "Pruning.scores_requested": [],
    "ProbeSeeds.exponent": [("seeds", "task.exponent", 3)],
    "ProbeSeeds.shift": [("seeds", "task.shift", 0)],
    "ProbeSeeds.perturbation": [("seeds", "task.perturbation", 2**30), ("seeds", "task.perturbation", 1)],
    "ProbeSeeds.state": [("seeds", "task.state", SeedState("whole", 0, b"", 3, b"d" * 32))],
    "ProbeSeeds.levels": [("seeds", "task.levels", b"x")],
    "ProbeSeeds.calibrate": [("seeds", "task.calibrate", True)],
    "ScoreRequest.blobs": [
        ("scores", "blobs", {"saved": {}, "local": {f"{UP}.a": np.zeros((4, 8), np.float32)}}),
        ("scores", "blobs", {"saved": {"norm.weight": np.zeros(9, np.float32)}}),
        ("scores", "blobs", {"global": {"embed_tokens.a": np.zeros((4, 8), np.float32)}}),
    ],
    "ScoreRequest.ledger": [("scores", "ledger", b"x")],
    "ScoreRequest.trainable": [("scores", "trainable", (1,))],
    "ScoreRequest.labels": [("scores", "labels", ("a", "a"))],
    "ScoreRequest.date": [("scores", "date", "2026-11-29")],
}
"""By field that is free within bounds: an order, the field's path, and a value outside of them."""


def test_what_is_free_has_bounds() -> None:
    assert OUT_OF_BOUNDS.keys() == FREE.keys()
    for cases in OUT_OF_BOUNDS.values():
        for kind, path, value in cases:
            text, make = ORDERS[kind]
            assert path in keys(text, put(make(), path, value)), (kind, path, value)


def test_codes_with_their_scales_are_within_the_bounds() -> None:
    text, make = ORDERS["adapters"]
    assert keys(text, put(make(), "task.blobs", {"local": coded(4, 8), "global": coded(4, 8), "saved": SAVED})) == set()
