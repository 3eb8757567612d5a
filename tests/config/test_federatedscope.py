from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config import bind
from fedtune.config.federatedscope import PARTS, Converted, convert, recipe_text, space_by_key
from fedtune.config.fs_given import Given, Setting
from fedtune.config.fs_keys import GROUPS, KEYS, SWITCHES
from fedtune.errors import ConfigError

SMALL: Mapping[str, Any] = {
    "use_gpu": False,
    "federate.client_num": 3,
    "federate.total_round_num": 7,
    "data.type": "gsm8k@llm",
    "data.splitter": "iid",
    "data.splits": [0.998, 0.001, 0.001],
    "llm.tok_len": 1000,
    "llm.adapter.use": True,
    "llm.adapter.args.r": 8,
    "llm.adapter.args.lora_alpha": 16,
    "llm.adapter.args.lora_dropout": 0.05,
    "dataloader.batch_size": 1,
    "model.type": "some/llama-7b@huggingface_llm",
    "train.local_update_steps": 30,
    "train.batch_or_epoch": "batch",
    "train.optimizer.lr": "5e-3",
    "eval.freq": 50,
    "early_stop.patience": 0,
}
"""GSM8K among three clients, with the keys of its published settings."""
RICH: Mapping[str, Any] = {
    **SMALL,
    "expname": "my experiment",
    "expname_tag": "one",
    "seed": 12,
    "use_gpu": True,
    "device": 1,
    "federate.client_num": 8,
    "federate.sample_client_rate": 0.55,
    "federate.process_num": 2,
    "federate.freeze_A": True,
    "federate.ignore_weight": True,
    "federate.data_weighted_aggr": False,
    "data.type": "dolly-15k@llm",
    "data.splitter": "lda",
    "data.splitter_args.alpha": 0.5,
    "data.splitter_args.min_size": 20,
    "train.is_enable_half": True,
    "train.optimizer.type": "SGD",
    "train.optimizer.momentum": 0.9,
    "train.optimizer.weight_decay": 0.01,
    "grad.grad_clip": 1.0,
    "grad.grad_accum_count": 5,
    "early_stop.patience": 4,
    "eval.best_res_update_round_wise_key": "val_loss",
    "fedopt.use": True,
    "fedopt.optimizer.type": "SGD",
    "fedopt.optimizer.momentum": 0.8,
    "fedopt.optimizer.lr": 0.5,
    "fedprox.use": True,
    "fedprox.mu": 0.1,
    "quantization.method": "uniform",
    "quantization.nbits": 8,
    "llm.adapter.args.target_modules": ["q_proj"],
    "llm.adapter.args.modules_to_save": ["lm_head"],
    "llm.adapter.args.use_rslora": True,
}
ROBUST = {**SMALL, "federate.client_num": 9, "aggregator.robust_rule": "krum", "aggregator.byzantine_node_num": 2}
CLIPPED = {
    **SMALL,
    "aggregator.robust_rule": "normbounding",
    "aggregator.BFT_args.normbounding_norm_bound": 2.5,
    "federate.sample_client_num": 2,
}
PROMPT = {
    **{key: value for key, value in SMALL.items() if "lora" not in key and not key.endswith("args.r")},
    "llm.adapter.args.adapter_method": "p-tuning",
    "llm.adapter.args.num_virtual_tokens": 10,
    "llm.adapter.args.encoder_hidden_size": 64,
}
TEXT = {**PROMPT, "llm.adapter.args.adapter_method": "prompt", "llm.adapter.args.prompt_tuning_init_text": "Say"}
OFFSITE = {
    **SMALL,
    "llm.offsite_tuning.use": True,
    "llm.offsite_tuning.emu_l": 2,
    "llm.offsite_tuning.emu_r": 30,
    "llm.offsite_tuning.kwargs.drop_ratio": 0.2,
    "llm.offsite_tuning.emu_align.use": True,
    "llm.offsite_tuning.emu_align.train.optimizer.lr": 0.0001,
}
PERSONAL = {
    **SMALL,
    "federate.method": "pFedMe",
    "personalization.regular_weight": 15,
    "personalization.K": 3,
    "personalization.lr": 0.01,
}
DITTO = {**PERSONAL, "federate.method": "Ditto", "personalization.local_update_steps": 4}
SHARED = {**SMALL, "personalization.local_param": ["lora_B"]}
FEDREP = {**SHARED, "federate.method": "FedRep", "personalization.lr_linear": 0.2}
TUNED = {**SMALL, "finetune.before_eval": True, "finetune.local_update_steps": 4, "finetune.optimizer.lr": 0.01}
ASYNC = {
    **SMALL,
    "asyn.use": True,
    "asyn.min_received_num": 2,
    "asyn.staleness_toleration": 5,
    "asyn.staleness_discount_factor": 0.5,
    "asyn.broadcast_manner": "after_receiving",
    "asyn.timeout": 60,
}
TIMED = {**ASYNC, "asyn.aggregator": "time_up", "asyn.time_budget": 10}
BY_RATE = {**ASYNC, "asyn.min_received_rate": 0.7}
FILE = {**SMALL, "data.type": "mine.jsonl@llm", "data.root": "there", "federate.method": "global"}
EPOCHS = {**SMALL, "train.batch_or_epoch": "epoch", "train.local_update_steps": 2, "data.batch_size": 4}
SEARCH = {
    **SMALL,
    "hpo.scheduler": "sha",
    "hpo.ss": "space.yaml",
    "hpo.init_cand_num": 9,
    "hpo.sha.elim_rate": 3,
    "hpo.sha.budgets": [1, 3],
}
POPULATION = {**SEARCH, "hpo.scheduler": "pbt", "hpo.pbt.max_stage": 3}
SPACE = {
    "train.optimizer.lr.type": "float",
    "train.optimizer.lr.lower": "1e-4",
    "train.optimizer.lr.upper": 0.1,
    "train.optimizer.lr.log": True,
    "train.local_update_steps.type": "int",
    "train.local_update_steps.lower": 5,
    "train.local_update_steps.upper": 30,
    "dataloader.batch_size.type": "cate",
    "dataloader.batch_size.choices": [1, 2],
    "model.layer.type": "int",
    "model.layer.lower": 1,
    "model.layer.upper": 2,
}
ALL: tuple[Mapping[str, Any], ...] = (
    SMALL,
    RICH,
    ROBUST,
    CLIPPED,
    PROMPT,
    TEXT,
    OFFSITE,
    PERSONAL,
    DITTO,
    SHARED,
    FEDREP,
    TUNED,
    ASYNC,
    TIMED,
)
ALL = (*ALL, BY_RATE, FILE, EPOCHS, SEARCH, POPULATION)


