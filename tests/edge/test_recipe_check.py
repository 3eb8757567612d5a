from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.config.recipe import Override
from fedtune.edge.recipe_check import check_recipe
from fedtune.errors import ConfigError

KSEED = {"name": "fedkseed", "bank": "kron", "seeds": 64}


def recipe(tables: dict[str, Any], **method: Any) -> Any:
    rest = {key: value for key, value in tables.items() if key != "override"}
    return bind(rest | {"method": KSEED | method, "client": rest["client"] | {"steps": 8}})


def test_fedkseed_over_linear_layers_is_what_a_device_does(tables: dict[str, Any]) -> None:
    check_recipe(recipe(tables))
    check_recipe(recipe(tables, estimator="one-sided", trainable=["*q_proj*"]))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            {"bank": "hadamard"},
            "method.bank: expected 'kron' for a device; got 'hadamard'; take part with fedtune-client",
        ),
        ({"vectors": True}, "method.vectors: expected false for a device"),
        ({"embeddings": True}, "method.embeddings: expected false for a device"),
        ({"groups": "tensor"}, "method.groups: expected 1 for a device; got 'tensor'"),
        ({"redraw": 4}, "method.redraw: expected 0 for a device; got 4"),
    ],
)
def test_what_a_device_cannot_follow_is_named(method: dict[str, Any], said: str, tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_recipe(recipe(tables, **method))
    assert said in str(caught.value)


def test_lora_is_for_the_client_with_torch(tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'flora', which trains LoRA factors; take part with fedtune-client"):
        check_recipe(bind(tables))


def test_a_device_probes_where_it_is_asked_to_descend_if_it_can(tables: dict[str, Any]) -> None:
    mixed = recipe(tables, verb="auto")
    check_recipe(mixed, "phone")
    asked = replace(mixed, override=(Override(("gpu-*",), verb="descend"),))
    check_recipe(asked, "phone")
    with pytest.raises(ConfigError, match=r"method.verb: expected 'probe' or 'auto' for a device") as caught:
        check_recipe(asked, "gpu-1")
    assert "ask for method.verb = 'auto'" in str(caught.value)
