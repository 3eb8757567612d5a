"""The tensor library of llama.cpp, as the package xllamacpp holds it: its C functions, and where they may be called.

Only functions that take numbers and opaque pointers are used, and two structures of three fields: nothing here depends
on the layout of the library's own. It aborts the process where an argument is not as it expects, so the callers check
types, sizes and ranges first.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.errors import ClientError, ExtraError
from fedtune.tensors import Array

VERSION = "0.26.0"
"""Of the library: another one may number its formats and order its arguments otherwise."""
PACKAGE = "xllamacpp>=2026.10,<2026.11"
F32, INT32 = 0, 26
"""Numbers of two formats."""
ALL_THREADS = -1
OPERATION = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_int, c_void_p)
"""A function that computes a tensor: the tensor, the thread's place, the number of threads, and a number."""
ERROR = 4
"""Level of the library's messages from which on they are kept."""


class Memory(Structure):
    """How much memory the descriptions of tensors take; their numbers lie elsewhere."""

    _fields_ = [("num_bytes", c_size_t), ("buffer", c_void_p), ("descriptions_only", c_bool)]


class Reading(Structure):
    """That a file's tensors are described, not read, and where the descriptions go."""

    _fields_ = [("descriptions_only", c_bool), ("context", POINTER(c_void_p))]


P, N, W, F = c_void_p, c_int64, c_int, c_float
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_init": (P, Memory),
    "ggml_free": (None, P),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_graph_custom": (P, P, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_new_tensor_1d": (P, P, W, N),
    "ggml_new_tensor_2d": (P, P, W, N, N),
    "ggml_new_tensor_3d": (P, P, W, N, N, N),
    "ggml_set_input": (None, P),
    "ggml_set_output": (None, P),
    "ggml_get_tensor": (P, P, c_char_p),
    "ggml_row_size": (c_size_t, W, N),
    "ggml_blck_size": (N, W),
    "ggml_type_name": (c_char_p, W),
    "ggml_get_rows": (P, P, P, P),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_mul": (P, P, P, P),
    "ggml_add": (P, P, P, P),
    "ggml_cpy": (P, P, P, P),
    "ggml_cont": (P, P, P),
    "ggml_permute": (P, P, P, W, W, W, W),
    "ggml_reshape_2d": (P, P, P, N, N),
    "ggml_reshape_3d": (P, P, P, N, N, N),
    "ggml_reshape_4d": (P, P, P, N, N, N, N),
    "ggml_view_1d": (P, P, P, N, c_size_t),
    "ggml_view_2d": (P, P, P, N, N, c_size_t, c_size_t),
    "ggml_rms_norm": (P, P, P, F),
    "ggml_rope_ext": (P, P, P, P, P, W, W, W, F, F, F, F, F, F),
    "ggml_soft_max_ext": (P, P, P, P, F, F),
    "ggml_custom_4d": (P, P, W, N, N, N, N, POINTER(c_void_p), W, P, W, P),
    "ggml_get_data": (P, P),
    "ggml_swiglu_split": (P, P, P, P),
    "ggml_gallocr_new": (P, P),
    "ggml_gallocr_free": (None, P),
    "ggml_gallocr_alloc_graph": (c_bool, P, P),
    "ggml_backend_cpu_init": (P,),
    "ggml_backend_cpu_set_n_threads": (None, P, W),
    "ggml_backend_cpu_buffer_type": (P,),
    "ggml_backend_cpu_buffer_from_ptr": (P, P, c_size_t),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, P, P),
    "ggml_backend_buffer_free": (None, P),
    "ggml_backend_free": (None, P),
    "ggml_backend_graph_compute": (W, P, P),
    "ggml_backend_tensor_alloc": (W, P, P, P),
    "ggml_backend_tensor_set": (None, P, P, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, P, P, c_size_t, c_size_t),
    "ggml_log_set": (None, P, P),
    "ggml_version": (c_char_p,),
    "gguf_init_from_file": (P, c_char_p, Reading),
    "gguf_free": (None, P),
    "gguf_find_key": (N, P, c_char_p),
    "gguf_get_kv_type": (W, P, N),
    "gguf_get_val_u32": (c_uint32, P, N),
    "gguf_get_val_f32": (F, P, N),
    "gguf_get_val_str": (c_char_p, P, N),
    "gguf_get_data_offset": (c_size_t, P),
    "gguf_get_n_tensors": (N, P),
    "gguf_get_tensor_name": (c_char_p, P, N),
    "gguf_get_tensor_offset": (c_size_t, P, N),
    "gguf_get_tensor_size": (c_size_t, P, N),
    "gguf_get_tensor_type": (W, P, N),
    "gguf_get_tensor_ne": (POINTER(N), P, N),
}
"""Result and arguments of every function that is called."""


