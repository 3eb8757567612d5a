"""A client whose adapter another program trains is a client like any other: all methods, all engines, the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import fedtune
from fedtune.client import perform
from fedtune.config import bind
from fedtune.errors import ConfigError
from fedtune.lora.adapter import Adapter
from fedtune.model.peft_model import write_factors
from fedtune.runs.local import prepare
from fedtune.store import peft
from tests.own_trainers import broken_in_round_2, keeps_a_file, sgd
from tests.test_engines import chosen, in_memory_grid, played

Tables: TypeAlias = dict[str, Any]
# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
METHODS: tuple[Tables, ...] = (
    {"name": "flora", "mode": "continue"},
    {"name": "ffa"},
    {"name": "fedex"},
    {"name": "hetlora", "rank_penalty": 0.0},
)
MORE: tuple[Tables, ...] = (
    {"name": "flora", "mode": "reinit"},
    {"name": "flexlora"},
    {"name": "fedit"},
    {"name": "zeropad"},
)
"""In the slow tier: they differ from those above in what the server does alone."""
ALIKE = ("fedit", "fedex")
"""Methods whose clients have one rank."""


def of(tables: Tables, method: Tables, **client: Any) -> Tables:
    """Return the tiny recipe with a method, of two rounds."""
    changed = {
        **tables,
        "method": method,
        "client": {**tables["client"], "steps": 2, **client},
        "rounds": {"count": 2},
        "evaluate": {"every": 0, "clients": False},
    }
    if method["name"] in ALIKE:
        changed.pop("override", None)
    return changed


@pytest.mark.parametrize(
    "method",
    [*METHODS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE)],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_the_same_factors_give_the_same_result_by_every_method(
    method: Tables, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: dict[tuple[str, int], tuple[Adapter, float]] = {}
    train = perform.train_locally

    def record(base: Any, examples: Any, assignment: Any, *args: Any, **options: Any) -> Any:
        learned = train(base, examples, assignment, *args, **options)
        recorded[assignment.plan.client, assignment.round] = learned.final, assignment.plan.scale
        return learned

    monkeypatch.setattr(perform, "train_locally", record)
    recipe = of(tables, method)
    ours = fedtune.simulate(recipe, out=tmp_path / "ours", watch=lambda event: None)

    def given(model: Any, data: Any, order: Any) -> None:
        adapter, scale = recorded[order.client, order.round]
        write_factors(model, adapter, scale=scale)

    theirs = fedtune.simulate(recipe, out=tmp_path / "theirs", trainer=given, watch=lambda event: None)
    one, other = (peft.read(run.adapter)[0] for run in (ours, theirs))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].a, other[name].a)
        np.testing.assert_array_equal(one[name].b, other[name].b)
    losses = [[(row["loss_before"], row["loss_after"]) for row in run.rounds] for run in (ours, theirs)]
    assert losses[0] == losses[1]


def test_hetloras_penalty_counts_with_a_loop_of_ones_own(tables: Tables, tmp_path: Path) -> None:
    plain = of(tables, {"name": "hetlora", "rank_penalty": 0.0}, learning_rate=0.1)
    pulled = of(tables, {"name": "hetlora", "rank_penalty": 0.5}, learning_rate=0.1)
    runs = [
        fedtune.simulate(recipe, out=tmp_path / str(place), trainer=sgd, watch=lambda event: None)
        for place, recipe in enumerate((plain, pulled))
    ]
    adapters = [peft.read(run.adapter)[0] for run in runs]
    name = next(iter(adapters[0]))
    assert not np.array_equal(adapters[0][name].b, adapters[1][name].b)


@pytest.mark.parametrize("pool", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["grid", "processes"])
def test_every_engine_gives_the_same_bits(pool: bool, tables: Tables) -> None:
    named = of(tables, METHODS[0], trainer="tests.own_trainers:sgd")
    experiment = prepare(bind(named))
    expected = played([experiment], chosen("inprocess", 1))
    if pool:
        assert played([experiment], chosen("processes", 2)) == expected
        return
    assert played([experiment], in_memory_grid) == expected
    without = prepare(bind(of(tables, METHODS[0])))
    objects = replace(without.recipe.objects, trainer=sgd)
    assert (
        played([replace(without, recipe=replace(without.recipe, objects=objects))], chosen("inprocess", 1)) == expected
    )
    assert played([without], chosen("inprocess", 1)) != expected


def test_some_clients_may_train_by_themselves_and_a_bad_one_stops_no_round(tables: Tables, tmp_path: Path) -> None:
    recipe = of(tables, METHODS[0])
    run = fedtune.simulate(
        recipe, out=tmp_path / "run", trainer={"client-1": broken_in_round_2}, watch=lambda event: None
    )
    assert [row["clients"] for row in run.rounds] == [0, 3, 2]
    record = (run.path / "rounds.jsonl").read_text()
    assert "client-1: expected its trainer to train; got ValueError: no more (own_trainers.py:" in record


def test_a_trainer_may_store_something_from_round_to_round(tables: Tables, tmp_path: Path) -> None:
    run = fedtune.simulate(of(tables, METHODS[0]), out=tmp_path / "run", trainer=keeps_a_file, watch=lambda event: None)
    files = sorted(path.read_text() for path in (run.path / "trainers").rglob("rounds"))
    assert files == ["1\n2\n"] * 3


def test_a_run_goes_on_with_the_trainer_that_it_was_started_with(tables: Tables, tmp_path: Path) -> None:
    recipe = of(tables, METHODS[0])
    run = fedtune.simulate(recipe, out=tmp_path / "run", trainer=sgd, watch=lambda event: None)
    with pytest.raises(ConfigError, match=r"trainer: expected the Python object that the run was started with"):
        fedtune.simulate(resume=run.path, overrides=["rounds.count=3"])
    more = fedtune.simulate(resume=run.path, overrides=["rounds.count=3"], trainer=sgd, watch=lambda event: None)
    assert len(more.rounds) == 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "train",
            "client.trainer: expected a function that Python can import, as package.module:function; got 'train'",
        ),
        (
            "no_such_package:train",
            "got 'no_such_package:train', ModuleNotFoundError: No module named 'no_such_package'; in",
        ),
        (
            "tests.own_trainers:nothing",
            "AttributeError: module 'tests.own_trainers' has no attribute 'nothing'; install",
        ),
        ("tests.own_trainers:NO_FUNCTION", "got 'tests.own_trainers:NO_FUNCTION', which is an int"),
    ],
)
def test_a_name_that_is_no_function_is_refused_before_anything_is_loaded(
    name: str, sentence: str, tables: Tables, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        fedtune.simulate(of(tables, METHODS[0], trainer=name), out=tmp_path / "run", watch=lambda event: None)
    assert sentence in str(caught.value)


def test_an_object_that_is_no_function_is_refused(tables: Tables, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer: expected a function .*; got a str; its name belongs in the recipe"
    ):
        fedtune.simulate(of(tables, METHODS[0]), out=tmp_path / "run", trainer="a:b")  # type: ignore[arg-type]


def test_a_name_that_no_client_has_is_refused(tables: Tables, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer: expected functions by names of clients \(client-0, .*\); got 'client-one'"
    ):
        fedtune.simulate(of(tables, METHODS[0]), out=tmp_path / "run", trainer={"client-one": sgd})


def test_an_object_is_for_one_process(tables: Tables, tmp_path: Path) -> None:
    recipe = {**of(tables, METHODS[0]), "engine": {"name": "processes"}}
    with pytest.raises(ConfigError, match=r'"inprocess" with Python objects; got "processes" with trainer='):
        fedtune.simulate(recipe, out=tmp_path / "run", trainer=sgd)
