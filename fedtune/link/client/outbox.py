"""Tasks and replies of a client on its disk: killed at any time, it sends the same bytes again after the next start."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fedtune.errors import StoreError, WireError
from fedtune.link.client.pause import PAUSE
from fedtune.link.provenance import WIRE_NAME
from fedtune.store import files
from fedtune.store.files import store_errors, write_bytes
from fedtune.store.manifest import SIGNATURE
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb

TASK, REPLY, RECEIPT, UPDATE = "order", "answer", "receipt", "update"
"""Names of files, which folders of earlier releases have, too."""
END = "complete"
DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class Entry:
    """The folder of one task of a round, and of the reply to it."""

    folder: Path
    task: pb.Envelope
    header: pb.Header

    @property
    def digest(self) -> bytes:
        return sha256(self.task.header).digest()

    @property
    def update(self) -> Path:
        """Where the trainer writes the update."""
        return self.folder / UPDATE

    def part(self, digest: bytes) -> Path:
        """Return where a part of the task is stored; until it is whole its beginning is beside it, named `.part`."""
        return self.folder / digest.hex()

    def reply(self) -> pb.SubmitRequest | None:
        """Return the signed reply, as it is sent; None before there is one, or if its update has gone."""
        if (data := self._read(REPLY)) is None:
            return None
        request = parse(pb.SubmitRequest(), data)
        inline = {part.digest for part in request.inline}
        apart = [part for part in parse(pb.Header(), request.envelope.header).parts if part.digest not in inline]
        # Without its update a reply could never be pushed: as if there were none, the task is trained again.
        return request if not apart or self.update.exists() else None

    def receipt(self) -> pb.Envelope | None:
        """Return the server's receipt of the reply; None before there is one."""
        data = self._read(RECEIPT)
        return None if data is None else parse(pb.Envelope(), data)

    def store_reply(self, request: pb.SubmitRequest) -> None:
        """Make the reply durable; its update is so already, or travels within it."""
        write_bytes(self.folder / REPLY, request.SerializeToString(), mode=0o600)

    def store_reply_and_update(self, request: pb.SubmitRequest) -> None:
        """Make a reply and its update durable."""
        # The update first: a stored reply promises that its bytes can be sent again.
        make_durable(self.update)
        self.store_reply(request)

    def store_receipt(self, receipt: pb.Envelope) -> None:
        """Store the receipt, without a sync: a server that is asked again gives the same one."""
        with store_errors(self.folder):
            files.write_private(self.folder / RECEIPT, receipt.SerializeToString())

    def _read(self, name: str) -> bytes | None:
        with store_errors(self.folder / name):
            try:
                return (self.folder / name).read_bytes()
            except FileNotFoundError:
                return None


def open_entry(state: Path, task: pb.Envelope, header: pb.Header) -> Entry:
    """Return the entry of a task, created if missing; not synced, since the server offers the task again.

    Raises:
        StoreError: if the folder cannot be written.
    """
    folder = state / "runs" / header.run / f"{header.round:06}-{sha256(task.header).hexdigest()[:16]}"
    with store_errors(folder):
        files.make_private(folder, below=state)
        # After a restart the task is the same bytes; a rewrite could leave half of them.
        if not (folder / TASK).exists():
            files.write_private(folder / TASK, task.SerializeToString())
    return Entry(folder, task, header)


def store_end(state: Path, run: str) -> None:
    """Note that a run is complete.

    Raises:
        StoreError: if the note cannot be written.
    """
    write_bytes(state / "runs" / run / END, b"", mode=0o600)


def complete_run(state: Path) -> str:
    """Return the id of the last run that this site took part in if it is complete; empty if not, or without one."""
    # By the plan, which is written when the site takes part: later than that of every run before it.
    plans = sorted((state / "runs").glob("*/plan"), key=lambda path: path.stat().st_mtime_ns)
    return plans[-1].parent.name if plans and (plans[-1].parent / END).exists() else ""


def store_result(state: Path, entry: Entry, check: Callable[[Path], None]) -> Path:
    """Put the fetched files of a run's result together in one step, and return their folder.

    Args:
        state: folder of the outbox.
        entry: of the order that brings them.
        check: called with the folder before it is in its place; an error leaves what was there before.

    Raises:
        StoreError: if the folder cannot be written; or raised by `check`.
    """
    parts = entry.header.parts
    path = state / "runs" / entry.header.run / parts[0].key.partition("/")[0]
    with files.new_folder(path) as folder:
        for part in parts:
            name = part.key.partition("/")[2]
            shutil.copyfile(entry.part(part.digest), folder / (SIGNATURE if name == WIRE_NAME else name))
        check(folder)
    return path


