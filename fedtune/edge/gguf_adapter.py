"""A LoRA adapter as a GGUF file, which llama.cpp loads beside any GGUF file of its base."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedtune.edge.gguf_names import gguf_name, interleave
from fedtune.errors import ConfigError, Fault
from fedtune.lora.adapter import Adapter, Factors
from fedtune.tensors import Array

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
TEXT, FLOAT32_VALUE = 8, 6
"""Types of a value in the head of a file."""
FLOAT32 = 0
"""Format of a tensor."""
GPT2_PARTS: Mapping[str, str] = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Layers of a block, by the names that transformers gives them."""
ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
"""Names of families in GGUF files, by those of transformers."""


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, by which Llama's files order the rows of queries and keys."""

    query: int
    key: int


def adapter_file(adapter: Adapter, *, family: str, heads: Heads | None) -> bytes:
    """Return the file of an adapter of scale 1 whose layers all have one rank.

    Args:
        adapter: by full name of the layer, as transformers calls it.
        family: of the base, as its config.json names it.
        heads: of the base, which Llama's files need.

    Raises:
        ConfigError: if llama.cpp has no such layer, or this order of rows cannot be known.
    """
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(Fault("--form gguf", f"a base of {known}", f"one of {family}", "write --form peft"))
    ranks = {factors.rank for factors in adapter.values()}
    assert len(ranks) == 1
    tensors: dict[str, Array] = {}
    for name, factors in adapter.items():
        stored = layer_name(name, family)
        b = file_rows(name, factors, family, heads)
        tensors[f"{stored}.lora_a"] = np.ascontiguousarray(factors.a, "<f4")  # (rank, in)
        tensors[f"{stored}.lora_b"] = np.ascontiguousarray(b, "<f4")  # (out, rank)
    texts = {"general.type": "adapter", "general.architecture": ARCHITECTURES[family], "adapter.type": "lora"}
    # llama.cpp scales by alpha / rank.
    return write_gguf(texts, {"adapter.lora.alpha": float(ranks.pop())}, tensors)


def layer_name(name: str, family: str) -> str:
    """Return what a GGUF file calls the matrix of a layer.

    Raises:
        ConfigError: if it has no name for it.
    """
    if family == "gpt2":
        block, _, part = name.removeprefix("transformer.").removeprefix("h.").partition(".")
        stored = f"blk.{block}.{GPT2_PARTS[part]}.weight" if part in GPT2_PARTS and block.isdecimal() else None
    else:
        stored = gguf_name(f"{name}.weight")
    if stored is None:
        raise ConfigError(Fault("--form gguf", "layers that GGUF files name", name, "write --form peft"))
    return stored


def file_rows(name: str, factors: Factors, family: str, heads: Heads | None) -> Array:
    """Return factor b with its rows in the order of the family's GGUF files."""
    part = name.rpartition(".")[2]
    if family != "llama" or part not in ("q_proj", "k_proj"):
        return factors.b
    if heads is None:
        hint = "write --form peft, or get a bundle that was exported anew"
        raise ConfigError(Fault("--form gguf", "a bundle that says how many heads its base has", "none", hint))
    return interleave(factors.b, heads.query if part == "q_proj" else heads.key)


def write_gguf(texts: Mapping[str, str], numbers: Mapping[str, float], tensors: Mapping[str, Array]) -> bytes:
    """Return a GGUF file of version 3 with texts, float32 numbers and float32 tensors."""
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(texts) + len(numbers))]
    head += [_text(key) + struct.pack("<I", TEXT) + _text(value) for key, value in texts.items()]
    head += [_text(key) + struct.pack("<If", FLOAT32_VALUE, value) for key, value in numbers.items()]
    bodies, offset = list[bytes](), 0
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]  # the fastest axis first
        head.append(_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, FLOAT32, offset))
        bodies.append(_pad(tensor.tobytes()))
        offset += len(bodies[-1])
    return _pad(b"".join(head)) + b"".join(bodies)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
