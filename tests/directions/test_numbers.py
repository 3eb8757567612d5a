from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.directions.numbers import LARGEST_NUMBER, MAX_NUMBERS, is_shortest, pack, unpack
from fedtune.errors import WireError


def test_numbers_of_four_and_two_bits_lie_lowest_first_in_a_byte() -> None:
    assert pack(np.array([1, -1, 7, -7, 3], np.int8), 4).hex() == "f19703"
    assert pack(np.array([1, -1, 0, 1, -1], np.int8), 2).hex() == "4d03"
    assert pack(np.array([1, -1, 127], np.int8), 8).hex() == "01ff7f"


@given(st.data(), st.sampled_from([8, 4, 2]))
def test_numbers_come_back_exactly(data: st.DataObject, bits: int) -> None:
    bound = 2 ** (bits - 1)
    numbers = np.array(data.draw(st.lists(st.integers(-bound, bound - 1), max_size=40)), np.int8)
    packed = pack(numbers, bits)
    assert len(packed) == -(-len(numbers) * bits // 8)
    again = unpack(packed, len(numbers), bits)
    assert (again.dtype, again.tolist(), again.flags.writeable) == (np.dtype(np.int8), numbers.tolist(), False)


@pytest.mark.parametrize(
    ("data", "count", "bits", "named"),
    [
        (b"\1", 1, 3, "expected 8, 4, 2 bits; got 3"),
        (b"\1\2", 1, 8, "expected 1 bytes for 1 of 8 bits"),
        (b"\1", 3, 4, "expected 2 bytes for 3 of 4 bits"),
        (b"\1", 2**40, 8, f"at most {MAX_NUMBERS}; got 1"),
        (b"", MAX_NUMBERS + 1, 2, f"at most {MAX_NUMBERS}"),
        (b"\x11", 1, 4, "zero bits after the last one"),
        (b"\xc1", 3, 2, "zero bits after the last one"),
    ],
)
def test_other_bytes_are_refused_before_memory_is_taken(data: bytes, count: int, bits: int, named: str) -> None:
    with pytest.raises(WireError, match=named):
        unpack(data, count, bits)


@given(st.sampled_from([8, 4, 2]), st.integers(1, 2**20))
def test_the_shortest_form_of_a_change_is_the_only_one_that_counts_as_such(bits: int, change: int) -> None:
    bound = LARGEST_NUMBER[bits]
    fits = [shift for shift in range(24) if round(change / 2**shift) <= bound]
    first = np.array([round(change / 2 ** fits[0])], np.int8)
    assert is_shortest(first, fits[0], bits)
    assert not is_shortest(first // 2, fits[0] + 1, bits)
