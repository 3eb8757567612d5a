"""Runs of virtual tokens, whole: the same on every engine, through a kill, over the wire, and in what they leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedtune
from fedtune import api
from fedtune.config import bind
from fedtune.errors import ConfigError
from fedtune.messages import AdmittedUpdate, ClientUpdate, LoraResult, Measured
from fedtune.methods.fedit import METHOD
from fedtune.model.lora import with_adapters
from fedtune.planning.policy import Arm
from fedtune.runs.chat import open_speaker
from fedtune.runs.local import prepare
from fedtune.runs.plan import plan
from fedtune.runs.runner import remarks
from fedtune.runs.start import start_state
from fedtune.store import peft
from fedtune.terminal.bill import columns
from tests.model.test_virtual_tokens import KINDS
from tests.runs.conftest import read_lines
from tests.runs.test_chat import said
from tests.test_engines import Engine, Killed, chosen, in_memory_grid, killed_in, played, states

Tables = dict[str, Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


FEW_KINDS = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in (KINDS[0], KINDS[2]) else pytest.mark.slow) for kind in KINDS],
    indirect=True,
    ids=lambda kind: "-".join(map(str, kind.values())),
)
"""Of the fast tier those with the most tensors: what holds for them holds for a single one."""


def of_kind(tables: Tables, kind: Mapping[str, Any], **changes: Any) -> Tables:
    rest = {key: value for key, value in tables.items() if key != "override"}
    return {**rest, "adapter": {"tokens": 4, **kind}, "method": {"name": "fedit"}, **changes}


@pytest.fixture
def tables(tables: Tables, kind: Any) -> Tables:
    return of_kind(tables, kind)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(chosen("processes", 2), id="processes", marks=pytest.mark.slow),
        pytest.param(in_memory_grid, id="grid"),
    ],
)
@FEW_KINDS
def test_every_engine_comes_to_the_same_bits(engine: Engine, tables: Tables) -> None:
    settings = {"name": "fedit", "server_optimizer": "fedyogi", "robust": "clip"}
    client = {**tables["client"], "proximal": 0.1}
    prepared = [prepare(bind({**tables, "method": settings, "client": client, "rounds": {"count": 2}}))]
    assert played(prepared, engine) == played(prepared, chosen("inprocess", 1))


@FEW_KINDS
def test_a_killed_run_goes_on_to_the_same_bits(tables: Tables, tmp_path: Path) -> None:
    whole, run = fedtune.simulate(tables, out=tmp_path / "whole"), tmp_path / "run"
    with pytest.raises(Killed):
        fedtune.simulate(tables, out=run, watch=killed_in(2, []))
    fedtune.simulate(tables, resume=run)
    assert states(run) == states(whole.path)
    assert len(set(states(run)[1:])) == 2
    assert peft.digest(run / "adapter") == peft.digest(whole.path / "adapter")
    api.verify(run)


def test_what_a_run_leaves_is_what_stock_peft_computes_and_what_it_says(tables: Tables, tmp_path: Path) -> None:
    ran = fedtune.simulate(tables, out=tmp_path / "run")
    speaker = open_speaker(ran.path)
    assert said(speaker, "the quick") == ran.summary["sample"]["after"]
    alone = open_speaker(ran.path / "adapter")
    assert said(alone, "the quick") == said(open_speaker(fedtune.export(ran.path)), "the quick")
    base = speaker.base
    ids = torch.tensor([[5, 6, 7, 8]])
    with with_adapters(base, saved=speaker.tuned.saved) as model, torch.no_grad():
        ours = model(input_ids=ids).logits
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), ran.path / "peft").eval()
    with torch.no_grad():
        assert (stock(input_ids=ids).logits[:, -4:] - ours).abs().max() < 1e-5


def test_a_run_starts_from_another_ones_tokens_exactly(tables: Tables, tmp_path: Path) -> None:
    first = fedtune.simulate(tables, out=tmp_path / "first")
    start = {**tables["adapter"], "start": str(first.path)}
    prepared = prepare(bind({**tables, "adapter": start}))
    _, saved, _ = peft.read(first.path / "adapter")
    state = start_state(prepared.recipe, prepared.blueprint)
    for name, array in saved.items():
        np.testing.assert_array_equal(state.saved[name], array)


@pytest.mark.parametrize("kind", [KINDS[2]], indirect=True, ids=["encoder"])
def test_a_start_of_another_kind_is_refused(tables: Tables, tmp_path: Path) -> None:
    first = fedtune.simulate(tables, out=tmp_path / "first")
    start = {"start": str(first.path)}
    for adapter in (
        {"kind": "prompt", "tokens": 4},  # of a prompt's name and shape, but read by an encoder
        {"kind": "p-tuning", "tokens": 4},
        {"kind": "p-tuning", "tokens": 5, "send": "encoder", "hidden": 24},
        {"kind": "prefix", "tokens": 4},
        {"rank": 2, "targets": ["q_proj"]},
    ):
        with pytest.raises(ConfigError, match=r"adapter\.start: expected an adapter of what the recipe trains"):
            prepare(bind({**tables, "adapter": {**adapter, **start}}))


@pytest.mark.parametrize("kind", [KINDS[3]], indirect=True, ids=["prompt"])
def test_no_form_but_pefts_is_written_and_two_are_not_merged(tables: Tables, tmp_path: Path) -> None:
    ran = fedtune.simulate(tables, out=tmp_path / "run")
    for options in ({"form": "merged"}, {"form": "uniform"}, {"max_rank": 2}):
        with pytest.raises(ConfigError, match="virtual tokens are read before a text"):
            fedtune.export(ran.path, **options)
    with pytest.raises(ConfigError, match="the sum of virtual tokens"):
        fedtune.merge([ran.path, ran.path], out=tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_bytes_are_the_papers_and_little_else(tables: Tables, tmp_path: Path) -> None:
    """Each message is the table's count in fp32 and less than 2 % more, once there is enough of it."""
    adapter = {**tables["adapter"], "tokens": 110}  # of 128 positions
    tables = {**tables, "adapter": adapter, "data": {**tables["data"], "max_tokens": 16}, "rounds": {"count": 1}}
    ran = fedtune.simulate(tables, out=tmp_path / "run")
    n, d, h = adapter["tokens"], 32, 24
    numbers = n * 2 * 2 * 2 * 8 if adapter["kind"] == "prefix" else n * d  # 2 sides, layers and heads of 8
    numbers += (d + 1) * h + (h + 1) * h + (h + 1) * d if "send" in adapter else 0
    for client in read_lines(ran.path)[1]["clients"].values():
        assert 4 * numbers < client["bytes_up"] < 1.02 * 4 * numbers
        # Down comes the plan as well, once for a message: 500 bytes whatever the numbers.
        assert 4 * numbers < client["bytes_down"] < 1.01 * 4 * numbers + 500
    prepared = prepare(bind(tables))
    assert prepared.devices.traffic(Arm(0.0, 8)) == (4 * numbers, 4 * numbers)


