"""Which blocks an emulator keeps, and an emulator.json that describes none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.model.emulator_facts import (
    ENDS,
    MAX_BYTES,
    NAME,
    EmulatorFacts,
    Select,
    encode,
    middle_layers,
    read,
    resolve_layers,
    true_name,
)

FACTS = EmulatorFacts(
    base="true",
    base_digest="d" * 64,
    base_blocks=6,
    blocks="model.layers",
    front=1,
    back=1,
    layers=[0, 1, 4, 5],
    kind="drop",
    ratio=0.5,
    select="round",
    codes=None,
    dtype="float32",
    seed=0,
    distilled=None,
    digests={"float32": "e" * 64},
)


def test_what_the_original_keeps_and_what_federatedscope_does() -> None:
    rounded = middle_layers(32, 2, 2, 0.5, "round")
    cut_off = middle_layers(32, 2, 2, 0.5, "floor")
    assert (len(rounded), len(cut_off)) == (14, 14)
    # 28 blocks between the ends, 14 of them kept: the places differ from the seventh on.
    assert [number - 2 for number in rounded][6:9] == [12, 15, 17]
    assert [number - 2 for number in cut_off][6:9] == [12, 14, 16]


def test_by_hand() -> None:
    assert middle_layers(5, 1, 1, 0.0, "round") == [1, 2, 3]
    assert middle_layers(5, 1, 1, 0.3, "round") == [1, 3]
    assert middle_layers(5, 1, 1, 0.6, "round") == [1]  # one block: the first, and no division by zero
    assert middle_layers(6, 0, 2, 0.25, "floor") == [0, 1, 3]


@given(
    blocks=st.integers(2, 100),
    front=st.integers(0, 50),
    back=st.integers(0, 50),
    drop=st.floats(0, 0.999),
    select=st.sampled_from(("round", "floor")),
)
def test_what_is_kept_is_in_order_without_repeats_between_the_ends(
    blocks: int, front: int, back: int, drop: float, select: Select
) -> None:
    try:
        chosen = middle_layers(blocks, front, back, drop, select)
    except ConfigError:
        assert front + back >= blocks or front + back == 0 or round((blocks - front - back) * (1 - drop)) < 1
        return
    assert chosen == sorted(set(chosen))
    assert front <= chosen[0]
    assert chosen[-1] < blocks - back
    assert len(chosen) == round((blocks - front - back) * (1 - drop))
    assert chosen[0] == front
    assert len(chosen) == 1 or chosen[-1] == blocks - back - 1


@pytest.mark.parametrize(
    ("front", "back", "drop", "words"),
    [
        (3, 3, 0.5, "leave at least one block between the ends"),
        (4, 4, 0.5, "fewer than 6 blocks in both ends together; got 4 \\+ 4"),
        (-1, 1, 0.5, "front: expected 0 or more"),
        (0, 0, 0.5, "at least one block in front or back"),
        (1, 1, 1.0, "drop: expected a share from 0 to below 1 of the middle; got 1"),
        (1, 1, float("nan"), "a share from 0 to below 1"),
        (1, 1, -0.1, "a share from 0 to below 1"),
        (1, 1, 0.95, "a share that leaves at least one of the 4 blocks of the middle; got 0.95; e.g. 0.75"),
    ],
)
def test_ends_and_shares_that_leave_no_middle(front: int, back: int, drop: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        middle_layers(6, front, back, drop, "round")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(encode(FACTS))
    assert read(tmp_path) == FACTS
    assert (FACTS.kept, list(FACTS.ends)) == (2, [0, 3])


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [0, 1, 4, 4]},
        {"layers": [1, 2, 4, 5]},
        {"layers": [0, 4, 1, 5]},
        {"layers": [0, 2, 2, 5]},
        {"layers": [0, 5]},
        {"layers": []},
        {"layers": [0, 1, 4, 5.0]},
        {"layers": [0, True, 4, 5]},
        {"layers": "0145"},
        {"layers": [0, 1, 99, 5]},
        {"front": 0, "back": 0},
        {"front": 9},
        {"back": -1},
        {"back": 10**12},
        {"base_blocks": 10**30},
        {"kind": "whole"},
        {"select": None},
        {"dtype": "int8"},
        {"base_digest": 7},
        {"digests": ["e"]},
        {"digests": {"float32": 1}},
        {"format": 2},
        {"extra": 1},
    ],
)
def test_facts_of_no_emulator_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    content = {**json.loads(encode(FACTS)), **change}
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"{NAME}: expected the facts of an emulator; got .*export it again"):
        read(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * (MAX_BYTES + 1), b'{"format": 1}'])
def test_bytes_that_are_no_facts_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(ConfigError, match="expected the facts of an emulator"):
        read(tmp_path)


def test_ends_are_numbers_of_the_emulator(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(encode(FACTS))
    assert resolve_layers(ENDS, tmp_path, blocks=range(4), dtype="float32", digest="e" * 64) == "0, 3"
    assert resolve_layers("1-2", tmp_path / "none") == "1-2"
    assert resolve_layers(None, tmp_path / "none") is None
    with pytest.raises(ConfigError, match=r"4 blocks, as in emulator\.json; got 6"):
        resolve_layers(ENDS, tmp_path, blocks=range(6))
    for dtype, digest in (("float32", "f" * 64), ("bfloat16", "e" * 64)):
        with pytest.raises(ConfigError, match=r"expected the weights that emulator\.json is of"):
            resolve_layers(ENDS, tmp_path, blocks=range(4), dtype=dtype, digest=digest)
    with pytest.raises(ConfigError, match=r"expected the folder of an emulator.*name the layers by number"):
        resolve_layers(ENDS, tmp_path / "none")


def test_names_of_the_true_base() -> None:
    assert true_name("model.layers.0.mlp.up_proj", FACTS) == "model.layers.0.mlp.up_proj"
    assert true_name("model.layers.3.mlp.up_proj", FACTS) == "model.layers.5.mlp.up_proj"
    assert true_name("model.layers.3", FACTS) == "model.layers.5"
    assert true_name("model.norm.weight", FACTS) == "model.norm.weight"
    for name in ("model.layers.1.mlp", "model.layers.2", "model.layers.4.mlp", "model.layers.x"):
        with pytest.raises(ConfigError, match="changes of the ends alone"):
            true_name(name, FACTS)
