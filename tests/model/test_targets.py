from __future__ import annotations

from typing import Any

import pytest

from fedtune.errors import ConfigError


def test_targets_are_found_by_their_last_part_with_out_and_in_sizes(loaded: Any) -> None:
    base = loaded(targets=["q_proj", "v_proj"])
    assert base.modules == {
        "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.0.self_attn.v_proj": (16, 32),
        "model.layers.1.self_attn.q_proj": (32, 32),
        "model.layers.1.self_attn.v_proj": (16, 32),
    }


def test_all_linear_leaves_the_output_head_out(loaded: Any) -> None:
    modules = loaded(targets=["all-linear"]).modules
    assert len(modules) == 2 * 7
    assert "lm_head" not in modules


def test_a_gpt2_layer_is_given_as_out_by_in_although_its_weight_is_transposed(loaded: Any) -> None:
    assert loaded("gpt2", targets=["c_attn"]).modules["transformer.h.0.attn.c_attn"] == (96, 32)


def test_a_target_that_matches_nothing_names_the_nearest_one(loaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets.*'q_prjo', which matches nothing.*'q_proj'"):
        loaded(targets=["q_prjo", "v_proj"])


def test_every_target_that_matches_nothing_is_named(loaded: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(targets=["c_attn", "c_fc"])
    assert len(caught.value.faults) == 2


def test_tied_embeddings_cannot_be_trained_in_full(loaded: Any) -> None:
    with pytest.raises(ConfigError, match="tied to the input embeddings"):
        loaded("gpt2", targets=["c_attn"], saved=["lm_head"])


def test_a_module_to_save_that_does_not_exist_is_named(loaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save.*'lm_haed'.*'lm_head'"):
        loaded(saved=["lm_haed"])


def test_a_tied_output_head_is_no_target(loaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets: .*'lm_head'.*tied"):
        loaded("gpt2", targets=["lm_head", "c_attn"])
    assert "lm_head" in loaded("llama", targets=["lm_head"]).modules
