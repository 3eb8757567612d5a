from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.config import bind
from fedtune.errors import ConfigError
from fedtune.runs import local, memory_guard
from tests.runs.conftest import Tables


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: round(free))


def refuse_loading(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("the base must not be loaded")


def test_a_run_that_cannot_fit_is_refused_before_its_base_is_loaded(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 0.2e9)
    monkeypatch.setattr("fedtune.client.site.load", refuse_loading)
    with pytest.raises(
        ConfigError, match=r"memory: expected at most the 0\.2 GB that are free on this machine"
    ) as refused:
        fedtune.simulate(tables, out=tmp_path / "run")
    # By part, and how to run anyway.
    assert "runtime" in str(refused.value)
    assert "engine.memory_check = false" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_settings_that_are_named_do_fit(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    tables["client"] = {**tables.get("client", {}), "batch": 64}
    with_free(monkeypatch, 1)
    with pytest.raises(ConfigError) as refused:
        local.prepare(bind(tables))
    needed = float(re.search(r"got ([0-9.e-]+) GB for", str(refused.value))[1])  # type: ignore[index]
    # A little less than it needs: half of the rows at a time fit.
    with_free(monkeypatch, needed * 1e9 * 0.995)
    with pytest.raises(ConfigError, match=r"nearest: client\.batch = 32 with client\.accumulation = 2 \([0-9.]+ GB\)"):
        local.prepare(bind(tables))
    tables["client"] |= {"batch": 32, "accumulation": 2}
    local.prepare(bind(tables))


def test_it_can_be_run_anyway_and_small_runs_are_not_looked_at_closer(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 1)
    local.prepare(bind({**tables, "engine": {"memory_check": False}}))
    with_free(monkeypatch, 64e9)
    monkeypatch.setattr(local, "sized_base", refuse_loading)
    monkeypatch.setattr(local, "check_memory", refuse_loading)
    local.prepare(bind(tables))
