"""The service of the link, beside what tests/wire/v1/test_round_pb2.py holds for the whole schema."""

from __future__ import annotations

from fedtune.link.rejections import ADVICE, FATAL, TRANSIENT
from fedtune.wire.v1 import link_pb2 as pb


def test_the_services_have_these_calls() -> None:
    methods = pb.DESCRIPTOR.services_by_name["Link"].methods
    shapes = {one.name: (one.client_streaming, one.server_streaming) for one in methods}
    assert shapes == {
        "Hello": (False, False),
        "Next": (False, False),
        "Fetch": (False, True),
        "Submit": (False, False),
        "Push": (True, True),
        "Renew": (False, False),
    }
    assert [one.name for one in pb.DESCRIPTOR.services_by_name["Enrolment"].methods] == ["Enrol"]


def test_no_reason_is_both_passing_and_fatal_and_advice_is_given_for_what_somebody_must_mend() -> None:
    assert not TRANSIENT & FATAL
    assert set(ADVICE) == FATAL | {pb.NAME_IN_USE}


def test_the_bytes_of_a_header_do_not_depend_on_how_it_was_built() -> None:
    first = pb.Header(run="a", round=1, parts=[pb.Part(key="x", digest=b"d", num_bytes=1)])
    second = pb.Header()
    second.parts.add(key="x", digest=b"d", num_bytes=1)
    second.round, second.run = 1, "a"
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
