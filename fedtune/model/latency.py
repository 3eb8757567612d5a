"""How long a model takes over one text on this machine, and what it remembers of it: measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch

from fedtune.lora.adapter import Adapter
from fedtune.model.base import Base
from fedtune.model.lora import with_adapters
from fedtune.tensors import Array, Tensors

PROMPT = 64
"""Tokens of the text: those of an example, repeated where it is shorter."""
NEW_TOKENS = 16
"""Tokens written after the first one, of whose time the mean counts."""
REPEATS = 5
"""Times of which the median counts; one more is measured first and left out."""


def latency(base: Base, adapter: Adapter, saved: Tensors, example: Array) -> Mapping[str, Any]:
    """Return what one text costs a model with an adapter.

    Args:
        base: the model.
        adapter: its change; empty where that is in the weights.
        saved: modules_to_save.
        example: token ids, (length,).

    Returns:
        `latency_ms`: of a causal model `prefill`, up to the first new token, and `decode`, of each further one; else
        `forward`. `prompt_tokens` of the text, and of a causal model `cache_bytes_per_token` of its context.
    """
    length = min(PROMPT, base.positions - NEW_TOKENS - 1)
    inputs = torch.tensor(np.resize(example, length)[None], device=base.device)
    with with_adapters(base, frozen=adapter, saved=saved) as model, torch.inference_mode():
        measure = writing_costs if base.task == "causal" else reading_costs
        return {"prompt_tokens": length, **measure(model, inputs)}


def reading_costs(model: Any, inputs: torch.Tensor) -> Mapping[str, Any]:
    """Return the milliseconds of a classifier's answer."""
    return {"latency_ms": {"forward": milliseconds(lambda: model(input_ids=inputs).logits.sum().item())}}


def writing_costs(model: Any, inputs: torch.Tensor) -> Mapping[str, Any]:
    """Return the milliseconds of a prompt and of each token after it, and the bytes that are kept per token.

    The two times are apart because they are bound by other things: a prompt by arithmetic, a token by the reading of
    all weights, so that a narrower model gains less there.
    """

    def write(tokens: int) -> Any:
        exactly = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        mask = torch.ones_like(inputs)
        return model.generate(inputs, attention_mask=mask, return_dict_in_generate=True, **exactly)

    cache = write(1).past_key_values
    numbers = [part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values)]
    first, all_tokens = milliseconds(lambda: write(1)), milliseconds(lambda: write(1 + NEW_TOKENS))
    latency_ms = {"prefill": first, "decode": round(max(0.0, all_tokens - first) / NEW_TOKENS, 3)}
    return {"cache_bytes_per_token": sum(numbers) // inputs.shape[1], "latency_ms": latency_ms}


def milliseconds(work: Callable[[], object]) -> float:
    """Return the median milliseconds of some work, which reads its result, so that the device has finished."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return round(median(times[1:]), 3)
