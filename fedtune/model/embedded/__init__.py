"""The small language model inside the package: weights, tokenizer, and `train`, the script that made them."""

from __future__ import annotations

import sys
from pathlib import Path

WEIGHTS = "model.safetensors"


def path() -> Path:
    """Return the folder of the model, which `AutoModelForCausalLM.from_pretrained` loads as it is."""
    own = Path(__file__).parent
    if (own / WEIGHTS).is_file():
        return own
    # The bundle of `flwr run .` holds Python files alone, and lies before the installed package.
    installed = (Path(entry or ".") / "fedtune" / "model" / "embedded" for entry in sys.path)
    return next((folder for folder in installed if (folder / WEIGHTS).is_file()), own)
