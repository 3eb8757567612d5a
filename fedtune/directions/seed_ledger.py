"""A run's whole history in 60 + 4K bytes, and the manifest of the base that it refers to."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np

from fedtune.directions.bank import BANK_NAMES, BANKS, DirectionBank, headroom
from fedtune.directions.rebuild_numpy import EXPONENTS
from fedtune.errors import ConfigError, Fault, WireError
from fedtune.tensors import DTYPES, Array, Tensors

LEDGER_MAGIC = b"FTKS\x01"
LEDGER_HEADER = struct.Struct("<5sBHIQiI32s")
"""Magic, bank, zero, K, key, exponent, round, digest of the manifest; then K integers of 32 bits."""

MANIFEST_MAGIC = b"FTKM\x01"
DTYPE_CODES: Mapping[str, int] = {"fp32": 1, "fp16": 2, "bf16": 3}
DTYPE_NAMES: Mapping[int, str] = {code: name for name, code in DTYPE_CODES.items()}
EXPONENT_BITS: Mapping[str, int] = {"fp32": 0x7F800000, "fp16": 0x7C00, "bf16": 0x7F80}
"""All of them are set in an infinity or NaN, and in no finite number."""
MAX_AXES = 64
"""Of an array, in numpy."""
PIECE = 2**20
"""Numbers checked together, so that a large tensor needs no mask of its own size."""


@dataclass(frozen=True)
class SeedLedger:
    """The state of FedKSeed: w(A) = w0 - 2^-e * sum_k A_k z_k."""

    bank: DirectionBank
    exponent: int
    """e."""
    round: int
    """Number of rounds whose updates are in the accumulators."""
    manifest: bytes
    """Digest of the base's manifest, 32 bytes."""
    accumulators: Array
    """A, int32 (K,)."""

    def encode(self) -> bytes:
        """Return the ledger in its one canonical form, integers little-endian."""
        bank = self.bank
        header = (LEDGER_MAGIC, bank.code, 0, bank.size, bank.key, self.exponent, self.round, self.manifest)
        return LEDGER_HEADER.pack(*header) + self.accumulators.astype("<i4").tobytes()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form: the state digest."""
        return hashlib.sha256(self.encode()).digest()


def decode_ledger(data: bytes) -> SeedLedger:
    """Return the ledger that was encoded; its accumulators are read-only.

    Raises:
        WireError: if the bytes are not exactly one ledger, or one that no run can have reached.
    """
    if len(data) < LEDGER_HEADER.size:
        raise WireError(
            f"seed ledger: expected at least {LEDGER_HEADER.size} bytes; got {len(data)}; send the whole ledger"
        )
    magic, code, zero, size, key, exponent, round, manifest = LEDGER_HEADER.unpack_from(data)
    if magic != LEDGER_MAGIC or zero != 0:
        raise WireError(
            f"seed ledger: expected it to start with {LEDGER_MAGIC!r}; got {bytes(data[:8])!r}; send a ledger"
        )
    if code not in BANK_NAMES:
        raise WireError(f"seed ledger: expected a bank of {dict(BANK_NAMES)}; got {code}; update fedtune")
    try:
        bank = BANKS[BANK_NAMES[code]](size, key)
    except ConfigError as error:
        raise WireError(f"seed ledger: {error}") from error
    if len(data) != LEDGER_HEADER.size + 4 * size:
        raise WireError(
            f"seed ledger: expected {LEDGER_HEADER.size + 4 * size} bytes for {size} seeds; got {len(data)}; "
            "send it whole"
        )
    if exponent not in EXPONENTS:
        raise WireError(f"seed ledger: expected e in {EXPONENTS}; got {exponent}; send the ledger of a run")
    accumulators = np.frombuffer(data, "<i4", offset=LEDGER_HEADER.size)
    # Larger sums would wrap around in a rebuild without any error.
    if headroom(bank, accumulators) < 0:
        raise WireError("seed ledger: expected sums that fit into 32 bits; got larger ones; send the ledger of a run")
    return SeedLedger(bank, exponent, round, manifest, accumulators)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the base, in its stored shape and number format."""

    name: str
    """In the state dict, without the prefixes of wrappers."""
    dtype: str
    """A name of `tensors.DTYPES`."""
    shape: tuple[int, ...]
    digest: bytes
    """SHA-256 of its little-endian bytes in row-major order."""

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    def encode(self) -> bytes:
        """Return the tensor's part of the manifest bytes."""
        name = self.name.encode()
        front = struct.pack("<I", len(name)) + name + struct.pack("<BB", DTYPE_CODES[self.dtype], len(self.shape))
        return front + struct.pack(f"<{len(self.shape)}Q", *self.shape) + self.digest


