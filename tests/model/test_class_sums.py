from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedtune.class_sums import FRACTION_BITS, sum_features
from fedtune.client.perform import perform
from fedtune.errors import ClientError, ShapeError
from fedtune.messages import Assignment, Plan, SumClasses, Training
from fedtune.model.base import Base
from fedtune.model.class_sums import rows_of
from fedtune.model.settings import AdapterSettings
from fedtune.model.targets import find_targets
from tests.model.families import CLASSIFIERS, build
from tests.model.test_pooling import classifier, example, states

LONG, SHORT = example([5, 6, 7, 8], 2), example([9, 10], 0)
ORDER = Assignment("fedit", 1, 7, Plan("ann", 1, 1.0, Training(batch=2, steps=1)), SumClasses(FRACTION_BITS))


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Base:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    return classifier(build("bert", CLASSIFIERS["bert"], tmp_path_factory.mktemp("bert"), tokenizer), "cls")


def test_the_sums_are_those_of_what_the_head_reads(base: Base) -> None:
    steps = list[tuple[int, int]]()
    update = perform(base, [LONG, SHORT], ORDER, threads=1, on_step=lambda done, of: steps.append((done, of)))
    with torch.no_grad():
        features = states(base)[:, 0].double().numpy()  # of the same two texts, in this order
    wanted = sum_features(features, np.array([2, 0]), 3, fraction_bits=FRACTION_BITS)
    assert update.class_sums.counts.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(update.class_sums.sums, wanted.sums)
    np.testing.assert_array_equal(update.class_sums.squares, wanted.squares)
    assert (update.num_examples, update.measured.tokens, steps) == (2, 6, [(1, 1)])
    assert update.class_sums.base == base.digest
    assert not base.model.classifier._forward_pre_hooks


def test_batches_by_length_change_no_count(base: Base) -> None:
    rows = [LONG, SHORT, LONG, SHORT, SHORT]
    update = perform(base, rows, ORDER, threads=1)
    assert update.class_sums.counts.tolist() == [3, 0, 2]


def test_a_client_without_examples_and_one_of_another_base_fail(base: Base) -> None:
    with pytest.raises(ClientError, match="ann: expected 1 to 33554431 training examples; got 0"):
        perform(base, [], ORDER, threads=1)
    with pytest.raises(ClientError, match="ann: expected base 00000"):
        perform(base, [LONG], replace(ORDER, base="0" * 64), threads=1)


def test_features_that_are_not_finite_and_heads_over_tokens_are_refused(base: Base) -> None:
    with pytest.raises(ClientError, match="finite features"):
        rows_of(torch.tensor([[1.0, torch.nan]]), "ann")
    with pytest.raises(ClientError, match="a row for each example"):
        rows_of(torch.ones(1, 2, 3), "ann")


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "modernbert", "gpt2"])
def test_heads_of_other_types(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints["llama"])
    base = classifier(build(kind, CLASSIFIERS[kind], tmp_path, tokenizer))
    if kind == "gpt2":  # a decoder's output layer has no bias
        with pytest.raises(ShapeError, match=r"score.weight alone"):
            perform(base, [LONG], ORDER, threads=1)
        return
    assert perform(base, [LONG], ORDER, threads=1).class_sums.examples == 1
    assert find_targets(base.model, AdapterSettings().targets)
