from __future__ import annotations

import json
import threading
from typing import Any

from fedtune.live.feed import MOST_PROBLEMS, Feed
from fedtune.messages import Failure, Traffic
from fedtune.rounds.events import ClientFinished, Event, Note, Phase, RoundFinished, RoundStarted
from fedtune.rounds.record import ClientRecord, RoundRecord


def record(round: int, **clients: ClientRecord) -> RoundRecord:
    return RoundRecord(round, 2.0, loss_after=3.0 - round, clients=clients, bytes_up=10, bytes_down=20)


def failure(client: str = "b", reason: str = "norm 41 > 10") -> ClientFinished:
    return ClientFinished(1, Failure.from_text(client, reason, kind="refused"), Traffic())


def test_a_page_is_sent_everything_first_and_then_what_has_changed() -> None:
    feed = Feed("ward", rounds=3, now=lambda: 1.0)
    feed(RoundFinished(record(0)))
    version, everything = feed.since(0)
    assert everything["reset"] is True
    assert [row["n"] for row in everything["rounds"]] == [0]
    assert feed.since(version)[1]["rounds"] == []
    feed(RoundStarted(1, 3, ("a", "b")))
    version, began = feed.since(version)
    assert (began["reset"], began["head"]["state"], began["head"]["asked"]) == (False, "running", 2)
    assert set(began["clients"]) == {"a", "b"}
    feed(failure())
    version, refused = feed.since(version)
    assert set(refused["clients"]) == {"b"}
    assert refused["problems"][0]["reason"] == "norm 41 > 10"
    feed(RoundFinished(record(1, a=ClientRecord("ok", bytes_up=10), b=ClientRecord("refused", reason="norm 41 > 10"))))
    _, ended = feed.since(version)
    assert [row["n"] for row in ended["rounds"]] == [1]
    assert ended["head"]["up"] == 20
    assert ended["head"]["seconds"] == 2.0
    assert "problems" not in ended  # it is named once


def test_a_page_of_any_moment_says_the_same_as_one_that_was_open_all_the_time() -> None:
    feed, version, clients, rounds = Feed("ward"), 0, dict[str, Any](), dict[int, Any]()
    events: list[Event] = [
        RoundFinished(record(0)),
        RoundStarted(1, 2, ("a", "b")),
        failure(),
        RoundFinished(record(1, a=ClientRecord("ok"), b=ClientRecord("refused", reason="x"))),
        Note("a remark"),
        Phase("scoring"),
    ]
    for event in events:
        feed(event)
        version, content = feed.since(version)
        clients |= content["clients"]
        rounds |= {row["n"]: row for row in content["rounds"]}
    _, everything = feed.since(0)
    assert clients == everything["clients"]
    assert list(rounds.values()) == everything["rounds"]
    assert everything["notes"] == ["a remark"]
    assert everything["head"]["phase"] == "scoring"
    json.dumps(everything, allow_nan=False)


def test_rounds_that_were_loaded_are_not_shown_twice() -> None:
    feed = Feed("ward")
    feed.load([record(0), record(1)])
    feed(RoundFinished(record(1)))
    feed(RoundFinished(record(2)))
    assert [row["n"] for row in feed.since(0)[1]["rounds"]] == [0, 1, 2]
    assert feed.since(0)[1]["head"]["up"] == 30


def test_a_change_wakes_those_who_wait_and_so_does_the_end() -> None:
    feed = Feed("ward")
    version, _ = feed.since(0)
    assert not feed.wait(version, 0.0)
    threading.Thread(target=lambda: feed(Note("now"))).start()
    assert feed.wait(version, 30.0)
    version, _ = feed.since(version)
    threading.Thread(target=feed.close).start()
    assert feed.wait(version, 30.0)


def test_errors_are_bounded_however_many_there_are() -> None:
    feed = Feed("ward")
    for round in range(1, 300):
        feed.add_problem("a", "refused", "x" * 5000, round)
    content = feed.since(0)[1]
    assert len(content["problems"]) == MOST_PROBLEMS
    assert len(json.dumps(content)) < 50_000


def test_a_name_that_is_shown_escaped_keeps_its_sums() -> None:
    feed, name = Feed("ward"), "a\u202eb"
    for round in (1, 2):
        feed(RoundFinished(record(round, **{name: ClientRecord("ok", bytes_up=10)})))
    assert feed.since(0)[1]["clients"]["a\\u202eb"]["up"] == 20
