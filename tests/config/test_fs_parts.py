from __future__ import annotations

from typing import Any

import pytest

from fedtune.config.fs_given import Given, Remark, Setting
from fedtune.config.fs_parts import adapter_part, client_part, cohort, emulator_part, split_part


def made(items: Any) -> dict[str, Any]:
    return {item.path: item.value for item in items if isinstance(item, Setting)}


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({"federate.client_num": 8}, 8),
        ({"federate.client_num": 8, "federate.sample_client_num": 3}, 3),
        ({"federate.client_num": 8, "federate.sample_client_num": 9}, 8),
        ({"federate.client_num": 8, "federate.sample_client_rate": 0.99}, 7),
        ({"federate.client_num": 8, "federate.sample_client_rate": 0.01, "federate.sample_client_num": 3}, 1),
        ({"federate.client_num": 8, "federate.method": "global"}, 1),
    ],
)
def test_a_round_has_as_many_clients_as_there(values: dict[str, Any], number: int) -> None:
    assert cohort(Given(values))[0] == number


def test_layers_are_those_that_peft_takes_for_the_family() -> None:
    for base, layers in {
        "gpt2-xl": ["c_attn"],
        "EleutherAI/pythia-70m": ["query_key_value"],
        "x": ["q_proj", "v_proj"],
    }.items():
        assert made(adapter_part(Given({"llm.adapter.use": True}), base))["adapter.targets"] == layers


def test_accumulated_batches_are_counted_as_steps() -> None:
    values = {"train.local_update_steps": 30, "grad.grad_accum_count": 4}
    items = list(client_part(Given(values)))
    assert made(items)["client.steps"] == 7
    assert [item.key for item in items if isinstance(item, Remark)] == ["train.local_update_steps"]


def test_an_emulator_with_one_block_at_each_end() -> None:
    values = {"llm.offsite_tuning.emu_l": 1, "llm.offsite_tuning.emu_r": 5, "llm.offsite_tuning.kwargs.drop_ratio": 0.5}
    assert made(emulator_part(Given(values), "base"))["adapter.layers"] == "0, 3"


def test_lda_has_its_published_alpha() -> None:
    split = made(split_part(Given({"federate.client_num": 3, "data.splitter": "lda"}), "category"))
    assert split["data.split.alpha"] == 0.5
