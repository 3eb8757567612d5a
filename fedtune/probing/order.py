"""The order in which a client reads its own examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedtune.seeds import derive, generator


def batches(num_examples: int, *, size: int, key: int) -> Iterator[Sequence[int]]:
    """Yield endless batches of places in the data: seeded permutations, of which the last batch may be short."""
    for epoch in range(2**31):
        order = generator(derive(key, "data.order", epoch)).permutation(num_examples)
        for begin in range(0, num_examples, size):
            yield order[begin : begin + size].tolist()
