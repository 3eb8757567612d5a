"""PEFT states in Flower's records, as `get_peft_model_state_dict` gives them; read without torch or pickle."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from tokenize import TokenError

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, RecordDict

from fedtune.errors import WireError
from fedtune.store.peft import PREFIX
from fedtune.tensors import Array, Tensors

NUMPY, MAGIC = "numpy.ndarray", b"\x93NUMPY"
"""How Flower names arrays that are stored as .npy files, and what such a file begins with."""
SIDE = re.compile(r"(.+)\.lora_([AB])\.weight")
FLOATS = ("float32", "float16", "float64")
MALFORMED = (
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    EOFError,
    RecursionError,
    MemoryError,
    TokenError,
    OverflowError,
)
"""What numpy raises over an .npy file that it cannot read; its head is Python source of a literal."""


@dataclass(frozen=True)
class PeftState:
    """The tensors of a PEFT LoRA model, float32; the scale alpha / rank is not in them."""

    factors: Tensors
    """`<module>.a` (rank, in) and `<module>.b` (out, rank)."""
    saved: Tensors
    """modules_to_save, by parameter name."""
    prefix: str = PREFIX
    """That its names carry in the record; empty where PEFT was put into a model of transformers itself."""

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every module with factors."""
        names = [key.removesuffix(".b") for key in self.factors if key.endswith(".b")]
        return {
            name: (int(self.factors[f"{name}.b"].shape[0]), int(self.factors[f"{name}.a"].shape[1])) for name in names
        }

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of every module with factors: columns of b."""
        return {key.removesuffix(".b"): int(b.shape[1]) for key, b in self.factors.items() if key.endswith(".b")}


def to_record(state: PeftState) -> ArrayRecord:
    """Return a state as the record that a client gives to `set_peft_model_state_dict`."""
    flat = dict[str, Array]()
    for name in state.modules:
        for side in ("a", "b"):
            flat[f"{name}.lora_{side.upper()}.weight"] = state.factors[f"{name}.{side}"]
    return arrays_to_record({state.prefix + key: array for key, array in {**flat, **state.saved}.items()})


def arrays_to_record(arrays: Tensors) -> ArrayRecord:
    """Return named arrays as a record, in float32."""
    # Copied into C order: numpy writes a transposed array as it lies, and torch would read a strided view.
    return ArrayRecord({key: FlowerArray(np.ascontiguousarray(array, np.float32)) for key, array in arrays.items()})


def from_record(record: ArrayRecord) -> PeftState:
    """Return the state in a record.

    Raises:
        WireError: naming the array, if one cannot be read, is no matrix of factors, or lacks its partner.
    """
    prefix = PREFIX if all(key.startswith(PREFIX) for key in record) else ""
    factors, saved = dict[str, Array](), dict[str, Array]()
    for key, stored in record.items():
        name = key.removeprefix(prefix)
        array = read_array(name, stored)
        match = SIDE.fullmatch(name)
        if match is None and "lora_" in name:
            expected = "expected factors lora_A.weight and lora_B.weight of linear layers, and modules_to_save"
            raise WireError(f"{name[:120]}: {expected}; got another part of an adapter; train without it")
        if match is None:
            saved[name] = array
        elif array.ndim != 2:
            raise WireError(f"{name[:120]}: expected a matrix; got shape {array.shape}; adapt linear layers alone")
        else:
            factors[f"{match[1]}.{match[2].lower()}"] = array
    for key in sorted(factors):
        partner = key[:-1] + ("b" if key.endswith(".a") else "a")
        if partner not in factors:
            raise WireError(f"{key[:-2][:120]}: expected both factors lora_A and lora_B; got one of them")
    return PeftState(factors, saved, prefix)


def read_array(name: str, stored: FlowerArray) -> Array:
    """Return the numbers of one array as float32.

    Raises:
        WireError: if it is no .npy file, its numbers are no floats, or it holds other than as many as it says.
    """
    where = name[:120]
    if stored.stype != NUMPY or not stored.data.startswith(MAGIC):
        raise WireError(f"{where}: expected an array of numpy; got one of {stored.stype[:40]!r}")
    # Its size is checked against its bytes before memory is taken, which numpy's own reader does not.
    body = BytesIO(stored.data)
    try:
        version = np.lib.format.read_magic(body)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read_head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_head(body)
        count = math.prod(shape)
        if abs(count) > sys.maxsize:
            raise ValueError("more numbers than any memory holds")
    except MALFORMED as error:
        raise WireError(f"{where}: expected an .npy file; got one that cannot be read ({str(error)[:60]})") from None
    if dtype.name not in FLOATS:
        # numpy has no bfloat16: Flower stores such tensors as two raw bytes a number.
        kind = "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 else dtype.name
        hint = "send tensor.float() of every tensor"
        raise WireError(f"{where}: expected numbers of {', '.join(FLOATS)}; got {kind}; {hint}")
    data = memoryview(stored.data)[body.tell() :]
    if min(shape, default=0) < 0 or len(data) != count * dtype.itemsize:
        raise WireError(f"{where}: expected {count} numbers of {dtype.name}; got {len(data)} bytes")
    try:
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")
    except MALFORMED as error:
        # A hundred axes, sides of True, or one beyond 64 bits beside one of 0.
        raise WireError(f"{where}: expected the shape of an array; got {str(shape)[:60]}") from error
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit float32 is refused as not finite
        return np.ascontiguousarray(array, np.float32)


def only_array_record(content: RecordDict, key: str) -> ArrayRecord:
    """Return the record of arrays in a reply.

    Raises:
        WireError: if there are none, or several.
    """
    records = dict(content.array_records)
    if len(records) != 1 or key not in records:
        raise WireError(f"expected one ArrayRecord, {key!r}; got {sorted(records)[:5] or 'none'}")
    return records[key]