def keys(converted: Converted) -> dict[str, Any]:
    """Return the recipe's values by dotted key."""

    def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in table.items():
            values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        return values

    return flat(converted.tables)


def table_key(path: str) -> str:
    """Return a key as the table names it: all of a search space as one."""
    return "search.space" if path.startswith("search.space.") else path


def given_of(values: Mapping[str, Any]) -> Given:
    return Given(values, space_by_key(SPACE) if "hpo.ss" in values else {})


def test_a_search_space_in_its_file_becomes_the_table_search() -> None:
    converted = convert(SEARCH, space=SPACE)
    assert converted.tables["search"] == {
        "kind": "sha",
        "trials": 9,
        "reduction": 3,
        "first_rung": 1,
        "space": {
            "client": {
                "learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
                "steps": {"low": 5, "high": 30},
                "batch": [1, 2],
            }
        },
    }
    entries = {entry.key: entry for entry in converted.entries}
    assert "model.layer is not searched here" in entries["hpo.ss"].note
    search = bind(recipe_text(converted, "x")).search
    assert search is not None
    assert list(search.space) == ["client.learning_rate", "client.steps", "client.batch"]
    assert convert(POPULATION, space=SPACE).tables["search"]["interval"] == 2
    without = convert(SEARCH)
    assert "search" not in without.tables
    assert "its file is not here" in {entry.key: entry for entry in without.entries}["hpo.ss"].note


def test_gsm8k_among_three_clients_as_published() -> None:
    converted = convert(SMALL)
    assert keys(converted) == {
        "seed": 0,
        "model.device": "cpu",
        "model.base": "some/llama-7b",
        "model.dtype": "float32",
        "adapter.rank": 8,
        "adapter.alpha": 16.0,
        "adapter.targets": ["q_proj", "v_proj"],
        "client.dropout": 0.05,
        "method.name": "fedit",
        "method.weights": "uniform",
        "method.wire_dtype": "fp32",
        "client.batch": 1,
        "client.steps": 30,
        "client.optimizer": "sgd",
        "client.learning_rate": 0.005,
        "client.clip_norm": "none",
        "rounds.count": 7,
        "evaluate.every": 50,
        "data.preset": "gsm8k",
        "data.max_tokens": 1000,
        "data.held_out": 0.002,
        "data.split.kind": "iid",
        "data.split.clients": 3,
    }
    assert 'client.optimizer = "sgd"' in converted.defaults
    recipe = bind(recipe_text(converted, "config.yaml"))
    assert (recipe.client.steps, recipe.rounds.count, recipe.data.source) == (30, 7, "openai/gsm8k")
    assert recipe.client.clip_norm is None


