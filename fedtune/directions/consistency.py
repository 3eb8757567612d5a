"""A few blocks of displacements that a client states and the server makes for itself: whether both mean one model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from fedtune.directions.bank import DirectionBank
from fedtune.directions.blocks import first_difference, num_blocks, sample_blocks
from fedtune.directions.manifest import Manifest
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.tensors import Array

BLOCKS = 4
"""Drawn anew for every state."""
LENGTH = 4
"""Bytes of each block's digest."""
STATE = 8
"""Bytes of the state's digest that travel up."""

Displacement = Callable[..., Array]
"""`bank.displacement`, or another way that gives the same bits."""


def places(digest: bytes, manifest: Manifest, trainable: Sequence[int]) -> Sequence[tuple[int, int]]:
    """Return (ordinal, block) of the blocks that a state's digest draws."""
    sizes = {ordinal: num_blocks(manifest.entries[ordinal].shape) for ordinal in trainable}
    return sample_blocks(int.from_bytes(digest[:8], "little"), sizes, BLOCKS)


def block_checks(ledger: SeedLedger, manifest: Manifest, trainable: Sequence[int], displacement: Displacement) -> bytes:
    """Return the first bytes of the SHA-256 of the displacements (int32, real positions only) of each drawn block."""
    return b"".join(
        check(ledger.bank, ledger.accumulators, displacement, manifest, ordinal, block)
        for ordinal, block in places(ledger.digest, manifest, trainable)
    )


def check(
    bank: DirectionBank, accumulators: Array, displacement: Displacement, manifest: Manifest, ordinal: int, block: int
) -> bytes:
    shape = manifest.entries[ordinal].shape
    y = displacement(bank, accumulators, ordinal=ordinal, shape=shape, blocks=range(block, block + 1))
    return hashlib.sha256(y.astype("<i4").tobytes()).digest()[:LENGTH]


def first_wrong(
    ours: bytes, theirs: bytes, digest: bytes, manifest: Manifest, trainable: Sequence[int]
) -> tuple[str, int] | None:
    """Return (tensor, block) of the first block that differs, None if all agree."""
    place = first_difference(split_checks(ours), split_checks(theirs))
    if place is None:
        return None
    ordinal, block = places(digest, manifest, trainable)[min(place, BLOCKS - 1)]
    return manifest.entries[ordinal].name, block


def split_checks(checks: bytes) -> Sequence[bytes]:
    return [checks[start : start + LENGTH] for start in range(0, len(checks), LENGTH)]
