from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client import batched
from fedtune.client.batched import Batched, Resident
from fedtune.client.perform import perform
from fedtune.data.encode import Example
from fedtune.lora.adapter import draw_a
from fedtune.messages import Assignment, ClientUpdate, Plan, Preference, Proximal, Training, TrainLora
from fedtune.model.base import Base, digest
from fedtune.model.stacked_lora import UnbatchableError
from fedtune.model.stacked_train import train_together
from fedtune.tensors import Tensors

TRAINING = Training(batch=2, learning_rate=0.01, steps=4)
Examples = Callable[[int], list[Example]]


def frozen(base: Base, seed: int = 0) -> Tensors:
    """Return a received global adapter that moves the base far from where it was; one of its layers is dense."""
    rng, tensors = np.random.default_rng(seed), dict[str, Any]()
    for place, (name, (m, n)) in enumerate(base.modules.items()):
        if place == 0:
            tensors[f"{name}.w"] = 0.02 * rng.standard_normal((m, n), np.float32)
        else:
            tensors[f"{name}.a"] = draw_a(seed, name, 3, n)
            tensors[f"{name}.b"] = 0.02 * rng.standard_normal((m, 3), np.float32)
    return tensors


def order(base: Base, name: str, *, rank: int = 4, training: Training = TRAINING, **task: Any) -> Assignment:
    plan = Plan(name, rank=rank, scale=8 / rank, training=training)
    key = sum(name.encode())
    return Assignment("flora", 3, key, plan, TrainLora(a_key=key, wire_dtype="fp32", **task), base.digest)


def alone(base: Base, clients: dict[str, Resident], orders: Sequence[Assignment]) -> dict[str, ClientUpdate]:
    return {
        item.plan.client: perform(
            base,
            clients[item.plan.client].examples,
            item,
            threads=1,
            held_out=clients[item.plan.client].held_out,
        )
        for item in orders
    }


@pytest.fixture
def clients(examples: Examples) -> dict[str, Resident]:
    """Three clients of 5, 3 and 8 examples: with batches of two, their epochs end at different steps."""
    rows = examples(20)
    return {
        "ann": Resident(rows[:5], rows[16:18], 1),
        "bob": Resident(rows[5:8], (), 1),
        "cyd": Resident(rows[8:16], rows[18:], 1),
    }


def differences(theirs: ClientUpdate, ours: ClientUpdate) -> tuple[float, float]:
    """Return the largest difference between two updates, and the largest step in either."""
    tensors = [(theirs.lora.tensors[name], ours.lora.tensors[name]) for name in theirs.lora.tensors]
    assert ours.lora.tensors.keys() == theirs.lora.tensors.keys()
    return max(np.abs(a - b).max() for a, b in tensors), max(np.abs(a).max() for a, _ in tensors)


