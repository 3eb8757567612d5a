from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.philox import Purpose, philox, words


# From the known answers that come with Random123 (kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
@pytest.mark.parametrize("kind", [np.uint64, np.int64])
def test_philox_gives_the_published_words(counter: str, key: str, expected: str, kind: type[np.integer]) -> None:
    c0, c1, c2, c3 = (np.array([int(word, 16)], kind) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word[0]):08x}" for word in philox((c0, c1, c2, c3), k0 | k1 << 32)] == expected.split()


def test_a_stream_depends_on_every_part_of_its_counter_and_key() -> None:
    streams = [
        words(5, Purpose.IDS, calls=2),
        words(6, Purpose.IDS, calls=2),
        words(5 | 1 << 40, Purpose.IDS, calls=2),
        words(5, Purpose.DISTINCT_IDS, calls=2),
        words(5, Purpose.IDS, calls=2, blocks=range(1, 2)),
        words(5, Purpose.IDS, calls=2, direction=1),
        words(5, Purpose.IDS, calls=2, ordinal=1),
    ]
    assert len({stream.tobytes() for stream in streams}) == len(streams)


def test_a_longer_stream_starts_with_the_shorter_and_blocks_stand_alone() -> None:
    long = words(9, Purpose.DENSE_SIGNS, calls=5, blocks=range(3, 6), ordinal=2)
    assert long.shape == (3, 20)
    short = words(9, Purpose.DENSE_SIGNS, calls=2, blocks=range(4, 5), ordinal=2)
    np.testing.assert_array_equal(long[1, :8], short[0])
