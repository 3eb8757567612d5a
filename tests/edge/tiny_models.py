"""Tiny random decoders of every family that devices run, as transformers computes them: bases that tests export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedtune.model.base import Base, base_from_object, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings

SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR: Mapping[str, Any] = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
MODELS: Mapping[str, Callable[..., Any]] = {
    # A head width that is no part of the width, stretched rotation, biases everywhere, an output layer of its own.
    "llama": lambda **common: LlamaForCausalLM(
        LlamaConfig(
            **SIZES, **common, head_dim=12, rope_parameters=dict(LLAMA3), attention_bias=True, mlp_bias=True,
            rms_norm_eps=1e-3,
        )
    ),
    "llama-tied": lambda **common: LlamaForCausalLM(
        LlamaConfig(**SIZES, **common, rope_parameters=dict(LINEAR), tie_word_embeddings=True)
    ),
    "qwen2": lambda **common: Qwen2ForCausalLM(Qwen2Config(**SIZES, **common, tie_word_embeddings=True)),
    "qwen3": lambda **common: Qwen3ForCausalLM(Qwen3Config(**SIZES, **common, head_dim=16)),
    "gpt2": lambda **common: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
    ),
    "gpt2-scaled": lambda **common: GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, **common, n_inner=40, activation_function="gelu",
            scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-3,
        )
    ),
}  # fmt: skip


@cache
def tiny_base(name: str, tokenizer: Path) -> Base:
    """Return a tiny model as a base, with the tokenizer of a folder; all weights are random, also norms and biases."""
    settings = ModelSettings(base=name, dtype="float32", device="cpu")
    words = load_tokenizer(ModelSettings(base=str(tokenizer)), Path())
    model = MODELS[name](vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=0).eval()
    draw = torch.Generator().manual_seed(len(name))
    for weight in model.parameters():
        middle = 1.0 if weight.dim() == 1 and bool((weight == 1).all()) else 0.0
        weight.data = middle + 0.15 * torch.randn(weight.shape, generator=draw)
    return base_from_object(settings, AdapterSettings(rank=4), (model, words))
