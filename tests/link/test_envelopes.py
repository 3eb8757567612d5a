from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.link.envelopes import (
    KIND,
    assignment_subject,
    digest,
    expect_fields,
    make_part,
    seal,
    verify_envelope,
)
from fedtune.link.pki.roster import Party
from fedtune.link.pki.signing import key_id, public_bytes, sign
from fedtune.link.rejections import RejectionError
from fedtune.messages import Assignment, DescendSeeds, Plan, ProbeSeeds, SeedState, Training, TrainLora
from fedtune.wire.codec import encode_assignment
from fedtune.wire.v1 import link_pb2 as pb

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
ANNA = Party("anna", "a", "client", public_bytes(KEY), ("1",), 0, 1)
HEADER = pb.Header(protocol=1, federation="care", run="r", author="anna", kind=pb.ANSWER, round=3)
SEALED = seal(HEADER, KEY)


def member(key: bytes) -> Party | None:
    return ANNA if key == key_id(ANNA.key) else None


def test_a_statement_is_opened_as_it_was_sealed() -> None:
    assert verify_envelope(SEALED, member) == (HEADER, ANNA)
    assert digest(SEALED) == sha256(SEALED.header).digest()


def signed(data: bytes) -> pb.Envelope:
    return pb.Envelope(header=data, signature=sign(KEY, KIND, data), key_id=key_id(public_bytes(KEY)))


def header(**changes: object) -> pb.Envelope:
    result = pb.Header()
    result.CopyFrom(HEADER)
    for name, value in changes.items():
        if isinstance(value, list):
            getattr(result, name).extend(value)
        else:
            setattr(result, name, value)
    return signed(result.SerializeToString())


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (lambda: signed(b"x" * (64 * 1024 + 1)), "HEADER_TOO_LARGE"),
        (lambda: pb.Envelope(header=SEALED.header, signature=SEALED.signature, key_id=b"k" * 16), "KEY_UNKNOWN"),
        (
            lambda: pb.Envelope(header=SEALED.header + b"\0", signature=SEALED.signature, key_id=SEALED.key_id),
            "SIGNATURE",
        ),
        (lambda: pb.Envelope(header=SEALED.header, signature=b"", key_id=SEALED.key_id), "SIGNATURE"),
        (lambda: signed(b"\xff\xff"), "HEADER_MALFORMED"),
        (lambda: signed(SEALED.header + b"\xf8\x3f\x01"), "HEADER_MALFORMED"),  # field 1023, which no release knows
        (lambda: signed(SEALED.header + b"\x6a\x04\x0a\x00\x40\x01"), "HEADER_MALFORMED"),  # field 8 of a part
        (lambda: signed(SEALED.header + b"\x22\x01\xff"), "HEADER_MALFORMED"),  # an author that is no UTF-8
        (lambda: signed(b""), "PROTOCOL"),
        (lambda: header(protocol=2), "PROTOCOL"),
        (lambda: header(protocol=2, author="bob"), "PROTOCOL"),  # of another version nothing else is believed
        (lambda: header(author="bob"), "AUTHOR_MISMATCH"),
        (lambda: header(parts=[pb.Part(key="a", digest=b"short")]), "HEADER_MALFORMED"),
        (
            lambda: header(parts=[pb.Part(key="b", digest=b"d" * 32), pb.Part(key="a", digest=b"d" * 32)]),
            "HEADER_MALFORMED",
        ),
        (lambda: header(parts=[pb.Part(key="a", digest=b"d" * 32)] * 2), "HEADER_MALFORMED"),
        (lambda: header(parts=[pb.Part(key=f"{i:03}", digest=b"d" * 32) for i in range(65)]), "HEADER_MALFORMED"),
    ],
)
def test_what_is_wrong_with_a_statement_has_a_name(envelope: Callable[[], pb.Envelope], reason: str) -> None:
    with pytest.raises(RejectionError) as caught:
        verify_envelope(envelope(), member)
    assert pb.Reason.Name(caught.value.refusal.reason) == reason


@given(st.binary(max_size=200), st.binary(max_size=80), st.binary(max_size=20))
def test_bytes_without_a_valid_signature_are_refused(data: bytes, signature: bytes, key: bytes) -> None:
    with pytest.raises(RejectionError):
        verify_envelope(pb.Envelope(header=data, signature=signature, key_id=key), member)


