from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.edge.bundle import Bundle, Module, read_bundle
from fedtune.edge.memory import RUNTIME_BYTES, available_bytes, check_memory, step_bytes, weight_bytes
from fedtune.errors import ConfigError
from tests.edge.bundles import FACTS, write_bundle


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


def row(length: int) -> Any:
    return SimpleNamespace(input_ids=range(length))


def test_a_step_takes_its_factors_its_activations_and_the_scores_of_every_word(bundle: Bundle) -> None:
    # Factors (2 + 3) * 4; 3 losses of 2 rows of 7 tokens, each 16 * 3 activations and 4 * 4 scores.
    assert step_bytes(bundle, 4, [row(5), row(7)], 3) == 4 * (20 + 3 * 2 * 7 * (16 * 3 + 4 * 4))


def test_losses_that_do_not_fit_into_one_pass_take_no_more_memory(bundle: Bundle) -> None:
    rows = [row(512)] * 8
    assert step_bytes(bundle, 4, rows, 9) == step_bytes(bundle, 4, rows, 2) == step_bytes(bundle, 4, rows, 1)
    assert step_bytes(bundle, 4, [row(512)] * 2, 9) == step_bytes(bundle, 4, [row(512)] * 2, 4)
    # One batch is not divided.
    assert step_bytes(bundle, 4, rows * 2, 1) > 1.9 * step_bytes(bundle, 4, rows, 1)


def test_the_scores_of_a_large_vocabulary_are_computed_some_at_a_time(tmp_path: Path) -> None:
    """A step of SmolLM2 over 8 rows of 512 tokens with 8 queries took 0.75 GB; 16 were asked for."""
    modules = {"layer": Module(out=1536, width=576)}
    facts = replace(FACTS, modules=modules, vocabulary=49152)
    large: Any = SimpleNamespace(facts=facts)
    assert 0.3e9 < step_bytes(large, 16, [row(512)] * 8, 9) < 0.75e9
    # The scores of a row against itself grow with its length.
    assert step_bytes(large, 16, [row(2048)] * 2, 2) > 1.5 * step_bytes(large, 16, [row(64)] * 64, 2)
