from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.link.pki.dsse import MAX_BYTES, canonical_json, make_dsse
from fedtune.link.pki.roster import KIND, Party, Roster, RosterFile, check_successor, decode, encode, find_party
from fedtune.link.pki.signing import key_id, public_bytes

ROOT = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
PUBLIC = public_bytes(ROOT)
ANNA = Party("anna", "a", "client", b"k" * 32, ("ab12",), 0, 100)
BOB = Party("bob", "b", "coordinator", b"l" * 32, ("1", "2"), 0, 100, "revoked")
ROSTER = Roster("care", 3, 1000, {"anna": ANNA, "bob": BOB})
SIGNED = encode(ROSTER, ROOT)


def test_a_roster_comes_back_as_it_was_signed() -> None:
    assert decode(SIGNED, PUBLIC) == ROSTER


def test_only_active_parties_are_known_by_their_keys() -> None:
    assert find_party(ROSTER, key_id(ANNA.key)) == ANNA
    assert find_party(ROSTER, key_id(BOB.key)) is None
    assert find_party(ROSTER, b"") is None


def test_another_root_key_signs_nothing() -> None:
    with pytest.raises(WireError, match="signature"):
        decode(SIGNED, public_bytes(OTHER))


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_any_changed_byte_is_found(place: int, change: int) -> None:
    spoilt = bytearray(SIGNED)
    spoilt[place] ^= change
    with pytest.raises(WireError):
        decode(bytes(spoilt), PUBLIC)


def test_what_is_not_signed_has_one_spelling() -> None:
    assert decode(SIGNED.rstrip(), PUBLIC) == ROSTER  # a mail or a pipe may eat the last line's end
    envelope = json.loads(SIGNED)
    for other in (
        json.dumps(envelope).encode(),
        canonical_json({**envelope, "signatures": envelope["signatures"] * 2}),
        canonical_json({**envelope, "signatures": [{**envelope["signatures"][0], "keyid": "00" * 16}]}),
    ):
        with pytest.raises(WireError, match="roster"):
            decode(other, PUBLIC)


@given(st.integers(0, len(SIGNED) - 2))
def test_a_roster_that_was_cut_is_refused(length: int) -> None:
    with pytest.raises(WireError):
        decode(SIGNED[:length], PUBLIC)


def body(**changes: Any) -> dict[str, Any]:
    member = {
        "name": "anna",
        "org": "a",
        "role": "client",
        "key": base64.b64encode(b"k" * 32).decode(),
        "serials": ["ab"],
        "not_before": 0,
        "not_after": 1,
        "state": "active",
    }
    member |= changes.pop("member", {})
    return {"federation": "care", "version": 1, "valid_until": 5, "members": [member], **changes}


@pytest.mark.parametrize(
    "content",
    [
        body(more=1),
        body(version="1"),
        body(version=0),
        body(version=True),
        body(version=2**60),
        body(federation="../x"),
        body(parties={}),
        body(parties=[1]),
        body(parties=[*body()["members"], *body()["members"]]),
        body(parties=[*body()["members"], {**body()["members"][0], "name": "bob"}]),
        body(member={"name": "a b"}),
        body(member={"role": "root"}),
        body(member={"state": "gone"}),
        body(member={"key": "k"}),
        body(member={"key": base64.b64encode(b"k").decode()}),
        body(member={"serials": ["XY"]}),
        body(member={"serials": ["1"] * 5}),
        body(member={"serials": "1"}),
        body(member={"not_before": 2}),
        body(member={"extra": 1}),
        [],
        "roster",
    ],
)
def test_what_the_root_key_signed_is_checked_all_the_same(content: Any) -> None:
    with pytest.raises(WireError, match="roster"):
        decode(make_dsse(KIND, canonical_json(content), ROOT), PUBLIC)


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(WireError, match="twice"):
        decode(make_dsse(KIND, b'{"federation":"a","federation":"b"}', ROOT), PUBLIC)


def test_what_is_nested_deeply_is_refused() -> None:
    for depth in (10, 900, 990, 5_000, 100_000):
        nested = b"[" * depth + b"]" * depth
        with pytest.raises(WireError):
            decode(b'{"payload":"","payloadType":"%s","signatures":%s}' % (KIND.encode(), nested), PUBLIC)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff", b"1" * (MAX_BYTES + 1)])
def test_what_is_no_roster_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data, PUBLIC)


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (replace(ROSTER, version=2), "version 3 or a later one"),
        (replace(ROSTER, parties={}), "two that differ"),
        (replace(ROSTER, federation="other"), "one of care"),
        (replace(ROSTER, version=4, valid_until=49), "expired"),
    ],
)
def test_only_a_newer_roster_takes_the_place_of_another(result: Roster, match: str) -> None:
    with pytest.raises(WireError, match=match):
        check_successor(ROSTER, result, now=50)
    assert check_successor(ROSTER, replace(ROSTER, version=4), now=50).version == 4
    assert check_successor(ROSTER, ROSTER, now=50) == ROSTER
    assert check_successor(None, ROSTER, now=50) == ROSTER


def test_a_file_is_read_again_when_it_changes_and_what_is_wrong_with_it_harms_nothing(tmp_path: Path) -> None:
    time = [0.0]
    path = tmp_path / "roster"
    path.write_bytes(SIGNED)
    file = RosterFile(path, PUBLIC, clock=lambda: time[0], now=lambda: 50.0)
    assert file.current() == ROSTER
    assert file.data == SIGNED
    path.write_bytes(second := encode(replace(ROSTER, version=4), ROOT))
    assert file.current().version == 3  # not looked at again within a second
    time[0] += 1
    assert file.current().version == 4
    assert (file.data, file.problem) == (second, "")
    for spoilt in (b"nonsense", SIGNED, encode(replace(ROSTER, version=9), OTHER)):
        path.write_bytes(spoilt)
        time[0] += 1
        assert file.current().version == 4
        assert file.problem
        assert file.data == second
    path.unlink()
    time[0] += 1
    assert file.current().version == 4
    path.write_bytes(encode(replace(ROSTER, version=5), ROOT))
    time[0] += 1
    assert file.current().version == 5
    assert not file.problem


def test_without_a_roster_there_is_nothing_to_begin_with(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="signed roster"):
        RosterFile(tmp_path / "none", PUBLIC)
