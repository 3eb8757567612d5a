from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import ConfigError, WireError
from fedtune.link.pki import authority, certificates, codes, enrollment, invitations
from fedtune.link.pki.identity import parse_root_key
from fedtune.link.pki.signing import fingerprint

Anchors: TypeAlias = tuple[bytes, bytes]
NOW = 1_800_000_000


@pytest.fixture
def anchors(tmp_path: Path) -> Anchors:
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    return (tmp_path / "ca" / "ca.crt").read_bytes(), parse_root_key((tmp_path / "ca" / "roster.pub").read_bytes())


def invite(folder: Path, anchors: Anchors, name: str = "anna", **changes: object) -> invitations.Code:
    given = {"address": "fl.example.org:9001", "server": "[::1]:9000", "org": "a", "hours": 24, "now": NOW, **changes}
    ca, root = anchors
    return invitations.invite(folder, name=name, ca=ca, root=root, **given)  # type: ignore[arg-type]


def kept(folder: Path) -> list[invitations.Invitation]:
    return [known for _, known in invitations.list_all(folder)]


def test_a_code_is_one_line_with_the_anchors_and_comes_back_whole(tmp_path: Path, anchors: Anchors) -> None:
    code = invite(tmp_path, anchors)
    line = invitations.encode(code)
    assert line.startswith("fedtune.invitation.")
    assert len(line) < 1000 < codes.MAX_PASTED
    assert invitations.decode(codes.decode("invitation", f"> {line[:90]}\n> {line[90:]}")) == code
    ca, root = anchors
    assert code.anchors == fingerprint(ca + enrollment.root_pem(root))


def test_the_issuer_keeps_no_secret(tmp_path: Path, anchors: Anchors) -> None:
    code = invite(tmp_path, anchors)
    (path,) = (tmp_path / "invitations").iterdir()
    assert code.seed.hex() not in path.read_text()
    assert invitations.text(code.seed) not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_a_proof_holds_for_one_request_and_one_code(tmp_path: Path, anchors: Anchors) -> None:
    first, second = invite(tmp_path, anchors), invite(tmp_path, anchors, "bob")
    identifier, signature = first.prove(b"request")
    known = invitations.find(tmp_path, identifier)
    assert known is not None
    assert (known.name, known.org, known.until) == ("anna", "a", NOW + 24 * 3600)
    assert known.is_proof(b"request", signature)
    assert not known.is_proof(b"another", signature)
    assert not known.is_proof(b"request", second.prove(b"request")[1])


def test_a_newer_code_for_a_name_ends_the_unused_one_before(tmp_path: Path, anchors: Anchors) -> None:
    old, _ = invite(tmp_path, anchors), invite(tmp_path, anchors)
    assert len(kept(tmp_path)) == 1
    assert invitations.find(tmp_path, old.prove(b"")[0]) is None


def test_a_used_code_is_kept_and_its_holder_does_not_change(tmp_path: Path, anchors: Anchors) -> None:
    identifier = invite(tmp_path, anchors).prove(b"")[0]
    known = invitations.find(tmp_path, identifier)
    assert known is not None
    invitations.claim(tmp_path, known, "ab")
    used = invitations.find(tmp_path, identifier)
    assert used is not None
    invitations.claim(tmp_path, used, "cd")
    assert invitations.find(tmp_path, identifier) == used
    invite(tmp_path, anchors, "carl")
    assert len(kept(tmp_path)) == 2
    # Both would take each other's place in the queue.
    invite(tmp_path, anchors)
    assert sorted(known.name for known in kept(tmp_path)) == ["anna", "carl"]
    assert invitations.find(tmp_path, identifier) is None
    invite(tmp_path, anchors, "bob", now=NOW + 60 * 24 * 3600)
    assert [known.name for known in kept(tmp_path)] == ["bob"]


def test_names_times_and_numbers_are_bounded(tmp_path: Path, anchors: Anchors, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"name": "../up"}, {"org": "a/b"}, {"hours": 0}, {"hours": 721}):
        with pytest.raises(ConfigError, match="--"):
            invite(tmp_path, anchors, **changes)
    monkeypatch.setattr(invitations, "MAX_OPEN", 2)
    for name in ("anna", "bob"):
        invite(tmp_path, anchors, name)
    with pytest.raises(ConfigError, match="at most 2 open invitations"):
        invite(tmp_path, anchors, "carl")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"address": "no port"}, "an address"),
        ({"name": "../up"}, "an address and names"),
        ({"server": "http://x:1"}, "an address and names"),
        ({"seed": "AAAA"}, "keys of 32 bytes"),
        ({"ca": []}, "a CA"),
        ({"ca": ["AAAA"]}, "certificate of a CA"),
        ({"more": 1}, "keys"),
    ],
)
def test_a_line_that_is_no_invitation_is_refused(
    tmp_path: Path, anchors: Anchors, changes: dict[str, object], match: str
) -> None:
    line = invitations.encode(invite(tmp_path, anchors))
    body = {**json.loads(codes.decode("invitation", line)), **changes}
    with pytest.raises(WireError, match=match):
        invitations.decode(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def test_a_certificate_that_signs_none_is_no_anchor(tmp_path: Path, anchors: Anchors) -> None:
    key = certificates.new_tls_key()
    leaf = certificates.issue_certificate(
        key.public_key(), "spiffe://care/a/x", hosts=(), server=False, days=1, ca=anchors[0],
        ca_key=certificates.load_tls_key((tmp_path / "ca" / "ca.key").read_bytes()), now=NOW,
    )  # fmt: skip
    code = invite(tmp_path, anchors)
    line = invitations.encode(replace(code, ca=leaf))
    with pytest.raises(WireError, match="got another"):
        invitations.decode(codes.decode("invitation", line))


@pytest.mark.parametrize("text", ["", "{}", "[" * 9000, '{"key":"00","name":"a","org":"a","until":1,"holder":""}'])
def test_a_damaged_or_foreign_file_is_no_invitation(tmp_path: Path, anchors: Anchors, text: str) -> None:
    invite(tmp_path, anchors)
    (path,) = (tmp_path / "invitations").iterdir()
    kept_bytes = path.read_bytes()
    path.write_text(text)
    assert kept(tmp_path) == []
    # Under another id than its key's, a record would let one code act for another.
    (path.parent / f"{'0' * 32}.json").write_bytes(kept_bytes)
    (path.parent / "note.json").write_text("x")
    assert kept(tmp_path) == []
    assert invitations.find(tmp_path, b"short") is None


def test_a_holder_is_known_by_both_keys(tmp_path: Path) -> None:
    def holder(place: str) -> str:
        data = enrollment.make_request(tmp_path / place, name="anna", org="a", role="client")
        return invitations.holder_of(enrollment.read_request(data))

    assert holder("one") == holder("one") != holder("two")
    (tmp_path / "one" / "tls.key").unlink()
    before = holder("one")
    (tmp_path / "one" / "sign.key").write_bytes(certificates.pem_of(Ed25519PrivateKey.generate()))
    assert holder("one") != before
