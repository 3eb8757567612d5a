"""What a GGUF file calls the tensors of a base, and in which order it holds the rows of queries and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedtune.tensors import Array

PARTS: Mapping[str, str] = {
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
"""Of a block, by the names that transformers gives them."""
TOPS: Mapping[str, str] = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str) -> str | None:
    """Return what a GGUF file calls a tensor of the families of `gguf_model`; None for one that they lack.

    >>> gguf_name("model.layers.3.self_attn.o_proj.weight"), gguf_name("model.norm.weight")
    ('blk.3.attn_output.weight', 'output_norm.weight')
    """
    if match := BLOCK.fullmatch(name):
        block, part, kind = match.groups()
        return f"blk.{block}.{PARTS[part]}.{kind}" if part in PARTS else None
    module, _, kind = name.rpartition(".")
    return f"{TOPS[module]}.{kind}" if module in TOPS else None


def interleave(rows: Array, heads: int) -> Array:
    """Return the rows of a query or key layer in the order of Llama's GGUF files.

    transformers rotates the first half of a head against its second half, llama.cpp a row against the next: row i of a
    half goes to the place 2 i or 2 i + 1 of its head. Rows are the first axis.
    """
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
