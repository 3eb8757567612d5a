from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.edge.gguf_adapter import Heads, adapter_file, layer_name, write_gguf
from fedtune.errors import ConfigError
from fedtune.lora.adapter import Factors

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
Q = "model.layers.0.self_attn.q_proj"


def factors(out: int, width: int, rank: int = 2) -> Factors:
    return Factors(
        a=np.arange(rank * width, dtype=np.float32).reshape(rank, width),
        b=np.arange(out * rank, dtype=np.float32).reshape(out, rank),
    )


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.dictionaries(WORDS, WORDS, max_size=3))
def test_files_are_those_that_the_reference_writer_writes(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, texts: dict[str, str]
) -> None:
    # The reference writer has this one of its own.
    texts.pop("general.architecture", None)
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    tensors = {"one": np.ones((rows, columns), np.float32), "two": np.zeros((columns, 3), np.float32)}
    writer = GGUFWriter(path, "llama")
    for key, text in texts.items():
        writer.add_string(key, text)
    writer.add_float32("number", 1.5)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stated = {"general.architecture": "llama", **texts}
    assert write_gguf(stated, {"number": 1.5}, tensors) == path.read_bytes()


def test_rows_of_queries_and_keys_of_llama_are_interleaved_by_their_heads(tmp_path: Path) -> None:
    data = adapter_file({Q: factors(8, 4)}, family="llama", heads=Heads(2, 1))
    (tmp_path / "a.gguf").write_bytes(data)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    # By hand: of each head of 4 rows the halves (0, 1) and (2, 3) take turns.
    rows = [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], factors(8, 4).b[rows])
    (tmp_path / "b.gguf").write_bytes(adapter_file({Q: factors(8, 4)}, family="qwen2", heads=None))
    plain = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "b.gguf").tensors}
    np.testing.assert_array_equal(plain["blk.0.attn_q.weight.lora_b"], factors(8, 4).b)


def test_layers_have_the_names_of_llama_cpp() -> None:
    assert layer_name("transformer.h.11.attn.c_attn", "gpt2") == "blk.11.attn_qkv.weight"
    assert layer_name("h.0.mlp.c_proj", "gpt2") == "blk.0.ffn_down.weight"
    assert layer_name("model.layers.3.mlp.gate_proj", "qwen3") == "blk.3.ffn_gate.weight"


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        (Q, "mamba", "expected a base of llama, qwen2, qwen3, gpt2; got one of mamba"),
        ("model.layers.0.self_attn.odd", "llama", "expected layers that GGUF files name"),
        ("transformer.h.x.attn.c_attn", "gpt2", "expected layers that GGUF files name"),
        (Q, "llama", "how many heads"),
    ],
)
def test_what_llama_cpp_cannot_load_is_refused(name: str, family: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        adapter_file({name: factors(8, 4)}, family=family, heads=None)
