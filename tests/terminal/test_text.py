from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.terminal.text import duration, number, printable, size


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    assert not [character for character in printable(text) if ord(character) < 32 or 0x7F <= ord(character) < 0xA0]


def test_a_text_that_reads_backwards_is_told() -> None:
    assert printable("a\u202eb") == "a\\u202eb"
    assert printable("\ud800") == "\\ud800"


def test_names_in_any_script_stay_as_they_are() -> None:
    assert printable("клиент-1 é 数") == "клиент-1 é 数"


def test_line_breaks_are_kept_on_request_only() -> None:
    assert printable("a\nb\r") == "a\\nb\\r"
    assert printable("a\nb\r", lines=True) == "a\nb\\r"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (4.2e13, "42.0 TB")],
)
def test_sizes_change_unit_before_they_need_a_fourth_digit(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (7.24, "7.2 s"), (59.6, "59.6 s"), (61, "1:01"), (3599.7, "1:00:00")]
)
def test_times_are_seconds_then_minutes_then_hours(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2.0, "2.000"), (1234.5678, "1235"), (None, "-"), (12, "12"), (1e-5, "1.000e-05")]
)
def test_metrics_have_four_digits_and_counts_all(value: float | None, text: str) -> None:
    assert number(value) == text
