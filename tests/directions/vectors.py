"""Expected values that two independent programs computed, for the bank seed 0x0123456789ABCDEF, and what they need."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fedtune.directions.bank import DirectionBank
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_numpy import Rebuild, rebuild
from fedtune.directions.space import directions, plain_banks
from fedtune.seeds import generator
from fedtune.tensors import DTYPES, Array

SEED = 0x0123456789ABCDEF

SMALL = np.array([1, -2, 3, 0, 0, 5, -7, 4], np.int32)
SMALL_Y = {
    (5,): "16 -6 0 6 16",
    (4, 6): "-14 -8 2 -8 18 4 -10 8 -18 -4 -10 8 14 8 -2 -8 12 -2 4 2 -20 -2 -8 -14",
}
SMALL_BF16 = {
    (5,): "bf04 be3a 3e00 3edd bea8",
    (4, 6): "bef9 be38 3dfc 3ee4 bea9 bb80 3ea5 bee4 bddc 3e44 3f02 be84 "
    "3d48 3ebc bebf bd60 3e74 beff be44 3dfc 3eea be9f 3c00 3ea7",
}
SMALL_FP32_TIMES_1024 = [-528, -186, 128, 442, -336]

LARGE = 10_000
LARGE_W0 = "75a045f8a6ee559010b46e5e2ff72ef31a3ca41ada191a4aacdd7c6b84a99369"
LARGE_Y = {
    4096: "9e76b796b65baf48a070190cec2cb9be0668ed2abc75865feafed9c4a0faf28d",
    1024: "81f0be0d63dd43eb8b81d3ca66f3c2cbec08bfeed2d3763d4482302865d5089d",
}
LARGE_BF16 = {
    4096: "46dd247efd9198e12ea572693d1f705788ea887c98b8f8fe831e3b154e39236c",
    1024: "12ff7d4371f0c36829b35da52e4f20a84ecd7ea1dbd5a9aab8010bd78b4cc5b6",
}

SIZES = (1, 15, 4095, 4096, 4097, 10_000)
BANKS = (
    Hadamard(1, SEED),
    Hadamard(8, SEED),
    Hadamard(256, SEED),
    Hadamard(4096, SEED),
    Gaussian(16, SEED),
    Kron(16, SEED),
    Kron(256, SEED),
)

KEYS = (SEED, 77, 2**64 - 1)
TENSORS = (2, 5, 9)
SPACES = [
    directions("hadamard", 16, KEYS[:1], 4),
    directions("hadamard", 64, KEYS[:2]),
    directions("hadamard", 4096, KEYS[:2], 2),
    directions("hadamard", 1, KEYS, 64),
    directions("hadamard", 8, KEYS[:2], "tensor", TENSORS),
    directions("gaussian", 4, KEYS[:2], 2),
    directions("gaussian", 2, KEYS[:1], "tensor", TENSORS),
    directions("kron", 16, KEYS[:2]),
    directions("kron", 16, KEYS[:2], "tensor", TENSORS),
]
SPACE_NAMES = [f"{bank.name}-{bank.seeds}-{len(plain_banks(bank))}-{getattr(bank, 'groups', 1)}" for bank in SPACES]
SHAPES: Sequence[tuple[int, ...]] = ((7,), (3, 4099), (4096 * 3 + 5,))


def sha(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def small_w0(shape: tuple[int, ...]) -> Array:
    i = np.arange(np.prod(shape))
    return ((((5 * i) % 17) - 8) / 16).astype(np.float32).reshape(shape)


def large_w0() -> Array:
    i = np.arange(LARGE)
    return ((40503 * i % 65536 - 32768) / 2**20).astype(np.float32).astype(DTYPES["bf16"])


def large_accumulators(size: int) -> Array:
    return ((2654435761 * np.arange(size) % 4096) - 2048).astype(np.int32)


def weights(shape: tuple[int, ...], dtype: str = "fp32", *, key: int = 0) -> Array:
    return (generator(key).standard_normal(shape) * 0.02).astype(DTYPES[dtype])


def accumulators(bank: DirectionBank, *, most: int, key: int = 0, used: int = 4096) -> Array:
    """Return random accumulators, at most `used` of them other than zero."""
    rng = generator(key)
    drawn = rng.integers(-most, most, bank.size, endpoint=True).astype(np.int32)
    drawn[rng.permutation(bank.size)[used:]] = 0
    return drawn


def check_vectors(way: Rebuild) -> None:
    """Hold a way to rebuild against the tiny and the larger expected values of the hadamard bank."""
    bank = Hadamard(8, SEED)
    for ordinal, shape in enumerate(SMALL_Y):
        rebuilt = way(small_w0(shape).astype(DTYPES["bf16"]), SMALL, bank=bank, ordinal=ordinal, exponent=10)
        assert " ".join(f"{bits:04x}" for bits in rebuilt.reshape(-1).view(np.uint16)) == SMALL_BF16[shape]
    for size, digest in LARGE_BF16.items():
        bank = Hadamard(size, SEED)
        assert sha(way(large_w0(), large_accumulators(size), bank=bank, ordinal=2, exponent=26)) == digest


def check_no_displacement(way: Rebuild, dtype: str) -> None:
    """Hold a way to rebuild against the bits of awkward numbers, which no displacement of zero may change."""
    info = np.finfo(np.float32) if dtype == "fp32" else np.finfo(np.float16)
    awkward = [0.0, -0.0, float(info.max), float(info.min), 6e-8, -6e-8, 1.0, 1e-40 if dtype == "fp32" else 6e-8]
    w0 = np.array(awkward * 40, np.float32).astype(DTYPES[dtype]).reshape(16, 20)
    if dtype == "bf16":
        w0.reshape(-1).view(np.uint16)[:4] = (0x0001, 0x8001, 0x7F7F, 0xFF7F)
    for bank in (Hadamard(256, SEED), Kron(256, SEED)):
        assert sha(way(w0, np.zeros(256, np.int32), bank=bank, ordinal=0, exponent=26)) == sha(w0)


def check_against_reference(way: Rebuild, bank: DirectionBank, *, most: int, dtypes: tuple[str, ...]) -> None:
    sums = accumulators(bank, most=most)
    for size in SIZES:
        shape = (size,) if size != 10_000 else (40, 250)
        for dtype in dtypes:
            w0 = weights(shape, dtype)
            expected = rebuild(w0, sums, bank=bank, ordinal=3, exponent=24)
            assert sha(way(w0, sums, bank=bank, ordinal=3, exponent=24)) == sha(expected), (bank, size, dtype)


def check_spaces(way: Rebuild, bank: DirectionBank, *, most: int, dtypes: tuple[str, ...]) -> None:
    """Hold a way to rebuild against the reference for directions of several banks or groups, over odd sizes."""
    sums = accumulators(bank, most=most, key=1)
    for shape in SHAPES:
        for dtype in dtypes:
            w0 = weights(shape, dtype)
            expected = rebuild(w0, sums, bank=bank, ordinal=5, exponent=24)
            assert sha(way(w0, sums, bank=bank, ordinal=5, exponent=24)) == sha(expected), (bank, shape, dtype)
