"""What a client has been asked and has answered, on its disk: killed at any time, it sends the same bytes again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fedtune.errors import StoreError, WireError
from fedtune.store import files
from fedtune.store.files import store_errors, write_bytes, write_text
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb

ORDER, ANSWER, RECEIPT, UPDATE = "order", "answer", "receipt", "update"
DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class Entry:
    """One order of a round, and what has become of it."""

    folder: Path
    order: pb.Envelope
    header: pb.Header

    @property
    def digest(self) -> bytes:
        return sha256(self.order.header).digest()

    @property
    def update(self) -> Path:
        """Where the answer's part lies."""
        return self.folder / UPDATE

    def part(self, digest: bytes) -> Path:
        """Return where a part of the order lies; beside it, its beginning as long as it is not whole."""
        return self.folder / digest.hex()

    def answer(self) -> pb.SubmitRequest | None:
        """Return the signed answer, as it is sent; None before it is made, or if its part has gone."""
        if (data := self._bytes(ANSWER)) is None:
            return None
        found = parse(pb.SubmitRequest(), data)
        inline = {one.digest for one in found.inline}
        wanted = [one for one in parse(pb.Header(), found.envelope.header).parts if one.digest not in inline]
        return found if not wanted or self.update.exists() else None

    def receipt(self) -> pb.Envelope | None:
        """Return what the server said of the answer."""
        data = self._bytes(RECEIPT)
        return None if data is None else parse(pb.Envelope(), data)

    def keep_answer(self, request: pb.SubmitRequest) -> None:
        """Make the answer durable; its update is so already, or travels within it."""
        write_bytes(self.folder / ANSWER, request.SerializeToString())

    def keep_receipt(self, receipt: pb.Envelope) -> None:
        """Keep what the server said; it need not last: it says the same again."""
        with store_errors(self.folder):
            (self.folder / RECEIPT).write_bytes(receipt.SerializeToString())

    def _bytes(self, name: str) -> bytes | None:
        with store_errors(self.folder / name):
            try:
                return (self.folder / name).read_bytes()
            except FileNotFoundError:
                return None


def entry(state: Path, order: pb.Envelope, header: pb.Header) -> Entry:
    """Return the entry of an order, which is made if need be. It need not last: the server asks again.

    Raises:
        StoreError: if the folder cannot be written.
    """
    folder = state / "runs" / header.run / f"{header.round:06}-{sha256(order.header).hexdigest()[:16]}"
    made = Entry(folder, order, header)
    with store_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ORDER).exists():
            (folder / ORDER).write_bytes(order.SerializeToString())
    return made


def entries(state: Path, run: str) -> Sequence[Entry]:
    """Return the entries of a run, in the order of its rounds; what is not whole is left out and asked for again.

    Raises:
        StoreError: if a file cannot be read.
    """
    return list(_entries(state / "runs" / run))


def _entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("*-*")):
        with store_errors(path):
            try:
                order = parse(pb.Envelope(), (path / ORDER).read_bytes())
                yield Entry(path, order, parse(pb.Header(), order.header))
            except (WireError, FileNotFoundError):
                continue


def tidy(state: Path, run: str, keep: Entry) -> None:
    """Remove what was received and sent in the rounds before; the statements and receipts stay.

    Bodies of the last round stay too: until the next one begins, the server may ask for the answer again.
    """
    with store_errors(state):
        earlier = [path for path in (state / "runs" / run).glob("*-*") if int(path.name[:6]) < keep.header.round]
        for folder in sorted(earlier, reverse=True):
            bodies = [path for path in folder.iterdir() if path.name not in (ORDER, ANSWER, RECEIPT)]
            if not bodies:
                return  # those before it were tidied with it
            for path in bodies:
                path.unlink(missing_ok=True)


def count_answers(state: Path, run: str) -> int:
    """Return how many rounds of a run have an answer."""
    return sum(1 for _ in (state / "runs" / run).glob(f"*-*/{ANSWER}"))


def bytes_sent_last_day(state: Path, *, now: float) -> int:
    """Return the bytes of the answers that were made within 24 hours, whatever the run."""
    total = 0
    for path in (state / "runs").glob(f"*/*/{ANSWER}"):
        with store_errors(path):
            if now - path.stat().st_mtime < DAY_S:
                try:
                    request = parse(pb.SubmitRequest(), path.read_bytes())
                    total += sum(part.num_bytes for part in parse(pb.Header(), request.envelope.header).parts)
                except WireError as error:
                    raise StoreError(f"{path}: {error}; the outbox is damaged: move its folder away") from None
    return total


def keep_plan(state: Path, run: str, plan: pb.Envelope, recipe: bytes) -> None:
    """Keep what a run is: the coordinator's signed statement, and the recipe for people to read."""
    folder = state / "runs" / run
    write_bytes(folder / "plan", plan.SerializeToString())
    write_text(folder / "recipe.toml", recipe.decode())


def settle(path: Path) -> None:
    """Make a file that is written last: it is sent only after that, so that the same bytes can be sent again."""
    with store_errors(path):
        files.sync_readable(path)
        files.sync_folder(path.parent)
