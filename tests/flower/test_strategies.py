"""The strategies against a ClientApp as Flower's examples have it, and their sums against dense ones in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict, UserConfig

from fedtune.flower import FFA, FedEx, FedIT, FlexLoRA, FLoRA, HetLoRA
from fedtune.flower.lora_strategy import LoraStrategy
from fedtune.flower.peft_records import to_record
from fedtune.lora.adapter import delta
from tests.flower.conftest import NODE, MemoryGrid, running
from tests.flower.stock_app import (
    LAYERS,
    NumpyClient,
    blocks,
    delta_of,
    first_state,
    grid_of,
    imported,
    record_delta,
    write_app,
)

ROOT = Path(__file__).parents[2]
# What a stock client calls warns so under transformers 5.14 and later.
STOCK = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
MIXED = {"node-0": 4, "node-1": 8, "node-2": 6}


def run(strategy: LoraStrategy, clients: Sequence[NumpyClient], *, rounds: int = 1, rank: int = 6) -> Any:
    return strategy.start(
        grid=grid_of(*clients), initial_arrays=to_record(first_state(rank)), num_rounds=rounds, timeout=1
    )


def error(strategy: LoraStrategy, dense: dict[str, Any]) -> float:
    """Return the largest error of a strategy's change, relative to the largest number of the dense one."""
    adapter = strategy.adapter
    return max(float(np.abs(delta(adapter[name]) - dense[name]).max() / np.abs(dense[name]).max()) for name in LAYERS)


def dense_sum(clients: Sequence[NumpyClient], alpha: float, *, frozen: bool = False) -> dict[str, Any]:
    """Return the weighted mean of what the clients' models were at the end of the last round."""
    total = sum(client.examples for client in clients)
    return {
        name: sum(
            client.examples
            / total
            * (
                delta_of(client.sent[-1], name, alpha / max(client.sent[-1].ranks.values()))
                + (record_delta(client.frozen[-1], name) if frozen else 0)
            )
            for client in clients
        )
        for name in LAYERS
    }


@pytest.mark.parametrize(
    "strategy",
    [
        FLoRA(alpha=16, ranks=MIXED),
        FLoRA(alpha=16, ranks="own"),
        FLoRA(alpha=16, ranks=MIXED, down="whole"),
        FLoRA(alpha=7, ranks=MIXED, use_rslora=False),
        FlexLoRA(alpha=16, ranks=MIXED),
        FlexLoRA(alpha=16, ranks="own"),
        FedEx(alpha=16),
    ],
    ids=lambda one: f"{type(one).__name__}-{one.alpha}-{'own' if one.ranks == 'own' else one.sends_frozen}",
)
def test_the_sum_of_the_first_round_is_exact(strategy: LoraStrategy) -> None:
    ranks = [6] * 3 if isinstance(strategy, FedEx) else MIXED.values()
    clients = [NumpyClient(seed, rank=rank, examples=seed + 1) for seed, rank in enumerate(ranks)]
    run(strategy, clients)
    assert error(strategy, dense_sum(clients, 7 if strategy.alpha == 7 else 16)) < 5e-7


@pytest.mark.parametrize(
    "strategy",
    [FlexLoRA(alpha=16, ranks=MIXED), FedEx(alpha=16), FLoRA(alpha=16, down="whole")],
    ids=lambda one: one.method,
)
def test_the_sum_stays_exact_over_rounds_where_a_client_holds_all_that_it_is_sent(strategy: LoraStrategy) -> None:
    clients = [NumpyClient(seed, examples=seed + 1) for seed in range(3)]
    run(strategy, clients, rounds=3)
    # Of FlexLoRA the clients' own models; of the others their adapters with the frozen change beside them.
    assert error(strategy, dense_sum(clients, 16, frozen=strategy.sends_frozen)) < 5e-6


def test_ffa_averages_b_over_the_one_a_that_all_were_sent() -> None:
    clients = [NumpyClient(seed, examples=seed + 1, train_a=False) for seed in range(3)]
    strategy = FFA(alpha=16, ranks=MIXED)
    run(strategy, clients, rounds=2)
    assert error(strategy, dense_sum(clients, 16)) < 5e-7


def test_fedit_is_the_mean_of_the_factors() -> None:
    clients = [NumpyClient(seed, examples=seed + 1) for seed in range(3)]
    strategy = FedIT(alpha=16)
    result = run(strategy, clients, rounds=2)
    mean = sum((seed + 1) / 6 * clients[seed].sent[-1].factors["m.q.b"].astype(float) for seed in range(3))
    returned = result.arrays["base_model.model.m.q.lora_B.weight"].numpy()
    assert np.allclose(returned, mean, rtol=1e-5)


def test_hetlora_sends_leading_rows_and_columns() -> None:
    clients = [NumpyClient(seed) for seed in range(3)]
    run(HetLoRA(alpha=16, ranks=MIXED), clients, rounds=2)
    small, large = clients[0].got[-1].factors, clients[1].got[-1].factors
    assert np.array_equal(small["m.q.a"], large["m.q.a"][:4])
    # In PEFT b is divided by alpha / rank, which is another for each rank.
    assert np.allclose(4 * small["m.q.b"], 2 * large["m.q.b"][:, :4])


def test_flora_with_equal_ranks_goes_on_as_flexlora_does() -> None:
    results = []
    for strategy in (FLoRA(alpha=16), FlexLoRA(alpha=16)):
        clients = [NumpyClient(seed, rank=6, examples=seed + 1) for seed in range(3)]
        run(strategy, clients, rounds=1)
        # Their clients draw other fresh factors in round 1, so only the rule is compared, on one sum.
        sent = dense_sum(clients, 16)
        results.append(error(strategy, sent))
    assert max(results) < 5e-7


