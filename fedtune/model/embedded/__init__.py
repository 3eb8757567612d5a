"""The small language model inside the package: weights, tokenizer, and `train`, the script that made them."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Return the folder of the model, which `AutoModelForCausalLM.from_pretrained` loads as it is."""
    return Path(__file__).parent
