from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.banks import BANKS
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.manifest import describe
from fedtune.directions.seed_ledger import SeedLedger, decode
from fedtune.errors import WireError
from tests.directions.vectors import SEED, SMALL, accumulators, small_w0

MANIFEST = describe({"b.weight": small_w0((4, 6)), "a.bias": small_w0((5,))}).digest
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
def test_what_is_encoded_is_decoded(name: str, size: int, key: int, exponent: int, round: int) -> None:
    bank = BANKS[name](size, key)
    ledger = SeedLedger(bank, exponent, round, MANIFEST, accumulators(bank, most=2**16, key=round))
    found = decode(ledger.encode())
    assert (found.bank, found.exponent, found.round, found.manifest) == (bank, exponent, round, MANIFEST)
    np.testing.assert_array_equal(found.accumulators, ledger.accumulators)
    assert found.encode() == ledger.encode()
    assert not found.accumulators.flags.writeable


def test_every_truncated_and_every_longer_ledger_is_refused() -> None:
    data = TINY.encode()
    for wrong in [*(data[:length] for length in range(len(data))), data + b"\0", data + bytes(4)]:
        with pytest.raises(WireError, match="seed ledger: expected"):
            decode(wrong)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"FTKM", "expected it to start with"),
        (4, b"\x02", "expected it to start with"),
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
        decode(bytes(data))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


def test_the_digest_knows_every_field() -> None:
    digests = {decode(TINY.encode()).digest}
    for offset in (12, 20, 24, 28, 60):
        data = bytearray(TINY.encode())
        data[offset] ^= 1
        digests.add(decode(bytes(data)).digest)
    assert len(digests) == 6
