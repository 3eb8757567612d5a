from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.bank import BANKS
from fedtune.directions.blocks import Groups
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.seed_ledger import (
    GROUPED_HEADER,
    Manifest,
    SeedLedger,
    TensorEntry,
    decode_ledger,
    decode_manifest,
    describe_base,
)
from fedtune.directions.space import MAX_ACCUMULATORS, MAX_BANKS, MAX_TENSORS, directions
from fedtune.errors import ConfigError, WireError
from fedtune.tensors import DTYPES, Array
from fedtune.wire import codec
from fedtune.wire.scores import MAX_LEDGER_BYTES
from tests.directions.vectors import SEED, SMALL, accumulators, small_w0

MANIFEST = describe_base({"b.weight": small_w0((4, 6)), "a.bias": small_w0((5,))}).digest
TINY = SeedLedger(Hadamard(8, SEED), 10, 3, MANIFEST, SMALL)


def test_the_tiny_ledger_has_the_expected_digest() -> None:
    assert len(TINY.encode()) == 92
    assert TINY.digest.hex() == "565aac7c9c1b82c0a55fb4dd552bc99ca698404e3a335fbf97b1a4b6c4eec62b"


def test_a_ledger_of_4096_seeds_has_16444_bytes() -> None:
    bank = Hadamard(4096, SEED)
    assert len(SeedLedger(bank, 26, 0, MANIFEST, accumulators(bank, most=5)).encode()) == 16_444


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(BANKS)),
    size=st.sampled_from([1, 4, 16, 1024]),
    key=st.integers(0, 2**64 - 1),
    exponent=st.integers(0, 125),
    round=st.integers(0, 2**32 - 1),
)
def test_an_encoded_ledger_is_decoded_again(name: str, size: int, key: int, exponent: int, round: int) -> None:
    bank = BANKS[name](size, key)
    ledger = SeedLedger(bank, exponent, round, MANIFEST, accumulators(bank, most=2**16, key=round))
    found = decode_ledger(ledger.encode())
    assert (found.bank, found.exponent, found.round, found.manifest) == (bank, exponent, round, MANIFEST)
    np.testing.assert_array_equal(found.accumulators, ledger.accumulators)
    assert found.encode() == ledger.encode()
    assert not found.accumulators.flags.writeable


def test_every_truncated_and_every_longer_ledger_is_refused() -> None:
    data = TINY.encode()
    for wrong in [*(data[:length] for length in range(len(data))), data + b"\0", data + bytes(4)]:
        with pytest.raises(WireError, match="seed ledger: expected"):
            decode_ledger(wrong)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"FTKM", "expected it to start with"),
        (4, b"\x03", "expected it to start with"),
        (5, b"\x00", "expected a bank of"),
        (5, b"\x04", "expected a bank of"),
        (5, b"\x03", "power of 4"),
        (6, b"\x01", "expected it to start with"),
        (8, (7).to_bytes(4, "little"), "power of 2"),
        (8, (2**32 - 1).to_bytes(4, "little"), "power of 2"),
        (8, (4096).to_bytes(4, "little"), "expected 16444 bytes for 4096 seeds; got 92"),
        (20, (-1).to_bytes(4, "little", signed=True), "expected e in"),
        (20, (126).to_bytes(4, "little"), "expected e in"),
        (60, (2**31 - 20).to_bytes(4, "little"), "sums that fit into 32 bits"),
        (60, (-(2**31)).to_bytes(4, "little", signed=True), "sums that fit into 32 bits"),
    ],
)
def test_a_ledger_that_no_run_wrote_is_refused(offset: int, value: bytes, reason: str) -> None:
    data = bytearray(TINY.encode())
    data[offset : offset + len(value)] = value
    with pytest.raises(WireError, match=reason):
        decode_ledger(bytes(data))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_ledger_bytes_raise_nothing_but_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_ledger(data)


def test_the_digest_knows_every_field() -> None:
    digests = {decode_ledger(TINY.encode()).digest}
    for offset in (12, 20, 24, 28, 60):
        data = bytearray(TINY.encode())
        data[offset] ^= 1
        digests.add(decode_ledger(bytes(data)).digest)
    assert len(digests) == 6


