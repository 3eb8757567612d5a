"""A method, a planner, a model and data that Python code hands to `fedtune.simulate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedtune
from fedtune import api
from fedtune.errors import ConfigError
from fedtune.methods import METHODS
from fedtune.model.base import Base
from fedtune.planning.planner import PlannerInputs
from fedtune.runs.export import export


def digests(run: Path) -> list[str]:
    return [json.loads(line)["state_digest"] for line in (run / "rounds.jsonl").read_text().splitlines()]


def steps(run: Path, round: int = 1) -> dict[str, int]:
    line = json.loads((run / "rounds.jsonl").read_text().splitlines()[round])
    return {name: client["steps"] for name, client in line["clients"].items()}


def loaded(recipe: dict[str, Any]) -> tuple[Any, Any]:
    """The recipe's model and its tokenizer, loaded by hand."""
    folder = recipe["model"]["base"]
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)


def rows_of(recipe: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The recipe's rows, by client."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in Path(recipe["data"]["source"]).read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["who"], []).append({"text": row["text"]})
    return rows


def test_objects_give_the_run_that_their_names_give(recipe: dict[str, Any], tmp_path: Path) -> None:
    named = fedtune.simulate(recipe, out=tmp_path / "named")
    rest = {key: value for key, value in recipe["data"].items() if key not in ("source", "split")}
    tables = {**recipe, "data": rest, "model": {"device": "cpu", "threads": 1}}
    run = fedtune.simulate(tables, model=loaded(recipe), data=rows_of(recipe), out=tmp_path / "run")
    assert digests(run.path) == digests(named.path)
    assert run.summary["after"]["test"] == named.summary["after"]["test"]
    assert run.summary["base"]["digest"] == named.summary["base"]["digest"]
    datasets = {client: Dataset.from_list(rows) for client, rows in rows_of(recipe).items()}
    other = fedtune.simulate(recipe, data=datasets, out=tmp_path / "datasets")
    assert digests(other.path) == digests(named.path)


def test_a_bound_recipe_takes_objects_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    named = fedtune.simulate(recipe, out=tmp_path / "named")
    run = fedtune.simulate(fedtune.bind(recipe), data=rows_of(recipe), out=tmp_path / "run")
    assert digests(run.path) == digests(named.path)


def test_method_and_planner_are_used_and_a_resumed_run_needs_them_again(
    recipe: dict[str, Any], module: Any, tmp_path: Path
) -> None:
    def planner(inputs: PlannerInputs) -> Any:
        return module.ByExamples(9, inputs)

    objects: dict[str, Any] = {"method": module.METHOD, "planner": planner}
    tables = {key: value for key, value in recipe.items() if key != "method"}
    longer = {**tables, "rounds": {"count": 3}}
    run = fedtune.simulate(tables, **objects, out=tmp_path / "run")
    assert run.summary["method"] == "median"
    assert set(steps(run.path).values()) == {1}
    assert 'name = "<python>"' in (run.path / "recipe.toml").read_text()

    with pytest.raises(ConfigError, match=r"planner.*pass it again"):
        fedtune.simulate(resume=run.path, method=module.METHOD)
    whole = fedtune.simulate(longer, **objects, out=tmp_path / "whole")
    resumed = fedtune.simulate(longer, resume=run.path, **objects)
    assert digests(resumed.path) == digests(whole.path)


def test_another_planner_does_not_go_on_with_a_run(recipe: dict[str, Any], module: Any, tmp_path: Path) -> None:
    first = fedtune.simulate(recipe, planner=lambda inputs: module.ByExamples(9, inputs), out=tmp_path / "run")

    def other(inputs: PlannerInputs) -> Any:
        return module.ByExamples(1, inputs)

    with pytest.raises(ConfigError, match=r"planner\.type"):
        fedtune.simulate(resume=first.path, planner=other)
    with pytest.raises(ConfigError, match=r"planner\.name"):
        fedtune.simulate(recipe, resume=first.path)


def test_a_planner_object_has_state_of_its_own_kind(recipe: dict[str, Any], tmp_path: Path) -> None:
    class Counting:
        """Counts rounds, and asks every client for as many steps."""

        inputs: PlannerInputs

        def start(self) -> int:
            return 0

        def plan(self, learned: int, round: int, cohort: Any) -> Any:
            return {client.name: self.inputs.plan(client, steps=learned + 1) for client in cohort}

        def observe(self, learned: int, seen: Any) -> int:
            return learned + 1

    planner = Counting()
    planner.inputs = PlannerInputs(
        seed=0, rounds=2, training=lambda name: (4, fedtune.bind(recipe).client), alpha="2r", rslora=False
    )
    run = fedtune.simulate(recipe, planner=planner, out=tmp_path / "run")
    assert [set(steps(run.path, number).values()) for number in (1, 2)] == [{1}, {2}]


def test_a_client_may_say_itself_what_it_holds_out(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = rows_of(recipe)
    split: dict[str, Any] = {name: {"train": own[:-2], "held_out": own[-2:]} for name, own in rows.items()}
    split["client-0"] = rows["client-0"]
    from fedtune.config.recipe import Objects
    from fedtune.runs.local import prepare

    prepared = prepare(fedtune.bind(recipe, objects=Objects(data=split)))
    sizes = {name: (len(shard.train), len(shard.held_out)) for name, shard in prepared.federation.clients.items()}
    assert sizes == {"client-0": (6, 2), "client-1": (6, 2), "client-2": (6, 2)}
    last = rows["client-1"][-1]["text"]
    texts = [prepared.base.tokenizer.decode(e.input_ids) for e in prepared.federation.clients["client-1"].held_out]
    assert any(last in text for text in texts)


def test_a_base_is_taken_as_it_was_loaded(recipe: dict[str, Any], tmp_path: Path) -> None:
    from fedtune.runs.local import prepare

    base = prepare(fedtune.bind(recipe)).base
    assert isinstance(base, Base)
    run = fedtune.simulate(recipe, model=base, out=tmp_path / "run")
    named = fedtune.simulate(recipe, out=tmp_path / "named")
    assert digests(run.path) == digests(named.path)
    elsewhere = {**recipe, "adapter": {"rank": 4, "targets": ["q_proj"]}}
    with pytest.raises(ConfigError, match="adapts 2 modules"):
        fedtune.simulate(elsewhere, model=base, out=tmp_path / "other")


def test_a_resumed_run_needs_its_model_and_data_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = fedtune.simulate(recipe, data=rows_of(recipe), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"data.*pass it again"):
        fedtune.simulate(resume=run.path)
    fewer = {name: rows[:-1] for name, rows in rows_of(recipe).items()}
    with pytest.raises(ConfigError, match="what the run was started with"):
        fedtune.simulate(resume=run.path, data=fewer)
    fedtune.simulate(resume=run.path, data=rows_of(recipe))


class Halves:
    """A partitioner by hand whose last part has no row."""

    num_partitions = 3

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def load_partition(self, number: int) -> Dataset:
        return self.data.select(range(number, len(self.data), 2) if number < 2 else [])


def test_a_partitioner_is_a_federation_that_goes_on_without_its_empty_part(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    every = Dataset.from_list([row for rows in rows_of(recipe).values() for row in rows])
    tables = {**recipe, "rounds": {"count": 1}}
    notes: list[str] = []
    run = fedtune.simulate(
        tables, data=Halves(every), out=tmp_path / "run", watch=lambda event: notes.append(getattr(event, "text", ""))
    )
    assert sorted(run.summary["clients"]) == ["client-0", "client-1"]
    assert "data: the partitioner gives no row to client-2, which takes no part" in notes
    with pytest.raises(ConfigError, match="what the run was started with"):
        fedtune.simulate(resume=run.path, data=Halves(every.select(range(1, len(every)))), overrides=["rounds.count=2"])
    on = fedtune.simulate(resume=run.path, data=Halves(every), overrides=["rounds.count=2"])
    assert on.summary["rounds"] == 2


def test_one_data_set_is_divided_by_the_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    tables = {**recipe, "rounds": {"count": 1}}
    named = fedtune.simulate(tables, out=tmp_path / "named")
    lines = [json.loads(line) for line in Path(recipe["data"]["source"]).read_text().splitlines()]
    run = fedtune.simulate(tables, data=Dataset.from_list(lines), out=tmp_path / "run")
    assert digests(run.path) == digests(named.path)
    # Its rows are gone: the base alone is needed to merge, and a file to score.
    merged, expected = (fedtune.export(one.path, form="merged") / "model.safetensors" for one in (run, named))
    assert merged.read_bytes() == expected.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the lazy dog sleeps"}\n')
    assert fedtune.evaluate(run.path, data=other)["after"] == fedtune.evaluate(named.path, data=other)["after"]
    with pytest.raises(ConfigError, match="a run whose rows were Python objects; give --data FILE"):
        fedtune.evaluate(run.path)


@pytest.mark.parametrize(
    ("engine", "objects", "named"),
    [
        ("processes", ["model"], "model="),
        ("ray", ["data"], "data="),
        ("ray", ["planner", "data"], "planner= and data="),
    ],
)
def test_engines_of_other_processes_refuse_what_they_cannot_be_given(
    recipe: dict[str, Any], engine: str, objects: list[str], named: str
) -> None:
    given: dict[str, Any] = {"model": (None, None), "data": {"a": []}, "planner": print}
    with pytest.raises(ConfigError) as error:
        fedtune.simulate({**recipe, "engine": engine}, **{name: given[name] for name in objects})
    assert [(fault.path, named in fault.got) for fault in error.value.faults] == [("engine.name", True)]


def test_worker_processes_take_data_and_planners_of_python(recipe: dict[str, Any], module: Any, tmp_path: Path) -> None:
    tables = {**recipe, "rounds": {"count": 1}}
    objects: dict[str, Any] = {"data": rows_of(recipe), "planner": lambda inputs: module.ByExamples(9, inputs)}
    here = fedtune.simulate(tables, **objects, out=tmp_path / "here")
    there = fedtune.simulate({**tables, "engine": "processes"}, **objects, out=tmp_path / "there")
    assert digests(here.path) == digests(there.path)


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("method", "flora", "a fedtune.methods.method.Method"),
        ("planner", 3, "start, plan and observe"),
        ("data", [], "rows by client"),
        ("data", {}, "rows by client"),
    ],
)
def test_objects_of_another_type_are_refused(recipe: dict[str, Any], argument: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        fedtune.simulate(recipe, **{argument: value})
    assert error.value.faults[0].path == argument


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"a": []}, "at least one row"),
        ({"a": ["text"]}, "mappings from column to value"),
        ({"a": {"rows": []}}, "a mapping with train and held_out"),
        ({"a": [{"text": "x"}], "b": [{"instruction": "x", "output": "y"}]}, "the columns of the first client"),
    ],
)
def test_rows_that_are_none_are_refused_by_client(recipe: dict[str, Any], data: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        fedtune.simulate(recipe, data=data)


def test_a_model_of_another_type_or_format_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a pair of a transformers model and its tokenizer"):
        fedtune.simulate(recipe, model="gpt2")
    half, tokenizer = loaded(recipe)
    recipe["model"]["dtype"] = "float32"
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        fedtune.simulate(recipe, model=(half.half(), tokenizer))


def test_a_method_must_have_the_name_that_the_recipe_gives(recipe: dict[str, Any], module: Any) -> None:
    with pytest.raises(ConfigError, match="the name of the method that was passed as an object"):
        fedtune.simulate(recipe, method=module.METHOD)


def test_a_method_with_the_name_of_another_is_refused(recipe: dict[str, Any], module: Any, tmp_path: Path) -> None:
    """The run's recipe holds the name alone: resumed without the object, the other method would go on with it."""
    for other in (METHODS["fedit"], module.METHOD):
        with pytest.raises(ConfigError, match="a name that no other method has") as error:
            fedtune.simulate(recipe, method=replace(other, adapter=lambda state: {}), out=tmp_path / "run")
        assert error.value.faults[0].path == "method"
    tables = {**recipe, "method": "fedit", "rounds": {"count": 1}}
    fedtune.simulate(tables, method=METHODS["fedit"], out=tmp_path / "run")


def test_a_run_of_a_method_object_says_what_it_lacks(recipe: dict[str, Any], module: Any, tmp_path: Path) -> None:
    method = replace(module.METHOD, name="other", settings=make_dataclass("Other", [("name", str, "other")]))
    tables = {**{key: value for key, value in recipe.items() if key != "method"}, "rounds": {"count": 1}}
    run = fedtune.simulate(tables, method=method, out=tmp_path / "run").path
    uses: list[Callable[[], Any]] = [
        lambda: fedtune.evaluate(run),
        lambda: api.verify(run),
        lambda: export(run, form="merged", out=tmp_path / "merged"),
    ]
    for use in uses:
        with pytest.raises(ConfigError) as error:
            use()
        (fault,) = error.value.faults
        assert (fault.path, fault.got) == ("method", "only its name, other")
        assert "simulate(resume=..., method=...)" in fault.hint
    assert export(run, out=tmp_path / "peft").is_dir()


def test_a_run_of_a_planner_object_is_scored_and_exported_without_it(
    recipe: dict[str, Any], module: Any, tmp_path: Path
) -> None:
    tables = {**recipe, "rounds": {"count": 1}}
    run = fedtune.simulate(tables, planner=lambda inputs: module.ByExamples(9, inputs), out=tmp_path / "run")
    assert fedtune.evaluate(run.path)["after"] == run.summary["after"]["test"]
    assert export(run.path, form="merged", out=tmp_path / "merged").is_dir()
    assert api.verify(run.path).committed == 1
