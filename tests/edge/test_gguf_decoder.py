from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from fedtune.edge.gguf_decoder import FAMILIES, read_decoder
from fedtune.edge.gguf_file import GgufFile
from fedtune.errors import ConfigError
from tests.edge.gguf_models import Twins, twins

SHAPES = {
    "token_embd.weight": (40, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
}
Change = Callable[[GGUFWriter, dict[str, np.ndarray[Any, Any]]], object]


def small(path: Path, change: Change = lambda *_: None, *, family: str = "llama") -> GgufFile:
    """Write a decoder of one block, changed by `change`."""
    writer = GGUFWriter(path, family)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    change(writer, tensors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_a_decoder_is_read_from_its_header_and_tensors(tmp_path: Path) -> None:
    decoder = read_decoder(small(tmp_path / "small.gguf"))
    assert (decoder.family, decoder.blocks, decoder.width, decoder.hidden) == ("llama", 1, 32, 64)
    assert (decoder.heads, decoder.kv_heads, decoder.head_size, decoder.vocabulary) == (4, 2, 8, 40)
    assert (decoder.theta, decoder.scale, decoder.head) == (10000.0, 1.0, "token_embd.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_read(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    pair: Twins = twins(checkpoints["llama"], tmp_path / "tiny.gguf", family=family)
    decoder, config = read_decoder(GgufFile(pair.file)), pair.base.model.config
    assert decoder.family == family
    assert (decoder.width, decoder.blocks) == (config.hidden_size, config.num_hidden_layers)
    assert decoder.theta == config.rope_parameters["rope_theta"]
    assert decoder.head == ("token_embd.weight" if config.tie_word_embeddings else "output.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, _: w.add_string("llama.rope.scaling.type", "yarn"), "rotary positions stretched by the rule 'yarn'"),
        (lambda w, _: w.add_rope_scaling_factor(4.0), "a factor of rotary positions without its rule"),
        (lambda w, _: w.add_float32("llama.rope.scale_linear", 4.0), "a factor of rotary positions without its rule"),
        (lambda w, _: w.add_rope_dimension_count(4), "rotary positions for 4 of a head's 8 numbers"),
        (lambda w, _: w.add_causal_attention(False), "tokens that see those behind them"),
        (lambda w, _: w.add_logit_scale(2.0), "a value under logit_scale"),
        (lambda w, _: w.add_float32("llama.final_logit_softcapping", 30.0), "under final_logit_softcapping"),
        (lambda w, _: w.add_float64("llama.rope.freq_base", 5e5), r"rope\.freq_base in the format 12 where 6 belongs"),
        (lambda w, _: w.add_uint64("llama.expert_count", 4), r"expert_count in the format 10 where 4 belongs"),
        (lambda w, _: w.add_array("llama.attention.key_length", [8, 8]), r"key_length in the format 9"),
        (lambda w, _: w.add_sliding_window(16), "attention within a sliding window"),
        (lambda w, _: w.add_expert_count(4), "a mixture of experts"),
        (lambda w, _: w.add_attention_scale(0.5), "a scale of attention of its own"),
        (lambda _, t: t.update({"blk.0.attn_q.bias": np.zeros(32, np.float32)}), r"with blk\.0\.attn_q\.bias"),
        (lambda _, t: t.update({"blk.1.ffn_up.weight": t["blk.0.ffn_up.weight"]}), r"with blk\.1\.ffn_up\.weight"),
        (lambda _, t: t.pop("blk.0.attn_v.weight"), r"blk\.0\.attn_v\.weight of shape none where \(32, 16\) belongs"),
        (lambda _, t: t.update({"output_norm.weight": np.zeros(31, np.float32)}), r"of shape \(31,\) where \(32,\)"),
        (lambda _, t: t.update({"output_norm.weight": np.zeros(32, np.float16)}), r"output_norm\.weight of .* in f16"),
        (lambda _, t: t.update({"blk.0.ffn_up.weight": np.zeros((64, 32))}), r"blk\.0\.ffn_up\.weight of .* in f64"),
        (lambda _, t: t.update({"rope_freqs.weight": np.ones(3, np.float32)}), r"rope_freqs\.weight of shape \(3,\)"),
    ],
)
def test_what_the_forward_pass_would_leave_out_is_refused_by_name(tmp_path: Path, change: Change, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_decoder(small(tmp_path / "small.gguf", change))


def test_another_family_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"families llama, qwen2, qwen3.*of 'gemma'.*runtime onnx"):
        read_decoder(small(tmp_path / "small.gguf", family="gemma"))


def test_sizes_that_would_divide_by_zero_are_refused(tmp_path: Path) -> None:
    def no_heads(writer: GGUFWriter, _: object) -> None:
        writer.kv_data[0]["llama.attention.head_count"].value = 0

    def odd_heads(writer: GGUFWriter, _: object) -> None:
        writer.kv_data[0]["llama.attention.head_count_kv"].value = 3

    for change in (no_heads, odd_heads):
        with pytest.raises(ConfigError, match="a whole GGUF file"):
            read_decoder(small(tmp_path / "small.gguf", change))
