"""A run's whole history in 60 + 4K bytes: the seed ledger, from which anyone who holds the base rebuilds the model."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from fedtune.directions.bank import DirectionBank, headroom
from fedtune.directions.banks import BANKS, CODES
from fedtune.directions.rebuild_numpy import EXPONENTS
from fedtune.errors import ConfigError, WireError
from fedtune.tensors import Array

FORMAT = struct.Struct("<5sBHIQiI32s")
MAGIC = b"FTKS\x01"


@dataclass(frozen=True)
class SeedLedger:
    """The state of FedKSeed: w(A) = w0 - 2^-e * sum_k A_k z_k."""

    bank: DirectionBank
    exponent: int
    """e."""
    round: int
    """Rounds that are in the accumulators."""
    manifest: bytes
    """Digest of the base's manifest, 32 bytes."""
    accumulators: Array
    """A, int32 (K,)."""

    def encode(self) -> bytes:
        """Return the ledger in its one canonical form, integers little-endian."""
        bank = self.bank
        front = (MAGIC, bank.code, 0, bank.size, bank.key, self.exponent, self.round, self.manifest)
        return FORMAT.pack(*front) + self.accumulators.astype("<i4").tobytes()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form: the state digest."""
        return hashlib.sha256(self.encode()).digest()


def decode(data: bytes) -> SeedLedger:
    """Return the ledger that was encoded; its accumulators cannot be written to.

    Raises:
        WireError: if the bytes are not exactly one ledger, or one that no run can have reached.
    """
    if len(data) < FORMAT.size:
        raise WireError(f"seed ledger: expected at least {FORMAT.size} bytes; got {len(data)}; send the whole ledger")
    magic, code, zero, size, key, exponent, round, manifest = FORMAT.unpack_from(data)
    if magic != MAGIC or zero != 0:
        raise WireError(f"seed ledger: expected it to start with {MAGIC!r}; got {bytes(data[:8])!r}; send a ledger")
    if code not in CODES:
        raise WireError(f"seed ledger: expected a bank of {dict(CODES)}; got {code}; update fedtune")
    try:
        bank = BANKS[CODES[code]](size, key)
    except ConfigError as error:
        raise WireError(f"seed ledger: {error}") from error
    if len(data) != FORMAT.size + 4 * size:
        raise WireError(
            f"seed ledger: expected {FORMAT.size + 4 * size} bytes for {size} seeds; got {len(data)}; send it whole"
        )
    if exponent not in EXPONENTS:
        raise WireError(f"seed ledger: expected e in {EXPONENTS}; got {exponent}; send the ledger of a run")
    accumulators = np.frombuffer(data, "<i4", offset=FORMAT.size)
    if headroom(bank, accumulators) < 0:
        raise WireError("seed ledger: expected sums that fit into 32 bits; got larger ones; send the ledger of a run")
    return SeedLedger(bank, exponent, round, manifest, accumulators)
