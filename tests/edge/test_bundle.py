"""A device takes the files that a coordinator of its roster has signed, and one line says what is wrong with others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from fedtune.edge import bundle
from fedtune.edge.bundle import BundleFacts, Module, read_bundle
from fedtune.errors import ConfigError, FedtuneError, StoreError
from fedtune.link.pki.identity import load_identity
from fedtune.link.pki.roster import Roster
from fedtune.link.provenance import Signer, load_roster, sign_folder
from fedtune.store import manifest
from tests.edge.bundles import FACTS, WEIGHT, write_bundle
from tests.link.ceremony import enroll_parties

NOW = int(time.time())
REQUIRED = [part.name for part in fields(BundleFacts) if part.default is part.default_factory is MISSING]


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return enroll_parties(tmp_path_factory.mktemp("sites"), now=NOW)


@pytest.fixture(scope="module")
def roster(parties: Mapping[str, Path]) -> Roster:
    return load_roster(parties["server"] / "roster", None)[0]


def sign(path: Path, folder: Path) -> Path:
    identity = load_identity(folder, role="coordinator", now=NOW)
    sign_folder(path, Signer(identity.federation, identity.name, identity.key), now=NOW)
    return path


def test_what_was_written_is_read(tmp_path: Path, parties: Mapping[str, Path], roster: Roster) -> None:
    path = sign(write_bundle(tmp_path / "base"), parties["server"])
    read = read_bundle(path, roster, now=NOW)
    assert (read.facts, read.base_name, read.base_digest, read.signer) == (FACTS, "tiny", "ab" * 32, "server")
    assert read.warnings == ()
    [entry] = read.manifest.entries
    assert (entry.name, entry.shape, entry.dtype) == ("layer.weight", WEIGHT.shape, "fp32")
    assert read.read("graph.onnx") == b"a graph"


@pytest.mark.guarantee("G4")
def test_a_bundle_without_a_signature_needs_the_owners_word(tmp_path: Path, roster: Roster) -> None:
    path = write_bundle(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"expected a bundle signed by a coordinator of care; .*unsigned_base = true"):
        read_bundle(path, roster, now=NOW)
    for read in (read_bundle(path, roster, unsigned=True, now=NOW), read_bundle(path)):
        [warning] = read.warnings
        assert read.signer == ""
        assert "no signature was checked" in warning


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("unsigned", [False, True])
def test_a_wrong_signature_is_never_taken(
    tmp_path: Path, parties: Mapping[str, Path], roster: Roster, unsigned: bool
) -> None:
    path = sign(write_bundle(tmp_path / "base"), parties["server"])
    stranger = enroll_parties(tmp_path / "others", now=NOW)
    forged = sign(write_bundle(tmp_path / "forged"), stranger["server"])
    with pytest.raises(StoreError, match="expected one signature by a key of care's roster"):
        read_bundle(forged, roster, unsigned=unsigned, now=NOW)
    (forged / "manifest.dsse").write_bytes((path / "manifest.dsse").read_bytes() + b" ")
    with pytest.raises(StoreError):
        read_bundle(forged, roster, unsigned=unsigned, now=NOW)


@pytest.mark.parametrize("name", ["graph.onnx", bundle.TENSORS, "fedtune.json"])
def test_a_changed_byte_is_found_without_any_signature(tmp_path: Path, name: str) -> None:
    path = write_bundle(tmp_path / "base")
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(StoreError, match="expected"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"layout": 2}, "expected a bundle of format 1; got .* of format 2; update this program"),
        ({"bank": "hadamard"}, "expected a bundle for the bank 'kron'; got .* for 'hadamard'; export the base again"),
        ({"runtime": "tvm"}, "runtime: expected"),
        ({"parameters": "many"}, "parameters: expected int"),
        ({"modules": {"layer": {"out": 3, "width": 2}}}, r"expected layer.weight of shape \(3, 2\)"),
        ({"transposed": True}, r"expected layer.weight of shape \(3, 2\)"),
        ({"layers": ["other.weight"]}, "expected the sizes of every layer"),
        ({"layers": ["x.weight"], "modules": {"x": {"out": 3, "width": 2}}}, "got no such tensor"),
        ({"eos_ids": [True]}, "eos_ids"),
        (
            {"pad_id": 4},
            r"fedtune.json: bundle.pad_id: expected a token of the vocabulary; got 4; get the bundle again",
        ),
        ({"pad_id": -1}, "pad_id: expected a token"),
        ({"pad_id": 2**70}, "pad_id: expected a token"),
        ({"bos_id": 4}, "bos_id: expected a token"),
        ({"positions": 1}, "positions: expected at least 2; got 1"),
        ({"vocabulary": 0}, "vocabulary: expected at least 1"),
        ({"parameters": -1}, "parameters: expected at least 1"),
        ({"modules": []}, "modules: expected"),
    ],
)
def test_one_line_says_what_is_wrong_with_the_facts(tmp_path: Path, edit: Mapping[str, Any], message: str) -> None:
    path = write_bundle(tmp_path / "base", edit=edit)
    with pytest.raises(FedtuneError, match=message) as caught:
        read_bundle(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_fact_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreError, match=key):
        read_bundle(write_bundle(tmp_path / "base", edit={key: None}))


def test_another_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; get the bundle again"):
        read_bundle(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"one without fedtune\.json"):
        read_bundle(tmp_path / "empty")
    path = write_bundle(tmp_path / "other")
    (path / "fedtune.json").unlink()
    manifest.write(path, {"name": "a run", "base": "cd"})
    with pytest.raises(ConfigError, match="expected a bundle of a base for devices"):
        read_bundle(path)


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_READ", 6)
    path = write_bundle(tmp_path / "base")
    with pytest.raises(StoreError, match=r"manifest.ftkm: expected at most 6 bytes"):
        read_bundle(path)


def test_a_module_is_its_sizes() -> None:
    assert FACTS.modules == {"layer": Module(out=2, width=3)}
