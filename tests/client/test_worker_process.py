from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client import perform as perform_module
from fedtune.client.worker_process import devices_of, payload, prepare
from fedtune.data.encode import Example
from fedtune.errors import ClientError, ConfigError
from fedtune.messages import (
    Assignment,
    Client,
    ClientUpdate,
    Failure,
    Plan,
    PlannedClient,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.model.base import Base, digest, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import ClientObservation
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import ClientFinished, Event, RoundStarted
from fedtune.rounds.loop import RoundResult, run
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Reply, Rule, Transport
from fedtune.simulation.fork_client import ForkServer
from fedtune.simulation.inprocess import InProcess
from fedtune.simulation.process_pool import ProcessPool
from fedtune.simulation.resources import Resources
from fedtune.wire.codec import encode_assignment

RANKS = {"ann": 2, "bob": 4, "cyd": 8}
SIZES = {"ann": 3, "bob": 5, "cyd": 4}
FLEET = [Client(name, size) for name, size in SIZES.items()]
ADAPTER = AdapterSettings(rank=4, targets=["q_proj", "v_proj"])


def rows(name: str) -> list[Example]:
    rng = np.random.default_rng(sum(name.encode()))
    ids = [rng.integers(3, 200, size=9).astype(np.int64) for _ in range(SIZES[name])]
    return [Example(input_ids=i, labels=i, characters=1, prompt="", reference="", prompt_tokens=0) for i in ids]


ROWS = {name: rows(name) for name in SIZES}
BEYOND = [replace(row, input_ids=row.input_ids + 10**6) for row in rows("ann")]
"""Rows with token ids that no embedding has."""


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> ModelSettings:
    return ModelSettings(base=str(checkpoints["llama"]), device="cpu")


@pytest.fixture(scope="module")
def nursery(model: ModelSettings) -> Iterator[ForkServer]:
    """The one of all tests that need torch in other processes: it takes seconds to start."""
    with ForkServer() as nursery:
        nursery.load(*payload(model, ADAPTER, {**ROWS, "dee": BEYOND}, root=Path(), seed=0))
        yield nursery


@pytest.fixture(scope="module")
def base(model: ModelSettings) -> Base:
    return load(model, ADAPTER, tokenizer=load_tokenizer(model, Path()), root=Path(), seed=0)


class Slow:
    """Asks far too much of bob in the second round, so that it is at work whenever it is killed."""

    def __init__(self, *, slow: bool) -> None:
        training = Training(batch=2, learning_rate=0.02, steps=3, dropout=0.1)
        self.fixed = Fixed(lambda name: (RANKS[name], training), alpha="2r", rslora=False)
        self.slow = slow

    def start(self) -> None: ...

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> None: ...

    def plan(self, learned: Any, round: int, fleet: Sequence[Client]) -> Mapping[str, PlannedClient]:
        plans = {client.name: self.fixed.plan_for(client) for client in fleet}
        if self.slow and round == 2:
            plans["bob"] = replace(plans["bob"], training=replace(plans["bob"].training, steps=10**7))
        return {name: PlannedClient(plan) for name, plan in plans.items()}


def results(base: Base, transport: Transport, *, slow: bool = False, watch: Any = None) -> list[RoundResult]:
    found = run(
        RoundContext(
            method=METHODS["flora"],
            settings=METHODS["flora"].settings(),
            planner=Slow(slow=slow),
            transport=transport,
            schedule=Schedule(count=3),
            blueprint=base.blueprint(max_rank=8, seed=0),
            base=base.digest,
            watch=watch or (lambda event: None),
        )
    )
    return list(found)


def inprocess(base: Base, **threads: int) -> InProcess:
    work = {name: partial(perform_module.perform, base, ROWS[name], threads=threads.get(name, 1)) for name in RANKS}
    return InProcess(FLEET, work)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_worker_processes_end_in_the_same_states_as_one_process(workers: int, base: Base, nursery: ForkServer) -> None:
    here = results(base, inprocess(base))
    there = results(base, ProcessPool(nursery, FLEET, workers=workers, cores=2))
    assert len(here) == 3
    assert [result.digest for result in there] == [result.digest for result in here]
    assert [result.norms for result in there] == [result.norms for result in here]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_its_clients_update_of_that_round(workers: int, base: Base, nursery: ForkServer) -> None:
    def fail(assignment: Assignment) -> ClientUpdate:
        if assignment.round == 2:
            raise ClientError("killed")
        return perform_module.perform(base, ROWS["bob"], assignment, threads=1)

    pool = ProcessPool(nursery, FLEET, workers=workers, cores=2)
    rounds = []

    def kill(event: Event) -> None:
        if isinstance(event, RoundStarted):
            rounds.append(event.round)
        if isinstance(event, ClientFinished) and event.outcome.client == "ann" and rounds[-1] == 2:
            os.kill(next(task.worker.pid for task in pool._running.values() if task.client == "bob"), signal.SIGKILL)

    expected = results(base, InProcess(FLEET, {**inprocess(base).work, "bob": fail}), slow=True)
    found = results(base, pool, slow=True, watch=kill)
    lost = found[1].outcomes["bob"]
    assert isinstance(lost, Failure)
    assert "bob: expected an update; got none: its process was killed by signal 9 (SIGKILL" in lost.reason
    assert not any(
        isinstance(outcome, Failure) for result in (found[0], found[2]) for outcome in result.outcomes.values()
    )
    assert [result.digest for result in found] == [result.digest for result in expected]
    assert found[1].digest != results(base, inprocess(base))[1].digest


def test_each_clients_threads_are_its_own(base: Base, nursery: ForkServer) -> None:
    expected = results(base, inprocess(base, bob=2))
    resources = {"bob": Resources(threads=2)}
    found = results(base, ProcessPool(nursery, FLEET, resources, workers=2, cores=2))
    assert [result.digest for result in found] == [result.digest for result in expected]


def test_an_error_of_torch_is_the_same_failure_as_in_one_process_and_the_next_client_works(
    base: Base, nursery: ForkServer
) -> None:
    method, blueprint = METHODS["fedit"], base.blueprint(max_rank=4, seed=0)
    fleet = [Client("ann", 3), Client("dee", 3)]
    plans = [
        PlannedClient(Plan(client.name, 4, 2.0, Training(batch=2, learning_rate=0.02, steps=1))) for client in fleet
    ]
    state = method.init(blueprint, method.settings())
    orders = {
        plan.plan.client: encode_assignment(replace(method.assign(state, 0, plan), base=base.digest)) for plan in plans
    }
    work = {
        name: partial(perform_module.perform, base, own, threads=1)
        for name, own in (("dee", BEYOND), ("ann", ROWS["ann"]))
    }
    answers = [
        {answer.client: answer for answer in engine.exchange(orders, Rule(quorum=1))}
        for engine in (InProcess(fleet, work), ProcessPool(nursery, fleet, workers=1, cores=1))
    ]
    here, there = (found["dee"] for found in answers)
    assert isinstance(here, Failure)
    assert here == there
    assert re.fullmatch(
        r"dee: expected an update; got IndexError: index out of range in self \(fedtune/model/loss.py:\d+\)",
        here.reason,
    )
    assert all(isinstance(found["ann"], Reply) for found in answers)
    assert digest(base.model) == base.digest


def test_a_base_that_is_not_there_is_the_same_fault_as_in_this_process(tmp_path: Path) -> None:
    settings = ModelSettings(base=str(tmp_path / "nothing"), device="cpu")
    with pytest.raises(ConfigError) as here:
        load_tokenizer(settings, tmp_path)
    with pytest.raises(ConfigError) as there:
        prepare(payload(settings, ADAPTER, {}, root=tmp_path, seed=0)[0], {})
    assert str(there.value) == str(here.value)
    assert there.value.faults == here.value.faults


def test_another_base_than_expected_is_refused(model: ModelSettings) -> None:
    spec, parts = payload(model, ADAPTER, ROWS, root=Path(), seed=0, base="0" * 64)
    with pytest.raises(ConfigError, match="expected the base of digest 000000000000; got "):
        prepare(spec, {name: memoryview(part) for name, part in parts.items()})


def test_what_is_prepared_performs_as_the_client_does(model: ModelSettings, base: Base) -> None:
    apart = {"ann": [*rows("bob"), *rows("cyd")] * 20}
    spec, parts = payload(model, ADAPTER, ROWS, root=Path(), seed=0, base=base.digest, held_out=apart)
    perform = prepare(spec, {name: memoryview(part) for name, part in parts.items()}).make_worker(3)
    blueprint = base.blueprint(max_rank=4, seed=0)
    method = METHODS["fedit"]
    plan = Plan("ann", 4, 2.0, Training(batch=2, learning_rate=0.02, steps=2))
    assignment = replace(
        method.assign(method.init(blueprint, method.settings()), 0, PlannedClient(plan)), base=base.digest
    )
    here = perform_module.perform(base, ROWS["ann"], assignment, threads=1, held_out=apart["ann"])
    there = perform(assignment, 1)
    assert here.measured.loss_before == there.measured.loss_before
    assert here.measured.loss_after == there.measured.loss_after
    assert here.lora.tensors.keys() == there.lora.tensors.keys()
    assert all(np.array_equal(here.lora.tensors[name], there.lora.tensors[name]) for name in here.lora.tensors)


def test_what_is_prepared_performs_with_the_threads_of_the_order(
    model: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(
        "fedtune.client.worker_process.perform", lambda *arguments, threads, **options: found.append(threads)
    )
    spec, parts = payload(model, ADAPTER, ROWS, root=Path(), seed=0)
    perform = prepare(spec, {name: memoryview(part) for name, part in parts.items()}).make_worker(0)
    plan = Plan("ann", 4, 2.0, Training(batch=2, learning_rate=0.02, steps=2))
    for threads in (1, 3):
        perform(Assignment("fedit", 1, 3, plan, TrainLora(a_key=4, blobs={}), base=""), threads)
    assert found == [1, 3]


def test_workers_take_every_gpu_in_turn_unless_the_recipe_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of(torch.device("cuda")) == ("cuda:0", "cuda:1")
    assert devices_of(torch.device("cuda:1")) == ("cuda:1",)
    assert devices_of(torch.device("cpu")) == ("cpu",)


@pytest.mark.slow
def test_a_program_s_workers_are_forked_without_a_number_of_threads_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "once upon a time"}\n' * 8)
    (tmp_path / "recipe.toml").write_text(
        'name = "forked"\nmodel = { base = "embedded" }\nmethod = { name = "flora" }\nclient = { steps = 1 }\n'
        'rounds = { count = 1 }\nengine = { name = "processes", workers = 2 }\nreport = { plots = false }\n'
        'data = { source = "rows.jsonl", split = { kind = "iid", clients = 2 } }\n'
    )
    # As a user has it: the suite itself runs with one thread, which hides the pools of the libraries.
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-m", "fedtune", "simulate", "recipe.toml", "--out", "run", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
