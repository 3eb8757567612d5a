from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedtune.directions.seed_ledger import describe_base
from fedtune.errors import WireError
from fedtune.pruning.structure import Block, BlockLayout, linear_shapes
from fedtune.tensors import Array
from fedtune.wire.codec import EncodedAssignment, encode_blob
from fedtune.wire.profile import (
    ClientProfile,
    Device,
    ModelSpec,
    decode_profile,
    decode_terms,
    difference,
    encode_profile,
    encode_terms,
)
from fedtune.wire.v1 import round_pb2 as pb

FOUNDATION = ModelSpec(
    base="9f3c",
    modules={"layer.q": (4, 6), "layer.v": (2, 6)},
    saved={"score.weight": np.array([[1.5, -2.0]], np.float32)},
    saved_modules=("score",),
    labels=("no", "yes"),
    transposed=True,
    parameters=260_000,
)
PROFILE = ClientProfile(
    client="bank-1",
    num_examples=120,
    foundation=FOUNDATION,
    methods=("flora", "fedit"),
    device=Device(memory_bytes=2**34, cores=8, accelerator="cuda:0"),
)


def again(profile: ClientProfile) -> ClientProfile:
    encoded = encode_profile(profile)
    return decode_profile(encoded.header, encoded.blobs)


def test_a_profile_arrives_as_it_was_sent() -> None:
    arrived = again(PROFILE)
    np.testing.assert_array_equal(arrived.foundation.saved["score.weight"], FOUNDATION.saved["score.weight"])
    bare = replace(arrived, foundation=replace(arrived.foundation, saved={}))
    assert bare == replace(PROFILE, foundation=replace(FOUNDATION, saved={}))


def test_a_manifest_of_another_number_of_parameters_is_refused() -> None:
    listed = describe_base({"layer.q.weight": np.ones((4, 6), np.float32)}).encode()
    whole = replace(PROFILE, foundation=replace(FOUNDATION, manifest=listed, parameters=24))
    assert again(whole).foundation.manifest == listed
    with pytest.raises(WireError, match=r"bank-1: expected a manifest of 25 parameters, no tensor empty; got 24"):
        again(replace(whole, foundation=replace(whole.foundation, parameters=25)))


def test_a_base_without_a_head_sends_no_tensors() -> None:
    arrived = again(replace(PROFILE, foundation=replace(FOUNDATION, saved={}, saved_modules=(), labels=())))
    assert arrived.foundation.saved == {}


def test_modules_are_in_order_whatever_the_order_of_the_mapping() -> None:
    turned = replace(FOUNDATION, modules=dict(sorted(FOUNDATION.modules.items(), reverse=True)))
    assert list(again(replace(PROFILE, foundation=turned)).foundation.modules) == ["layer.q", "layer.v"]


def changed(change: Callable[[pb.ClientProfile], object]) -> EncodedAssignment:
    encoded = encode_profile(PROFILE)
    message = pb.ClientProfile.FromString(encoded.header)
    change(message)
    return EncodedAssignment(message.SerializeToString(), encoded.blobs)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: setattr(m, "client", ""), "printable name"),
        (lambda m: setattr(m, "client", "x" * 101), "printable name"),
        (lambda m: setattr(m, "client", "a\x1b[2J"), "printable name"),
        (lambda m: setattr(m, "protocol", 2), "expected protocol 1"),
        (lambda m: m.ClearField("protocol"), "expected protocol 1"),
        (lambda m: m.ClearField("verbs"), "the verb ADAPT"),
        (lambda m: setattr(m, "examples", 0), "expected 1 to 1,000,000,000 examples.*got 0"),
        (lambda m: setattr(m, "examples", 10**9 + 1), "expected 1 to 1,000,000,000 examples"),
        (lambda m: setattr(m, "examples", 2**62), "expected 1 to 1,000,000,000 examples"),
        (lambda m: setattr(m, "held_out", 10**9 + 1), "as many rows held out at most"),
        (lambda m: m.ClearField("modules"), "each once and in order"),
        (lambda m: m.modules.reverse(), "each once and in order"),
        (lambda m: m.modules.add(name="layer.v", out_features=1, in_features=1), "each once and in order"),
        (lambda m: setattr(m.modules[0], "name", ""), "each once and in order"),
        (lambda m: setattr(m.modules[0], "out_features", 0), "no empty module"),
        (lambda m: setattr(m.saved, "digest", b"0" * 32), "expected a body of digest"),
        (lambda m: setattr(m.saved, "num_bytes", 4), "expected a body of 4 bytes"),
        (lambda m: m.saved.tensors[0].shape.append(2), "expected a body of"),
    ],
)
def test_what_no_client_says_is_refused(change: Callable[[pb.ClientProfile], object], expected: str) -> None:
    encoded = changed(change)
    with pytest.raises(WireError, match=expected):
        decode_profile(encoded.header, encoded.blobs)