@pytest.mark.parametrize(
    "training",
    [
        TRAINING,
        replace(TRAINING, optimizer="sgd", momentum=0.9, learning_rate=0.5, clip_norm=None),
        replace(TRAINING, batch=4, accumulation=2, weight_decay=0.1, schedule="cosine", warmup=0.5, clip_norm=0.05),
    ],
    ids=["adamw", "sgd", "accumulated"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_clients_trained_together_learn_what_each_learns_alone(
    family: str, training: Training, loaded: Callable[..., Base], clients: dict[str, Resident]
) -> None:
    base = loaded(family, targets=("all-linear",))
    # Differences are small beside a factor B that starts at zero, and grows to about the sum of the rates.
    received = {"global": frozen(base)}
    ranks = {"ann": 4, "bob": 2, "cyd": 4}
    orders = [order(base, name, rank=rank, training=training, blobs=received) for name, rank in ranks.items()]
    expected, found = alone(base, clients, orders), Batched(base, clients)(orders)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        error, size = differences(theirs, ours)
        assert error <= 1e-5
        assert size > 1e-2
        assert (ours.num_examples, ours.round, ours.measured.tokens) == (
            theirs.num_examples,
            theirs.round,
            theirs.measured.tokens,
        )
        assert ours.measured.loss_before == pytest.approx(theirs.measured.loss_before, rel=1e-5)
        assert ours.measured.loss_after == pytest.approx(theirs.measured.loss_after, rel=1e-5)
    assert digest(base.model) == base.digest
    assert not base.model._forward_hooks


def test_where_a_alone_is_frozen_it_stays_as_it_came(loaded: Callable[..., Base], clients: dict[str, Resident]) -> None:
    base = loaded()
    orders = [order(base, name, train="b") for name in clients]
    expected, found = alone(base, clients, orders), Batched(base, clients)(orders)
    assert all(differences(expected[name], found[name])[0] <= 1e-5 for name in clients)
    assert all(name.endswith(".b") for name in found["ann"].lora.tensors)


def test_one_forward_pass_serves_all_clients(
    loaded: Callable[..., Base], clients: dict[str, Resident], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = loaded(), list[int]()
    handle = base.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    Batched(base, clients)([order(base, name, training=replace(TRAINING, steps=2)) for name in clients])
    handle.remove()
    assert rows == [6] * 4  # once for the losses before, two steps, once for those after


def test_a_client_whose_loss_is_not_finite_costs_the_others_nothing(
    loaded: Callable[..., Base], clients: dict[str, Resident]
) -> None:
    base = loaded()
    broken = {f"{name}.b": np.full((m, 4), np.inf, np.float32) for name, (m, _) in base.modules.items()}
    orders = [order(base, "ann"), order(base, "bob", blobs={"local": broken}), order(base, "cyd")]
    expected = alone(base, clients, [orders[0], orders[2]])
    found = Batched(base, clients)(orders)
    assert found.keys() == {"ann", "cyd"}  # bob has its own error, when it trains alone
    assert all(differences(expected[name], found[name])[0] <= 1e-5 for name in found)


@pytest.mark.parametrize(
    "change",
    [
        {"training": replace(TRAINING, dropout=0.1)},
        {"training": replace(TRAINING, gradient_checkpointing=True)},
        {"training": replace(TRAINING, packing=True)},
        {"terms": (Proximal(0.1),)},
        {"terms": (Preference(0.1),)},
        {"blobs": {"saved": {"lm_head.weight": np.zeros((2, 2), np.float32)}}},
    ],
    ids=["dropout", "checkpointing", "packing", "terms", "preference", "saved"],
)
def test_what_is_more_than_plain_steps_is_left_to_each_client(
    change: dict[str, Any], loaded: Callable[..., Base], clients: dict[str, Resident]
) -> None:
    base = loaded()
    assert Batched(base, clients)([order(base, name, **change) for name in clients]) == {}


def test_clients_of_another_base_without_examples_or_without_company_work_alone(
    loaded: Callable[..., Base], clients: dict[str, Resident]
) -> None:
    base, none = loaded(), Resident((), (), 1)
    orders = [order(base, "ann"), replace(order(base, "bob"), base="another"), order(base, "cyd")]
    assert Batched(base, clients | {"cyd": none})(orders) == {}
    wider = replace(TRAINING, batch=3)
    assert Batched(base, clients)([order(base, "ann"), order(base, "bob", training=wider)]) == {}
    selective = [replace(item, plan=replace(item.plan, back=0.5)) for item in map(partial(order, base), clients)]
    assert Batched(base, clients)(selective) == {}
    other = {"global": frozen(base, seed=1)}
    assert Batched(base, clients)([order(base, "ann"), order(base, "bob", blobs=other)]) == {}


def test_where_memory_runs_out_half_as_many_train_together_from_then_on(
    loaded: Callable[..., Base], clients: dict[str, Resident], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sizes = loaded(), list[int]()

    def full(base: Base, members: Sequence[Any], training: Training, **options: Any) -> Any:
        sizes.append(len(members))
        if len(members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_together(base, members, training, **options)

    monkeypatch.setattr(batched, "train_together", full)
    together, orders = Batched(base, clients), [order(base, name) for name in clients]
    assert together(orders).keys() == {"ann", "bob"}
    assert together(orders).keys() == {"ann", "bob"}
    assert sizes == [3, 2, 2]


def test_an_error_that_is_not_of_memory_is_not_swallowed(
    loaded: Callable[..., Base], clients: dict[str, Resident], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(batched, "train_together", fail)
    base = loaded()
    with pytest.raises(RuntimeError, match="a fault of ours"):
        Batched(base, clients)([order(base, name) for name in clients])


def test_a_layer_that_sees_other_rows_is_refused_and_not_trained_wrongly(
    loaded: Callable[..., Base], clients: dict[str, Resident], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded()
    layer = base.model.get_submodule(next(iter(base.modules)))
    # As a layer that puts time first, or routes tokens: the batch is not its first axis.
    handle = layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].transpose(0, 1),))
    back = layer.register_forward_hook(lambda module, inputs, output: output.transpose(0, 1))
    try:
        with pytest.raises(UnbatchableError, match=r"expected an input of \(6 rows, time, channels\)"):
            batched.updates_of(base, list(clients.values()), [order(base, name) for name in clients])
        assert Batched(base, clients)([order(base, name) for name in clients]) == {}
    finally:
        handle.remove()
        back.remove()


def test_clients_of_one_set_of_modules_train_together_whatever_the_rank_of_each(
    loaded: Callable[..., Base], clients: dict[str, Resident]
) -> None:
    base = loaded()
    received = frozen(base)
    ranks = {"ann": (0, 0, 4, 2), "bob": (0, 0, 1, 3), "cyd": (1, 2, 3, 4)}
    orders = [order(base, name, rank=max(own), blobs={"global": received}) for name, own in ranks.items()]
    orders = [replace(one, plan=replace(one.plan, ranks=ranks[one.plan.client])) for one in orders]
    together = Batched(base, clients)(orders)
    assert together.keys() == {"ann", "bob"}  # the third has other modules: nothing is stacked for it
    theirs = alone(base, clients, orders)
    for name, update in together.items():
        error, step = differences(theirs[name], update)
        assert error < 1e-3 * step
        assert {k: v.shape for k, v in update.lora.tensors.items()} == {
            k: v.shape for k, v in theirs[name].lora.tensors.items()
        }
    assert digest(base.model) == base.digest
