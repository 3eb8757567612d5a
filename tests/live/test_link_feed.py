from __future__ import annotations

from fedtune.live.feed import Feed
from fedtune.live.link_feed import feed_link


def test_connected_clients_are_counted_and_what_goes_wrong_is_named() -> None:
    feed = Feed("ward")
    assert feed.since(0)[1]["head"]["connected"] is None
    record = feed_link(feed)
    record("hello", client="site-a", build="x", roster=1)
    record("connected", client="site-b", examples=77)
    assert feed.since(0)[1]["head"]["connected"] == 2
    record("lost", client="site-b", round=3, reason="no sign of life for 60 s")
    record("refused", client="site-c", reason="not on the roster", code="UNKNOWN")
    record("warning", text="the roster ends in 3 days")
    content = feed.since(0)[1]
    assert content["head"]["connected"] == 1
    assert content["clients"]["site-b"]["state"] == "away"
    assert [(one["kind"], one["client"], one["round"]) for one in content["problems"]] == [
        ("lost", "site-b", 3),
        ("refused", "site-c", None),
        ("warning", "", None),
    ]
    assert content["problems"][2]["reason"] == "the roster ends in 3 days"


def test_events_that_are_of_no_interest_change_nothing() -> None:
    feed = Feed("ward")
    record = feed_link(feed)
    version, _ = feed.since(0)
    record("fetched", client="site-a", part="00", bytes=7)
    assert feed.since(version)[0] == version
