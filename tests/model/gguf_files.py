"""GGUF files of the tiny Llama, written as llama.cpp's converter does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows of a query or key layer in llama.cpp's order: the two halves of a head, row by row in turn."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    checkpoint: Path,
    file: Path,
    *,
    factors: Any = None,
    more: Any = None,
    model: Any = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Any:
    """Write a model and a tokenizer as one GGUF file, and return the model, whose weights are those in the file.

    Args:
        checkpoint: folder of the tokenizer, and of the model where none is given.
        file: to write.
        factors: of the rotary frequencies, if any.
        more: tensors beside the model's, by name.
        model: a Llama, or one that differs from it as Qwen2 and Qwen3 do.
        kind: format of the matrices.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint) if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = model.config
    writer = GGUFWriter(file, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if tensor.dim() == 2 and kind != GGMLQuantizationType.F32:
            tensor.copy_(torch.from_numpy(dequantize(quantize(tensor.numpy(), kind), kind)))
        weight = tensor.numpy()
        if name.endswith("q_proj.weight") and config.model_type == "llama":
            weight = interleaved(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight") and config.model_type == "llama":
            weight = interleaved(weight, config.num_key_value_heads)
        coded = weight.ndim == 2 and kind != GGMLQuantizationType.F32
        raw_kind = kind if coded else None
        weight = quantize(weight, kind) if coded else weight
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight), raw_dtype=raw_kind)
    for name, extra in {**({} if factors is None else {"rope_freqs.weight": factors}), **(more or {})}.items():
        writer.add_tensor(name, np.asarray(extra, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, end = name.rpartition(".")
    if module in top:
        return f"{top[module]}.{end}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{end}"