def test_many_keys_at_once() -> None:
    found = keys(convert(RICH))
    assert found["name"] == "my-experiment-one"
    assert found["seed"] == 12
    assert found["model.device"] == "cuda:1"
    assert found["model.dtype"] == "bfloat16"
    assert found["rounds.cohort"] == 4  # int(0.55 * 8)
    assert (found["client.steps"], found["client.accumulation"]) == (6, 5)
    assert (found["client.momentum"], found["client.weight_decay"], found["client.clip_norm"]) == (0.9, 0.01, 1.0)
    assert (found["client.proximal"], found["method.name"], found["method.wire_dtype"]) == (0.1, "ffa", "int8")
    assert found["method.server_optimizer.name"] == "fedavgm"
    assert (found["method.server_optimizer.momentum"], found["method.server_learning_rate"]) == (0.8, 0.5)
    assert {key: value for key, value in found.items() if key.startswith("data.split")} == {
        "data.split.kind": "dirichlet",
        "data.split.by": "category",
        "data.split.alpha": 0.5,
        "data.split.clients": 8,
        "data.split.min_examples": 20,
    }
    assert (found["rounds.patience"], found["rounds.keep"], found["rounds.metric"]) == (4, "best", "loss")
    assert (found["engine.name"], found["engine.workers"]) == ("processes", 2)


def test_offsite_tuning_names_the_emulator_and_the_command_that_writes_it() -> None:
    converted = convert(OFFSITE)
    found = keys(converted)
    assert found["model.base"] == "emulator"
    assert found["adapter.layers"] == "0-1, 24-25"  # 2 + round(28 * 0.8) + 2 blocks
    command = "fedtune export some/llama-7b --form emulator --front 2 --back 2 --drop 0.2"
    assert any(command in entry.note for entry in converted.entries)


def test_personal_prompt_and_asynchronous_tables() -> None:
    assert {k: v for k, v in keys(convert(PERSONAL)).items() if k.startswith("personal")} == {
        "personal.kind": "pfedme",
        "personal.strength": 15.0,
        "personal.rate": 0.01,
        "personal.steps": 3,
    }
    assert keys(convert(DITTO))["personal.steps"] == 4
    shared = keys(convert(SHARED))
    assert (shared["personal.kind"], shared["personal.keep"]) == ("share-a", ["*.b"])
    assert keys(convert(TUNED))["personal.kind"] == "finetune"
    prompt = keys(convert(PROMPT))
    assert (prompt["adapter.kind"], prompt["adapter.tokens"], prompt["adapter.hidden"]) == ("p-tuning", 10, 64)
    assert "adapter.rank" not in prompt
    assert {k: v for k, v in keys(convert(ASYNC)).items() if k.startswith("asyn")} == {
        "asynchronous.trigger": "goal",
        "asynchronous.buffer": 2,
        "asynchronous.staleness_exponent": 0.5,
        "asynchronous.max_staleness": 5,
        "asynchronous.send": "after-receiving",
    }
    assert keys(convert(BY_RATE))["asynchronous.buffer"] == 2  # int(0.7 * 3)
    timed = keys(convert(TIMED))
    assert (timed["asynchronous.budget_s"], timed.get("asynchronous.buffer")) == (10, None)


def test_a_krum_of_nine_clients_has_room_for_two_attackers() -> None:
    found = keys(convert(ROBUST))
    assert found["method.robust.name"] == "multikrum"
    assert int(found["method.robust.attackers"] * 9) == 2
    bind(recipe_text(convert(ROBUST), "x"))
    assert keys(convert(CLIPPED))["method.robust.bound"] == 2.5


@pytest.mark.parametrize("values", ALL, ids=range(len(ALL)))
def test_every_key_of_a_file_is_accounted_for_once_and_as_the_table_says(values: Mapping[str, Any]) -> None:
    converted = convert(values, space=SPACE if "hpo.ss" in values else None)
    assert [entry.key for entry in converted.entries] == list(values)
    assert all(entry.known and (entry.ours or entry.note) for entry in converted.entries)
    for setting in (item for part in PARTS for item in part(given_of(values)) if isinstance(item, Setting)):
        for key in setting.of:
            assert table_key(setting.path) in KEYS[key].ours, (key, setting.path)


@pytest.mark.parametrize("values", ALL, ids=range(len(ALL)))
def test_every_recipe_binds(values: Mapping[str, Any]) -> None:
    converted = convert(values, space=SPACE if "hpo.ss" in values else None)
    assert bind(recipe_text(converted, "config.yaml")).rounds.count == 7


def test_every_pair_of_keys_in_the_table_is_made_by_some_file() -> None:
    made = {
        (key, table_key(setting.path))
        for values in ALL
        for part in PARTS
        for setting in part(given_of(values))
        if isinstance(setting, Setting)
        for key in setting.of
    }
    said = {(key, ours) for key, entry in KEYS.items() for ours in entry.ours}
    assert said - made == set()


