from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedtune.errors import ShapeError
from fedtune.model.base import Base, manifest_of
from fedtune.model.base_head import with_head
from tests.model.families import CLASSIFIERS, build
from tests.model.test_pooling import classifier


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Base:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    return classifier(build("bert", CLASSIFIERS["bert"], tmp_path_factory.mktemp("bert"), tokenizer))


def test_the_base_has_the_head_inside_the_block_alone(base: Base) -> None:
    head = {"classifier.weight": np.full((3, 32), 2.0, np.float32)}
    layer = base.model.classifier
    parameter, own, digest = layer.weight, layer.weight.detach().clone(), base.manifest.digest
    with with_head(base, head) as other:
        assert torch.equal(layer.weight, torch.full((3, 32), 2.0))
        assert layer.weight is parameter  # tied names and hooks keep what they have
        assert other.manifest == manifest_of(base.model)
        assert other.manifest.digest != digest
        assert other.digest == base.digest
    assert torch.equal(layer.weight, own)
    assert base.manifest.digest == digest
    with with_head(base, {}) as same:
        assert same is base


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("classifier.weight", (2, 32), "classifier.weight: expected shape"),
        ("bert.embeddings.LayerNorm.weight", (32,), "expected one of those trained in full .* got another"),
        ("no.such", (1,), "no.such: expected one of those"),
    ],
)
def test_a_head_of_another_base_is_refused(name: str, shape: tuple[int, ...], what: str, base: Base) -> None:
    with pytest.raises(ShapeError, match=what), with_head(base, {name: np.zeros(shape, np.float32)}):
        pass
