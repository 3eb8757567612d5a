from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.model.latency import NEW_TOKENS, PROMPT, latency


def test_a_causal_models_prompt_and_tokens_are_measured_apart(loaded: Any, examples: Any) -> None:
    base = loaded()
    costs = latency(base, {}, {}, examples(1)[0].input_ids)
    config = base.model.config
    # Keys and values of every block, in float32.
    heads = config.num_key_value_heads * config.head_dim
    assert costs["cache_bytes_per_token"] == 2 * 4 * config.num_hidden_layers * heads
    assert costs["prompt_tokens"] == min(PROMPT, base.positions - NEW_TOKENS - 1)
    assert costs["latency_ms"].keys() == {"prefill", "decode"}
    assert costs["latency_ms"]["prefill"] > 0


def test_a_classifiers_answer_is_measured(loaded: Any) -> None:
    base = loaded("bert", targets=["query"], task="classification", labels=["a", "b"])
    head = {"classifier.weight": np.ones((2, 32), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    costs = latency(base, {}, head, np.array([5, 6, 7]))
    assert costs["latency_ms"].keys() == {"forward"}
    assert costs["latency_ms"]["forward"] > 0
    assert "cache_bytes_per_token" not in costs
