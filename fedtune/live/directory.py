"""A run directory as a live page: one that another process writes, a finished one, or one copied from elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.live.feed import Feed
from fedtune.report.reader import Summary, read_summary, recipe_table
from fedtune.store.lock import holder
from fedtune.store.round_records import NAME, read_rounds
from fedtune.store.run_directory import check_records

LOOK_S = 0.5
"""Between two looks at the directory."""


def open_directory(run: Path) -> Feed:
    """Return a feed with what a run directory holds now.

    Raises:
        StoreError: if the folder is no run directory, or its rounds cannot be read.
    """
    check_records(run)
    table = recipe_table(run)
    rounds = table.get("rounds", {})
    count = rounds.get("count") if isinstance(rounds, dict) else None
    feed = Feed(str(table.get("name", run.resolve().name)), rounds=count if isinstance(count, int) else 0)
    look(run, feed)
    return feed


def look(run: Path, feed: Feed) -> None:
    """Pass on to a feed what is new in a run directory.

    Raises:
        StoreError: if its rounds cannot be read.
    """
    feed.load(read_rounds(run))
    summary = summary_of(run)
    if holder(run) is not None:
        feed.set_state("running")
    elif summary is not None and summary.state == "finished":
        feed.set_state("finished", summary.selection.ended)
    else:
        feed.set_state("stopped", "no process runs it here")


def summary_of(run: Path) -> Summary | None:
    """Return the content of summary.json; None where there is none, or another process is just writing it."""
    try:
        return read_summary(run / "summary.json")
    except StoreError:
        return None


@contextmanager
def follow_directory(run: Path, feed: Feed, *, every_s: float = LOOK_S) -> Iterator[None]:
    """Look at a run directory until the block ends, and pass on what is new; an error is shown on the page."""
    over = threading.Event()

    def work() -> None:
        # Unlike any other: what was written since the directory was opened is new as well.
        seen: tuple[object, ...] | None = None
        while not over.wait(every_s):
            now = signature(run)
            if now != seen:
                seen = now
                try:
                    look(run, feed)
                except StoreError as error:
                    feed.add_problem("", "rounds.jsonl", str(error))

    thread = threading.Thread(target=work, name="fedtune live directory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def signature(run: Path) -> tuple[object, ...]:
    """Return what differs after a round, at the end, and when the process that writes the run begins or is gone."""
    try:
        sizes = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(run) if path.exists()]
        return (*sizes, holder(run))
    except (OSError, StoreError):
        return ()


def files_of(run: Path) -> tuple[Path, Path]:
    return run / NAME, run / "summary.json"
