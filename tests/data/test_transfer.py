from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.data.encode import IGNORED, Example
from fedtune.data.transfer import decode, encode


def example(ids: list[int], labels: list[int] | int) -> Example:
    learned = labels if isinstance(labels, int) else np.array(labels, np.int64)
    return Example(np.array(ids, np.int64), learned, characters=3, prompt="a", reference="b", prompt_tokens=1)


def test_ids_and_labels_of_a_language_model_come_back() -> None:
    sent = [example([5, 6, 7], [IGNORED, 6, 7]), example([2**40, 9], [IGNORED, 9])]
    came = decode(encode(sent))
    assert [e.input_ids.tolist() for e in came] == [[5, 6, 7], [2**40, 9]]
    assert [np.asarray(e.labels).tolist() for e in came] == [[IGNORED, 6, 7], [IGNORED, 9]]


def test_classes_come_back_as_plain_numbers() -> None:
    came = decode(encode([example([5, 6, 7], 2), example([8], 0)]))
    assert [(e.input_ids.tolist(), e.labels) for e in came] == [([5, 6, 7], 2), ([8], 0)]
    assert type(came[0].labels) is int


def test_token_types_come_back_where_any_example_has_them() -> None:
    pair = replace(example([5, 6, 7], 1), token_types=np.array([0, 1, 1]))
    came = decode(encode([pair, example([8], 0)]))
    assert [np.asarray(e.token_types).tolist() for e in came] == [[0, 1, 1], [0]]
    assert [(e.input_ids.tolist(), e.labels) for e in came] == [([5, 6, 7], 1), ([8], 0)]
    assert [e.token_types for e in decode(encode([example([5, 6], 2)]))] == [None]


@pytest.mark.parametrize("typed", [False, True])
def test_rejected_answers_come_back_beside_the_preferred_ones(typed: bool) -> None:
    types = np.array([0, 1, 1]) if typed else None
    pairs = [
        replace(example([5, 6, 7], [IGNORED, 6, 7]), rejected=example([5, 9], [IGNORED, 9]), token_types=types),
        replace(example([1, 2], [IGNORED, 2]), rejected=example([1, 3, 4, 5], [IGNORED, 3, 4, 5])),
    ]
    came = decode(memoryview(encode(pairs)))
    others = [e.rejected for e in came if e.rejected is not None]
    assert [e.input_ids.tolist() for e in came] == [[5, 6, 7], [1, 2]]
    assert [e.input_ids.tolist() for e in others] == [[5, 9], [1, 3, 4, 5]]
    assert [np.asarray(e.labels).tolist() for e in others] == [[IGNORED, 9], [IGNORED, 3, 4, 5]]
    assert (came[0].token_types is not None) is typed


def test_a_client_may_hold_nothing() -> None:
    assert decode(encode([])) == []


def test_arrays_are_views_that_nobody_can_write_into() -> None:
    data = encode([example([5, 6], [IGNORED, 6])])
    (came,) = decode(memoryview(data))
    assert np.shares_memory(came.input_ids, np.frombuffer(data, np.int64))
    with pytest.raises(ValueError, match="read-only"):
        came.input_ids[0] = 1
