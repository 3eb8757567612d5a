from __future__ import annotations

from typing import Any

import pytest

from fedtune.config.fs_given import Given
from fedtune.errors import ConfigError


def test_numbers_may_be_written_as_yaml_reads_them() -> None:
    given = Given({"a": "5e-3", "b": 3.0, "c": "x", "d": ["p", "q"], "e": "p", "f": True})
    assert (given.number("a", 0), given.whole("b", 0), given.number("absent", 0.5)) == (0.005, 3, 0.5)
    assert (given.text("c", ""), given.texts("d"), given.texts("e"), given.texts("absent")) == (
        "x",
        ["p", "q"],
        ["p"],
        [],
    )
    assert given.flag("f", False) is True


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda given: given.number("a", 0), "a: expected a number; got true"),
        (lambda given: given.whole("b", 0), r"b: expected a whole number; got 1\.5"),
        (lambda given: given.whole("c", 0), "c: expected a number"),
        (lambda given: given.flag("b", False), r"b: expected true or false; got 1\.5"),
        (lambda given: given.text("a", ""), "a: expected a text; got true"),
        (lambda given: given.texts("d"), "d: expected a list of texts"),
        (lambda given: given.whole("inf", 0), "inf: expected a whole number"),
    ],
)
def test_values_of_another_type_are_refused_by_their_key(ask: Any, message: str) -> None:
    given = Given({"a": True, "b": 1.5, "c": None, "d": [1], "inf": float("inf")})
    with pytest.raises(ConfigError, match=message):
        ask(given)
