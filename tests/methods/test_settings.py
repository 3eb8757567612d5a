from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest

from fedtune.config import bind, digest, render
from fedtune.config.recipe import Objects
from fedtune.errors import ConfigError
from fedtune.methods import METHODS
from fedtune.methods.settings import AveragingSettings, LinearSettings, RobustRule, ServerOptimizer

RECIPE: dict[str, Any] = {
    "model": {"base": "embedded"},
    "adapter": {"rank": 4, "targets": ["q_proj"]},
    "method": {"name": "fedit"},
    "client": {"steps": 2, "batch": 2, "learning_rate": 0.1},
    "rounds": {"count": 1},
    "data": {"source": "x.jsonl", "split": {"kind": "iid", "clients": 2}},
}


def recipe(method: str = "fedit", **settings: Any) -> dict[str, Any]:
    return {**RECIPE, "method": {"name": method, **settings}}


@pytest.mark.parametrize("name", ["fedit", "ffa", "zeropad", "hetlora", "flexlora", "fedex"])
def test_shared_keys_come_first_and_in_one_order(name: str) -> None:
    settings = METHODS[name].settings
    assert issubclass(settings, AveragingSettings)
    shared = ["name", "server_learning_rate", "weights", "wire_dtype"]
    assert [field.name for field in fields(settings)][:4] == shared


def test_without_an_optimiser_nothing_of_it_is_written() -> None:
    plain, named = bind(recipe()), bind(recipe(server_optimizer="none"))
    assert "server_optimizer" not in render(plain)
    assert plain == named
    assert digest(plain) == digest(named)


def test_an_optimiser_is_a_name_or_a_table_and_changes_the_digest() -> None:
    short = bind(recipe(server_optimizer="fedadam"))
    long = bind(recipe(server_optimizer={"name": "fedadam", "beta1": 0.9}))
    assert short == long
    assert isinstance(short.method, LinearSettings)
    assert short.method.server_optimizer == ServerOptimizer("fedadam")
    assert bind(render(short)) == short
    assert digest(short) != digest(bind(recipe()))
    assert bind(recipe(), overrides=["method.server_optimizer=fedadam"]) == short


@pytest.mark.parametrize("method", ["flora", "hetlora", "flexlora", "fedex"])
def test_a_method_that_is_not_linear_takes_no_optimiser(method: str) -> None:
    with pytest.raises(ConfigError) as error:
        bind(recipe(method, server_optimizer="fedadam"))
    (fault,) = error.value.faults
    assert fault.path == "method.server_optimizer"
    assert "fedit" in fault.expected
    assert method in fault.got


@pytest.mark.parametrize(
    ("optimizer", "path"),
    [
        ({"name": "fedadam", "momentum": 0.5}, "momentum"),
        ({"name": "fedavgm", "beta1": 0.5}, "beta1"),
        ({"name": "none", "tau": 0.5}, "tau"),
        ({"name": "fedadam", "beta2": 1.0}, "beta2"),
        ({"name": "fedadam", "tau": 0.0}, "tau"),
        ({"name": "adam"}, "name"),
        ({"name": "fedadam", "beta3": 0.0}, "beta3"),
    ],
)
def test_keys_that_the_rule_does_not_read_or_out_of_range_are_faults(optimizer: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as error:
        bind(recipe(server_optimizer=optimizer))
    assert [fault.path for fault in error.value.faults] == [f"method.server_optimizer.{path}"]


def faults_of(table: dict[str, Any], **rounds: Any) -> dict[str, str]:
    """Return the faults of a recipe by path."""
    with pytest.raises(ConfigError) as error:
        bind(table | {"rounds": {"count": 1, **rounds}, "data": RECIPE["data"] | {"split": {"kind": "files"}}})
    return {fault.path: str(fault) for fault in error.value.faults}


def test_a_robust_rule_is_a_name_or_a_table_and_changes_the_digest_only_where_there_is_one() -> None:
    plain, none = bind(recipe()), bind(recipe(robust="none"))
    assert (plain, digest(plain)) == (none, digest(none))
    assert "robust" not in render(plain)
    short, long = bind(recipe(robust="clip")), bind(recipe(robust={"name": "clip", "bound": "median"}))
    assert short == long
    assert isinstance(short.method, LinearSettings)
    assert short.method.robust == RobustRule("clip")
    assert bind(render(short)) == short
    assert digest(short) != digest(plain)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("flora", "stacks the clients' factors, .* ffa averages"),
        ("hetlora", "weighs clients by the size .* zeropad averages"),
        ("flexlora", "adds up products .* ffa and zeropad average"),
        ("fedex", "residual holds every client's product; fedit averages"),
        ("fedkseed", "adds whole numbers along seeds, .* method.clip bounds them"),
    ],
)
def test_a_method_that_is_not_linear_says_why_it_takes_no_robust_rule_and_which_one_does(method: str, why: str) -> None:
    text = faults_of(recipe(method, robust="median"))["method.robust"]
    assert re.search(rf'one step towards a mean \(fedit, zeropad or ffa\); got "{method}": .*{why}', text)


@pytest.mark.parametrize(
    ("robust", "path", "text"),
    [
        ({"name": "median", "bound": 2.0}, "method.robust.bound", "nothing with 'median', which does not read it"),
        ({"name": "clip", "attackers": 0.1}, "method.robust.attackers", "it is of trimmed and multikrum"),
        ({"bound": 2.0}, "method.robust.bound", "nothing with 'none'"),
        ({"name": "trimmed", "attackers": 0.5}, "method.robust.attackers", "below 0.5"),
        ({"name": "clip", "bound": 0}, "method.robust.bound", "above 0"),
        ("krum", "method.robust.name", "multikrum"),
        ("median", "rounds.min_clients", "at least 3 with method.robust = 'median'; got 1"),
        ("multikrum", "rounds.min_clients", "at least 5 with .*'multikrum' and attackers = 0.2; got 1"),
    ],
)
def test_what_does_not_fit_a_robust_rule_is_refused_before_anything_starts(robust: Any, path: str, text: str) -> None:
    assert re.search(text, faults_of(recipe(robust=robust))[path])


def test_a_method_of_its_own_aggregation_cannot_carry_the_rule_in_its_settings() -> None:
    """Its recipe would say `robust`, and nothing would be."""
    own = replace(METHODS["fedex"], name="own", settings=METHODS["fedit"].settings)
    with pytest.raises(ConfigError, match=r"method.robust: expected a LinearMethod"):
        bind(recipe("own", robust="clip"), objects=Objects(method=own))
