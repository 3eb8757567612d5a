from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.edge import ggml
from fedtune.errors import ExtraError


def test_numbers_go_in_and_out_of_a_tensor() -> None:
    g, context = ggml.library(), ggml.context(1)
    tensor = g.ggml_new_tensor_2d(context, ggml.F32, 3, 2)
    buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, g.ggml_backend_cpu_buffer_type())
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ggml.write(tensor, array)
    assert np.array_equal(ggml.read(tensor, (2, 3)), array)
    g.ggml_backend_buffer_free(buffer)
    g.ggml_free(context)


@pytest.fixture
def fresh() -> Any:
    """The library is looked up anew in the test, and as before after it."""
    ggml.library.cache_clear()
    yield
    ggml.library.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda _: None)
    with pytest.raises(ExtraError, match=r"expected the package xllamacpp.*fedtune\[edge-gguf\]"):
        ggml.library()


@pytest.mark.usefixtures("fresh")
def test_another_version_of_the_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "VERSION", "0.25.0")
    with pytest.raises(ExtraError, match=r"expected ggml 0\.25\.0; got 0\.26\.0; run pip install"):
        ggml.library()


@pytest.mark.usefixtures("fresh")
def test_a_library_that_lacks_a_function_or_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xllamacpp.abi3.so").write_bytes(b"no library")
    monkeypatch.setattr(ggml, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(ExtraError, match="got another library"):
        ggml.library()
    monkeypatch.setattr(ggml, "find_spec", importlib.util.find_spec)
    monkeypatch.setitem(ggml.FUNCTIONS, "ggml_of_tomorrow", (None,))
    with pytest.raises(ExtraError, match=r"got another library.*ggml_of_tomorrow"):
        ggml.library()