def test_a_client_of_small_rank_does_not_erase_what_it_was_not_sent() -> None:
    """A client that replies what it was sent changes nothing, whatever it lacks."""
    clients = [NumpyClient(seed, reply=None) for seed in range(2)]
    strategy = FLoRA(alpha=16, ranks={"node-0": 2, "node-1": 6})
    run(strategy, clients)
    before = {name: delta(strategy.adapter[name]) for name in LAYERS}

    def unchanged(message: Message) -> RecordDict:
        state = message.content.array_records["arrays"]
        return RecordDict({"arrays": state, "metrics": MetricRecord({"num-examples": 1})})

    grid = grid_of(unchanged, unchanged)
    messages = list(strategy.configure_train(2, ArrayRecord(), ConfigRecord(), grid))
    strategy.aggregate_train(2, grid.send_and_receive(messages))
    # What the largest rank cannot hold is left out between rounds, and nothing else.
    for name in LAYERS:
        u, s, vt = np.linalg.svd(before[name])
        kept = (u[:, :6] * s[:6]) @ vt[:6]
        assert np.abs(delta(strategy.adapter[name]) - kept).max() < 1e-6 * s[0]


def test_neither_the_order_of_replies_nor_the_nodes_ids_change_a_bit() -> None:
    def bits(places: Sequence[int], *, backwards: bool) -> bytes:
        clients = [NumpyClient(seed, examples=seed + 1) for seed in range(3)]
        names = ["ann", "bob", "eve"]
        grid = MemoryGrid(
            {NODE + place: client for place, client in zip(places, clients, strict=True)},
            names={NODE + place: name for place, name in zip(places, names, strict=True)},
        )
        if backwards:
            grid.order = lambda replies: replies[::-1]
        strategy = FLoRA(alpha=16, ranks={"ann": 2, "bob": 4})
        result = strategy.start(grid=grid, initial_arrays=to_record(first_state(6)), num_rounds=2, timeout=1)
        return b"".join(array.data for array in result.arrays.values())

    first = bits([0, 1, 2], backwards=False)
    assert bits([7, 3, 5], backwards=True) == first


@STOCK
def test_the_page_runs_in_memory_and_stock_peft_loads_what_it_saves(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = str(checkpoints["llama"])
    config: UserConfig = {"model": base, "num-server-rounds": 2, "save-path": str(tmp_path / "adapter")}
    with imported(write_app(tmp_path / "app")) as app:
        nodes = {
            NODE + place: running(app["client_app"].app, node_config={"partition-id": place}, run_config=config)
            for place in range(3)
        }
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        app["server_app"].app(grid=MemoryGrid(nodes), context=context)
    ids = torch.arange(8)[None]
    model = AutoModelForCausalLM.from_pretrained(base)
    before = model(ids).logits
    tuned = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert (tuned(ids).logits - before).abs().max() > 1e-3


@STOCK
def test_a_page_whose_clients_choose_their_ranks_runs_with_one_changed_line(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    config: UserConfig = {
        "model": str(checkpoints["llama"]),
        "num-server-rounds": 2,
        "save-path": str(tmp_path / "adapter"),
    }
    client = 'Message:\n    model = get_model(context.run_config["model"], rank=8)'
    changed = client.replace("rank=8", 'rank=[2, 4, 8][context.node_config["partition-id"]]')
    changes = [(client, changed), ("FLoRA(alpha=16, ", 'FLoRA(alpha=16, ranks="own", ')]
    with imported(write_app(tmp_path / "app", changes)) as app:
        nodes = {
            NODE + place: running(app["client_app"].app, node_config={"partition-id": place}, run_config=config)
            for place in range(3)
        }
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        app["server_app"].app(grid=MemoryGrid(nodes), context=context)
    from fedtune.store.peft import read

    adapter, _, facts = read(tmp_path / "adapter")
    assert max(factors.rank for factors in adapter.values()) > 8
    assert (facts["method"], facts["rounds"]) == ("flora", 2)


def test_the_page_changes_as_many_lines_as_it_says() -> None:
    changed = [line for line in blocks()["server_app.py"].splitlines() if "# was: " in line or "# new: " in line]
    assert len(changed) == 3
    assert "fedtune" not in blocks()["client_app.py"] + blocks()["task.py"] + blocks()["pyproject.toml"]


def test_the_server_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from fedtune.flower import FLoRA, FlexLoRA, FedEx, HetLoRA, FFA, FedIT, read_arrays, add_frozen\n"
        "from tests.flower.stock_app import *\n"
        "from tests.flower.conftest import shim\n"
        "shim.enter_task()\n"
        "strategy = FLoRA(alpha=16, ranks={'node-0': 2})\n"
        "grid = grid_of(NumpyClient(0), NumpyClient(1))\n"
        "strategy.start(grid=grid, initial_arrays=to_record(first_state(4)), num_rounds=1)\n"
        "import tempfile\n"
        "strategy.save(tempfile.mkdtemp() + '/adapter')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"torch", "transformers", "peft", "ray"}


def test_without_flwr_one_sentence_names_the_extra() -> None:
    code = "import sys\nsys.modules['flwr'] = None\nfrom fedtune.flower import FLoRA\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fedtune.errors.ExtraError: expected the package flwr")
    assert 'run pip install "fedtune[flower]"' in last


def test_an_unknown_name_is_an_attribute_error() -> None:
    import fedtune.flower

    with pytest.raises(AttributeError, match="no attribute 'FedAvg'"):
        fedtune.flower.FedAvg  # noqa: B018