GROUPED = SeedLedger(directions("hadamard", 2, [SEED, 7], 2), 10, 3, MANIFEST, SMALL)
BY_TENSOR = SeedLedger(directions("hadamard", 4, [SEED], "tensor", [3, 9]), 10, 3, MANIFEST, SMALL)


def test_a_ledger_of_several_banks_and_groups_is_written_as_the_format_says() -> None:
    front = b"FTKS\2" + struct.pack("<BHIiI", 2, 0, 2, 10, 3) + MANIFEST
    numbers = struct.pack("<8i", *SMALL.tolist())
    assert GROUPED.encode() == front + struct.pack("<HHQQ", 2, 2, SEED, 7) + numbers
    front = b"FTKS\2" + struct.pack("<BHIiI", 2, 0, 4, 10, 3) + MANIFEST
    assert BY_TENSOR.encode() == front + struct.pack("<HHQ3I", 1, 0, SEED, 2, 3, 9) + numbers
    assert (len(GROUPED.encode()), len(BY_TENSOR.encode())) == (56 + 16 + 32, 56 + 8 + 12 + 32)
    assert GROUPED.digest.hex() == "2fedacc4e8825bdc4d3f923d5ac01ee7d76da5d052d09e60af5a594be14aace7"
    assert BY_TENSOR.digest.hex() == "b85edb3de20be883db212029f9fac92b01614841174d238e97ab6569d5278896"


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["gaussian", "hadamard", "kron"]),
    seeds=st.sampled_from([1, 4, 16]),
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4, unique=True),
    groups=st.sampled_from([1, 2, 64, "tensor"]),
    tensors=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5, unique=True),
    round=st.integers(0, 2**32 - 1),
)
def test_an_encoded_ledger_of_any_directions_is_decoded_again(
    name: str, seeds: int, keys: list[int], groups: Groups, tensors: list[int], round: int
) -> None:
    bank = directions(name, seeds, keys, 1 if name == "kron" and groups != "tensor" else groups, sorted(tensors))
    ledger = SeedLedger(bank, 26, round, MANIFEST, accumulators(bank, most=2**16, key=round))
    again = decode_ledger(ledger.encode())
    assert (again.bank, again.exponent, again.round, again.manifest) == (bank, 26, round, MANIFEST)
    np.testing.assert_array_equal(again.accumulators, ledger.accumulators)
    assert again.digest == ledger.digest


@pytest.mark.parametrize("ledger", [GROUPED, BY_TENSOR], ids=["blocks", "tensors"])
def test_every_truncated_and_every_longer_ledger_of_groups_is_refused(ledger: SeedLedger) -> None:
    data = ledger.encode()
    for wrong in [*(data[:length] for length in range(len(data))), data + b"\0", data + bytes(4)]:
        with pytest.raises(WireError, match="seed ledger: expected"):
            decode_ledger(wrong)