def test_a_field_that_differs_is_refused_by_its_own_reason() -> None:
    expect_fields(HEADER, federation="care", run="r", round=3)
    for name, value, reason in (
        ("federation", "x", "WRONG_FEDERATION"),
        ("run", "x", "WRONG_RUN"),
        ("round", 4, "ROUND_DIFFERS"),
        ("recipe", b"x", "RECIPE_DIFFERS"),
        ("base", b"x", "BASE_DIFFERS"),
        ("state", b"x", "STATE_DIFFERS"),
        ("kind", pb.ORDER, "KIND_NOT_EXPECTED"),
        ("build", "fedtune 9", "BUILD_DIFFERS"),
    ):
        with pytest.raises(RejectionError) as caught:
            expect_fields(HEADER, **{name: value})
        assert pb.Reason.Name(caught.value.refusal.reason) == reason


def test_the_subject_of_a_task_is_its_round_its_base_and_the_bodies_it_brings() -> None:
    plan = Plan("anna", rank=4, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=7))
    made = Assignment("flora", round=3, seed=0, plan=plan, task=TrainLora(a_key=0), base="9f3c")
    front = encode_assignment(made).header
    bodies = [make_part("", front), make_part("b", b"two"), make_part("a", b"one")]
    number, base, state = assignment_subject(front, bodies)
    assert (number, base) == (3, "9f3c")
    assert state == assignment_subject(front, bodies[::-1])[2]
    assert state != assignment_subject(front, bodies[:2])[2]


def test_size_comes_before_the_key_and_the_key_before_the_signature() -> None:
    large = pb.Envelope(header=b"x" * (64 * 1024 + 1), signature=b"none", key_id=b"unknown")
    unknown = pb.Envelope(header=b"\xff\xff", signature=b"none", key_id=b"unknown")
    forged = pb.Envelope(header=b"\xff\xff", signature=b"none", key_id=SEALED.key_id)
    task_digest = list[bytes]()

    def counted(key: bytes) -> Party | None:
        task_digest.append(key)
        return member(key)

    for envelope, reason in ((large, "HEADER_TOO_LARGE"), (unknown, "KEY_UNKNOWN"), (forged, "SIGNATURE")):
        with pytest.raises(RejectionError) as caught:
            verify_envelope(envelope, counted)
        assert pb.Reason.Name(caught.value.refusal.reason) == reason
    assert task_digest == [b"unknown", SEALED.key_id]


def test_a_header_of_the_largest_size_is_read() -> None:
    rest = pb.Header(run="r" * 60_000)
    rest.MergeFrom(pb.Header(protocol=1, author="anna"))
    rest.build = "b" * (64 * 1024 - rest.ByteSize() - 4)  # its own tag and length: two and three bytes
    rest.build += "b" * (64 * 1024 - rest.ByteSize())
    assert rest.ByteSize() == 64 * 1024
    assert verify_envelope(seal(rest, KEY), member) == (rest, ANNA)


def test_the_subject_of_a_probe_is_the_state_that_its_seeds_stand_for() -> None:
    plan = Plan("anna", rank=1, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=7))
    probe = ProbeSeeds(
        bank="hadamard", seeds=4, key=1, exponent=20, shift=1, perturbation=1,
        state=SeedState("whole", 0, b"\0" * 16, 2, b"d" * 32),
    )  # fmt: skip
    front = encode_assignment(Assignment("fedkseed", round=2, seed=0, plan=plan, task=probe, base="9f3c")).header
    whole, short = (
        assignment_subject(front, [make_part("", front), make_part("a", b"bodies")]),
        assignment_subject(front, [make_part("", front)]),
    )
    assert whole == short == (2, "", b"d" * 32)  # whichever bodies bring it there; the state names its base
    descending = Assignment("fedkseed", round=2, seed=0, plan=plan, task=DescendSeeds(probe, 4, 9), base="9f3c")
    front = encode_assignment(descending).header
    assert assignment_subject(front, [make_part("", front)]) == (2, "", b"d" * 32)


def test_what_is_no_assignment_has_no_subject() -> None:
    with pytest.raises(WireError):
        assignment_subject(b"\xff\xff", [])
