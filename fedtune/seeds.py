"""The one source of randomness: keys derived from the run's seed, and generators made of them."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, purpose: str, round: int = 0, client: str = "") -> int:
    """Return a 64-bit key that depends on all four arguments and on nothing else.

    The key is the first 8 bytes (little-endian) of SHA-256 over the four fields, each preceded by its length
    in bytes, so that no two different argument lists are ever the same byte string.

    >>> derive(0, "cohort", 1) == derive(0, "cohort", 1)
    True
    >>> derive(0, "cohort", 1) == derive(0, "cohort", 11)
    False
    """
    digest = hashlib.sha256()
    for field in (str(seed), purpose, str(round), client):
        data = field.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest()[:8], "little")


def generator(key: int) -> np.random.Generator:
    """Return a counter-based numpy generator (Philox) for a key made by `derive`."""
    return np.random.Generator(np.random.Philox(key=key))
