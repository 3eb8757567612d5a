from __future__ import annotations

from dataclasses import replace

import torch

from fedtune.model.base import digest
from fedtune.model.reread import changed_names, reread
from tests.model.conftest import Loader


def test_a_changed_base_is_read_again_to_the_same_digest(loaded: Loader) -> None:
    base = loaded("llama")
    before = base.checksums
    assert changed_names(base, before) == []
    weight = base.model.get_submodule("model.layers.0.mlp.up_proj").weight
    weight.data[0, 0] += 1e-6  # the last bits of one number
    assert changed_names(base, before) == ["model.layers.0.mlp.up_proj.weight"]
    base.model.lm_head.weight.data = base.model.lm_head.weight.data.to(torch.bfloat16)
    assert reread(base, before)
    assert digest(base.model) == base.digest


def test_a_base_without_its_checkpoint_stays_changed(loaded: Loader) -> None:
    base = replace(loaded("llama"), path="no/such/folder")
    before = base.checksums
    base.model.lm_head.weight.data.zero_()
    assert not reread(base, before)


def test_a_checkpoint_of_other_weights_does_not_count(loaded: Loader) -> None:
    base = replace(loaded("llama"), path=loaded("gpt2", targets=("c_attn",)).path)
    before = base.checksums
    base.model.lm_head.weight.data.zero_()
    assert not reread(base, before)


def test_a_base_in_16_bits_of_which_all_has_changed_is_read_again_in_16_bits(loaded: Loader) -> None:
    base = loaded("llama", dtype="bfloat16")
    before = base.checksums
    for parameter in base.model.parameters():
        parameter.data = parameter.data.float()
    assert reread(base, before)
    assert digest(base.model) == base.digest
