"""Rows with two answers from rows with one: what a person wrote, and how the base itself goes on, greedily.

python benchmarks/preference_pairs.py [ROWS] [--count 8] [--model DIR] [--tokens 32] > pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fedtune.data.templates import prompt_of
from fedtune.model.base import load, load_tokenizer
from fedtune.model.evaluate import continue_text
from fedtune.model.settings import AdapterSettings, ModelSettings

SHARED = Path(__file__).parents[2] / "shared"
LONGEST = 300
"""Characters of a prompt and its answer together: longer rows would be cut."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    dolly = SHARED / "data/dolly/small_dev.jsonl"
    parser.add_argument("rows", type=Path, nargs="?", default=dolly, help="JSON lines: instruction, input, output")
    parser.add_argument("--model", default=str(SHARED / "models/stories260k-hf"), help="folder of the base")
    parser.add_argument("--count", type=int, default=8, help="rows at most")
    parser.add_argument("--tokens", type=int, default=32, help="of the base's answer at most")
    args = parser.parse_args()
    settings = ModelSettings(base=args.model, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    base = load(settings, AdapterSettings(rank=1, targets=["all-linear"]), tokenizer=tokenizer, root=Path(), seed=0)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    short = [row for row in rows if len(row["instruction"]) + len(row["input"]) + len(row["output"]) <= LONGEST]
    with torch.inference_mode():
        for row in short[: args.count]:
            ids = tokenizer(prompt_of("plain", row["instruction"], row["input"]))["input_ids"]
            own = continue_text(base.model, base, ids, new_tokens=args.tokens).strip()
            if own:
                pair = {"instruction": row["instruction"], "input": row["input"], "chosen": row["output"]}
                print(json.dumps({**pair, "rejected": own}))


if __name__ == "__main__":
    main()
