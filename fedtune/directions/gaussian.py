"""The bank nearest to the paper: centred binomial numbers of variance 1, drawn for each direction and position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.directions.blocks import BLOCK, absolute_sum, check_size, places_of, positions
from fedtune.directions.philox import Purpose, check_key, words
from fedtune.tensors import Array


@dataclass(frozen=True)
class Gaussian:
    """Directions z = m/2 with m = popcount(16 random bits) - 8: mean 0, variance exactly 1, kurtosis 2.875, |z| <= 4.

    No transform adds the directions up: a rebuild costs K random numbers per position.
    """

    size: int
    key: int
    name: ClassVar[str] = "gaussian"
    code: ClassVar[int] = 1
    halvings: ClassVar[int] = 1
    max_abs: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_size(self.size, self.name)
        check_key(self.key)

    @property
    def seeds(self) -> int:
        """See `DirectionBank.seeds`."""
        return self.size

    @property
    def newest(self) -> slice:
        """See `DirectionBank.newest`."""
        return slice(0, self.size)

    def places(self, seed: int) -> range:
        """See `DirectionBank.places`."""
        return places_of(seed, self.size)

    def span(self, accumulators: Array) -> int:
        """See `DirectionBank.span`."""
        return absolute_sum(accumulators)

    def pieces(self, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range) -> Iterator[Array]:
        """See `DirectionBank.pieces`."""
        table = np.atleast_2d(accumulators)  # (groups, K)
        for number in blocks:
            block = range(number, number + 1)
            y = np.zeros(len(positions(block, shape)), np.int32)
            row = table[number % len(table)]
            for k in np.flatnonzero(row).tolist():
                # Widened first: an int8 product would wrap at 128.
                y += row[k] * self.direction(k, ordinal=ordinal, shape=shape, blocks=block).astype(np.int32)
            yield y

    def direction(self, index: int, *, ordinal: int, shape: Sequence[int], blocks: range) -> Array:
        """See `DirectionBank.direction`."""
        drawn = words(
            self.key, Purpose.GAUSSIAN, calls=BLOCK // 8, blocks=blocks, direction=index, ordinal=ordinal
        )  # (blocks, 2048): the low half of a word is the even position
        m: Array = np.bitwise_count(drawn.astype("<u4").view("<u2")).astype(np.int8) - np.int8(8)
        return m.reshape(-1)[: len(positions(blocks, shape))]
