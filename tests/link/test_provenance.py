"""What a coordinator has signed is verified by the roster alone, and no changed byte, name, role or time passes."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError, FedtuneError, StoreError, WireError
from fedtune.link import provenance
from fedtune.link.pki import authority
from fedtune.link.pki.dsse import canonical_json, make_dsse
from fedtune.link.pki.identity import load_identity
from fedtune.link.pki.roster import Roster
from fedtune.link.pki.signing import pae
from fedtune.link.provenance import Signer, load_roster, sign_folder, verify_folder
from fedtune.store import manifest, peft
from fedtune.tensors import Tensors
from tests.link.ceremony import enroll_parties
from tests.store.test_manifest import ADAPTER, FACTS, flips
from tests.store.test_result import TARGET

NOW = int(time.time())
SAVED: Tensors = {}
TRAINING = {"journal": {"records": 7, "head": "ab" * 32}, "rounds": [{"round": 1, "accepted": 3, "set": "cd" * 32}]}


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return enroll_parties(tmp_path_factory.mktemp("sites"), now=NOW)


def signer_at(folder: Path, role: str = "coordinator") -> Signer:
    identity = load_identity(folder, role=role, now=NOW)
    return Signer(identity.federation, identity.name, identity.key)


@pytest.fixture
def signer(parties: Mapping[str, Path]) -> Signer:
    return signer_at(parties["server"])


@pytest.fixture
def roster(parties: Mapping[str, Path]) -> Roster:
    return load_roster(parties["server"] / "roster", None)[0]


@pytest.fixture
def folder(tmp_path: Path, signer: Signer) -> Path:
    path = peft.write(tmp_path / "adapter", ADAPTER, SAVED, TARGET, {**FACTS, "training": TRAINING})
    assert sign_folder(path, signer, now=NOW) == path / "manifest.dsse"
    return path


def test_the_encoding_that_is_signed_is_that_of_the_specification() -> None:
    """The test vector of DSSE 1.0, protocol.md: type and payload with their lengths in decimal."""
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_what_was_signed_is_a_statement_of_in_toto_about_every_file(folder: Path, roster: Roster) -> None:
    envelope = json.loads((folder / "manifest.dsse").read_text())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert [entry["name"] for entry in statement["subject"]] == [
        "adapter_config.json", "adapter_model.safetensors", "fedtune.json",
    ]  # fmt: skip
    verified = verify_folder(folder, roster, now=NOW)
    assert (verified.signer.name, verified.federation, verified.signed_at, verified.files) == ("server", "care", NOW, 3)
    assert verified.predicate == statement["predicate"]
    assert verified.predicate["training"] == TRAINING
    assert verified.predicate["base"] == FACTS["base"]


def refused(folder: Path, roster: Roster) -> bool:
    try:
        verify_folder(folder, roster, now=NOW)
    except FedtuneError:
        return True
    return False


def check_flips(folder: Path, roster: Roster, count: int, cases: Callable[[int], None]) -> None:
    """Flip bits of all files, the signature among them, each of which must be refused."""
    for name, at, bit in flips(folder, count):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        assert refused(folder, roster), f"{name}, byte {at}, bit {bit}"
        (folder / name).write_bytes(whole)
        cases(1)
    assert not refused(folder, roster)


@pytest.mark.guarantee("G19")
def test_no_flipped_bit_of_adapter_manifest_or_signature_passes(
    folder: Path, roster: Roster, cases: Callable[[int], None]
) -> None:
    check_flips(folder, roster, 30, cases)


@pytest.mark.slow
@pytest.mark.guarantee("G19")
def test_a_thousand_flipped_bits_do_not_pass(folder: Path, roster: Roster, cases: Callable[[int], None]) -> None:
    check_flips(folder, roster, 300, cases)


@pytest.mark.guarantee("G19")
def test_files_and_manifest_changed_together_do_not_pass(folder: Path, roster: Roster) -> None:
    (folder / "adapter_config.json").write_text("{}")
    manifest.write(folder, FACTS)
    manifest.open_folder(folder).check()  # the manifest alone is no proof
    with pytest.raises(StoreError, match=r"fedtune\.json: expected the digest \w{12}, as was signed; got"):
        verify_folder(folder, roster, now=NOW)


def test_files_that_are_missing_added_or_linked_do_not_pass(folder: Path, roster: Roster, tmp_path: Path) -> None:
    (folder / "extra.py").write_text("x")
    with pytest.raises(StoreError, match=r"extra\.py: expected only the files"):
        verify_folder(folder, roster, now=NOW)
    (folder / "extra.py").unlink()
    (folder / "adapter_config.json").rename(tmp_path / "moved")
    with pytest.raises(StoreError, match="expected this file, which fedtune.json lists"):  # noqa: RUF043
        verify_folder(folder, roster, now=NOW)
    (folder / "adapter_config.json").symlink_to(tmp_path / "moved")
    with pytest.raises(StoreError, match="got a link"):
        verify_folder(folder, roster, now=NOW)
    (folder / "manifest.dsse").unlink()
    with pytest.raises(StoreError, match=r"manifest\.dsse: expected a signature; got none"):
        verify_folder(folder, roster, now=NOW)


@pytest.mark.guarantee("G19")
def test_a_wrong_signer_is_refused(folder: Path, roster: Roster, parties: Mapping[str, Path], tmp_path: Path) -> None:
    sign_folder(folder, signer_at(parties["site-a"], "client"), now=NOW)
    with pytest.raises(StoreError, match="expected a signature by a coordinator; got one by site-a, a client"):
        verify_folder(folder, roster, now=NOW)
    # In the coordinator's name, with a key of the roster.
    site = signer_at(parties["site-a"], "client")
    sign_folder(folder, replace(site, name="server"), now=NOW)
    with pytest.raises(StoreError, match="got one by site-a"):
        verify_folder(folder, roster, now=NOW)
    stranger = enroll_parties(tmp_path / "other", now=NOW)  # another federation of the same name
    sign_folder(folder, signer_at(stranger["server"]), now=NOW)
    with pytest.raises(StoreError, match=r"expected one signature by a key of care's roster \(version"):
        verify_folder(folder, roster, now=NOW)
    sign_folder(folder, replace(signer_at(parties["server"]), federation="other"), now=NOW)
    with pytest.raises(StoreError, match="expected a statement by server of care"):
        verify_folder(folder, roster, now=NOW)


@pytest.mark.guarantee("G19")
def test_a_time_of_signing_outside_of_the_enrolment_is_refused(folder: Path, signer: Signer, roster: Roster) -> None:
    server = roster.parties["server"]
    for at in (server.not_before - 1, server.not_after + 1, 2**53):
        sign_folder(folder, signer, now=at)
        with pytest.raises(StoreError, match="expected a time of signing within"):
            verify_folder(folder, roster, now=2**53)
    sign_folder(folder, signer, now=NOW + 301)
    with pytest.raises(StoreError, match="expected a time of signing in the past"):
        verify_folder(folder, roster, now=NOW)
    sign_folder(folder, signer, now=NOW)
    # Signed in time: the artefact outlives the certificate.
    verify_folder(folder, roster, now=server.not_after + 10**6)


@pytest.mark.guarantee("G19")
def test_a_revoked_signer_is_refused_whenever_it_signed(
    folder: Path, tmp_path: Path, parties: Mapping[str, Path]
) -> None:
    shutil.copytree(parties["ca"], tmp_path / "ca")
    revoked = authority.revoke(tmp_path / "ca", "server", now=NOW)
    with pytest.raises(StoreError, match="expected a signer that is not revoked; got server; have it signed again"):
        verify_folder(folder, revoked, now=NOW)


def test_a_renewed_certificate_leaves_what_was_signed_before_it(
    folder: Path, tmp_path: Path, parties: Mapping[str, Path]
) -> None:
    from fedtune.link.pki import enrollment

    ca, later = shutil.copytree(parties["ca"], tmp_path / "ca"), NOW + 60 * 86_400
    place = shutil.copytree(parties["server"], tmp_path / "server")
    request = enrollment.make_request(place, name="server", org="org-server", role="coordinator", hosts=("localhost",))
    authority.sign_request(ca, request, now=later)
    renewed = authority.current_roster(ca)
    assert renewed.parties["server"].not_before <= NOW < later < renewed.parties["server"].not_after
    assert verify_folder(folder, renewed, now=later).signed_at == NOW


def test_a_roster_must_be_signed_by_the_root_and_valid(parties: Mapping[str, Path], tmp_path: Path) -> None:
    file = parties["server"] / "roster"
    roster, key = load_roster(file, None)
    assert load_roster(parties["ca"] / "roster", None)[1] == key == load_roster(file, parties["ca"] / "roster.pub")[1]
    alone = shutil.copy(file, tmp_path / "roster")
    with pytest.raises(ConfigError, match=r"--root: expected the public key .* give --root KEY"):
        load_roster(Path(alone), None)
    with pytest.raises(ConfigError, match=r"--roster: expected a roster that is valid.*--expired-roster"):
        load_roster(file, None, now=roster.valid_until + 1)
    assert load_roster(file, None, expired=True, now=roster.valid_until + 1)[0] == roster
    other = enroll_parties(tmp_path / "other", now=NOW)
    with pytest.raises(WireError, match="expected a signature by the key"):
        load_roster(file, other["ca"] / "roster.pub")


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": "https://slsa.dev/provenance/v1"},
        {"subject": []},
        {"subject": [{"name": "a"}]},
        {"subject": 3},
        {"predicate": None},
        {"predicate": {"federation": "care", "signer": "server", "signed_at": "now"}},
        {"predicate": {"federation": "care", "signer": "server", "signed_at": True}},
    ],
)
def test_another_statement_by_the_right_key_is_refused(
    change: Mapping[str, Any], folder: Path, signer: Signer, roster: Roster
) -> None:
    payload = json.loads(base64.b64decode(json.loads((folder / "manifest.dsse").read_text())["payload"]))
    envelope = make_dsse(provenance.KIND, canonical_json({**payload, **change}), signer.key)
    (folder / "manifest.dsse").write_bytes(envelope)
    assert refused(folder, roster)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 10_000, b"\xff", b"null", b'{"payload":1,"payloadType":2,"signatures":[]}']
)
def test_bytes_that_are_no_envelope_are_refused(data: bytes, folder: Path, roster: Roster) -> None:
    (folder / "manifest.dsse").write_bytes(data)
    assert refused(folder, roster)


def test_a_signature_for_another_purpose_is_none(folder: Path, signer: Signer, roster: Roster) -> None:
    """The same key signs messages of the link; their type is part of what is signed."""
    envelope = json.loads((folder / "manifest.dsse").read_text())
    other = json.loads(
        make_dsse("application/vnd.fedtune.roster.v1+json", base64.b64decode(envelope["payload"]), signer.key)
    )
    (folder / "manifest.dsse").write_bytes(canonical_json({**envelope, "signatures": other["signatures"]}) + b"\n")
    with pytest.raises(StoreError, match="expected a signature by server that holds"):
        verify_folder(folder, roster, now=NOW)


def test_two_signatures_are_one_too_many(folder: Path, roster: Roster) -> None:
    envelope = json.loads((folder / "manifest.dsse").read_text())
    envelope["signatures"] *= 2
    (folder / "manifest.dsse").write_bytes(canonical_json(envelope) + b"\n")
    with pytest.raises(StoreError, match="expected one signature"):
        verify_folder(folder, roster, now=NOW)


def test_only_what_holds_is_signed(folder: Path, signer: Signer) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(StoreError, match="expected the"):
        sign_folder(folder, signer, now=NOW)
    (folder / "fedtune.json").write_text('{"fedtune": "0.2.0"}')
    with pytest.raises(StoreError, match=r"not checked: written by fedtune 0\.2\.0.*expected a manifest to sign"):
        sign_folder(folder, signer, now=NOW)


@pytest.mark.guarantee("G19")
def test_a_signed_statement_is_held_against_its_folder_without_a_roster(folder: Path, signer: Signer) -> None:
    file = folder / "manifest.dsse"
    assert provenance.check_statement(manifest.open_folder(folder))
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(StoreError, match="sign the folder again with fedtune sign"):
        provenance.check_statement(manifest.open_folder(folder))
    file.write_bytes(whole)
    other = peft.write(folder.parent / "other", ADAPTER, SAVED, TARGET, {**FACTS, "round": 99})
    (other / "manifest.dsse").write_bytes(whole)
    with pytest.raises(StoreError, match=r"manifest\.dsse: expected the digest"):
        provenance.check_statement(manifest.open_folder(other))
    (other / "manifest.dsse").unlink()
    assert not provenance.check_statement(manifest.open_folder(other))
