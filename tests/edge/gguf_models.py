"""Tiny decoders as GGUF files, and the torch base that each of them holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedtune.data.encode import IGNORED, Example
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge.gguf_file import GgufFile
from fedtune.edge.gguf_runtime import GgufRuntime
from fedtune.model.base import Base, base_from_object
from fedtune.model.settings import AdapterSettings, ModelSettings
from tests.model.gguf_files import write_gguf

EXPONENT = 24
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Widths are multiples of 32, the block of quantised formats; two queries share a key."""
DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
}


@dataclass(frozen=True)
class Twins:
    """One base as a GGUF file and in torch, and a run's state over it."""

    file: Path
    base: Base
    ledger: SeedLedger
    trainable: tuple[int, ...]

    def runtime(self) -> GgufRuntime:
        return GgufRuntime(GgufFile(self.file), self.base.manifest, eos_ids=[], threads=1)


def twins(checkpoint: Path, file: Path, *, family: str = "llama", kind: str = "F32", rank: int = 4) -> Twins:
    """Write a tiny decoder of seeded random weights as a GGUF file, and load it in torch."""
    build, config, more = DECODERS[family]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = build(config(vocab_size=len(tokenizer), **SIZES, **more))
        for name, vector in model.named_parameters():
            # Norms of 1 and biases of 0 would hide whether they are read.
            if vector.dim() == 1:
                vector.data.add_(torch.randn_like(vector) * (0.2 if name.endswith("bias") else 0.1))
    write_gguf(checkpoint, file, model=model.eval(), kind=GGMLQuantizationType[kind])
    settings = ModelSettings(base=str(file), device="cpu")
    base = base_from_object(settings, AdapterSettings(rank=2, targets=["all-linear"]), (model, tokenizer))
    sums = np.random.default_rng(1).integers(-40_000, 40_000, rank * rank).astype(np.int32)
    ledger = SeedLedger(Kron(rank * rank, 99), EXPONENT, 1, base.manifest.digest, sums)
    return Twins(file, base, ledger, trainable_ordinals(base.manifest, TensorSelection("kron"), base.matrices))


def examples(*lengths: int, vocabulary: int = 290) -> list[Example]:
    """Return rows of random tokens, of which the first three do not count."""
    rng, rows = np.random.default_rng(3), []
    for length in lengths:
        ids = rng.integers(3, vocabulary, length)
        rows.append(Example(ids, np.where(np.arange(length) < 3, IGNORED, ids), 0, "", "", 0))
    return rows
