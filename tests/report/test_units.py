from __future__ import annotations

import doctest
import math

import pytest

from fedtune.report import units
from fedtune.report.units import bytes_text, number_text, seconds_text


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(units).failed == 0


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1.5e9, "1.5 GB")])
def test_bytes_are_decimal(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.96, "60.0 s"), (3599.6, "1 h 0 min")])
def test_seconds_at_the_edges_of_their_units(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.41, "2.410"), (0.01, "0.01000"), (28206.0, "28\u202f206"), (1_100_000, "1\u202f100\u202f000"), (0, "0")],
)
def test_numbers_keep_four_digits(value: float, text: str) -> None:
    assert number_text(value) == text


def test_what_was_not_measured_is_a_dash() -> None:
    assert {bytes_text(None), seconds_text(None), number_text(None), number_text(math.nan)} == {units.NOTHING}
