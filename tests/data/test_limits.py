"""Limits of a base by hand; with models of torch they are in tests/client/test_data_checks.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.data.federation import Federation, Shard
from fedtune.data.limits import Limits, all_examples, check_limits, cut_to_positions, longest
from fedtune.data.settings import MAX_TOKENS, DataSettings
from fedtune.errors import ConfigError
from tests.model.conftest import examples

__all__ = ["examples"]


@pytest.fixture
def federation(examples: Any) -> Federation:
    return Federation({"ann": Shard(examples(3), examples(1))}, examples(2), [], [])


def test_every_example_is_named_and_the_longest_found(federation: Federation) -> None:
    assert [where for where, _ in all_examples(federation)] == [
        *(f"training example {row} of ann" for row in (1, 2, 3)),
        "held-out example 1 of ann",
        "test example 1",
        "test example 2",
    ]
    assert longest(federation) == 12
    assert longest(Federation({}, [], [], [])) == 0


def test_what_a_base_cannot_read_is_named(federation: Federation) -> None:
    check_limits(federation, Limits("tiny", 12, 200), str)
    with pytest.raises(ConfigError, match=r"at most 11 tokens.*tiny has; got one of 12 \(training example 3 of ann\)"):
        check_limits(federation, Limits("tiny", 11, 200), str)
    with pytest.raises(ConfigError, match=r"tokens below 4, of which tiny has an embedding; got token \d+ \('<\d+>'\)"):
        check_limits(federation, Limits("tiny", 12, 4), lambda token: f"<{token}>")


def test_texts_are_cut_where_the_default_is_longer_than_the_base(federation: Federation) -> None:
    asked = list[int]()

    def encode(data: DataSettings) -> Federation:
        asked.append(data.max_tokens)
        return replace(federation, notes=["cut"])

    data = DataSettings(source="rows", split=None)  # type: ignore[arg-type]
    assert data.max_tokens == MAX_TOKENS
    assert cut_to_positions(federation, data, encode, base="tiny", positions=12) is federation
    stated = replace(data, max_tokens=20)
    assert cut_to_positions(federation, stated, encode, base="tiny", positions=8) is federation
    cut = cut_to_positions(federation, data, encode, base="tiny", positions=8)
    assert asked == [8]
    assert cut.notes == ["data.max_tokens: 8, the positions that tiny has", "cut"]
