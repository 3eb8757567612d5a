from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedtune
from fedtune.cli.main import app
from fedtune.config import bind, render
from fedtune.errors import ConfigError
from fedtune.runs.local import prepare
from fedtune.runs.plan import plan


@pytest.fixture
def recipe(tables: dict[str, Any], tmp_path: Path) -> Path:
    """A file with the tiny recipe."""
    path = tmp_path / "tiny.toml"
    path.write_text(render(bind(tables)))
    return path


def test_a_plan_is_the_recipe_as_it_would_run_with_the_bases_digest(recipe: Path) -> None:
    planned, experiment = plan(recipe, pin=True), prepare(bind(recipe))
    bound = bind(planned.recipe)
    assert bound.model.digest == experiment.base.digest
    assert bound.model.dtype == "float32"  # auto, on a CPU
    counts = ", ".join(f"{name} {count}" for name, count in experiment.fleet.items())
    assert f"training examples: {counts}" in planned.notes


def test_a_plan_says_how_the_learning_rate_changes_from_round_to_round(recipe: Path) -> None:
    planned = plan(recipe, overrides=["rounds.schedule=cosine", "rounds.count=9", "client.learning_rate=0.01"])
    assert planned.notes[-1] == "learning rate: 0.01, falling to 0.001 in round 9 (cosine)"


def test_a_plan_says_who_holds_how_many_rows_of_which_labels(tables: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": f"{kind} {row}", "kind": kind} for kind in ("apple", "berry") for row in range(10)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"kind": "meta", "by": "kind", "clients": 2}
    tables["data"] = {"source": str(tmp_path / "x.jsonl"), "split": split, "held_out": 0.2, "limit": 19}
    tables["override"] = []
    planned = plan(tables)
    numbers = dict(planned.split)
    assert re.fullmatch("[0-9a-f]{64}", numbers.pop("digest"))
    assert sum(sum(own) for own in numbers["mix"].pop("counts").values()) == 19
    distances = numbers["mix"].pop("distances")
    assert numbers["mix"].pop("mean_distance") == sum(distances.values()) / 2
    assert {"apple", "berry"} == set(distances) == set(numbers["clients"])
    assert sum(own["train"] + own["held_out"] for own in numbers.pop("clients").values()) == 19
    assert numbers == {"kind": "meta", "left_out": 1, "mix": {"label": "kind", "labels": ["apple", "berry"]}}


def test_pinning_refuses_another_base_from_then_on(recipe: Path) -> None:
    before = tomllib.loads(recipe.read_text())
    plan(recipe, pin=True)
    after = tomllib.loads(recipe.read_text())
    digest = after["model"].pop("digest")
    assert after == before
    assert prepare(bind(recipe)).base.digest == digest
    with pytest.raises(ConfigError, match=rf"model\.digest: expected the base of digest {digest}.*got [0-9a-f]{{64}} "):
        prepare(bind(recipe, overrides=['model.dtype="bfloat16"']))
    plan(recipe, overrides=['model.dtype="bfloat16"'], pin=True)  # a new pin takes the place of the old one
    assert tomllib.loads(recipe.read_text())["model"]["digest"] != digest


def test_a_digest_that_is_none_is_a_fault(tables: dict[str, Any]) -> None:
    tables["model"]["digest"] = "abc"
    with pytest.raises(ConfigError, match=r"model\.digest: expected 64 digits"):
        bind(tables)


def test_the_command_prints_the_recipe_alone_on_stdout(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe), "--pin", "--recipe"])
    assert result.exit_code == 0, result.output
    assert bind(result.stdout).model.digest == tomllib.loads(recipe.read_text())["model"]["digest"]
    assert "wrote model.digest into" in result.stderr


def test_a_base_and_data_alone_run(checkpoints: dict[str, Path], tables: dict[str, Any], tmp_path: Path) -> None:
    source = tables["data"]["source"]
    file = tmp_path / "minimal.toml"
    file.write_text(f'model = {{ base = "{checkpoints["llama"]}" }}\ndata = {{ source = "{source}" }}\n')
    overrides = ["client.steps=1", "rounds.count=1", "report.plots=false"]
    run = fedtune.simulate(file, out=tmp_path / "run", overrides=overrides)
    recorded = bind(run.path / "recipe.toml")
    assert recorded.model.dtype == "float32"
    assert recorded.adapter.rank == 8
    assert len(run.summary["clients"]) == 4


def test_a_plan_loads_no_weights(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("fedtune.model.base.read_whole", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    planned = plan(recipe)
    assert bind(planned.recipe).model.digest is None
    assert planned.bill is not None
    assert {bill.client for bill in planned.bill.clients} == {"client-0", "client-1", "client-2"}


def test_the_bill_fits_eighty_columns_and_json_has_every_client(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe)])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Memory at the peak" in result.stdout
    stated = json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--json"]).stdout.splitlines()[-1])
    own = stated["clients"]["client-2"]
    assert own["rank"] == 8
    assert sum(size for part, size in own["memory_bytes"].items() if part != "total") == own["memory_bytes"]["total"]
    assert bind(stated["recipe"]).name == "tiny"


def test_a_recipe_for_sites_is_planned_without_their_data(tables: dict[str, Any], tmp_path: Path) -> None:
    del tables["data"]["source"], tables["data"]["split"], tables["override"]
    tables["rounds"]["min_clients"] = 3
    file = tmp_path / "sites.json.toml"
    file.write_text(rendered(tables))
    planned = plan(file)
    assert planned.bill is not None
    assert [bill.client for bill in planned.bill.clients] == ["site-1", "site-2", "site-3"]
    assert planned.bill.clients[0].longest == 32
    with pytest.raises(ConfigError, match="--measure: expected data on this machine"):
        plan(file, measure=True)


def rendered(tables: dict[str, Any]) -> str:
    """Return tables as TOML, one line a key."""
    lines = []
    for name, value in tables.items():
        lines.append(f"{name} = {inline(value)}")
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)
