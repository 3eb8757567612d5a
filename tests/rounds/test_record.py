from __future__ import annotations

from fedtune.rounds.record import ClientRecord, RoundRecord, observations


def test_only_updates_that_were_aggregated_are_used() -> None:
    clients = {"ann": ClientRecord("ok"), "bob": ClientRecord("late"), "cyd": ClientRecord("ok")}
    assert RoundRecord(round=1, seconds=1.0, clients=clients).used == 2


def test_a_planner_observes_every_client_of_the_cohort() -> None:
    ann = ClientRecord("ok", rank=4, examples=30, ratio=0.5, compute_s=2.0, transfer_s=1.0, loss_after=3.0, bytes_up=7)
    bob = ClientRecord("unfit", reason="no memory", examples=10)
    first, second = observations(RoundRecord(round=1, seconds=1.0, clients={"ann": ann, "bob": bob}))
    assert (first.client, first.num_examples, first.ratio, first.rank, first.status) == ("ann", 30, 0.5, 4, "ok")
    assert (first.compute_s, first.transfer_s, first.loss_after, first.bytes_up) == (2.0, 1.0, 3.0, 7)
    assert (second.client, second.ratio, second.rank, second.status) == ("bob", 0.0, 0, "unfit")
