"""Types and values read as plain words, and a misspelt word is met with the one that was meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from fedtune.config.error_text import LONGEST, allows, choices, describe, display, join_words, nearest, quote


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (str, "text"),
        (bool, "true or false"),
        (Annotated[int, Ge(1)], "a whole number of at least 1"),
        (Annotated[float, Gt(0), Le(1)], "a number above 0 and at most 1"),
        (Annotated[float, Interval(ge=0, lt=1)], "a number of at least 0 and below 1"),
        (Annotated[int, Lt(9)] | None, 'a whole number below 9 or "none"'),
        (str | None, "text"),
        (Literal["a"], '"a"'),
        (Literal["a", "b"], 'one of "a", "b"'),
        (Sequence[str], "a list, each item text"),
        (Sequence[str] | None, 'a list, each item text, or "none"'),
        (str | Sequence[str], "text, or a list, each item text"),
        (Mapping[str, str], "a table"),
        (Annotated[float, Gt(0)] | Literal["2r"], 'a number above 0 or "2r"'),
    ],
)
def test_a_type_is_described_in_words(annotation: Any, words: str) -> None:
    assert describe(annotation) == words


def test_choices_are_the_words_of_a_literal_however_deep_it_stands() -> None:
    assert choices(Literal["auto", "cpu"] | str | None) == ["auto", "cpu"]
    assert choices(Annotated[Literal["a", 1], Ge(0)]) == ["a"]
    assert choices(Annotated[int, Ge(1)]) == []


def test_a_plain_type_is_found_inside_unions_and_annotations() -> None:
    assert allows(Annotated[int, Ge(1)] | None, type(None))
    assert allows(Annotated[int, Ge(1)] | None, int)
    assert not allows(Sequence[str] | None, str)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        ("8", "'8'"),
        (8, "8"),
        ({"a": 1}, "a table"),
        ([1, False, "x"], "[1, false, 'x']"),
        (date(2026, 3, 1), "2026-03-01"),
    ],
)
def test_a_value_is_shown_as_a_recipe_writes_it(value: object, text: str) -> None:
    assert display(value) == text


def test_a_long_value_is_cut() -> None:
    text = display("x" * 10_000)
    assert len(text) == LONGEST + 3
    assert text.endswith("...")


def test_the_nearest_word_is_found_whatever_its_case() -> None:
    assert nearest("max_rnak", ["name", "max_rank", "tau"]) == "max_rank"
    assert nearest("FLoRA", ["flora", "fedit"]) == "flora"
    assert nearest("guard", ["name", "tau"]) is None
    assert nearest(3, ["3"]) is None


def test_only_text_is_quoted() -> None:
    assert [quote("a"), quote(1)] == ['"a"', "1"]


def test_words_are_listed_with_a_joint_before_the_last() -> None:
    assert join_words(["a"]) == "a"
    assert join_words(["a", "b", 3]) == "a, b and 3"
    assert join_words(["a", "b"], joint="or") == "a or b"
