"""Two hundred questions of each kind, of simple words that even a small model has seen, always the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedtune.seeds import derive, generator
from tests.evaluation.conftest import write

WORDS = [
    "dog",
    "cat",
    "bird",
    "tree",
    "house",
    "boy",
    "girl",
    "ball",
    "park",
    "sun",
    "moon",
    "big",
    "little",
    "red",
    "blue",
    "happy",
    "sad",
    "ran",
    "jumped",
    "saw",
]
ITEMS, SHOTS = 200, 2


def phrase(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, 7)))


def write_items(folder: Path, *, items: int = ITEMS) -> dict[str, Path]:
    """Write a folder for `mmlu` (two subjects, with shots) and one for `arc`, and return them by task."""
    rng = generator(derive(0, "test.items"))
    mmlu, arc = list[dict[str, Any]](), list[dict[str, Any]]()
    for number in range(ITEMS + 2 * SHOTS):
        question, options = f"What did the {phrase(rng)} see?", [phrase(rng) for _ in range(4)]
        gold, subject = int(rng.integers(4)), ("animals", "old_stories")[number % 2]
        mmlu.append({"question": question, "choices": options, "answer": gold, "subject": subject})
        choices = {"text": options, "label": list("ABCD")}
        arc.append({"question": question, "choices": choices, "answerKey": "ABCD"[gold]})
    write(folder / "mmlu" / "test.jsonl", *mmlu[:items])
    write(folder / "mmlu" / "dev.jsonl", *mmlu[ITEMS:])
    write(folder / "arc" / "test.jsonl", *arc[:items])
    return {"mmlu": folder / "mmlu", "arc": folder / "arc"}
