"""A few blocks of displacements that a client states and the server computes too: whether both have the same model."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.blocks import num_blocks
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.philox import Purpose, words
from fedtune.directions.seed_ledger import Manifest, SeedLedger
from fedtune.tensors import Array

BLOCKS = 4
"""Blocks that are compared, drawn anew for every state."""
LENGTH = 4
"""Bytes of each block's digest: a wrong block passes with probability 2^-32."""
STATE = 8
"""Bytes of the state's digest that travel up."""

Displacement = Callable[..., Array]
"""`bank.displacement`, or another way that gives the same bits."""


def fastest_displacement(bank: DirectionBank) -> Displacement:
    """Return the quickest installed way to the displacements of a few blocks; all ways give the same bits."""
    # Only a bank that draws for each direction repays the seconds that numba takes to compile.
    if bank.name != Gaussian.name or importlib.util.find_spec("numba") is None:
        return displacement
    from fedtune.directions import rebuild_numba

    return rebuild_numba.displacement


def sample_blocks(key: int, sizes: Mapping[int, int], count: int) -> Sequence[tuple[int, int]]:
    """Return (ordinal, block) of `count` blocks among all tensors, drawn uniformly with replacement.

    Args:
        key: of 64 bits.
        sizes: number of blocks of each trainable tensor, by ordinal.
        count: how many to draw.
    """
    ordinals = sorted(sizes)
    ends = np.cumsum([sizes[ordinal] for ordinal in ordinals], dtype=np.uint64)
    stream = words(key, Purpose.IDS, calls=-(-count // 4))[0, :count].astype(np.uint64)
    drawn = (stream * ends[-1]) >> np.uint64(32)
    tensors = np.searchsorted(ends, drawn, side="right")
    return [
        (ordinals[tensor], int(block) - int(ends[tensor]) + sizes[ordinals[tensor]])
        for tensor, block in zip(tensors.tolist(), drawn.tolist(), strict=True)
    ]


def sample_places(digest: bytes, manifest: Manifest, trainable: Sequence[int]) -> Sequence[tuple[int, int]]:
    """Return (ordinal, block) of the blocks that are compared for a state, drawn by the state's digest."""
    # By the digest, so that a client cannot know the blocks before it has the state.
    sizes = {ordinal: num_blocks(manifest.entries[ordinal].shape) for ordinal in trainable}
    return sample_blocks(int.from_bytes(digest[:8], "little"), sizes, BLOCKS)


def block_checks(
    ledger: SeedLedger, manifest: Manifest, trainable: Sequence[int], displacement_of: Displacement
) -> bytes:
    """Return the first bytes of the SHA-256 of the displacements (int32, real positions only) of each drawn block."""
    return b"".join(
        block_check(ledger.bank, ledger.accumulators, displacement_of, manifest, ordinal, block)
        for ordinal, block in sample_places(ledger.digest, manifest, trainable)
    )


def block_check(
    bank: DirectionBank,
    accumulators: Array,
    displacement_of: Displacement,
    manifest: Manifest,
    ordinal: int,
    block: int,
) -> bytes:
    """Return the check of one block."""
    shape = manifest.entries[ordinal].shape
    y = displacement_of(bank, accumulators, ordinal=ordinal, shape=shape, blocks=range(block, block + 1))
    return hashlib.sha256(y.astype("<i4").tobytes()).digest()[:LENGTH]


def first_wrong(
    ours: bytes, theirs: bytes, digest: bytes, manifest: Manifest, trainable: Sequence[int]
) -> tuple[str, int] | None:
    """Return (tensor, block) of the first block whose check differs, None if all agree.

    `ours` and `theirs` are checks as `block_checks` returns them, `theirs` of any length.
    """
    place = first_difference(split_checks(ours), split_checks(theirs))
    if place is None:
        return None
    # Checks that are too long differ after the last block, which is named then.
    ordinal, block = sample_places(digest, manifest, trainable)[min(place, BLOCKS - 1)]
    return manifest.entries[ordinal].name, block


def first_difference(ours: Sequence[bytes], theirs: Sequence[bytes]) -> int | None:
    """Return the place of the first check that differs or is missing, None if all agree."""
    return next((i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b), None)


def split_checks(checks: bytes) -> Sequence[bytes]:
    return [checks[start : start + LENGTH] for start in range(0, len(checks), LENGTH)]
