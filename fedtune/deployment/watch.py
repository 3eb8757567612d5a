"""What a served run says while it runs: warnings of what ends soon, and for its status how far each site is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.pki.identity import Identity, certificate_warning, current_dates, expiry_warnings, roster_warning
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.store.files import store_errors, write_private

NOW = "now"
"""Name of the file below `link`."""
LOOK_S = 10.0
DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class RunNow:
    """What a server has said last of its run, in a file for `fedtune status`."""

    name: str = ""
    """Of the coordinator."""
    certificate: tuple[int, int] = (0, 0)
    """From when to when its certificate is valid, in seconds since 1970."""
    roster_version: int = 0
    roster_until: int = 0
    """Seconds since 1970."""
    work: Mapping[str, str] = field(default_factory=dict)
    """How far each site is, in words."""

    def warnings(self, *, now: float) -> Sequence[str]:
        """Return a sentence for each thing that ends soon; none where nothing is known."""
        if not self.roster_version:
            return ()
        certificate = certificate_warning(self.name, *self.certificate, now=now)
        return [text for text in (certificate, roster_warning(self.roster_version, self.roster_until, now=now)) if text]


def read_now(folder: Path) -> RunNow:
    """Return what a server has said last of the run whose link folder this is; nothing if it has said nothing.

    Raises:
        StoreError: if the file is damaged.
    """
    path = folder / NOW
    if not path.exists():
        return RunNow()
    with store_errors(path):
        data = path.read_bytes()
    try:
        body = json.loads(data)
        begin, end = body["certificate"]
        work = {str(client): str(text) for client, text in body["work"].items()}
        roster = int(body["roster_version"]), int(body["roster_until"])
        return RunNow(str(body["name"]), (int(begin), int(end)), *roster, work)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"{path}: expected what a server has said of its run; got other text; remove it") from None


class Watch:
    """Looks at a served run; `look` is called every few seconds."""

    def __init__(
        self,
        folder: Path,
        dispatcher: Dispatcher,
        identity: Identity,
        roster: RosterFile,
        record: RecordEvent,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Begin without a warning; the file is written to `folder`."""
        self._folder, self._dispatcher, self._identity, self._roster = folder, dispatcher, identity, roster
        self._record, self._now = record, now
        self._warned: dict[str, float] = {}  # when each sentence was said last

    def look(self) -> None:
        """Record warnings, each once a day, and write how far the sites are."""
        roster, now = self._roster.current(), self._now()
        for text in expiry_warnings(self._identity, roster, now=now):
            if now - self._warned.get(text, float("-inf")) >= DAY_S:
                self._warned[text] = now
                self._record("warning", text=text)
        work = {name: client.work for name, client in self._dispatcher.status().items() if client.work}
        body: dict[str, Any] = {
            "name": self._identity.name,
            "certificate": current_dates(self._identity),
            "roster_version": roster.version,
            "roster_until": roster.valid_until,
            "work": work,
        }
        partial = self._folder / f".{NOW}.partial"
        # Not synced: after a power cut it is written anew, and nothing relies on it.
        with store_errors(partial):
            write_private(partial, json.dumps(body).encode())
            partial.replace(self._folder / NOW)


@contextmanager
def watching(watch: Watch, *, every_s: float = LOOK_S) -> Iterator[None]:
    """Look at a run every few seconds until the block ends; the first look is taken before it begins."""
    watch.look()
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_s):
            try:
                watch.look()
            except StoreError:
                continue  # a full disk: what matters more than a status says so

    thread = threading.Thread(target=run, name="fedtune watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
