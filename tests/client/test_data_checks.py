from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.client.data_checks import check_examples
from fedtune.data.federation import Federation, Shard
from fedtune.errors import ConfigError
from tests.model.conftest import examples, loaded

__all__ = ["examples", "loaded"]


def federation_of(train: Any, held_out: Any = (), test: Any = ()) -> Federation:
    return Federation({"a": Shard(train[:2], []), "b": Shard(train[2:], held_out)}, test, [], [])


def test_examples_that_fit_are_let_through(loaded: Any, examples: Any) -> None:
    check_examples(federation_of(examples(4), examples(1), examples(1)), loaded())


@pytest.mark.parametrize(
    ("part", "where"), [("train", "training example 2 of b"), ("held_out", "held-out example 1 of b"), ("test", "test")]
)
def test_a_token_beyond_the_embeddings_is_named_with_its_row_and_client(
    part: str, where: str, loaded: Any, examples: Any
) -> None:
    base, parts = loaded(), {"train": examples(4), "held_out": examples(1), "test": examples(1)}
    rows = base.model.config.vocab_size
    parts[part][-1].input_ids[-1] = rows - 1  # the last that there is
    check_examples(federation_of(**parts), base)
    parts[part][-1].input_ids[-1] = rows
    with pytest.raises(ConfigError, match=rf"tokens below {rows}.*got token {rows} \(.*\) in {where}"):
        check_examples(federation_of(**parts), base)


def test_an_example_with_more_positions_than_the_base_is_named(loaded: Any, examples: Any) -> None:
    long = replace(examples(1)[0], input_ids=np.full(129, 5))
    with pytest.raises(ConfigError, match=r"at most 128 tokens.*got one of 129 \(training example 1 of b\)"):
        check_examples(federation_of([*examples(2), long]), loaded())


def test_the_limits_of_the_base_are_looked_up_once_and_not_per_example(
    loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, walks = loaded(), list[int]()
    walk = base.model.named_modules

    def counted(*args: Any, **named: Any) -> Any:
        walks.append(1)
        return walk(*args, **named)

    monkeypatch.setattr(base.model, "named_modules", counted)
    check_examples(federation_of(examples(2)), base)
    few = len(walks)
    check_examples(federation_of(examples(40), examples(9), examples(9)), base)
    assert few > 0
    assert len(walks) == 2 * few


def test_a_token_type_that_the_base_has_no_row_for_is_named(loaded: Any, examples: Any) -> None:
    base = loaded("bert", targets=["query"], task="classification", labels=("a", "b"))
    pair = examples(1, classes=2)[0]
    types = np.zeros_like(pair.input_ids)
    types[-1] = base.model.config.type_vocab_size - 1
    check_examples(federation_of([*examples(2, classes=2), replace(pair, token_types=types)]), base)
    with pytest.raises(ConfigError, match=r"token types below 2.*got type 2 in training example 1 of b"):
        check_examples(federation_of([*examples(2, classes=2), replace(pair, token_types=types + 1)]), base)
    decoder = loaded()  # reads none
    check_examples(federation_of([*examples(2), replace(pair, token_types=types + 9)]), decoder)
