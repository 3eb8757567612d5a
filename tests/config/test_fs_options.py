from __future__ import annotations

from typing import Any

from fedtune.config.fs_given import Given, Setting
from fedtune.config.fs_options import method_part, personal_part, robust_part
from fedtune.methods.robust import least_clients
from fedtune.methods.settings import RobustRule


def made(items: Any) -> dict[str, Any]:
    return {item.path: item.value for item in items if isinstance(item, Setting)}


def test_clients_that_make_the_same_steps_weigh_alike() -> None:
    for values, weights in (
        ({}, "uniform"),
        ({"train.batch_or_epoch": "epoch"}, "examples"),
        ({"federate.data_weighted_aggr": True}, "examples"),
        ({"federate.data_weighted_aggr": True, "federate.ignore_weight": True}, "uniform"),
    ):
        assert made(method_part(Given(values)))["method.weights"] == weights


def test_a_robust_rule_gets_the_clients_that_it_needs() -> None:
    values = {"federate.client_num": 10, "aggregator.robust_rule": "trimmedmean", "aggregator.byzantine_node_num": 3}
    found = made(robust_part(Given(values)))
    share = found["method.robust.attackers"]
    assert int(share * 10) == 3
    assert found["rounds.min_clients"] == least_clients(RobustRule("trimmed", attackers=share))
    assert made(robust_part(Given({}))) == {}


def test_tensors_that_stay_are_named_as_adapters_name_them() -> None:
    values = {"federate.method": "FedRep", "personalization.local_param": ["lora_B", "head"]}
    assert made(personal_part(Given(values)))["personal.keep"] == ["*.b", "*head*"]
    assert made(personal_part(Given({}))) == {}