@lru_cache(maxsize=1)
def library() -> Any:
    """Return the library, silent but for errors, which `complaint` gives back.

    Raises:
        ExtraError: if the package is missing, or holds another version.
    """
    hint = f'run pip install "fedtune[edge-gguf]", which asks for {PACKAGE}'
    spec = find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    # By its path, not by an import: the package's own module brings a whole server, which nothing here needs.
    files = [file for folder in folders for file in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not files:
        raise ExtraError(f"expected the package xllamacpp, which runs GGUF files; {hint}")
    # Otherwise an abort starts a debugger to print where it happened.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        loaded: Any = ctypes.CDLL(str(files[0]))
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
        version = loaded.ggml_version().decode()
    except (OSError, AttributeError) as error:
        raise ExtraError(f"{files[0]}: expected ggml {VERSION}; got another library ({error}); {hint}") from error
    if version != VERSION:
        raise ExtraError(f"{files[0]}: expected ggml {VERSION}; got {version}; {hint}")
    loaded.complaints = deque[str](maxlen=4)

    def keep(level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            loaded.complaints.append(" ".join(text.decode(errors="replace").split()))

    # The library holds the pointer alone: without this reference the function would be collected.
    loaded.log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(keep)
    loaded.ggml_log_set(loaded.log, None)
    return loaded


def complaint() -> str:
    """Return the last error that the library wrote, and forget it; empty if there is none."""
    complaints = library().complaints
    last = complaints[-1] if complaints else ""
    complaints.clear()
    return str(last)


def context(num_tensors: int, *, num_nodes: int = 0) -> int:
    """Return a new context for the descriptions of so many tensors, and of a graph; free it with `ggml_free`."""
    g = library()
    num_bytes = num_tensors * g.ggml_tensor_overhead()
    if num_nodes:
        num_bytes += g.ggml_graph_overhead_custom(num_nodes, False)
    handle = g.ggml_init(Memory(num_bytes, None, True))
    if not handle:
        raise no_memory()
    return int(handle)


def write(tensor: int, array: Array) -> None:
    """Copy a contiguous array into a tensor of the same size and format."""
    assert array.flags.c_contiguous
    library().ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def read(tensor: int, shape: tuple[int, ...]) -> Array:
    """Return a tensor's numbers, float32, the fastest axis last."""
    array = np.empty(shape, np.float32)
    library().ggml_backend_tensor_get(tensor, array.ctypes.data, 0, array.nbytes)
    return array


def view(tensor: int, shape: tuple[int, int]) -> Array:
    """Return a contiguous float32 tensor as an array in the same memory, the fastest axis last."""
    memory: Any = (c_float * (shape[0] * shape[1])).from_address(library().ggml_get_data(tensor))
    return np.frombuffer(memory, np.float32).reshape(shape)


def no_memory() -> ClientError:
    """Return the error of a step that does not fit."""
    reason = complaint()
    return ClientError(
        f"expected the memory that the model's work takes; the system gave none{f' ({reason})' if reason else ''}; "
        "lower client.batch or data.max_tokens in the recipe, or take part with a smaller base"
    )
