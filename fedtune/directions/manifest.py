"""What a base checkpoint consists of, in one canonical order: the list that directions and digests refer to."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np

from fedtune.errors import ConfigError, Fault, WireError
from fedtune.tensors import DTYPES, Array, Tensors

MAGIC = b"FTKM\x01"
CODES: Mapping[str, int] = {"fp32": 1, "fp16": 2, "bf16": 3}
NAMES: Mapping[int, str] = {code: name for name, code in CODES.items()}
EXPONENT_BITS: Mapping[str, int] = {"fp32": 0x7F800000, "fp16": 0x7C00, "bf16": 0x7F80}
"""All set in a number that is infinite or none."""
PIECE = 2**20


@dataclass(frozen=True)
class Entry:
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
        front = struct.pack("<I", len(name)) + name + struct.pack("<BB", CODES[self.dtype], len(self.shape))
        return front + struct.pack(f"<{len(self.shape)}Q", *self.shape) + self.digest


@dataclass(frozen=True)
class Manifest:
    """All floating-point tensors of a base, trainable or not, sorted by the UTF-8 bytes of their names."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        names = [entry.name.encode() for entry in self.entries]
        if any(a >= b for a, b in pairwise(names)):
            raise ConfigError(Fault("manifest", "every tensor once, sorted by name", "another order", "use `describe`"))

    @cached_property
    def ordinals(self) -> Mapping[str, int]:
        """Places of the tensors in the list, by name: what a direction depends on."""
        return {entry.name: ordinal for ordinal, entry in enumerate(self.entries)}

    def encode(self) -> bytes:
        """Return the manifest in its one canonical form, integers little-endian."""
        return MAGIC + struct.pack("<I", len(self.entries)) + b"".join(entry.encode() for entry in self.entries)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form."""
        return hashlib.sha256(self.encode()).digest()


def describe(tensors: Tensors) -> Manifest:
    """Return the manifest of a base; a tied tensor must be given once, under the first of its names.

    Raises:
        ConfigError: naming every tensor whose format is none of fp32, fp16 and bf16, or that is not finite.
    """
    faults = [fault for name in sorted(tensors) if (fault := fault_of(name, tensors[name]))]
    if faults:
        raise ConfigError(faults)
    return Manifest(tuple(describe_one(name, tensors[name]) for name in sorted(tensors, key=str.encode)))


def describe_one(name: str, tensor: Array) -> Entry:
    """Return a tensor's line of the manifest."""
    dtype = next(key for key, kind in DTYPES.items() if kind == tensor.dtype)
    digest = hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).digest()
    return Entry(name, dtype, tuple(tensor.shape), digest)


def fault_of(name: str, tensor: Array) -> Fault | None:
    """Return what keeps a tensor from being a base: its format, or a number that is not finite."""
    if tensor.dtype not in DTYPES.values():
        return Fault(name, f"weights in {', '.join(DTYPES)}", str(tensor.dtype), "convert the base")
    dtype = next(key for key, kind in DTYPES.items() if kind == tensor.dtype)
    mask = EXPONENT_BITS[dtype]
    flat: Array = np.ascontiguousarray(tensor).reshape(-1).view(np.uint32 if dtype == "fp32" else np.uint16)
    for start in range(0, len(flat), PIECE):
        if (np.bitwise_and(flat[start : start + PIECE], mask) == mask).any():
            return Fault(name, "finite weights", "NaN or infinity", "repair the base")
    return None


def decode(data: bytes) -> Manifest:
    """Return the manifest that was encoded.

    Raises:
        WireError: if the bytes are not exactly one manifest.
    """
    try:
        entries, place = [], len(MAGIC) + 4
        (count,) = struct.unpack_from("<I", data, len(MAGIC))
        for _ in range(count):
            (length,) = struct.unpack_from("<I", data, place)
            name = bytes(data[place + 4 : place + 4 + length]).decode()
            code, axes = struct.unpack_from("<BB", data, place + 4 + length)
            shape = struct.unpack_from(f"<{axes}Q", data, place + 6 + length)
            place += 6 + length + 8 * axes
            (digest,) = struct.unpack_from("32s", data, place)
            entries.append(Entry(name, NAMES[code], shape, digest))
            place += len(digest)
        found = Manifest(tuple(entries))
    except (struct.error, UnicodeDecodeError, KeyError, ConfigError) as error:
        raise WireError(f"manifest: expected {len(data)} bytes that are one; got others ({error})") from None
    if found.encode() != data:
        raise WireError(f"manifest: expected the one canonical form; got {len(data)} other bytes")
    return found
