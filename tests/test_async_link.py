"""An asynchronous run over the gRPC link, with the real processes: its journal replays to the bit, after a kill too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune import api
from fedtune.config import planned_training
from fedtune.config.recipe import largest_rank
from fedtune.deployment.served_run import accepted_updates, unsettled_orders
from fedtune.deployment.server_setup import data_at_sites
from fedtune.link.client import outbox
from fedtune.messages import Blueprint, Client, Failure
from fedtune.planning.fixed import Fixed
from fedtune.rounds.transport import Answer, Reply
from fedtune.runs.context import RunContext
from fedtune.runs.runner import run_rounds_of
from fedtune.store import journal, peft
from fedtune.store.history import replay_journal
from fedtune.store.round_records import read_rounds
from fedtune.store.training_record import training_record
from fedtune.wire.codec import EncodedAssignment, decode_assignment, encode_update
from tests.link.federation import federation
from tests.link.scripted import EXAMPLES, MODEL, scripted_update
from tests.test_link import FLORA, SITE, SITES, scripted

RECIPE = FLORA.replace("min_clients = 3", "min_clients = 2") + "\n[asynchronous]\nbuffer = 2\n"


def settled(run: Path) -> list[list[str]]:
    """The clients of every buffer, as the journal has them."""
    buffers: list[list[str]] = []
    journal.read(run / "journal", lambda each: buffers.append(each.fields["used"]) if each.kind == "settle" else None)
    return buffers


class Replayed:
    """Clients whose answers come in an order that was recorded."""

    def __init__(self, buffers: Sequence[Sequence[str]]) -> None:
        self.order = [name for names in buffers for name in names]
        self.answers = dict[str, Answer]()

    def clients(self) -> Sequence[Client]:
        return [Client(name, EXAMPLES) for name in SITES]

    def idle(self) -> Sequence[Client]:
        return [client for client in self.clients() if client.name not in self.answers]

    def exchange(self, orders: Any, rule: Any) -> Any:
        raise AssertionError("orders of these rounds outlast them")

    def send(self, orders: Mapping[str, EncodedAssignment], seconds: float) -> Sequence[Failure]:
        for name, order in orders.items():
            update = encode_update(scripted_update(decode_assignment(order.header, order.blobs)))
            self.answers[name] = Reply(name, update)
        return []

    def receive(self, seconds: float) -> Answer | None:
        return self.answers.pop(self.order.pop(0))

    def withdraw(self, client: str) -> None: ...


def replayed(buffers: Sequence[Sequence[str]]) -> list[str]:
    """The digests of the states that follow from the buffers in one process."""
    bound = data_at_sites(RECIPE)
    blueprint = Blueprint(MODEL.modules, {}, max_rank=largest_rank(bound), seed=bound.seed)
    setting = RunContext(
        recipe=bound,
        blueprint=blueprint,
        planner=Fixed(partial(planned_training, bound), alpha=bound.adapter.alpha, rslora=bound.adapter.rslora),
        base={"name": "none", "digest": MODEL.base, "parameters": MODEL.parameters},
        target=peft.Target(base="none", revision=None, task="causal", fan_in_fan_out=False, saved_modules=()),
        fleet=dict.fromkeys(SITES, EXAMPLES),
        machine={},
        door="link",
    )
    return [result.digest for result in run_rounds_of(setting, Replayed(buffers))]


@pytest.mark.slow
@pytest.mark.guarantee("G12")
def test_a_server_that_is_killed_in_mid_buffer_goes_on_and_the_journal_replays_to_the_bit(tmp_path: Path) -> None:
    with federation(tmp_path, RECIPE, SITES, site=dict.fromkeys(SITES, SITE), server={"inline_kib": 1}) as fed:
        fed.serve()
        scripted(fed, "site-a", "site-b")
        scripted(fed, "site-c", seconds=1.5)
        fed.until(lambda: fed.events("site-a", "receipt") and fed.events("server", "committed"))
        fed.kill("server")
        orders, (accepted, ended) = unsettled_orders(fed.run), accepted_updates(fed.run)
        fed.serve(resume=True)
        assert fed.exit_statuses("server", *SITES) == [0] * 4, fed.log("server")
        assert ended >= 1
        assert orders
        assert accepted
        history, _ = replay_journal(fed.run)
        buffers = settled(fed.run)
        assert [len(names) for names in buffers] == [2] * 4
        assert replayed(buffers) == history.digests
        lines = read_rounds(fed.run)[1:]
        assert [sorted(line.clients) for line in lines] == [sorted(names) for names in buffers]
        # A slow site's update is used when it comes, and what sites have sent was trained once.
        assert max(client.staleness for line in lines for client in line.clients.values()) >= 1
        for name in SITES:
            run = next((fed.folder / name / "state" / "runs").iterdir()).name
            entries = outbox.load_entries(fed.folder / name / "state", run)
            numbers = [entry.header.round for entry in entries]
            assert len(numbers) == len(set(numbers))
            assert not fed.events(name, "refused")
        # Of each round the record of training has the updates of its buffer, not those that came during it.
        assert [entry["accepted"] for entry in training_record(fed.run)["rounds"]] == [2] * 4
        assert api.verify(fed.run).committed == 4
        assert json.loads((fed.run / "summary.json").read_text())["state"] == "finished"
