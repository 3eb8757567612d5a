"""Rows with two answers from rows with one: what a person wrote, and how the base itself goes on, greedily.

python benchmarks/preference_pairs.py MODEL ROWS OUT [--count 400] [--tokens 32] [--by flora_client]
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

LONGEST = 300
"""Characters of a prompt and its answer together: longer rows would be cut."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder of the base")
    parser.add_argument("rows", type=Path, help="JSON lines with instruction, input and output")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--count", type=int, default=400, help="rows at most")
    parser.add_argument("--tokens", type=int, default=32, help="of the base's answer at most")
    parser.add_argument("--by", default="flora_client", help="column that is copied, for the split")
    args = parser.parse_args()
    settings = ModelSettings(base=args.model, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    base = load(settings, AdapterSettings(rank=1, targets=["all-linear"]), tokenizer=tokenizer, root=Path(), seed=0)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    short = [row for row in rows if len(row["instruction"]) + len(row["input"]) + len(row["output"]) <= LONGEST]
    with args.out.open("w") as file, torch.inference_mode():
        for row in short[: args.count]:
            ids = tokenizer(prompt_of("plain", row["instruction"], row["input"]))["input_ids"]
            own = continue_text(base.model, base, ids, new_tokens=args.tokens).strip()
            if own:
                pair = {"instruction": row["instruction"], "input": row["input"], "chosen": row["output"]}
                more = {args.by: row[args.by]} if args.by in row else {}
                file.write(json.dumps({**pair, "rejected": own, **more}) + "\n")


if __name__ == "__main__":
    main()