@pytest.mark.parametrize(
    ("ledger", "offset", "value", "reason"),
    [
        (GROUPED, 5, b"\x04", "expected a bank of"),
        (GROUPED, 5, b"\x03", "power of 4"),
        (GROUPED, 6, b"\x01", "expected it to start with"),
        (GROUPED, 8, struct.pack("<I", 3), "power of 2"),
        (GROUPED, 8, struct.pack("<I", 2**32 - 1), "power of 2"),
        (GROUPED, 8, struct.pack("<I", 4096), "expected 65608 bytes for 16384 seeds"),
        (GROUPED, 12, struct.pack("<i", 126), "expected e in"),
        (GROUPED, 52, struct.pack("<H", 0), "1 to 256 banks and at most 64 groups; got 0 and 2"),
        (GROUPED, 52, struct.pack("<H", 65535), "1 to 256 banks and at most 64 groups; got 65535 and 2"),
        (GROUPED, 52, struct.pack("<H", 256), "end within one"),
        (GROUPED, 54, struct.pack("<H", 65535), "at most 64 groups; got 2 and 65535"),
        (GROUPED, 54, struct.pack("<H", 3), "power of 2 from 1 to 64"),
        (GROUPED, 54, struct.pack("<H", 64), "expected 1096 bytes for 256 seeds"),
        (GROUPED, 54, struct.pack("<H", 0), "expected 96 bytes for 4 seeds; got 104"),
        (GROUPED, 64, struct.pack("<Q", SEED), "another one for every bank"),
        (GROUPED, 72, struct.pack("<i", 2**31 - 7), "sums that fit into 32 bits"),
        (BY_TENSOR, 64, struct.pack("<I", 2**32 - 1), "at most 4096 tensors; got 4294967295"),
        (BY_TENSOR, 64, struct.pack("<I", MAX_TENSORS), "end within one"),
        (BY_TENSOR, 64, struct.pack("<I", 0), "ordinals in rising order"),
        (BY_TENSOR, 68, struct.pack("<I", 9), "ordinals in rising order"),
        (BY_TENSOR, 5, b"\x01", None),
        (BY_TENSOR, 5, b"\x03", None),
    ],
)
def test_a_ledger_of_groups_that_no_run_wrote_is_refused(
    ledger: SeedLedger, offset: int, value: bytes, reason: str | None
) -> None:
    data = bytearray(ledger.encode())
    data[offset : offset + len(value)] = value
    if reason is None:  # one that a run may well have written
        assert decode_ledger(bytes(data)).encode() == data
        return
    with pytest.raises(WireError, match=reason):
        decode_ledger(bytes(data))


def test_the_longest_ledger_of_all_fits_into_a_message() -> None:
    most = GROUPED_HEADER.size + 8 * MAX_BANKS + 4 + 4 * MAX_TENSORS + 4 * MAX_ACCUMULATORS
    assert most <= MAX_LEDGER_BYTES < codec.MAX_HEADER_BYTES - 16 * 1024  # ordinals, and what else is asked


def test_one_bank_of_one_group_has_no_second_form() -> None:
    front = b"FTKS\2" + struct.pack("<BHIiI", 2, 0, 8, 10, 3) + MANIFEST
    with pytest.raises(WireError, match=r"several banks or groups .* got one; write it with b'FTKS"):
        decode_ledger(front + struct.pack("<HHQ", 1, 1, SEED) + struct.pack("<8i", *SMALL.tolist()))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_after_the_second_magic_raise_nothing_but_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_ledger(b"FTKS\2" + data)


BASE = {"b.weight": small_w0((4, 6)), "a.bias": small_w0((5,))}


def test_the_tiny_manifest_has_the_expected_digest() -> None:
    manifest = describe_base(BASE)
    assert len(manifest.encode()) == 123
    assert manifest.digest.hex() == "1fe13af778e030d751a0368e0ebc743550afbd26c3eb22619fd4555b95888d33"


def test_ordinals_follow_the_bytes_of_the_names_whatever_the_order_given() -> None:
    names = ["layers.2.w", "layers.10.w", "Z", "é", "z", "a"]
    manifest = describe_base({name: np.zeros(2, np.float32) for name in names})
    assert manifest.ordinals == {"Z": 0, "a": 1, "layers.10.w": 2, "layers.2.w": 3, "z": 4, "é": 5}


def test_the_digest_knows_every_name_format_shape_and_bit() -> None:
    base = np.array([[1.0, -0.0]], np.float32)
    tensors: list[dict[str, Array]] = [
        {"w": base},
        {"v": base},
        {"w": base.T},
        {"w": base.astype(np.float16)},
        {"w": base.astype(DTYPES["bf16"])},
        {"w": np.abs(base)},
        {"w": base, "x": base},
    ]
    assert len({describe_base(each).digest for each in tensors}) == len(tensors)


