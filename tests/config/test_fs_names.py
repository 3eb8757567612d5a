from __future__ import annotations

import pytest

from fedtune.config.federatedscope import convert
from fedtune.config.fs_keys import KEYS
from fedtune.config.fs_names import FREE, OTHERS, is_known

SMALL = {
    "federate.client_num": 3,
    "data.type": "dolly-15k@llm",
    "data.splitter": "iid",
    "model.type": "some/llama@huggingface_llm",
}


def test_known_names_are_whole() -> None:
    assert is_known("trainer.sam.rho")
    assert is_known("train.optimizer.anything")
    assert not any(map(is_known, ("trainer.sam", "trainer.sam.rho.x", "trainer.foo", "train.optimizers.lr", "")))


@pytest.mark.parametrize("table", FREE)
def test_any_name_may_be_in_a_table_that_is_passed_on(table: str) -> None:
    [entry] = [entry for entry in convert({**SMALL, f"{table}zz9": 3}).entries if entry.key == f"{table}zz9"]
    assert entry.known
    assert "did you mean" not in entry.note
    slips = [key for key in KEYS if key.startswith(table)]
    for key in slips:
        [entry] = [entry for entry in convert({**SMALL, f"{key}s": 3}).entries if entry.key == f"{key}s"]
        assert entry.note.endswith(f"did you mean {key}?") or entry.note.startswith("no effect: ")


def test_every_name_without_a_counterpart_says_why() -> None:
    entries = {entry.key: entry for entry in convert({**SMALL, **dict.fromkeys(sorted(OTHERS), 1)}).entries}
    assert all(entries[key].known and entries[key].note and not entries[key].ours for key in OTHERS)
    assert not OTHERS & KEYS.keys()
