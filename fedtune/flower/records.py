"""One layout of Flower records for every message: a header, and bodies as raw bytes without a numpy header."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.errors import WireError
from fedtune.wire.codec import EncodedAssignment

HEADER, TENSORS, STYPE = "fedtune.header", "fedtune.tensors", "fedtune.raw"
UPDATE = "update"
"""Key of an update's body, which carries its own header."""
ERROR = 100
"""Code of an error reply whose reason is one of fedtune's errors; Flower's own codes are far below."""


def raw(body: bytes) -> Array:
    return Array("uint8", (len(body),), STYPE, body)


def pack(
    header: bytes, bodies: Mapping[str, bytes], *, array: Callable[[str, bytes], Array] | None = None
) -> RecordDict:
    """Return the content of a Flower message.

    Args:
        header: bytes of a proto header.
        bodies: by their key, the digest where they have one.
        array: makes the array of a body; that of `arrays()` makes each once.
    """
    tensors = ArrayRecord()
    for key, body in bodies.items():
        # One by one: ArrayRecord(dict) copies each Array, and a copy is cut and hashed again (1.2 ms per MB).
        tensors[key] = raw(body) if array is None else array(key, body)
    return RecordDict({HEADER: ConfigRecord({"proto": header}), TENSORS: tensors})


def arrays() -> Callable[[str, bytes], Array]:
    """Return a function that makes the array of a body once, found by its digest, as long as the function lives."""
    cache: dict[str, Array] = {}

    def array(digest: str, body: bytes) -> Array:
        if digest not in cache:
            cache[digest] = raw(body)
        return cache[digest]

    return array


def unpack(content: RecordDict) -> EncodedAssignment:
    """Return header and bodies; what they say is for `wire` to check.

    Raises:
        WireError: if a record is missing, extra or of another type.
    """
    header, tensors = content.get(HEADER), content.get(TENSORS)
    if len(content) != 2 or not isinstance(header, ConfigRecord) or not isinstance(tensors, ArrayRecord):
        raise WireError(f"expected a ConfigRecord {HEADER} and an ArrayRecord {TENSORS}; got {sorted(content)[:5]}")
    proto = header.get("proto")
    if len(header) != 1 or not isinstance(proto, bytes) or any(array.stype != STYPE for array in tensors.values()):
        raise WireError(f"expected bytes under 'proto' and arrays of {STYPE}; got something else")
    return EncodedAssignment(proto, {key: array.data for key, array in tensors.items()})