@pytest.mark.parametrize(
    "tensor",
    [
        np.array([np.nan], np.float32),
        np.array([np.inf], np.float32),
        np.ones(1, np.float16),
        np.ones(1, ml_dtypes.bfloat16),
    ],
)
def test_initial_values_are_finite_float32(tensor: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    with pytest.raises(WireError, match="expected finite float32 numbers"):
        again(replace(PROFILE, foundation=replace(FOUNDATION, saved={"score.weight": tensor})))


def test_every_truncated_header_is_refused() -> None:
    encoded = encode_profile(PROFILE)
    for length in range(len(encoded.header)):
        try:
            cut = decode_profile(encoded.header[:length], encoded.blobs)
        except WireError:
            continue
        # What follows the protocol's number may be missing: it says less, not something else.
        assert cut.foundation.base == PROFILE.foundation.base
        assert cut.device != PROFILE.device


def test_a_field_of_a_later_release_is_refused() -> None:
    with pytest.raises(WireError, match="of this release"):
        decode_profile(encode_profile(PROFILE).header + b"\xf8\x07\x01", encode_profile(PROFILE).blobs)


def test_a_missing_body_is_refused() -> None:
    with pytest.raises(WireError, match="got only"):
        decode_profile(encode_profile(PROFILE).header, {})


def named(name: str, **changes: object) -> ClientProfile:
    return replace(PROFILE, client=name, foundation=replace(FOUNDATION, **changes))  # type: ignore[arg-type]


def test_the_class_names_of_a_hello_come_back_and_none_are_empty_bytes() -> None:
    assert decode_terms(encode_terms(("no", "yes"))) == ("no", "yes")
    assert encode_terms(()) == b""
    with pytest.raises(WireError, match="each once"):
        decode_terms(encode_terms(("no", "no")))
    with pytest.raises(WireError, match="Terms"):
        decode_terms(b"\xff")


def test_held_out_rows_are_said_and_none_where_nothing_is() -> None:
    assert again(replace(PROFILE, held_out=7)).held_out == 7
    assert again(PROFILE).held_out == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base": "77"}, "expected the base 9f3c; got 77; load the same model"),
        ({"modules": {"layer.q": (4, 6)}}, "expected 2 adapted modules; got 1, the first difference being 'layer.v'"),
        ({"modules": FOUNDATION.modules | {"layer.v": (3, 6)}}, "the first difference being 'layer.v'"),  # type: ignore[operator]
        ({"labels": ("maybe", "no", "yes")}, r"expected the classes no, yes \(2\); got maybe, no, yes \(3\)"),
        ({"labels": ()}, "got none; use the same label names"),
        ({"saved_modules": ("head",)}, r"expected modules_to_save \['score'\]; got \['head'\]"),
        ({"saved": {"score.weight": np.zeros((1, 2), np.float32)}}, "set the same seed"),
        ({"transposed": False}, "expected the layout of the run's base; got another; run"),
    ],
)
def test_a_difference_is_told_in_words(changes: dict[str, object], expected: str) -> None:
    import re

    assert re.search(expected, difference(FOUNDATION, named("ann", **changes).foundation))


def test_the_same_foundation_has_no_difference() -> None:
    assert difference(FOUNDATION, again(PROFILE).foundation) == ""