def load_entries(state: Path, run: str) -> Sequence[Entry]:
    """Return the entries of a run in the order of its rounds; damaged ones are left out, and their tasks offered again.

    Raises:
        StoreError: if a file cannot be read.
    """
    return list(_iterate_entries(state / "runs" / run))


def _iterate_entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("*-*")):
        with store_errors(path):
            try:
                task = parse(pb.Envelope(), (path / TASK).read_bytes())
                yield Entry(path, task, parse(pb.Header(), task.header))
            # A crash can leave a task without its bytes, since nothing here was synced.
            except (WireError, FileNotFoundError):
                continue


def remove_earlier_bodies(state: Path, run: str, keep: Entry) -> None:
    """Remove the large files of the rounds before an entry's; signed statements and receipts stay.

    Bodies of the entry's own round stay: until the next one begins, the server may ask for the reply again.
    """
    with store_errors(state):
        earlier = [path for path in (state / "runs" / run).glob("*-*") if int(path.name[:6]) < keep.header.round]
        for folder in sorted(earlier, reverse=True):
            bodies = [path for path in folder.iterdir() if path.name not in (TASK, REPLY, RECEIPT)]
            # An earlier call emptied this folder, and every one before it.
            if not bodies:
                return
            for path in bodies:
                path.unlink(missing_ok=True)


def count_replies(state: Path, run: str) -> int:
    """Return how many rounds of a run have a reply."""
    return sum(1 for _ in (state / "runs" / run).glob(f"*-*/{REPLY}"))


def count_answers(state: Path, header: pb.Header) -> int:
    """Return to how many orders of the round of one there is a reply."""
    return sum(1 for _ in (state / "runs" / header.run).glob(f"{header.round:06}-*/{REPLY}"))


def bytes_sent_last_day(state: Path, *, now: float) -> int:
    """Return the bytes of the replies that were stored within 24 hours, whatever the run.

    Raises:
        StoreError: if a reply cannot be read: a damaged file must not raise the site's own daily limit.
    """
    total = 0
    for path in (state / "runs").glob(f"*/*/{REPLY}"):
        with store_errors(path):
            if now - path.stat().st_mtime < DAY_S:
                try:
                    request = parse(pb.SubmitRequest(), path.read_bytes())
                    total += sum(part.num_bytes for part in parse(pb.Header(), request.envelope.header).parts)
                except WireError as error:
                    raise StoreError(f"{path}: {error}; the outbox is damaged: move its folder away") from None
    return total


def sweep(state: Path) -> None:
    """Remove what a process that was killed left half written, in the state folder and in those of its runs.

    Not of a pause, which another process may be ordering now; those of rounds go with the bodies of their round.

    Raises:
        StoreError: if it cannot be removed.
    """
    with store_errors(state):
        for folder in (state, *(state / "runs").glob("*")):
            for path in folder.glob(f".*{files.PARTIAL}"):
                if not path.name.startswith(f".{PAUSE}"):
                    files.remove(path)


def accepted_recipe(state: Path, run: str) -> bytes | None:
    """Return the recipe of a run that the site takes part in; None of any other run."""
    path = state / "runs" / run / "recipe.toml"
    with store_errors(path):
        return path.read_bytes() if path.exists() else None


def store_plan(state: Path, run: str, plan: pb.Envelope, recipe: bytes) -> None:
    """Store the coordinator's signed statement of a run, and its recipe for people to read."""
    folder = state / "runs" / run
    # A run that was complete may go on for more rounds.
    with store_errors(folder):
        files.make_private(folder, below=state)
        (folder / END).unlink(missing_ok=True)
    write_bytes(folder / "plan", plan.SerializeToString(), mode=0o600)
    write_bytes(folder / "recipe.toml", recipe, mode=0o600)


def make_durable(path: Path) -> None:
    """Sync a file and its folder."""
    with store_errors(path):
        with path.open("rb") as file:
            files.sync(file.fileno())
        files.sync_folder(path.parent)
