"""A run's whole history in 60 + 4K bytes, or in a few more for several banks or groups, and the base's manifest."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np

from fedtune.directions.bank import BANK_NAMES, DirectionBank, headroom
from fedtune.directions.blocks import Groups
from fedtune.directions.rebuild_numpy import EXPONENTS
from fedtune.directions.space import MAX_BANKS, MAX_GROUPS, MAX_TENSORS, Grouped, directions
from fedtune.errors import ConfigError, Fault, WireError
from fedtune.tensors import DTYPES, Array, Tensors

LEDGER_MAGIC = b"FTKS\x01"
LEDGER_HEADER = struct.Struct("<5sBHIQiI32s")
"""Magic, bank, zero, K, key, exponent, round, digest of the manifest; then K integers of 32 bits."""
GROUPED_MAGIC = b"FTKS\x02"
GROUPED_HEADER = struct.Struct("<5sBHIiI32sHH")
"""Magic, bank, zero, K, exponent, round, digest of the manifest, number of banks B, number of groups G or 0 for one per
tensor; then B keys of 64 bits, oldest first; for one per tensor G and G ordinals, of 32 bits; then B x G x K integers.
"""

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
    """The state of FedKSeed: w(A) = w0 - 2^-e * sum_k A_k z_k, over all banks, and the group of each position."""

    bank: DirectionBank
    exponent: int
    """e."""
    round: int
    """Number of rounds whose updates are in the accumulators."""
    manifest: bytes
    """Digest of the base's manifest, 32 bytes."""
    accumulators: Array
    """A, int32 (bank.size,)."""

    def encode(self) -> bytes:
        """Return the ledger in its one canonical form, integers little-endian."""
        bank = self.bank
        if isinstance(bank, Grouped):
            return encode_grouped_header(self, bank) + self.accumulators.astype("<i4").tobytes()
        header = (LEDGER_MAGIC, bank.code, 0, bank.size, bank.key, self.exponent, self.round, self.manifest)
        return LEDGER_HEADER.pack(*header) + self.accumulators.astype("<i4").tobytes()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form: the state digest."""
        return hashlib.sha256(self.encode()).digest()


def encode_grouped_header(ledger: SeedLedger, bank: Grouped) -> bytes:
    """Return what stands before the integers of a ledger of several banks or groups."""
    fixed = (GROUPED_MAGIC, bank.code, 0, bank.seeds, ledger.exponent, ledger.round, ledger.manifest, len(bank.banks))
    keys = struct.pack(f"<{len(bank.banks)}Q", *(plain.key for plain in bank.banks))
    if bank.groups == "tensor":
        ordinals = struct.pack(f"<I{len(bank.tensors)}I", len(bank.tensors), *bank.tensors)
        return GROUPED_HEADER.pack(*fixed, 0) + keys + ordinals
    return GROUPED_HEADER.pack(*fixed, bank.groups) + keys


def decode_ledger(data: bytes) -> SeedLedger:
    """Return the ledger that was encoded, of either version; its accumulators are read-only.

    Raises:
        WireError: if the bytes are not exactly one ledger, or one that no run can have reached.
    """
    grouped = data[: len(GROUPED_MAGIC)] == GROUPED_MAGIC
    header = GROUPED_HEADER if grouped else LEDGER_HEADER
    if len(data) < header.size:
        raise WireError(f"seed ledger: expected at least {header.size} bytes; got {len(data)}; send the whole ledger")
    if not (grouped or data[: len(LEDGER_MAGIC)] == LEDGER_MAGIC) or data[6:8] != bytes(2):
        expected = f"to start with {LEDGER_MAGIC!r} or {GROUPED_MAGIC!r} and to have zeros after the bank"
        raise WireError(f"seed ledger: expected it {expected}; got {bytes(data[:8])!r}; send a ledger")
    if (code := data[5]) not in BANK_NAMES:
        raise WireError(f"seed ledger: expected a bank of {dict(BANK_NAMES)}; got {code}; update fedtune")
    bank: DirectionBank
    try:
        if grouped:
            bank, exponent, round, manifest, start = decode_grouped_header(data, BANK_NAMES[code])
        else:
            _, _, _, size, key, exponent, round, manifest = LEDGER_HEADER.unpack_from(data)
            bank, start = directions(BANK_NAMES[code], size, [key]), LEDGER_HEADER.size
    except ConfigError as error:
        raise WireError(f"seed ledger: {error}") from error
    if len(data) != start + 4 * bank.size:
        raise WireError(
            f"seed ledger: expected {start + 4 * bank.size} bytes for {bank.size} seeds; got {len(data)}; send it whole"
        )
    if exponent not in EXPONENTS:
        raise WireError(f"seed ledger: expected e in {EXPONENTS}; got {exponent}; send the ledger of a run")
    accumulators = np.frombuffer(data, "<i4", offset=start)
    # Larger sums would wrap around in a rebuild without any error.
    if headroom(bank, accumulators) < 0:
        raise WireError("seed ledger: expected sums that fit into 32 bits; got larger ones; send the ledger of a run")
    return SeedLedger(bank, exponent, round, manifest, accumulators)


def decode_grouped_header(data: bytes, name: str) -> tuple[Grouped, int, int, bytes, int]:
    """Return the directions, the exponent, the round and the manifest's digest, and where the integers start.

    Raises:
        ConfigError: if there are no such directions.
        WireError: if the bytes end too early, or one bank of one group is stated, which has a form of its own.
    """
    _, _, _, seeds, exponent, round, manifest, count, number = GROUPED_HEADER.unpack_from(data)
    if not 1 <= count <= MAX_BANKS or number > MAX_GROUPS:
        expected = f"1 to {MAX_BANKS} banks and at most {MAX_GROUPS} groups"
        raise WireError(f"seed ledger: expected {expected}; got {count} and {number}; send the ledger of a run")
    try:
        keys, start = struct.unpack_from(f"<{count}Q", data, GROUPED_HEADER.size), GROUPED_HEADER.size + 8 * count
        groups: Groups = number or "tensor"
        tensors: tuple[int, ...] = ()
        if groups == "tensor":
            (listed,) = struct.unpack_from("<I", data, start)
            # Before as many ordinals are read: the number may be any of 32 bits.
            if listed > MAX_TENSORS:
                expected = f"at most {MAX_TENSORS} tensors"
                raise WireError(f"seed ledger: expected {expected}; got {listed}; send the ledger of a run")
            tensors = struct.unpack_from(f"<{listed}I", data, start + 4)
            start += 4 + 4 * listed
    except struct.error:
        raise WireError(f"seed ledger: expected whole lists; got {len(data)} bytes that end within one") from None
    if (count, groups) == (1, 1):
        # Two encodings of one state would have two digests.
        raise WireError(
            f"seed ledger: expected several banks or groups after {GROUPED_MAGIC!r}; got one; "
            f"write it with {LEDGER_MAGIC!r}"
        )
    bank = directions(name, seeds, keys, groups, tensors)
    assert isinstance(bank, Grouped)
    return bank, exponent, round, manifest, start


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


def replace_tensors(manifest: Manifest, tensors: Tensors) -> Manifest:
    """Return the manifest of a base in which some tensors are others, of the same names; unknown names are left out."""
    entries = (
        describe_tensor(entry.name, tensors[entry.name]) if entry.name in tensors else entry
        for entry in manifest.entries
    )
    return Manifest(tuple(entries))


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