def test_a_profiles_body_is_found_by_its_digest() -> None:
    assert list(encode_profile(PROFILE).blobs) == [encode_blob(FOUNDATION.saved).digest]


STATED = BlockLayout("llama", (Block("model.layers.0", 4, 2, 2, 16), Block("model.layers.1", 4, 2, 2, 16)), width=8)
ADAPTED = {name: shape for name, shape in zip(STATED.sides, linear_shapes(STATED), strict=True) if "q_proj" in name}


def stating(anatomy: BlockLayout) -> ClientProfile:
    return again(replace(PROFILE, foundation=replace(FOUNDATION, modules=ADAPTED, saved={}, anatomy=anatomy)))


def test_an_anatomy_arrives_as_it_was_sent() -> None:
    assert stating(STATED).foundation.anatomy == STATED


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"channels": 2**32 - 1}, "expected an anatomy of"),
        ({"heads": 2**30, "kv_heads": 2**30}, "expected an anatomy of"),
        ({"head_dim": 0}, "expected an anatomy of"),
        ({"kv_heads": 3}, "expected an anatomy of"),
        ({"prefix": "model.layers.1"}, "expected an anatomy of"),
        ({"heads": 8}, r"model\.layers\.0\.self_attn\.q_proj: expected \(16, 8\), as its anatomy says; got \(8, 8\)"),
    ],
)
def test_an_anatomy_that_no_base_has_or_not_this_one_is_refused(block: dict[str, Any], said: str) -> None:
    with pytest.raises(WireError, match=f"bank-1: {said}"):
        stating(replace(STATED, blocks=(replace(STATED.blocks[0], **block), STATED.blocks[1])))


@pytest.mark.parametrize("change", [{"width": 2**31}, {"width": 0}, {"family": "phi3"}, {"blocks": ()}])
def test_an_anatomy_of_impossible_size_or_family_is_refused(change: dict[str, Any]) -> None:
    changed_anatomy = replace(STATED, **change)
    with pytest.raises(WireError, match="bank-1: expected an anatomy of"):
        stating(changed_anatomy)


def test_the_speed_that_a_client_has_just_measured_arrives_or_is_absent() -> None:
    fast = replace(PROFILE, device=replace(PROFILE.device, s_per_tflop=0.25, s_per_mb=0.01))
    assert again(fast).device == fast.device
    assert not pb.ClientProfile.FromString(encode_profile(PROFILE).header).device.HasField("s_per_tflop")


@pytest.mark.guarantee("G2")
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e39])
@pytest.mark.parametrize("key", ["s_per_tflop", "s_per_mb"])
def test_a_speed_that_no_device_has_is_refused(key: str, seconds: float) -> None:
    encoded = changed(lambda message: setattr(message.device, key, seconds))
    with pytest.raises(WireError, match=f"bank-1: expected {key} above 0 s, in float32; got"):
        decode_profile(encoded.header, encoded.blobs)


def of_tokens(values: Array, name: str = "virtual_tokens.embedding") -> ClientProfile:
    own = replace(FOUNDATION, modules={}, saved={name: values}, saved_modules=(), labels=())
    return replace(PROFILE, foundation=own)


def test_a_client_whose_virtual_tokens_train_adapts_no_module_and_needs_those_of_the_others() -> None:
    tokens = np.ones((2, 3), np.float32)
    arrived = again(of_tokens(tokens))
    assert arrived.foundation.modules == {}
    np.testing.assert_array_equal(arrived.foundation.saved["virtual_tokens.embedding"], tokens)
    other = of_tokens(2 * tokens).foundation
    assert "other first virtual tokens; set the same seed" in difference(arrived.foundation, other)
    lora = difference(arrived.foundation, FOUNDATION)
    assert lora == "expected virtual tokens to train; got factors; set the same adapter.kind"
    assert difference(arrived.foundation, again(of_tokens(tokens)).foundation) == ""
    with pytest.raises(WireError, match="each once and in order"):
        again(of_tokens(tokens, name="score.weight"))
