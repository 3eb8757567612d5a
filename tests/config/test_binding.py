"""Every value of a recipe is checked against its type, and all faults are told at once, each with what to do."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Recipe, bind, render
from fedtune.data.settings import Split
from fedtune.errors import ConfigError
from fedtune.messages import Training, TrainLora
from fedtune.methods import METHODS
from fedtune.model.settings import AdapterSettings
from tests.config.conftest import SHORTEST, Faulty

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "simulations").rglob("*.toml"))


def test_the_shortest_recipe_has_harmless_defaults(recipe: Recipe) -> None:
    assert recipe.seed == 0
    assert recipe.planner.name == "fixed"
    assert recipe.override == ()
    assert recipe.adapter.alpha == "2r"
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.data.split.clients == 4


@pytest.mark.parametrize("name", METHODS)
def test_every_method_binds_from_its_name_alone(name: str) -> None:
    method = bind(SHORTEST, overrides=[f"method={name}"]).method
    assert isinstance(method, METHODS[name].settings)
    assert method.name == name


ADAPTING = [name for name, method in sorted(METHODS.items()) if method.task is TrainLora]
METHOD_KEYS = [
    ("flora", {"mode": "svt", "tau": 0.95, "max_rank": 64, "state_max_rank": 128}),
    ("hetlora", {"rank_decay": 0.9, "rank_penalty": 0.1}),
    *((name, {"server_learning_rate": 0.5, "weights": "uniform", "wire_dtype": "fp32"}) for name in ADAPTING),
    ("fedkseed", {"bank": "kron", "seeds": 256, "clip": 2.5, "scalar_step": 1e-6, "trainable": ("*q_proj*",)}),
]


@pytest.mark.parametrize(("name", "keys"), METHOD_KEYS)
def test_every_method_binds_its_own_settings(name: str, keys: dict[str, object]) -> None:
    method = bind(tomllib.loads(SHORTEST) | {"method": {"name": name, **keys}}).method
    assert {key: getattr(method, key) for key in keys} == keys


def test_a_method_refuses_the_settings_of_another(faulty: Faulty) -> None:
    found = faulty("method=fedit", "method.max_rank=64")
    assert found["method.max_rank"].startswith("method.max_rank: unknown key")


def test_the_shortest_recipe_has_at_most_twelve_lines() -> None:
    assert len(SHORTEST.splitlines()) <= 12
    bind(SHORTEST)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_recipe_of_the_simulations_binds(file: Path) -> None:
    assert bind(file).name == file.stem


def test_a_name_alone_is_the_same_as_its_table() -> None:
    assert bind(SHORTEST) == bind(SHORTEST, overrides=['method={name = "flora"}', 'planner="fixed"'])
    assert bind(SHORTEST, overrides=["data.split=files"]).data.split.kind == "files"


def test_all_faults_are_told_at_once_with_the_file_and_their_number(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    text = SHORTEST.replace("steps = 20", 'steps = "20"').replace("rank = 8", "rank = 0").replace('"flora"', '"flor"')
    file.write_text(text + "[evaluat]\n")
    with pytest.raises(ConfigError) as caught:
        bind(file, overrides=["rounds.cohort=2.5"])
    assert str(caught.value).startswith("my.toml: 5 faults\n")
    paths = {fault.path for fault in caught.value.faults}
    assert paths == {"client.steps", "adapter.rank", "method.name", "evaluat", "rounds.cohort"}


def test_one_misspelt_key_reads_as_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(SHORTEST.replace('"flora"', '{ name = "flora", max_rnak = 4 }'))
    with pytest.raises(ConfigError) as caught:
        bind(file)
    assert str(caught.value) == ("recipe.toml: 1 fault\n  method.max_rnak: unknown key; did you mean method.max_rank?")


def test_an_unknown_table_is_told_with_those_that_there_are(faulty: Faulty) -> None:
    found = faulty("guard.name=secure", "modle.base=x")
    assert "the keys are name, seed, model, adapter, client" in found["guard"]
    assert found["modle"].endswith("did you mean model?")


def test_a_bad_override_is_told_beside_the_other_faults(faulty: Faulty) -> None:
    assert set(faulty("seed", "adapter.rank=0")) == {"--set seed", "adapter.rank"}


def test_missing_tables_come_with_an_example(faulty: Faulty) -> None:
    found = faulty(text="\n")
    assert set(found) == {"model", "data"}
    assert found["data"].endswith('e.g. data = { source = "train.jsonl" }')


def test_missing_keys_say_what_they_hold(faulty: Faulty) -> None:
    found = faulty("data={}")
    assert found["data.source"].startswith("data.source: expected")
    assert found["data.source"].endswith("got nothing")


MINIMAL = 'model = { base = "embedded" }\ndata = { source = "train.jsonl" }\n'


def test_a_base_and_data_make_a_recipe_whose_defaults_are_written_out() -> None:
    recipe = bind(MINIMAL)
    assert recipe.method.name == "flora"  # takes clients of any ranks
    assert recipe.adapter == AdapterSettings(rank=8, targets=("all-linear",))  # names of layers differ by family
    assert recipe.client == Training(steps=10, batch=4, learning_rate=2e-4)
    assert recipe.rounds.count == 3
    assert recipe.data.split == Split("iid", clients=4)
    text = render(recipe)
    for line in ('targets = ["all-linear"]', "steps = 10", "count = 3", 'dtype = "auto"'):
        assert line in text
    assert bind(text) == recipe


def test_what_is_given_takes_the_place_of_a_default() -> None:
    recipe = bind(MINIMAL, overrides=["client.epochs=2.0", "adapter.rank=4", 'data.split="files"', "method=fedit"])
    assert recipe.client.steps is None
    assert recipe.client.epochs == 2
    assert recipe.adapter.rank == 4
    assert recipe.data.split.kind == "files"
    assert recipe.method.name == "fedit"


@pytest.mark.parametrize("source", ['["a.jsonl", "b.jsonl"]', '"*.jsonl"', '"one/../?.jsonl"'])
def test_several_files_are_one_client_each(source: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
    file = tmp_path / "r.toml"
    file.write_text(f'model = {{ base = "embedded" }}\ndata = {{ source = {source} }}\n')
    assert bind(file).data.split == Split("files")
    (tmp_path / "b.jsonl").unlink()
    if source == '"*.jsonl"':
        assert bind(file).data.split == Split("iid", clients=4)


def test_the_name_is_the_files_unless_given_and_names_a_folder(tmp_path: Path, faulty: Faulty) -> None:
    file = tmp_path / "my run (2).toml"
    file.write_text("\ufeff" + SHORTEST)
    assert bind(file).name == "my-run-2"
    for bad in ("../up", ".hidden", "", "a/b", "x" * 101):
        assert "it names a folder" in faulty(f"name='{bad}'")["name"]


def test_local_files_are_found_beside_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "some[1]"
    (folder / "model").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text("")
    (folder / "r.toml").write_text(SHORTEST)
    given = ["model.base=model", 'data.source=["a.jsonl", "missing.jsonl"]', "data.test=*.jsonl"]
    bound = bind(folder / "r.toml", overrides=given)
    assert bound.root == folder
    assert bound.model.base == str(folder / "model")
    assert bound.data.source == (str(folder / "a.jsonl"), "missing.jsonl")
    assert str(bound.data.test).endswith("*.jsonl")
    assert Path(str(bound.data.test)).is_absolute()
    assert bind(SHORTEST).model.base == "embedded"


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=8), st.text(max_size=8))
def test_no_override_crashes(key: str, value: str) -> None:
    for override in (f"client.{key}={value}", f"{key}={value}", f"data.source={value}", f"override={value}"):
        with suppress(ConfigError):  # any other error fails the test
            bind(SHORTEST, overrides=[override])


def test_config_loads_no_torch() -> None:
    code = "import sys, fedtune.config; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
