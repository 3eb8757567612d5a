from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from fedtune.data.as_dataset import columns, to_dataset
from fedtune.data.encode import Example
from fedtune.errors import ExtraError


def example(*ids: int, prompt: int = 1) -> Example:
    row = np.array(ids, np.int64)
    labels = row.copy()
    labels[:prompt] = -100
    return Example(row, labels, characters=3, prompt="", reference="", prompt_tokens=prompt)


def test_rows_have_ids_and_labels_as_a_trainer_takes_them() -> None:
    made = to_dataset([example(5, 6, 7), example(8, 9)])
    assert made[:] == {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [-100, 9]]}


def test_classes_are_labels_of_rows() -> None:
    assert columns([replace(example(5, 6), labels=1)]) == {"input_ids": [[5, 6]], "labels": [1]}


def test_texts_of_a_pair_keep_their_types() -> None:
    made = columns([replace(example(5, 6), token_types=np.array([0, 1]))])
    assert made["token_type_ids"] == [[0, 1]]


def test_compared_answers_are_prompt_and_two_completions() -> None:
    row = replace(example(5, 6, 7), rejected=example(5, 8))
    assert columns([row]) == {"prompt_ids": [[5]], "chosen_ids": [[6, 7]], "rejected_ids": [[8]]}


def test_without_the_package_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExtraError, match=r'expected the package datasets, .*; got none; run pip .* "fedtune\[data\]"'):
        to_dataset([example(5, 6)])
