from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedtune.errors import ConfigError
from fedtune.pruning.least_squares import moment_shapes
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout, BlockStructure, ModelStructure
from fedtune.store import pruning
from fedtune.tensors import Array

ANATOMY = BlockLayout("llama", (Block("model.layers.0", 4, 2, 2, 8),), width=8)
KEEP = ModelStructure((BlockStructure((2, 3), (1,), (0, 1, 2, 6)),))
ORDER: dict[str, Array] = {"heads": np.arange(4, dtype=np.float32), "channels": np.arange(8, dtype=np.float32) / 3}
BASE = {"name": "tiny", "digest": "abc123", "revision": ""}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    pruning.write(tmp_path, KEEP, ANATOMY, ratio=0.5, settings=PruningSettings(), ranking=ORDER, base=BASE)
    return tmp_path / "pruning.json"


def test_what_was_kept_and_its_order_come_back(written: Path) -> None:
    assert pruning.read(written, ANATOMY, "abc123") == KEEP
    order = pruning.read_ranking(str(written), Path(), ANATOMY, "abc123")
    np.testing.assert_allclose(order["channels"], ORDER["channels"], rtol=1e-5)
    told = json.loads(written.read_text())
    assert told["blocks"][0]["ff"] == [[0, 3], [6, 1]]
    assert told["sparsity"] == pytest.approx(0.5)


@given(st.sets(st.integers(0, 300)))
def test_runs_give_their_numbers_back(numbers: set[int]) -> None:
    rising = tuple(sorted(numbers))
    assert pruning.expand_runs(pruning.runs(rising)) == rising


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told["blocks"][0].update(q=[3, 2]), "rising indices"),
        (lambda told: told["blocks"][0].update(q=[0, 2]), "kept key/value heads"),
        (lambda told: told["blocks"][0].update(ff=[[0, 9]]), "indices from 0 to 7"),
        (lambda told: told["blocks"][0].update(ff=[[4, 2], [0, 1]]), "rising indices"),
        (lambda told: told["blocks"][0].update(ff=[]), "at least one of 8"),
        (lambda told: told["blocks"][0].update(ff=[[0, 2**40]]), "runs of"),
        (lambda told: told["blocks"][0].pop("kv"), "heads and channels"),
        (lambda told: told["blocks"].append(told["blocks"][0]), "expected 1 blocks"),
        (lambda told: told.update(digest="00"), "lists of the digest 00"),
        (lambda told: told["base"].update(digest="other"), "the base abc123"),
        (lambda told: told.update(family="bert"), "the base abc123"),
        (lambda told: told.update(format=9), "of format 1"),
    ],
)
def test_a_file_of_no_model_or_of_another_base_is_refused_by_name(written: Path, change: Change, said: str) -> None:
    told = json.loads(written.read_text())
    change(told)
    written.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=said) as caught:
        pruning.read(written, ANATOMY, "abc123")
    assert "pruning.json" in str(caught.value)


def test_an_order_of_another_length_or_of_no_numbers_is_refused(written: Path, tmp_path: Path) -> None:
    told = json.loads(written.read_text())
    for bad, said in (
        ([1.0], "expected heads of shape"),
        ([1.0, 2.0, None, 4.0], "finite numbers"),
        ("x", "a ranking of"),
    ):
        written.write_text(json.dumps({**told, "order": {**told["order"], "heads": bad}}))
        with pytest.raises(ConfigError, match=said):
            pruning.read_ranking(str(written), Path(), ANATOMY, "abc123")
    with pytest.raises(ConfigError, match=r"to hold a pruning.json"):
        pruning.read_ranking("nowhere.json", tmp_path, ANATOMY, "abc123")


REPAIR = PruningSettings(repair="least-squares", repair_rank=4)


def some_moments(settings: PruningSettings = REPAIR) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = moment_shapes(settings, ANATOMY)
    return {name: np.abs(rng.normal(size=shape)).astype(np.float16) for name, shape in shapes.items()}


@pytest.fixture
def repaired(tmp_path: Path) -> Path:
    rest: dict[str, Any] = {"ratio": 0.5, "ranking": ORDER, "base": BASE}
    pruning.write(tmp_path, KEEP, ANATOMY, settings=REPAIR, moments=some_moments(), **rest)
    return tmp_path / "pruning.json"


def test_moments_come_back_exactly_with_their_settings(repaired: Path) -> None:
    settings = pruning.settings_of(repaired, ANATOMY, "abc123")
    assert settings == REPAIR
    found = pruning.read_moments(repaired, Path(), settings, ANATOMY, "abc123")
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in some_moments().items()
    }
    assert pruning.read_moments(repaired, Path(), PruningSettings(), ANATOMY, "abc123") == {}


def test_settings_of_a_release_before_repairs_are_those_without(written: Path) -> None:
    told = json.loads(written.read_text())
    del told["settings"]["repair"], told["settings"]["repair_rank"]
    written.write_text(json.dumps(told))
    assert pruning.settings_of(written, ANATOMY, "abc123") == PruningSettings()
    with pytest.raises(ConfigError, match=r"expected .*pruning\.json to name moments for 'least-squares'; got none"):
        pruning.read_moments(written, Path(), REPAIR, ANATOMY, "abc123")


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (lambda m: b"", "others than pruning.json names"),
        (lambda m: save({**m, "model.layers.0.mlp.down_proj.mean": np.zeros(8, np.float16)}), "others than"),
    ],
)
def test_other_moments_than_those_that_were_written_are_refused(repaired: Path, body: Any, said: str) -> None:
    (repaired.parent / "moments.safetensors").write_bytes(body(some_moments()))
    with pytest.raises(ConfigError, match=said):
        pruning.read_moments(repaired, Path(), REPAIR, ANATOMY, "abc123")


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: {**m, "model.layers.0.mlp.down_proj.u": m["model.layers.0.mlp.down_proj.u"][:7]}, r"\(8, 4\)"),
        (lambda m: {k: v for k, v in m.items() if not k.endswith("o_proj.mean")}, r"o_proj\.mean.*got none"),
        (lambda m: {**m, "model.layers.0.mlp.down_proj.mean": np.full(8, np.nan, np.float16)}, "finite numbers"),
        (lambda m: {**m, "model.layers.0.mlp.down_proj.deviation": np.full(8, -1, np.float16)}, "none below 0"),
    ],
)
def test_moments_that_are_none_of_this_base_are_refused_though_their_digest_holds(
    tmp_path: Path, change: Any, said: str
) -> None:
    rest: dict[str, Any] = {"ratio": 0.5, "settings": REPAIR, "ranking": ORDER, "base": BASE}
    pruning.write(tmp_path, KEEP, ANATOMY, moments=change(some_moments()), **rest)
    with pytest.raises(ConfigError, match=said):
        pruning.read_moments(tmp_path / "pruning.json", Path(), REPAIR, ANATOMY, "abc123")
    with pytest.raises(ConfigError, match="the base other"):
        pruning.read_moments(tmp_path / "pruning.json", Path(), REPAIR, ANATOMY, "other")