@dataclass(frozen=True)
class Manifest:
    """All floating-point tensors of a base, trainable or not, sorted by the UTF-8 bytes of their names."""

    entries: tuple[TensorEntry, ...]

    def __post_init__(self) -> None:
        # By bytes: a sort of str would differ between languages beyond the first 2^16 characters.
        names = [entry.name.encode() for entry in self.entries]
        if any(a >= b for a, b in pairwise(names)):
            raise ConfigError(
                Fault("manifest", "every tensor once, sorted by name", "another order", "use `describe_base`")
            )

    @cached_property
    def ordinals(self) -> Mapping[str, int]:
        """Places of the tensors in the list, by name; every direction of a tensor depends on its place."""
        return {entry.name: ordinal for ordinal, entry in enumerate(self.entries)}

    def encode(self) -> bytes:
        """Return the manifest in its one canonical form, integers little-endian."""
        parts = [entry.encode() for entry in self.entries]
        return MANIFEST_MAGIC + struct.pack("<I", len(self.entries)) + b"".join(parts)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form."""
        return hashlib.sha256(self.encode()).digest()


def describe_base(tensors: Tensors) -> Manifest:
    """Return the manifest of a base; a tied tensor must be given once, under the first of its names.

    Raises:
        ConfigError: naming every tensor whose format is none of fp32, fp16 and bf16, or that is not finite.
    """
    faults = [fault for name in sorted(tensors) if (fault := tensor_fault(name, tensors[name]))]
    if faults:
        raise ConfigError(faults)
    return Manifest(tuple(describe_tensor(name, tensors[name]) for name in sorted(tensors, key=str.encode)))


def describe_tensor(name: str, tensor: Array) -> TensorEntry:
    """Return a tensor's entry in the manifest."""
    dtype = next(key for key, kind in DTYPES.items() if kind == tensor.dtype)
    # Viewed as bytes: hashlib refuses the buffer of a bfloat16 array.
    digest = hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).digest()
    return TensorEntry(name, dtype, tuple(tensor.shape), digest)


def tensor_fault(name: str, tensor: Array) -> Fault | None:
    """Return why a tensor cannot be part of a base (its format, or a number that is not finite), None if it can."""
    if tensor.dtype not in DTYPES.values():
        return Fault(name, f"weights in {', '.join(DTYPES)}", str(tensor.dtype), "convert the base")
    dtype = next(key for key, kind in DTYPES.items() if kind == tensor.dtype)
    mask = EXPONENT_BITS[dtype]
    # On the bits: one rule for all three formats.
    flat: Array = np.ascontiguousarray(tensor).reshape(-1).view(np.uint32 if dtype == "fp32" else np.uint16)
    for start in range(0, len(flat), PIECE):
        if (np.bitwise_and(flat[start : start + PIECE], mask) == mask).any():
            return Fault(name, "finite weights", "NaN or infinity", "repair the base")
    return None


def decode_manifest(data: bytes) -> Manifest:
    """Return the manifest that was encoded.

    Raises:
        WireError: if the bytes are not exactly one manifest.
    """
    try:
        entries, place = list[TensorEntry](), len(MANIFEST_MAGIC) + 4
        (count,) = struct.unpack_from("<I", data, len(MANIFEST_MAGIC))
        for _ in range(count):
            (length,) = struct.unpack_from("<I", data, place)
            # A slice beyond the end is short without an error; the comparison at the end refuses what follows.
            name = bytes(data[place + 4 : place + 4 + length]).decode()
            code, axes = struct.unpack_from("<BB", data, place + 4 + length)
            # Here, and not when all are read: a list of one name again and again takes memory for nothing.
            if axes > MAX_AXES or (entries and name.encode() <= entries[-1].name.encode()):
                raise WireError(
                    f"manifest: expected tensors sorted by name, of at most {MAX_AXES} axes; got {name[:80]!r}"
                )
            shape = struct.unpack_from(f"<{axes}Q", data, place + 6 + length)
            place += 6 + length + 8 * axes
            (digest,) = struct.unpack_from("32s", data, place)
            entries.append(TensorEntry(name, DTYPE_NAMES[code], shape, digest))
            place += len(digest)
        manifest = Manifest(tuple(entries))
    except (struct.error, UnicodeDecodeError, KeyError, ConfigError) as error:
        raise WireError(f"manifest: expected {len(data)} bytes that are one; got others ({error})") from None
    # Two encodings of one manifest would have two digests: only the canonical one is let in.
    if manifest.encode() != data:
        raise WireError(f"manifest: expected the one canonical form; got {len(data)} other bytes")
    return manifest
