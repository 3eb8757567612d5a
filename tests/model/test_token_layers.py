"""Tokens read off the rows of an embedding that an update has moved, and the layers of which that can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client.perform import perform
from fedtune.data.encode import Example
from fedtune.messages import Assignment, Plan, Training, TrainLora
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.token_layers import token_layers

Load = Callable[..., Base]


@pytest.fixture
def loaded_with(checkpoints: dict[str, Path]) -> Load:
    settings = ModelSettings(base=str(checkpoints["llama"]), device="cpu")

    def load_with(**adapter: Any) -> Base:
        tokenizer = load_tokenizer(settings, Path())
        return load(settings, AdapterSettings(rank=2, **adapter), tokenizer=tokenizer, root=Path(), seed=0)

    return load_with


def test_one_examples_tokens_are_the_rows_that_an_update_of_the_embeddings_moves(loaded_with: Load) -> None:
    base = loaded_with(targets=["q_proj"], modules_to_save=["embed_tokens"])
    ids = np.array([7, 42, 7, 19, 133, 5], np.int64)
    secret = Example(input_ids=ids, labels=ids, characters=6, prompt_tokens=0, prompt="", reference="")
    order = Assignment(
        "flora",
        1,
        seed=3,
        plan=Plan("ann", 2, 2.0, Training(batch=1, learning_rate=1e-3, steps=1)),
        task=TrainLora(a_key=5, blobs={"saved": base.saved_tensors()}),
        base=base.digest,
    )
    (name,) = base.saved
    change = perform(base, [secret], order, threads=1).lora.saved[name] - base.saved_tensors()[name]
    moved = set(np.flatnonzero(np.abs(change).max(axis=1)).tolist())
    assert moved == {*ids.tolist()[:-1]}  # the last token is read by nothing
    assert token_layers(base) == [name]


@pytest.mark.parametrize(
    ("targets", "saved", "layers"),
    [
        (["q_proj", "v_proj"], [], []),
        (["all-linear"], ["norm"], []),
        (["q_proj"], ["lm_head"], ["lm_head.weight"]),
        (["q_proj", "lm_head"], [], ["lm_head"]),
        (["lm_head"], ["model"], ["lm_head", "model.embed_tokens.weight"]),
    ],
)
def test_embeddings_and_the_output_layer_have_a_row_for_each_token(
    loaded_with: Load, targets: list[str], saved: list[str], layers: list[str]
) -> None:
    assert token_layers(loaded_with(targets=targets, modules_to_save=saved)) == layers
