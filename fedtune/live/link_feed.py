"""The events of a served run's link, as the live page shows them: who is connected, and what went wrong."""

from __future__ import annotations

from fedtune.link.audit_log import RecordEvent
from fedtune.live.feed import Feed

PROBLEMS = ("refused", "unfit", "barred", "declined", "dropped", "rival", "lost", "died", "warning")
"""Kinds of events that say what went wrong; unused updates are among the rounds' own events."""


def feed_link(feed: Feed) -> RecordEvent:
    """Return a function that passes the events of a server's link on to a feed."""
    feed.serve()

    def record(kind: str, **fields: int | str) -> None:
        client, reason = str(fields.get("client", "")), str(fields.get("reason", fields.get("text", "")))
        if kind in ("hello", "connected"):
            feed.connect(client)
        elif kind in ("left", "lost", "barred", "unfit") and client:
            feed.disconnect(client, reason)
        if kind in PROBLEMS:
            round = int(fields["round"]) if "round" in fields else None
            feed.add_problem(client, kind, reason or str(fields.get("veto", "")), round)

    return record
