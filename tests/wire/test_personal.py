"""Settings of personal models and their digests travel whole, and nothing that no release writes is taken."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.messages import Personal, PersonalTrace
from fedtune.wire.personal import from_message, read_trace, to_message, write_trace
from fedtune.wire.v1 import round_pb2 as pb

FLOATS = st.floats(0, 1e6, width=32)


@given(
    kind=st.sampled_from(["ditto", "pfedme", "fedrep", "share-a", "fedbn", "finetune"]),
    keep=st.lists(st.text("abc.*", min_size=1), max_size=3),
    strength=st.none() | FLOATS,
    rate=st.none() | FLOATS.filter(bool),
    steps=st.none() | st.integers(1, 1000),
)
def test_settings_come_back_with_the_defaults_of_their_kind(
    kind: Any, keep: Any, strength: Any, rate: Any, steps: Any
) -> None:
    personal = Personal(kind, tuple(keep), strength, rate, steps)
    assert from_message(pb.Personal.FromString(to_message(personal).SerializeToString())) == personal.in_full()


def test_the_defaults_are_those_of_the_papers() -> None:
    assert Personal("ditto").in_full() == Personal("ditto", strength=0.1)
    assert Personal("pfedme").in_full() == Personal("pfedme", strength=15.0, steps=5)
    assert Personal("share-a").in_full().keep == ("*.b",)
    assert Personal("fedbn").in_full().keep == ("*norm*",)
    assert Personal("share-a").in_full().keeps("model.layers.0.q_proj.b")
    assert Personal("fedrep", keep=["*.B"]).keeps("x.b")  # letters count alike


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": 0},
        {"kind": 99},
        {"kind": 1, "keep": [""]},
        {"kind": 1, "keep": ["x"] * 257},
        {"kind": 1, "strength": -1.0},
        {"kind": 1, "strength": float("nan")},
        {"kind": 1, "rate": 0.0},
        {"kind": 1, "rate": float("inf")},
    ],
)
def test_settings_that_no_recipe_could_hold_are_refused(wrong: Any) -> None:
    with pytest.raises(WireError):
        from_message(pb.Personal(**wrong))


@pytest.mark.parametrize("trace", [None, PersonalTrace(b"", bytes(8)), PersonalTrace(bytes(range(8)), bytes(8))])
def test_digests_come_back(trace: PersonalTrace | None) -> None:
    header = pb.ClientUpdate()
    write_trace(header, trace)
    assert read_trace(pb.ClientUpdate.FromString(header.SerializeToString())) == trace


@pytest.mark.parametrize(
    "wrong",
    [
        {"personal_before": b""},
        {"personal_after": bytes(8)},
        {"personal_before": bytes(7), "personal_after": bytes(8)},
        {"personal_before": b"", "personal_after": b""},
        {"personal_before": b"", "personal_after": bytes(9)},
    ],
)
def test_digests_of_other_lengths_are_refused(wrong: Any) -> None:
    with pytest.raises(WireError):
        read_trace(pb.ClientUpdate(**wrong))
