"""Tiny models of many families, made on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

COMMON = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ENCODER = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
GEMMA = {**LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 16}
EXPERTS = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CAUSAL: Mapping[str, Mapping[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 8},
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi": LLAMA,
    "phi3": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": ENCODER,
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "stablelm": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "cohere": LLAMA,
    "granite": LLAMA,
    "starcoder2": LLAMA,
    "smollm3": LLAMA,
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v3": {
        **LLAMA,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "first_k_dense_replace": 1,
    },
    "phimoe": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon_mamba": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 8,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4, "expand": 2},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
}
"""By type, the sizes of a decoder's config."""

CLASSIFIERS: Mapping[str, Mapping[str, Any]] = {
    "bert": ENCODER,
    "roberta": {**ENCODER, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
    "xlm-roberta": {**ENCODER, "pad_token_id": 1, "bos_token_id": 0},
    "camembert": {**ENCODER, "pad_token_id": 1, "bos_token_id": 0},
    "longformer": {**ENCODER, "pad_token_id": 1, "bos_token_id": 0, "attention_window": 8},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "electra": {**ENCODER, "embedding_size": 16},
    "deberta": ENCODER,
    "deberta-v2": {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "albert": {**ENCODER, "embedding_size": 16},
    "modernbert": {**ENCODER, "cls_token_id": 1, "sep_token_id": 2},
    "mpnet": {**ENCODER, "pad_token_id": 1, "bos_token_id": 0},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "llama": LLAMA,
    "gpt2": CAUSAL["gpt2"],
}
"""By type, the sizes of a classifier's config."""


def build(kind: str, sizes: Mapping[str, Any], folder: Path, tokenizer: Any, *, task: str = "body") -> Path:
    """Write a tiny model with seeded random weights, and a tokenizer.

    Args:
        kind: transformers' type of model.
        sizes: of its config.
        folder: to write.
        tokenizer: of the model.
        task: `causal`, `classification` with a head of three classes, or `body`, without any head.
    """
    config = AutoConfig.for_model(kind, **{**COMMON, **sizes})
    auto = {"causal": AutoModelForCausalLM, "body": AutoModel}.get(task, AutoModelForSequenceClassification)
    if task == "classification":
        config.id2label = {0: "yes", 1: "no", 2: "maybe"}
        config.label2id = {"yes": 0, "no": 1, "maybe": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
