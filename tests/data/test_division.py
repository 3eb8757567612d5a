from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedtune.data.federation import Federation, digest, federate
from fedtune.data.partition_file import all_rows, write_division
from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ConfigError

TEXTS = ("apple", "berry", "cherry")


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with 60 rows and 18 test rows of three kinds, and one test row of a fourth."""
    write(tmp_path / "x.jsonl", [{"text": f"{kind} {row}", "kind": kind} for row in range(20) for kind in TEXTS])
    tests = [{"text": f"{kind} at {row}", "kind": kind} for row in range(6) for kind in TEXTS]
    write(tmp_path / "t.jsonl", [*tests, {"text": "damson", "kind": "damson"}])
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(folder: Path, tokenizer: Any, split: Split, **options: Any) -> Federation:
    settings = DataSettings("x.jsonl", split, template="plain", **options)
    return federate(settings, tokenizer=tokenizer, task="causal", seed=3, root=folder)


def kinds(examples: Any) -> Counter[str]:
    return Counter(example.reference.split()[0] for example in examples)


@pytest.mark.parametrize(
    "split",
    [
        Split("iid", clients=4),
        Split("sizes", sizes=(5, 9)),
        Split("dirichlet", by="kind", clients=3, alpha=1.0),
        Split("dirichlet", by="kind", clients=3, alpha=1.0, match="train"),
        Split("meta", by="kind", clients=2, match="train"),
        Split("key", by="kind", only=("berry",)),
    ],
    ids=lambda split: f"{split.kind}-{split.match}",
)
def test_the_partition_file_of_a_run_gives_the_same_federation(folder: Path, tokenizer: Any, split: Split) -> None:
    first = load(folder, tokenizer, split, test="t.jsonl")
    assert first.division is not None
    text = write_division(first.division)
    (folder / "p.jsonl").write_text(text)
    again = load(folder, tokenizer, Split("file", file="p.jsonl", match=split.match), test="t.jsonl")
    assert again.division is not None
    assert write_division(again.division) == text
    assert digest(again) == digest(first)
    for name, shard in first.clients.items():
        assert [e.reference for e in again.clients[name].held_out] == [e.reference for e in shard.held_out]


def test_matched_clients_are_tested_on_their_own_mix_and_hold_out_no_training_row(folder: Path, tokenizer: Any) -> None:
    split = Split("meta", by="kind", clients=3, match="train")
    federation = load(folder, tokenizer, split, test="t.jsonl")
    for name, shard in federation.clients.items():
        assert kinds(shard.train) == {name: 20}
        assert kinds(shard.held_out) == {name: 6}
    assert len(federation.test) == 19
    note = "data.split.match: 18 of 19 test rows go to clients by their training rows; 1 of labels"
    assert note in str(federation.notes)


def test_matched_dirichlet_clients_have_the_training_shares_of_each_kind(folder: Path, tokenizer: Any) -> None:
    split = Split("dirichlet", by="kind", clients=3, alpha=0.7, match="train")
    federation = load(folder, tokenizer, split, test="t.jsonl")
    scored = [example.reference for shard in federation.clients.values() for example in shard.held_out]
    assert len(scored) == len(set(scored)) == 18
    assert sum(len(shard.train) for shard in federation.clients.values()) == 60
    for shard in federation.clients.values():
        for kind in TEXTS:
            assert abs(kinds(shard.held_out)[kind] - 6 * kinds(shard.train)[kind] / 20) <= 1


def test_rows_that_no_client_holds_are_listed(folder: Path, tokenizer: Any) -> None:
    division = load(folder, tokenizer, Split("sizes", sizes=(5, 9)), limit=30).division
    assert division is not None
    assert len(division.left_out) == 60 - 14
    held = {row for own in division.clients.values() for row in all_rows(own).tolist()}
    assert held | set(division.left_out.tolist()) == set(range(60))


def test_the_mix_of_a_split_by_kind_is_counted(folder: Path, tokenizer: Any) -> None:
    mix = load(folder, tokenizer, Split("meta", by="kind", clients=2)).mix
    assert mix is not None
    assert (mix.label, mix.labels) == ("kind", list(TEXTS))
    assert mix.counts == {"apple": [20, 0, 20], "berry": [0, 20, 0]}
    assert load(folder, tokenizer, Split("iid", clients=2)).mix is None


def test_illegal_pairs_are_refused(folder: Path, tokenizer: Any) -> None:
    line = {"client": "a", "rows": list(range(50)), "held_out": list(range(50, 60))}
    (folder / "p.jsonl").write_text(json.dumps(line))
    by_file, tests = Split("file", file="p.jsonl"), {"test": "t.jsonl"}
    for split, options, text in (
        (Split("meta", by="kind", clients=2, match="train"), {}, r"data\.test: expected test files"),
        (Split("iid", clients=2, match="train"), tests, r"data\.split\.match: expected no value, for 'iid'"),
        (by_file, {"limit": 3}, r"data\.limit: expected none with data\.split\.kind = 'file'"),
        (Split("file"), {}, r"data\.split\.file: expected a value, which 'file' needs"),
        (Split("meta", by="kind"), {}, r"data\.split\.clients: expected a value, which 'meta' needs"),
        (replace(by_file, match="train", by="kind"), tests, "without rows that are held out, beside"),
        (replace(by_file, min_examples=61), {}, "at least 61 examples per client; got 60 for a"),
        (Split("key", by="text", only=("z",)), {}, "names of clients"),
    ):
        with pytest.raises(ConfigError, match=text):
            load(folder, tokenizer, split, **options)
    (folder / "p.jsonl").write_text(json.dumps({"client": "a", "rows": list(range(60))}))
    with pytest.raises(ConfigError, match=r"data\.split\.by: expected the column of the label"):
        load(folder, tokenizer, replace(by_file, match="train"), test="t.jsonl")
    write(folder / "t.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError, match=r"data\.split\.by: expected column 'kind'"):
        load(folder, tokenizer, Split("meta", by="kind", clients=2, match="train"), test="t.jsonl")
