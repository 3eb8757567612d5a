from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.messages import Training
from fedtune.wire import settings
from fedtune.wire.expect import LARGEST, MAX_NUMBER

TRAINING = Training(batch=4, learning_rate=3e-4, steps=30)


def written(**changes: Any) -> bytes:
    """Return TRAINING as JSON with some values exchanged, as the other side might send it."""
    values = json.loads(settings.encode(TRAINING)) | changes
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


@given(
    st.floats(0, LARGEST, exclude_min=True),
    st.integers(1, MAX_NUMBER - 1),
    st.none() | st.integers(1, MAX_NUMBER - 1),
    st.sampled_from(["adamw", "sgd"]),
    st.booleans(),
)
def test_settings_come_back_exactly(
    learning_rate: float, batch: int, steps: int | None, optimizer: Any, checkpointing: bool
) -> None:
    training = Training(
        batch, learning_rate, steps, optimizer=optimizer, gradient_checkpointing=checkpointing, clip_norm=None
    )
    assert settings.decode(settings.encode(training), Training) == training


def test_every_field_is_written_out_in_sorted_ascii_without_spaces() -> None:
    data = settings.encode(TRAINING)
    assert list(json.loads(data)) == sorted(
        # Which travels as a term, and which is at the default that it was added with.
        {field.name for field in fields(Training)} - {"proximal", "packing", "objective", "dpo_beta", "trainer"}
    )
    assert b" " not in data
    assert data.isascii()
    assert len(data) < settings.MAX_SETTINGS_BYTES


def test_a_field_that_a_release_added_travels_only_where_it_is_not_at_its_default() -> None:
    assert b"packing" not in settings.encode(TRAINING)
    packed = settings.encode(replace(TRAINING, packing=True))
    assert settings.decode(packed, Training) == replace(TRAINING, packing=True)
    written = packed.replace(b'"packing":true', b'"packing":false')
    with pytest.raises(WireError, match=r"settings\.packing: expected it left out at its default; got False"):
        settings.decode(written, Training)
    with pytest.raises(WireError, match=r"settings\.packing: expected .*bool.*; got 1"):
        settings.decode(packed.replace(b'"packing":true', b'"packing":1'), Training)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_settings_that_are_not_finite_are_not_sent(value: float) -> None:
    with pytest.raises(WireError, match="finite"):
        settings.encode(replace(TRAINING, learning_rate=value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch", 0),
        ("batch", 1.0),
        ("batch", True),
        ("batch", "4"),
        ("batch", None),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", True),
        ("learning_rate", 10**400),
        ("steps", 0),
        ("steps", [1]),
        ("optimizer", "lion"),
        ("optimizer", 1),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("gradient_checkpointing", 0),
        ("clip_norm", 0.0),
    ],
)
def test_a_value_outside_its_field_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(WireError, match=rf"settings\.{key}: expected"):
        settings.decode(written(**{key: value}), Training)


@pytest.mark.parametrize("value", [0, 0.0, 0.99])
def test_the_ends_of_a_half_open_interval_are_told_apart(value: float) -> None:
    assert settings.decode(written(warmup=value), Training).warmup == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"7",
        b"\xff",
        b"[" * 16_000,
        b"9" * 16_000,
        b" " + settings.encode(TRAINING),
        settings.encode(TRAINING)[:-1],
        settings.encode(TRAINING).replace(b'"batch":4', b'"batch":4,"batch":4'),
        settings.encode(TRAINING).replace(b"0.0003", b"NaN"),
        settings.encode(TRAINING).replace(b"0.0003", b"1e999"),
        settings.encode(TRAINING).replace(b"0.0003", b"3e-4"),
        written(tau=0.5),
    ],
    ids=[
        *("empty", "no keys", "list", "number", "no text", "deep", "long number", "space", "cut", "repeated key"),
        *("NaN", "infinite", "not canonical", "unknown key"),
    ],
)
def test_what_is_no_canonical_json_of_these_keys_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="canonical JSON"):
        settings.decode(data, Training)


def test_settings_beyond_the_limit_are_not_read() -> None:
    with pytest.raises(WireError, match="16384 bytes"):
        settings.decode(b"[" * (settings.MAX_SETTINGS_BYTES + 1), Training)
