"""Settings of the base model and its device, of the adapter's layers, and of when the global model is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True)
class ModelSettings:
    """The recipe's table `model`."""

    base: str
    """Folder with config.json, hub name, or `embedded` for the small model inside the package."""
    task: Literal["causal", "classification"] = "causal"
    """causal: the base predicts the next token; classification: one label per example."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen base; adapters are always trained in float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] | str = "auto"
    """auto: cuda if there is one, else mps, else cpu; `cuda:1` chooses among several."""
    threads: Annotated[int, Ge(1)] = 1
    """CPU threads that a client trains with, on every engine; their number changes the last bits of a sum. One thread
    and as many worker processes as cores is the fastest way to run small clients."""


@dataclass(frozen=True)
class AdapterSettings:
    """The recipe's table `adapter`."""

    rank: Annotated[int, Ge(1)]
    """LoRA rank of every client that no override names."""
    targets: Sequence[str]
    """Module names or their last parts, e.g. ["q_proj", "v_proj"]; ["all-linear"] takes every linear layer."""
    kind: Literal["lora"] = "lora"
    """Kind of adapter; LoRA is the only one."""
    alpha: Annotated[float, Gt(0)] | Literal["2r"] = "2r"
    """Numerator of the LoRA scale; 2r keeps the scale at 2 for every rank."""
    rslora: bool = False
    """Scale alpha / sqrt(rank) instead of alpha / rank."""
    modules_to_save: Sequence[str] = ()
    """Modules trained in full beside the adapter, such as a classification head; averaged with p_k."""


@dataclass(frozen=True)
class EvaluationSettings:
    """When and on how much the global model is scored; the recipe's table `evaluate`."""

    every: Annotated[int, Ge(0)] = 1
    """Rounds between scores of the global model on the test data; 0 scores only before the first and after the last."""
    examples: Annotated[int, Ge(1)] | None = 256
    """Test examples used, the first so many; none uses all."""
    clients: bool = True
    """Also score the global model on each client's held-out examples, before the first round and after the last."""
    client_examples: Annotated[int, Ge(1)] | None = 64
    """Held-out examples per client used for that."""
    batch: Annotated[int, Ge(1)] = 16
    """Examples per forward pass of an evaluation."""
    generate: Annotated[int, Ge(0)] = 0
    """Test examples to answer by greedy generation and score with Rouge-L and exact match; 0 is off."""
    new_tokens: Annotated[int, Ge(1)] = 64
    """Longest generated answer."""
    prompt: str | None = None
    """Text to continue before and after the run, shown at its end."""
