"""A tiny base deep enough for emulators, and recipes over it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.model.families import CAUSAL, build

Tables = dict[str, Any]
BLOCKS = 6


def deep_base(folder: Path, tokenizer: Path, kind: str = "llama", **sizes: Any) -> Path:
    """Write a model of six blocks with random weights."""
    depth = {"n_layer": BLOCKS} if kind == "gpt2" else {"num_hidden_layers": BLOCKS}
    return build(
        kind, {**CAUSAL[kind], **depth, **sizes}, folder, AutoTokenizer.from_pretrained(tokenizer), task="causal"
    )


def public_text(file: Path) -> Path:
    """Write a few rows of public text."""
    words = ("a dog and a fox sleep", "while the quick brown dog", "runs over the lazy fox")
    rows = [{"text": " ".join(words[(i + j) % 3] for j in range(1 + i % 3))} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def over(tables: Tables, base: Path, layers: str | None, **adapter: Any) -> Tables:
    """Return the tiny recipe over another base, whose adapters lie in some of its blocks."""
    changed = copy.deepcopy(tables)
    changed.pop("override", None)
    changed["model"]["base"] = str(base)
    changed["adapter"] = {"rank": 4, "targets": ["all-linear"], **({"layers": layers} if layers else {}), **adapter}
    changed["method"] = {"name": "fedit"}
    changed["client"]["steps"] = changed["rounds"]["count"] = 1
    changed["evaluate"] = {"batch": 8, "clients": False}
    return changed