def test_an_entry_holds_the_digest_of_the_tensors_bytes_in_row_major_order() -> None:
    turned = np.asfortranarray(small_w0((4, 6)))
    assert describe_base({"w": turned}).entries[0].digest == hashlib.sha256(small_w0((4, 6)).tobytes()).digest()
    assert describe_base({"w": turned}).entries[0].num_parameters == 24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_base_that_is_not_finite_is_refused_by_name(dtype: str, bad: float) -> None:
    tensors = {"good": np.ones(3, DTYPES[dtype]), "bad": np.array([1, bad], np.float32).astype(DTYPES[dtype])}
    with pytest.raises(ConfigError, match=r"^bad: expected finite weights; got NaN or infinity"):
        describe_base(tensors)


def test_the_largest_and_smallest_numbers_are_finite() -> None:
    info = np.finfo(np.float16)
    describe_base({"w": np.array([info.max, info.min, info.smallest_subnormal, -0.0], np.float16)})


def test_all_faults_of_a_base_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        describe_base({"a": np.zeros(2), "b": np.zeros(2, np.float32), "c": np.zeros(2, np.int8)})
    assert [fault.path for fault in caught.value.faults] == ["a", "c"]


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a")])
def test_a_manifest_out_of_order_cannot_be_made(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="sorted by name"):
        Manifest(tuple(TensorEntry(name, "fp32", (2,), bytes(32)) for name in names))


NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ENTRIES = st.dictionaries(
    NAME,
    st.tuples(
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 2**64 - 1), max_size=9).map(tuple),
        st.binary(min_size=32, max_size=32),
    ),
    max_size=5,
)


@settings(deadline=None, max_examples=50)
@given(found=ENTRIES)
def test_an_encoded_manifest_is_decoded_again(found: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    manifest = Manifest(tuple(TensorEntry(name, *found[name]) for name in sorted(found, key=str.encode)))
    again = decode_manifest(manifest.encode())
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.ordinals == manifest.ordinals


def test_every_truncated_and_every_longer_manifest_is_refused() -> None:
    data = describe_base(BASE).encode()
    for wrong in [*(data[:length] for length in range(len(data) - 32)), data + b"\0", data + data[9:]]:
        with pytest.raises(WireError, match="manifest: expected"):
            decode_manifest(wrong)


@pytest.mark.parametrize("missing", [1, 31, 32])
def test_a_manifest_cut_within_its_last_digest_is_refused(missing: int) -> None:
    data = describe_base(BASE).encode()
    with pytest.raises(WireError, match="manifest: expected"):
        decode_manifest(data[:-missing])


# Of the tiny manifest: front of 9 bytes; length at 9, name of 6 at 13, format at 19, axes at 20, then one axis of 8.
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b"FTKS"),
        (4, b"\x02"),
        (5, (1).to_bytes(4, "little")),
        (5, (3).to_bytes(4, "little")),
        (5, (2**32 - 1).to_bytes(4, "little")),
        (9, (2**32 - 1).to_bytes(4, "little")),
        (9, (5).to_bytes(4, "little")),
        (13, b"\xff"),
        (13, b"c"),
        (19, b"\x00"),
        (19, b"\x04"),
        (20, b"\x00"),
        (20, b"\x02"),
        (20, b"\xff"),
    ],
    ids=[
        *("magic", "version", "fewer", "more", "many more", "long name", "short name", "no text", "order"),
        *("no format", "unknown format", "fewer axes", "more axes", "many axes"),
    ],
)
def test_a_manifest_that_lies_is_refused(place: int, value: bytes) -> None:
    data = bytearray(describe_base(BASE).encode())
    data[place : place + len(value)] = value
    with pytest.raises(WireError, match="manifest: expected"):
        decode_manifest(bytes(data))


def test_a_name_that_stands_twice_is_refused() -> None:
    one = TensorEntry("w", "fp32", (2,), bytes(32)).encode()
    with pytest.raises(WireError, match="sorted by name"):
        decode_manifest(b"FTKM\x01" + (2).to_bytes(4, "little") + one + one)


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=120), front=st.booleans())
def test_arbitrary_manifest_bytes_raise_nothing_but_a_wire_error(data: bytes, front: bool) -> None:
    with pytest.raises(WireError):
        decode_manifest((b"FTKM\x01" + (2).to_bytes(4, "little") if front else b"") + data)
