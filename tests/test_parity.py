"""Whole rounds on real layers against what the papers do to the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client import perform as perform_module
from fedtune.data.encode import Example
from fedtune.lora.adapter import delta, unpack
from fedtune.messages import (
    AdmittedUpdate,
    Client,
    ClientUpdate,
    PlannedClient,
    Training,
)
from fedtune.methods import METHODS
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.lora import with_adapters
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.planning.fixed import Fixed
from fedtune.rounds.context import RoundContext
from fedtune.rounds.loop import run
from fedtune.rounds.schedule import Schedule
from fedtune.simulation.inprocess import InProcess
from fedtune.tensors import Array

perform = partial(perform_module.perform, threads=1)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
TRAINING = Training(batch=2, learning_rate=0.02, steps=3)
SIZES = {"ann": 3, "bob": 5, "cyd": 4}


def base_of(path: Path, targets: Sequence[str]) -> Base:
    settings = ModelSettings(base=str(path), device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    return load(settings, AdapterSettings(rank=2, targets=targets), tokenizer=tokenizer, root=Path(), seed=0)


def rows_of(client: str) -> list[Example]:
    rng = np.random.default_rng(sum(client.encode()))
    ids = [rng.integers(3, 200, size=9).astype(np.int64) for _ in range(SIZES[client])]
    return [Example(input_ids=i, labels=i, characters=1, prompt="", reference="", prompt_tokens=0) for i in ids]


class Spied:
    """Clients that work as ever, and whose updates are kept to be summed by hand."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.updates: list[ClientUpdate] = []

    def work(self, assignment: Any) -> ClientUpdate:
        rows = rows_of(assignment.plan.client)
        # Trained twice alike: once for whole factors, of which a sum can be taken by hand.
        whole = replace(assignment, task=replace(assignment.lora, upload="factors"))
        self.updates.append(perform(self.base, rows, whole))
        return perform(self.base, rows, assignment)


def states(base: Base, method: str, settings: dict[str, Any], ranks: dict[str, int], *, rounds: int) -> Any:
    """Return (the state after each round, the updates of each round)."""
    spied = Spied(base)
    results = run(
        RoundContext(
            method=METHODS[method],
            settings=METHODS[method].settings(**settings),
            planner=Fixed(lambda name: (ranks[name], TRAINING), alpha="2r", rslora=False),
            transport=InProcess([Client(n, SIZES[n]) for n in ranks], dict.fromkeys(ranks, spied.work)),
            schedule=Schedule(count=rounds),
            blueprint=base.blueprint(max_rank=max(ranks.values()), seed=0),
            base=base.digest,
        )
    )
    found, begun = [], 0
    for result in results:
        found.append((result.state, spied.updates[begun:]))
        begun = len(spied.updates)
    return found


def summed(updates: Sequence[ClientUpdate]) -> dict[str, Array]:
    """Return sum of p_k b_k a_k by module, dense and in float64."""
    total = sum(update.num_examples for update in updates)
    changes: dict[str, Array] = {}
    for update in updates:
        for name, factors in unpack(update.lora.tensors).items():
            changes[name] = changes.get(name, 0) + update.num_examples / total * delta(factors)
    return changes


def add(base: Base, changes: dict[str, Array]) -> None:
    """Add the changes to the base's own weights, as the papers' code does."""
    with torch.no_grad():
        for name, change in changes.items():
            weight = base.model.get_submodule(name).weight
            weight += torch.from_numpy(change.T if base.transposed else change).float()


def logits(base: Base, adapter: Any = None) -> torch.Tensor:
    with with_adapters(base, frozen=adapter) as model, torch.inference_mode():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


LAYERS = pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["v_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)


@LAYERS
@pytest.mark.parametrize("method", ["flora", "fedex", "flexlora"])
def test_the_global_model_is_the_base_plus_the_exact_sum(
    method: str, name: str, targets: list[str], checkpoints: dict[str, Path]
) -> None:
    """Neither transposed nor rescaled, on layers that are not square and on GPT-2's, which hold (in, out)."""
    base = base_of(checkpoints[name], targets)
    # flexlora keeps what the largest client can hold, so that client is given the layer's full rank here
    ranks = {"flora": [1, 3, 2], "fedex": [2, 2, 2], "flexlora": [1, 32, 2]}[method]
    fleet = dict(zip(SIZES, ranks, strict=True))
    settings = {"wire_dtype": "fp32"} | ({"mode": "reinit"} if method == "flora" else {})
    ((state, updates),) = states(base, method, settings, fleet, rounds=1)
    ours = logits(base, METHODS[method].adapter(state))
    untouched = logits(base)
    add(base, summed(updates))
    torch.testing.assert_close(ours, logits(base), atol=1e-5, rtol=0)
    assert (ours - untouched).abs().max() > 1e-3


def test_reinit_is_the_papers_merge_without_merging(checkpoints: dict[str, Path]) -> None:
    """Three rounds in which the sum is added to the base itself, from the same fresh starts, end in the same model."""
    fleet, targets = {"ann": 1, "bob": 3, "cyd": 2}, ["q_proj", "v_proj"]
    ours_base = base_of(checkpoints["llama"], targets)
    exact = {"mode": "reinit", "wire_dtype": "fp32", "state_max_rank": "exact"}
    ours = states(ours_base, "flora", exact, fleet, rounds=3)[-1][0]

    merged = base_of(checkpoints["llama"], targets)
    blueprint = merged.blueprint(max_rank=3, seed=0)
    method = METHODS["flora"]
    planner = Fixed(lambda name: (fleet[name], TRAINING), alpha="2r", rslora=False)
    state = method.init(blueprint, method.settings(mode="reinit", wire_dtype="fp32"))
    for _ in range(3):
        plans = {name: planner.plan_for(Client(name, SIZES[name])) for name in fleet}
        orders = {name: method.assign(state, 0, PlannedClient(plan)) for name, plan in plans.items()}
        # The paper sends no frozen adapter: what was learned is in the base already.
        bare = {
            name: replace(order, task=replace(order.lora, blobs={}, upload="factors")) for name, order in orders.items()
        }
        updates = [perform(merged, rows_of(name), order) for name, order in bare.items()]
        state = method.aggregate(state, [AdmittedUpdate(update) for update in updates])
        add(merged, summed(updates))
    torch.testing.assert_close(logits(ours_base, method.adapter(ours)), logits(merged), atol=1e-5, rtol=0)


def test_svt_that_keeps_everything_is_reinit_to_the_bit(checkpoints: dict[str, Path]) -> None:
    fleet = {"ann": 1, "bob": 3, "cyd": 2}
    ends = [
        states(base_of(checkpoints["llama"], ["q_proj"]), "flora", settings, fleet, rounds=2)[-1][0].delta
        for settings in ({"mode": "reinit"}, {"mode": "svt", "tau": 1.0})
    ]
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])
