from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.link.rejections import ADVICE, FATAL, MAX_TEXT_CHARS, TRANSIENT, describe, one_line, reason_name, rejection
from fedtune.wire.v1 import link_pb2 as pb


@given(st.text(max_size=2000))
def test_a_text_from_outside_is_one_short_printable_line(text: str) -> None:
    result = one_line(text)
    assert len(result) <= MAX_TEXT_CHARS
    assert result.isprintable()
    assert result == result.strip()


def test_a_refusal_says_what_was_expected_what_came_and_what_to_do() -> None:
    error = rejection(pb.REVOKED, "roster", "an active member", "anna, \x1b[2Jrevoked")
    assert isinstance(error, WireError)
    assert str(error) == (
        "REVOKED: roster: expected an active member; got anna, [2Jrevoked; "
        "ask the coordinator why this site was revoked"
    )
    assert not error.refusal.passing
    assert rejection(pb.BUSY, "uploads", 8, 9).refusal.passing


def test_a_reason_of_a_later_release_is_shown_by_its_number() -> None:
    later = pb.Refusal.FromString(b"\x08\xe7\x07")
    assert reason_name(later.reason) == "reason 999"
    assert describe(later).startswith("reason 999: expected")


@given(st.text(max_size=2000), st.text(max_size=2000), st.text(max_size=2000))
def test_every_text_of_a_refusal_is_cut_before_it_travels(field: str, expected: str, result: str) -> None:
    error = rejection(pb.SIGNATURE, field, expected, result)
    for text in (error.refusal.field, error.refusal.expected, error.refusal.found):
        assert len(text) <= MAX_TEXT_CHARS
        assert text.isprintable()
    assert str(error).isprintable()
    assert pb.Refusal.FromString(error.refusal.SerializeToString()) == error.refusal


def test_what_a_server_says_is_cut_by_its_reader_too() -> None:
    hostile = pb.Refusal(reason=pb.BARRED, field="f\n" * 900, expected="\x1b[2J" * 900, found="x" * 9000)
    assert describe(hostile).isprintable()
    assert len(describe(hostile)) < 4 * MAX_TEXT_CHARS


def test_a_refusal_is_passing_by_its_reason_alone_and_none_that_passes_ends_a_client() -> None:
    for one in pb.DESCRIPTOR.enum_types_by_name["Reason"].values:
        assert rejection(getattr(pb, one.name), "", "", "").refusal.passing == (one.number in TRANSIENT)
    assert not TRANSIENT & FATAL
    assert ADVICE.keys() <= FATAL | {pb.BUILD_DIFFERS, pb.NAME_IN_USE}
