"""A GGUF file as llama.cpp's library sees it: its numbers and names, and its tensors where the file is mapped."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.edge.ggml import Reading, complaint, library
from fedtune.errors import ConfigError, Fault

AGAIN = "get the file again"
UINT32, FLOAT32, TEXT = 4, 6, 8
"""Formats of a file's values."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    handle: int
    kind: int
    """Number of its format."""
    shape: tuple[int, ...]
    """The fastest axis first, as the library orders them: a matrix is (in, out)."""

    @property
    def rows(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1


class GgufFile:
    """An open file; its tensors are read from the mapped file as they are needed."""

    def __init__(self, path: Path) -> None:
        """Open a file and check that all of its tensors lie in it.

        Raises:
            ConfigError: if it is no GGUF file, or not a whole one.
        """
        g, self.path = library(), path
        try:
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise unreadable(path, "another file")
                # The numbers stay on disk until they are used, and other processes share them.
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(path, error.strerror or str(error)) from error
        descriptions = ctypes.c_void_p()
        complaint()
        self._header = g.gguf_init_from_file(str(path).encode(), Reading(True, ctypes.pointer(descriptions)))
        if not self._header:
            raise unreadable(path, complaint() or "one that llama.cpp cannot read")
        self._context = descriptions.value
        self._bytes = np.frombuffer(self._mapped, np.uint8)
        self._buffer = g.ggml_backend_cpu_buffer_from_ptr(self._bytes.ctypes.data, len(self._bytes))
        self.tensors: Mapping[str, Tensor] = self._locate()

    def _locate(self) -> Mapping[str, Tensor]:
        g, tensors = library(), dict[str, Tensor]()
        begin = g.gguf_get_data_offset(self._header)
        for i in range(g.gguf_get_n_tensors(self._header)):
            name = g.gguf_get_tensor_name(self._header, i)
            offset = begin + g.gguf_get_tensor_offset(self._header, i)
            end = offset + g.gguf_get_tensor_size(self._header, i)
            # Checked here: the library would read beyond the mapped file, which ends the process.
            if end > len(self._bytes):
                raise unreadable(self.path, f"{len(self._bytes)} bytes; {name.decode()} ends at {end}")
            handle = g.ggml_get_tensor(self._context, name)
            g.ggml_backend_tensor_alloc(self._buffer, handle, self._bytes.ctypes.data + offset)
            sizes = g.gguf_get_tensor_ne(self._header, i)[:4]
            while len(sizes) > 1 and sizes[-1] == 1:
                sizes.pop()
            tensors[name.decode(errors="replace")] = Tensor(handle, g.gguf_get_tensor_type(self._header, i), (*sizes,))
        return tensors

    def text(self, key: str) -> str:
        """Return a text of the header; empty if it has none.

        Raises:
            ConfigError: if its value is of another format.
        """
        place = self._find(key, TEXT)
        return "" if place is None else str(library().gguf_get_val_str(self._header, place).decode(errors="replace"))

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number of the header.

        Raises:
            ConfigError: if it has none and there is no default, or its value is of another format.
        """
        place = self._find(key, UINT32)
        if place is not None:
            return int(library().gguf_get_val_u32(self._header, place))
        if default is None:
            raise unreadable(self.path, f"one without {key}")
        return default

    def real(self, key: str, default: float | None = None) -> float:
        """See `integer`."""
        place = self._find(key, FLOAT32)
        if place is not None:
            return float(library().gguf_get_val_f32(self._header, place))
        if default is None:
            raise unreadable(self.path, f"one without {key}")
        return default

    def has(self, key: str) -> bool:
        """Return whether the header has a value of any format under a key."""
        return bool(library().gguf_find_key(self._header, key.encode()) >= 0)

    def close(self) -> None:
        """Free the descriptions; the tensors must not be used afterwards."""
        g = library()
        g.ggml_backend_buffer_free(self._buffer)
        g.ggml_free(self._context)
        g.gguf_free(self._header)
        del self._bytes  # the map cannot be closed while an array looks into it
        self._mapped.close()

    def _find(self, key: str, kind: int) -> int | None:
        g = library()
        place = int(g.gguf_find_key(self._header, key.encode()))
        if place < 0:
            return None
        # It would abort the process; and without it, a default would take the place of what the file says.
        if (got := int(g.gguf_get_kv_type(self._header, place))) != kind:
            raise unreadable(self.path, f"{key} in the format {got} where {kind} belongs")
        return place


def unreadable(path: Path, got: str) -> ConfigError:
    """Return the error of a file that is not as its format says."""
    return ConfigError(Fault("model.base", f"a whole GGUF file at {path}", got[:200], AGAIN))
