from __future__ import annotations

import numpy as np

from fedtune.edge.gguf_names import gguf_name, interleave


def test_tensors_of_a_decoder_have_names_in_a_gguf_file() -> None:
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    assert gguf_name("model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    assert gguf_name("model.layers.0.self_attn.rotary.weight") is None
    assert gguf_name("transformer.h.0.attn.c_attn.weight") is None


def test_rows_of_a_head_alternate_between_its_halves() -> None:
    # Two heads of four rows: halves (0, 1) and (2, 3).
    rows = np.arange(8)[:, None] * np.ones((1, 3))
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(np.arange(6), 1).tolist() == [0, 3, 1, 4, 2, 5]
