from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.edge.bundle import Bundle, read_bundle
from fedtune.edge.memory import RUNTIME_BYTES, available_bytes, check_memory, step_bytes, weight_bytes
from fedtune.errors import ConfigError
from tests.edge.bundles import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_bundle(tmp_path / "bundle"))


def meminfo(folder: Path, kib: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal:  9999999 kB\nMemFree:  1 kB\nMemAvailable:  {kib} kB\n")
    return path


def test_what_is_free_is_what_the_system_says_is_available(tmp_path: Path) -> None:
    assert available_bytes(meminfo(tmp_path, 2048)) == 2**21
    assert available_bytes(tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("MemTotal: 3 kB\n")
    assert available_bytes(tmp_path / "meminfo") is None


def test_a_bundle_that_does_not_fit_is_refused_with_what_there_is_and_what_to_do(
    bundle: Bundle, tmp_path: Path
) -> None:
    needed = weight_bytes(bundle) + RUNTIME_BYTES
    assert needed > RUNTIME_BYTES
    check_memory(bundle, needed, meminfo=tmp_path / "none")
    check_memory(bundle, None, meminfo=meminfo(tmp_path, needed // 1024 + 1))
    with pytest.raises(
        ConfigError, match=r"tiny; got policy.max_memory_gib = 0.0\d+; raise it, or take a smaller bundle"
    ):
        check_memory(bundle, needed - 1, meminfo=tmp_path / "none")
    expected = r"model.base: expected 67 MB of free memory for tiny; got 1 MB; end other programs, or take a smaller"
    with pytest.raises(ConfigError, match=expected) as caught:
        check_memory(bundle, None, meminfo=meminfo(tmp_path, 1024))
    assert "\n" not in str(caught.value)


def test_loaded_weights_are_no_longer_asked_of_what_is_free(bundle: Bundle, tmp_path: Path) -> None:
    small = meminfo(tmp_path, 1024)
    check_memory(bundle, None, loaded=True, more=2**20, meminfo=small)
    with pytest.raises(ConfigError, match="expected 1 MB of free memory"):
        check_memory(bundle, None, loaded=True, more=2**20 + 1, meminfo=small)
    with pytest.raises(ConfigError, match="max_memory_gib"):
        check_memory(bundle, 2**20, loaded=True, meminfo=small)


def test_a_step_takes_its_factors_and_the_scores_of_every_word(bundle: Bundle) -> None:
    rows: Any = [SimpleNamespace(input_ids=range(5)), SimpleNamespace(input_ids=range(7))]
    # Factors (2 + 3) * 4, 3 losses of 2 rows of 7 tokens, each 2 * 4 scores and 8 * 3 activations.
    assert step_bytes(bundle, 4, rows, 3) == 4 * (20 + 3 * 2 * 7 * (8 + 24))
