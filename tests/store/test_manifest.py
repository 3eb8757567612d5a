"""A folder's manifest finds every changed byte, and nothing that is not listed passes for a part of a result."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FedtuneError, StoreError
from fedtune.lora.adapter import Factors
from fedtune.store import manifest, peft
from fedtune.store.peft_import import read_adapter
from fedtune.tensors import digest
from tests.store.test_result import TARGET

FACTS = {"fedtune": "0.3.0", "name": "tiny", "round": 2, "base": {"name": "base", "digest": "ab" * 32}, "labels": ["ü"]}
RNG = np.random.default_rng(0)
ADAPTER = {
    f"layers.{n}.q": Factors(RNG.normal(size=(2, 8)).astype(np.float32), RNG.normal(size=(8, 2)).astype(np.float32))
    for n in range(2)
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return peft.write(tmp_path / "adapter", ADAPTER, {}, TARGET, FACTS)


def flips(folder: Path, count: int | None, seed: int = 0) -> list[tuple[str, int, int]]:
    """File, byte and bit of flips in every file: drawn from a seed, or of all bytes, one bit of each."""
    draw, chosen = random.Random(seed), []
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        places = range(size) if count is None else draw.sample(range(size), min(size, count))
        chosen += [(path.name, at, draw.randrange(8)) for at in places]
    return chosen


def flip(path: Path, at: int, bit: int) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    return whole


def refused(folder: Path) -> bool:
    """Tell whether both readers of adapters refuse a folder, in one sentence that names it."""
    reasons = []
    for read in (peft.read, read_adapter):
        try:
            read(folder)
        except FedtuneError as error:
            reasons.append(str(error))
    assert all(str(folder) in reason and "expected" in reason and "\n" not in reason for reason in reasons)
    return len(reasons) == 2


def check_flips(folder: Path, count: int | None, cases: Callable[[int], None]) -> None:
    """Flip bits one after the other, each of which both readers must refuse."""
    for name, at, bit in flips(folder, count):
        whole = flip(folder / name, at, bit)
        assert refused(folder), f"{name}, byte {at}, bit {bit}"
        (folder / name).write_bytes(whole)
        cases(1)
    assert not refused(folder)


@pytest.mark.guarantee("G19")
def test_no_flipped_bit_of_an_adapter_is_read(folder: Path, cases: Callable[[int], None]) -> None:
    check_flips(folder, 60, cases)


@pytest.mark.slow
@pytest.mark.guarantee("G19")
def test_no_flipped_byte_at_all_is_read(folder: Path, cases: Callable[[int], None]) -> None:
    check_flips(folder, None, cases)


def test_what_was_written_is_read_with_its_facts(folder: Path) -> None:
    opened = manifest.open_folder(folder)
    assert (opened.facts, opened.remark) == (FACTS, "")
    assert opened.listed is not None
    assert set(opened.listed) == {"adapter_model.safetensors", "adapter_config.json"}
    assert opened.read("adapter_config.json") == (folder / "adapter_config.json").read_bytes()
    opened.check()
    assert manifest.source(folder) == {"manifest": opened.digest}


@pytest.mark.parametrize("name", ["adapter_model.bin", "chat_template.jinja", "modeling.py", "nested/adapter.json"])
def test_a_file_that_is_not_listed_is_refused(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(StoreError, match=f"{name}: expected only the files that fedtune.json lists; move it elsewhere"):
        peft.read(folder)


def test_files_that_begin_with_a_dot_belong_to_nothing(folder: Path) -> None:
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state").write_text("x")
    assert not refused(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "fedtune.json"])
def test_a_missing_file_and_a_link_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    # An adapter of others has no manifest: only within a run is one that has lost it refused by both.
    with pytest.raises(StoreError, match=name.partition(".")[0]):
        peft.read(folder)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(StoreError, match=f"{name}: expected"):
        peft.read(folder)
    with pytest.raises(StoreError, match=f"{name}: expected"):
        read_adapter(folder)


def test_an_adapter_of_a_run_without_its_manifest_is_refused(folder: Path) -> None:
    (folder.parent / "recipe.toml").write_text("")
    assert read_adapter(folder.parent).manifest
    (folder / "fedtune.json").unlink()
    with pytest.raises(StoreError, match=r"fedtune\.json: expected this file, which is written last; got none"):
        read_adapter(folder.parent)


def test_a_pipe_in_the_place_of_a_file_does_not_block(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    opened = manifest.parse((folder / "fedtune.json").read_bytes(), folder)
    with pytest.raises(StoreError, match="expected a file; got something else"):
        opened.read("adapter_model.safetensors")
    with pytest.raises(StoreError, match="got a link or a device"):
        manifest.open_folder(folder)


def test_a_file_in_a_folder_below_is_listed_and_checked(tmp_path: Path) -> None:
    (tmp_path / "ratio-0.5" / "model").mkdir(parents=True)
    (tmp_path / "ratio-0.5" / "model" / "config.json").write_text("{}")
    manifest.write(tmp_path / "ratio-0.5" / "model", {})
    manifest.write(tmp_path, {})
    opened = manifest.open_folder(tmp_path)
    assert opened.listed is not None
    # A folder within has a manifest of its own, which is a file like others here.
    assert list(opened.listed) == ["ratio-0.5/model/config.json", "ratio-0.5/model/fedtune.json"]
    opened.check()
    (tmp_path / "ratio-0.5" / "model" / "fedtune.json").write_text("{}")
    with pytest.raises(StoreError, match=r"model/fedtune\.json: expected the \d+ bytes"):
        opened.check()


def test_results_of_0_2_0_are_read_with_a_remark(folder: Path) -> None:
    (folder / "fedtune.json").write_text(json.dumps({**FACTS, "fedtune": "0.2.0"}, indent=1) + "\n")
    assert "not checked: written by fedtune 0.2.0" in manifest.open_folder(folder).remark
    assert digest(dict(peft.read(folder)[1])) == digest({})
    read = read_adapter(folder)
    assert (read.base_digest, read.manifest) == ("ab" * 32, "")
    assert read.remark == f"{folder}: not checked: written by fedtune 0.2.0, which listed no digests"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("\xff", "expected JSON"),
        ("[]", "expected a JSON object; got a list"),
        ("{}", "expected the digests of the files beside it; got none"),
        ('{"fedtune": "0.3.0"}', "expected the digests of the files beside it; got none"),
        ('{"manifest": []}', "expected it as it was written"),
        ('{"manifest": {"format": 1, "files": {"a": 3}}}', "expected it as it was written"),
        ('{"manifest": {"format": 2, "files": {}}}', "expected a manifest of format 1; got 2"),
        ('{"fedtune": "0.2.0", "manifest": {"format": 1, "files": {}}}', "expected it as it was written"),
    ],
)
def test_a_damaged_manifest_is_one_sentence(text: str, message: str, folder: Path) -> None:
    (folder / "fedtune.json").write_bytes(text.encode("latin-1"))
    for read in (peft.read, read_adapter):
        with pytest.raises(StoreError, match=rf"fedtune\.json: {message}.*;"):
            read(folder)


def test_the_same_content_in_another_spelling_is_refused(folder: Path) -> None:
    content = json.loads((folder / "fedtune.json").read_text())
    (folder / "fedtune.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match="expected it as it was written"):
        peft.read(folder)


def test_a_file_may_not_grow_while_it_is_read(folder: Path) -> None:
    opened = manifest.open_folder(folder)
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 34)  # sparse: none of it is read
    with pytest.raises(StoreError, match=r"expected the 688 bytes of fedtune\.json; got more"):
        opened.read("adapter_model.safetensors")


def test_a_folder_that_a_crash_left_without_its_last_file_passes_for_nothing(tmp_path: Path) -> None:
    peft.put(tmp_path, ADAPTER, {}, TARGET)
    with pytest.raises(StoreError, match="which is written last"):
        peft.read(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20, deadline=None)
@given(facts=st.dictionaries(st.text().filter(lambda key: key != "manifest"), JSON, max_size=4), data=st.data())
def test_any_facts_come_back_and_no_other_byte_passes(facts: dict[str, Any], data: st.DataObject) -> None:
    listed = {"a": manifest.FileFacts("0" * 64, 3)}
    encoded = manifest.encode(facts, listed)
    opened = manifest.parse(encoded, Path("x"))
    assert (opened.facts, opened.listed) == (facts, listed)
    at, other = data.draw(st.integers(0, len(encoded) - 1)), data.draw(st.integers(1, 255))
    with pytest.raises(StoreError):
        manifest.parse(encoded[:at] + bytes([encoded[at] ^ other]) + encoded[at + 1 :], Path("x"))
