"""The list of a model's blocks, and what flows through it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedtune.errors import ConfigError
from fedtune.model.blocks import block_numbers, find_blocks, listen_to_output, without_blocks
from tests.model.conftest import Loader


@pytest.mark.parametrize(("name", "blocks"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_the_blocks_of_a_model(name: str, blocks: str, loaded: Loader) -> None:
    model = loaded(name, targets=["all-linear"]).model
    assert find_blocks(model)[0] == blocks
    assert list(block_numbers(model)) == [0, 1]


def test_a_model_with_no_list_or_two_of_them() -> None:
    def model(**lists: nn.ModuleList) -> Any:
        whole: Any = nn.Module()
        for name, part in lists.items():
            setattr(whole, name, part)
        config = SimpleNamespace(num_hidden_layers=2, model_type="odd")
        whole.config = SimpleNamespace(get_text_config=lambda: config)
        return whole

    pair = [nn.Linear(1, 1), nn.Linear(1, 1)]
    for odd in (model(), model(a=nn.ModuleList(pair), b=nn.ModuleList(pair)), model(a=nn.ModuleList(pair[:1]))):
        with pytest.raises(ConfigError, match="one list of 2 blocks"):
            find_blocks(odd)
        assert list(block_numbers(odd)) == []
    ambiguous = model()
    ambiguous.config.get_text_config = lambda: int("two texts")
    assert list(block_numbers(ambiguous)) == []


def test_a_block_that_is_skipped_gives_back_its_input(loaded: Loader) -> None:
    model = loaded("llama").model
    ids, seen = torch.tensor([[5, 6, 7]]), list[torch.Tensor]()
    blocks = find_blocks(model)[1]
    with torch.inference_mode(), without_blocks(model, [1]), listen_to_output(blocks[0], seen.append):
        skipped = model(input_ids=ids, output_hidden_states=True)
    with torch.inference_mode():
        whole = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(skipped.hidden_states[1], whole.hidden_states[1])
    assert torch.equal(seen[0], whole.hidden_states[1])
    assert torch.equal(skipped.logits, model.lm_head(model.model.norm(seen[0])))
    assert not torch.equal(skipped.logits, whole.logits)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, whole.logits)  # and nothing listens any more
    assert len(seen) == 1
