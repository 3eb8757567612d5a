"""The order of the data: every example once per pass, other passes in other orders."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from fedtune.probing.order import batches


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 2**64 - 1))
def test_every_pass_reads_every_example_once(count: int, size: int, key: int) -> None:
    per_pass = -(-count // size)
    first = list(islice(batches(count, size=size, key=key), 2 * per_pass))
    for epoch in (first[:per_pass], first[per_pass:]):
        assert sorted(place for batch in epoch for place in batch) == list(range(count))
    assert first == list(islice(batches(count, size=size, key=key), 2 * per_pass))


def test_passes_and_keys_have_orders_of_their_own() -> None:
    order = batches(50, size=50, key=3)
    one, two, other = next(order), next(order), next(batches(50, size=50, key=4))
    assert len({tuple(one), tuple(two), tuple(other)}) == 3