@given(st.sampled_from(sorted(KEYS)), st.sampled_from([True, False, 0, 1, -1, 0.5, "x", "", [], [1], {}, None]))
def test_any_value_of_any_key_is_converted_or_refused_by_name(key: str, value: Any) -> None:
    try:
        converted = convert({**SMALL, key: value})
    except ConfigError as error:
        refused = {fault.path for fault in error.faults}
    else:
        refused = set()
    assert refused <= KEYS.keys()
    if refused:
        return
    text = recipe_text(converted, "x.yaml")
    tomllib.loads(text)
    assert key in {entry.key for entry in converted.entries}


def test_keys_that_are_switched_off_unknown_or_of_a_group() -> None:
    values = {
        **SMALL,
        "fedprox.use": False,
        "fedprox.mu": 0.1,
        "traim.local_update_steps": 3,
        "vertical.use": True,
        "train.optimizer.nesterov": True,
    }
    entries = {entry.key: entry for entry in convert(values).entries}
    assert entries["fedprox.mu"].note == "no effect: fedprox.use is false"
    assert not entries["traim.local_update_steps"].known
    assert "did you mean train.local_update_steps?" in entries["traim.local_update_steps"].note
    assert entries["vertical.use"].note == GROUPS["vertical."]
    assert entries["train.optimizer.nesterov"].note == GROUPS["train.optimizer."]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trainer.foo", "trainer.type"),
        ("trainer.sam.rhoo", "trainer.sam.rho"),
        ("vertical.usee", "vertical.use"),
        ("hpo.shaa.budgets", "hpo.sha.budgets"),
        ("hpo.fedex.schedd", "hpo.fedex.sched"),  # below a table that is switched off
        ("model.tpye", "model.type"),
        ("data.splittr", "data.splitter"),
        ("wandb.nam_user", "wandb.name_user"),
        ("llm.adaptr.use", "llm.adapter.use"),
    ],
)
def test_a_slip_is_unknown_in_every_table_and_names_the_nearest_key(key: str, near: str) -> None:
    [entry] = [entry for entry in convert({**SMALL, key: 3}).entries if entry.key == key]
    assert (entry.known, entry.ours) == (False, ())
    assert entry.note == f"no key of FederatedScope-LLM; did you mean {near}?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.type": "lr"}, r"^model\.type: expected a language model, such as NAME@huggingface_llm; got .*lr"),
        ({"data.type": "femnist"}, r"^data\.type: expected NAME@llm"),
        ({"data.splitter": "graph"}, r"^data\.splitter: expected iid, lda or meta"),
        ({"federate.method": "FedEM"}, r"^federate\.method: expected FedAvg, .*got .*FedEM"),
        ({"federate.client_num": 0}, r"^federate\.client_num: expected at least 1"),
        ({"train.local_update_steps": 1.5}, r"^train\.local_update_steps: expected a whole number; got 1\.5"),
        ({"train.optimizer.lr": "fast"}, r"^train\.optimizer\.lr: expected a number"),
        ({"use_gpu": "yes!"}, r"^use_gpu: expected true or false"),
        ({"data.splits": [0.5, 0.1, 0.1]}, r"^data\.splits: expected three shares whose sum is 1"),
        ({"llm.adapter.args": [{}, {}]}, r"^llm\.adapter\.args: expected a list of one table"),
        ({"llm.adapter.args.adapter_method": "bitfit"}, r"^llm\.adapter\.args\.adapter_method: expected lora, prefix"),
        ({"aggregator.robust_rule": "bulyan"}, "bulyan has no counterpart"),
        ({"quantization.method": "uniform", "quantization.nbits": 3}, r"^quantization\.nbits: expected 8 or 16"),
        ({"backend": "tensorflow"}, r"^backend: expected torch"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_key(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert({**SMALL, **changes})


def test_a_comment_cannot_become_a_line_of_the_recipe() -> None:
    values = {**SMALL, "outdir": "x\nseed = 3\r\n[model]\u2028y", "wandb.name_user": "a # b"}
    text = recipe_text(convert(values), "x.yaml")
    assert tomllib.loads(text)["seed"] == 0
    assert bind(text).seed == 0


def test_local_replacements_take_the_place_of_model_and_data() -> None:
    found = keys(convert(FILE))
    assert found["data.source"] == "there/mine.jsonl"
    assert (found["data.split.kind"], found["data.split.clients"]) == ("iid", 1)
    found = keys(convert(SMALL, base="models/tiny", data="mine.jsonl"))
    assert (found["model.base"], found["data.source"], found["data.preset"]) == ("models/tiny", "mine.jsonl", "gsm8k")
    found = keys(convert(FILE, data="mine.jsonl"))
    assert (found["data.source"], found["data.template"]) == ("mine.jsonl", "alpaca")


def test_the_switches_are_keys() -> None:
    assert all(f"{table}use" in KEYS for table in SWITCHES)
