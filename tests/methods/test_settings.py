from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from fedtune.config import bind, digest, render
from fedtune.errors import ConfigError
from fedtune.methods import METHODS
from fedtune.methods.settings import AveragingSettings, LinearSettings, ServerOptimizer

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
