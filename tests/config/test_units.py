"""Every number of a settings file has a unit, and a new one without is refused by name."""

from __future__ import annotations

from typing import Literal

import pytest

from fedtune.config.units import PLAIN_NUMBERS, UNITS, numeric, unit_of


def test_a_unit_is_known_by_name_and_by_ending() -> None:
    assert unit_of("batch", int) == "examples"
    assert unit_of("timeout_s", float | None) == "seconds"
    assert unit_of("learning_rate", float) == "no unit"
    assert unit_of("source", str) == ""


def test_a_number_without_a_unit_is_refused() -> None:
    with pytest.raises(KeyError, match="expected a unit for 'furlongs'"):
        unit_of("furlongs", float)


def test_words_are_no_numbers_and_no_name_has_two_units() -> None:
    assert numeric(int | None)
    assert not numeric(Literal["a"])
    assert not PLAIN_NUMBERS & UNITS.keys()