def test_the_round_is_the_weighted_mean_of_what_clients_have(tables: Tables) -> None:
    prepared = prepare(bind(tables))
    state, sent = start_state(prepared.recipe, prepared.blueprint), list[tuple[float, Any]]()
    updates = []
    for place, count in enumerate((10, 30)):
        rng = np.random.default_rng(place)
        saved = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in prepared.blueprint.saved.items()}
        sent.append((count / 40, saved))
        update = ClientUpdate(f"client-{place}", 1, count, LoraResult({}, saved, ""), Measured(1.0, 0))
        updates.append(AdmittedUpdate(update, upload="difference"))
    state = METHOD.aggregate(state, updates)
    for name, array in state.saved.items():
        np.testing.assert_allclose(array, sum(share * x[name].astype(np.float64) for share, x in sent), atol=1e-6)


def test_plan_counts_the_work_and_memory_of_virtual_tokens(tables: Tables) -> None:
    few, many = (
        prepare(bind({**tables, "adapter": {**tables["adapter"], "tokens": count}})).devices for count in (2, 60)
    )
    client = "client-0"
    costs = [fleet.cost(client, Arm(0.0, 8), fleet.recipe.client) for fleet in (few, many)]
    assert costs[0].tflop < costs[1].tflop
    assert costs[0].memory_gb < costs[1].memory_gb
    memories = [fleet.memory(client, Arm(0.0, 8), fleet.recipe.client) for fleet in (few, many)]
    assert 0 < memories[0].activations < memories[1].activations
    body = many.body
    assert body is not None
    assert memories[1].optimizer == 4 * body.saved * 3


def test_no_rank_is_shown_of_tokens(tables: Tables, tmp_path: Path) -> None:
    ran = fedtune.simulate({**tables, "rounds": {"count": 1}}, out=tmp_path / "run")
    assert {client["rank"] for client in ran.summary["clients"].values()} == {None}
    billed = plan(tables).bill
    assert billed is not None
    clients = billed.as_json()["clients"].values()
    assert [columns(client).split()[0] for client in clients] == ["-"] * len(clients)


def test_a_learning_rate_of_factors_is_noted(tables: Tables) -> None:
    assert list(remarks(bind({**tables, "client": {"learning_rate": 0.1}}))) == []
    [note] = remarks(bind({**tables, "client": {"learning_rate": 2e-4}}))
    assert "client.learning_rate is 0.0002" in note
    assert list(remarks(bind({**tables, "client": {"learning_rate": 2e-4}, "adapter": {}}))) == []
