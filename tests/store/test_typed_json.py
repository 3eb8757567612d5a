from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fedtune.errors import StoreError
from fedtune.store.typed_json import decode, nan_to_null


@dataclass(frozen=True)
class Point:
    x: float
    name: str = ""
    kind: Literal["a", "b"] = "a"
    count: float | int | None = None
    size: int = 0
    loss: float | None = None
    parts: tuple[float, ...] = field(default=(), metadata={"key": "pieces"})


@dataclass(frozen=True)
class Cloud:
    points: Mapping[str, Point]


def test_values_take_the_types_of_their_fields() -> None:
    value = {"x": 1, "name": "n", "kind": "b", "count": 3, "loss": 2, "pieces": [1, 2.5], "later": {}}
    point = decode(Point, value, "here")
    assert point == Point(1.0, "n", "b", 3, loss=2.0, parts=(1.0, 2.5))
    assert (type(point.x), type(point.count), type(point.loss)) == (float, int, float)
    assert decode(Point, {"x": 0.5, "count": None}, "here") == Point(0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"^f, line 2: expected an object \(Cloud\); got \[\]; restore the file from a copy$"),
        ({}, r"^f, line 2: expected the key 'points'; got none;"),
        ({"points": []}, r"^f, line 2: points: expected an object; got \[\];"),
        ({"points": {"p": {}}}, r"^f, line 2: points\.p: expected the key 'x'; got none;"),
        ({"points": {"p": {"x": True}}}, r"points\.p\.x: expected float; got True;"),
        ({"points": {"p": {"x": 1, "size": True}}}, r"points\.p\.size: expected int; got True;"),
        ({"points": {"p": {"x": 1, "size": 1.0}}}, r"points\.p\.size: expected int; got 1\.0;"),
        ({"points": {"p": {"x": 1, "name": None}}}, r"points\.p\.name: expected str; got None;"),
        ({"points": {"p": {"x": 1, "kind": "c"}}}, r"points\.p\.kind: expected 'a' or 'b'; got 'c';"),
        ({"points": {"p": {"x": 1, "count": "3"}}}, r"points\.p\.count: expected float; got '3';"),
        ({"points": {"p": {"x": 1, "pieces": 1}}}, r"points\.p\.pieces: expected an array; got 1;"),
        ({"points": {"p": {"x": 1, "pieces": [1, "a"]}}}, r"points\.p\.pieces\[1\]: expected float; got 'a';"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key(value: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        decode(Cloud, value, "f, line 2")


def test_a_diverged_loss_is_written_as_null() -> None:
    value = {"test": {"loss": math.nan, "perplexity": math.inf}, "seconds": (1.5, 2)}
    assert nan_to_null(value) == {"test": {"loss": None, "perplexity": None}, "seconds": [1.5, 2]}
