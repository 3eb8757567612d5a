from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import distributed as torch_distributed

from fedtune.client.ranks import Ranks, ranks_here
from fedtune.errors import ClientError
from fedtune.messages import Assignment, Plan, Training, TrainLora

distributed: Any = torch_distributed
"""Some of what is used here has no types."""


def order(number: int) -> Assignment:
    plan = Plan("ann", rank=2, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    blobs = {"local": {"q.a": np.full((2, 3), number, np.float32)}}
    return Assignment("flora", round=number, seed=0, plan=plan, task=TrainLora(a_key=0, blobs=blobs))


def test_without_a_launcher_a_client_is_one_process_and_sends_nothing() -> None:
    alone = ranks_here()
    assert alone == Ranks()
    alone.announce(order(1))
    alone.end()


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[Ranks]:
    """Two processes in two threads: what is broadcast goes through a store on disk, by gloo."""
    groups = [distributed.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]
    made: list[Any] = [None, None]

    def connect(rank: int) -> None:
        made[rank] = distributed.ProcessGroupGloo(groups[rank], rank, 2, timedelta(seconds=60))

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def broadcast(tensor: Any, source: int, *, group: Any) -> None:
        options = distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        group.broadcast([tensor], options).wait()

    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    return [Ranks(rank, 2, made[rank]) for rank in range(2)]


def test_every_order_reaches_the_other_process_as_it_is_until_the_end(pair: Sequence[Ranks]) -> None:
    first, other = pair
    performed: list[Assignment] = []
    notes: list[str] = []
    thread = threading.Thread(target=lambda: notes.append(other.follow(performed.append)))
    thread.start()
    for number in (1, 2):
        first.announce(order(number))
    first.end("runs/1/adapter")
    thread.join()
    assert notes == ["runs/1/adapter"]
    assert [one.round for one in performed] == [1, 2]
    for one in performed:
        assert one.plan == order(one.round).plan
        np.testing.assert_array_equal(one.lora.blobs["local"]["q.a"], order(one.round).lora.blobs["local"]["q.a"])


def test_an_end_may_have_no_note(pair: Sequence[Ranks]) -> None:
    first, other = pair
    notes: list[str] = []
    thread = threading.Thread(target=lambda: notes.append(other.follow(lambda order: None)))
    thread.start()
    first.end()
    thread.join()
    assert notes == [""]


def test_a_check_that_fails_costs_one_round_and_an_error_of_the_program_ends_the_process(pair: Sequence[Ranks]) -> None:
    first, other = pair
    performed: list[int] = []
    ends: list[object] = []

    def perform(one: Assignment) -> None:
        performed.append(one.round)
        if one.round == 1:
            raise ClientError("ann: expected finite factors")
        if one.round == 3:
            raise ClientError("ann: expected its trainer to train") from ValueError("row 17")

    def follow() -> None:
        try:
            ends.append(other.follow(perform))
        except ClientError as error:
            ends.append(str(error))

    thread = threading.Thread(target=follow)
    thread.start()
    for number in (1, 2, 3):
        first.announce(order(number))
    thread.join()
    assert performed == [1, 2, 3]
    assert ends == ["ann: expected its trainer to train"]
