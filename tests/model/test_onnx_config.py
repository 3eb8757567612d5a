"""Every key of a config is read, without effect, or refused: none that changes a computation is passed over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fedtune.errors import ConfigError
from fedtune.model.onnx_config import read_architecture
from tests.edge.tiny_models import LINEAR, LLAMA3, SIZES


def config(kind: type[PreTrainedConfig] = LlamaConfig, **changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = kind(**(SIZES if kind is not GPT2Config else {}), vocab_size=300).to_dict()
    return {**table, **changes}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config, GPT2Config])
def test_the_configs_of_transformers_are_read(kind: type[PreTrainedConfig]) -> None:
    architecture = read_architecture(config(kind))
    assert architecture.family == kind.model_type
    assert architecture.heads * architecture.head_width >= architecture.width
    assert len(architecture.scales) == architecture.blocks


@pytest.mark.parametrize(
    ("kind", "published"),
    [
        # Of GPT-2, GPT-2 medium and DistilGPT2, as they were published.
        (GPT2Config, {"n_ctx": 1024, "summary_type": "cls_index", "summary_proj_to_labels": True}),
        (GPT2Config, {"n_ctx": 1024, "n_special": 0, "predict_special_tokens": True}),
        (
            GPT2Config,
            {"n_ctx": 1024, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "tokenizer_class": "GPT2Tokenizer"},
        ),
        (LlamaConfig, {"max_sequence_length": 2048, "pretraining_tp": 1, "rope_scaling": None}),
        (LlamaConfig, {"is_llama_config": True, "rope_interleaved": False, "unsloth_fixed": True}),
        (Qwen2Config, {"use_mrope": False, "max_window_layers": 21, "use_sliding_window": False}),
    ],
)
def test_keys_of_published_files_that_change_no_loss_are_passed_over(kind: Any, published: dict[str, Any]) -> None:
    assert read_architecture(config(kind, **published)).family == kind.model_type


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, {"rope_type": "default", "rope_theta": 123.0}])
def test_frequencies_are_those_of_transformers(rope: Any) -> None:
    given = LlamaConfig(**SIZES, head_dim=12, rope_parameters=dict(rope))
    frequencies = read_architecture(given.to_dict()).frequencies
    assert frequencies is not None
    if rope["rope_type"] == "default":
        expected = 1.0 / 123.0 ** (torch.arange(0, 12, 2, dtype=torch.float32) / 12)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](given, torch.device("cpu"))
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=3e-7)


def test_old_files_say_the_same_with_two_keys() -> None:
    table = config(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.5})
    del table["rope_parameters"]
    old, new = read_architecture(table), read_architecture(config(rope_parameters=dict(LINEAR)))
    np.testing.assert_array_equal(np.asarray(old.frequencies), np.asarray(new.frequencies))


def test_scales_fall_with_the_block_where_the_config_says_so() -> None:
    table = config(GPT2Config, scale_attn_by_inverse_layer_idx=True, n_layer=3, n_head=3, n_embd=12)
    assert read_architecture(table).scales == (0.5, 0.25, 0.5 / 3)
    assert read_architecture({**table, "scale_attn_weights": False}).scales == (1.0, 0.5, 1 / 3)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (LlamaConfig, {"model_type": "mamba"}, "expected one of llama, qwen2, qwen3, gpt2 for devices; got 'mamba'"),
        (LlamaConfig, {"residual_multiplier": 0.22}, r"config\.json: residual_multiplier: .*got 0\.22"),
        (LlamaConfig, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (LlamaConfig, {"use_parallel_residual": True}, "use_parallel_residual"),
        (LlamaConfig, {"hidden_act": "xielu"}, "hidden_act: expected one of silu, .*got 'xielu'"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2}}, "got 'yarn'"),
        (LlamaConfig, {"rope_parameters": {**LLAMA3, "mscale": 2}}, r"rope_parameters: .*got \['mscale'\]"),
        (LlamaConfig, {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}, r"got 0\.5"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "factor: expected this key"),
        (LlamaConfig, {"rms_norm_eps": None}, "rms_norm_eps: expected this key of llama; got none"),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 16}, "got 'a window of 16'"),
        (Qwen2Config, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}, "layer_types"),
        (Qwen3Config, {"layer_types": ["linear_attention"] * 2}, "got .*linear_attention"),
        (GPT2Config, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2Config, {"activation_function": "tanh"}, "activation_function"),
        (LlamaConfig, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LlamaConfig, {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_what_the_graphs_do_not_compute_is_refused_by_name(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_architecture(config(kind, **changes))


def test_all_faults_of_a_config_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_architecture(config(alpha=1, beta=0, gamma=None, delta=False, pruned_heads={}, epsilon={"0": [1]}))
    assert [fault.path.removeprefix("config.json: ") for fault in caught.value.faults] == ["alpha", "beta", "epsilon"]


@pytest.mark.parametrize("window", [64, 4096])
def test_a_window_that_is_longer_than_any_text_changes_nothing(window: int) -> None:
    table = config(Qwen2Config, use_sliding_window=True, sliding_window=window, layer_types=["sliding_attention"] * 2)
    assert read_architecture(table).family == "qwen2"
