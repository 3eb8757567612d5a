"""Parts of a task: continued where a cut left them, and verified before they are used."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError, WireError
from fedtune.link.client.bandwidth import Bandwidth
from fedtune.link.client.downloads import Downloads, hash_file
from fedtune.link.client.jobs import Job, StoppedError
from fedtune.link.client.outbox import Entry
from fedtune.link.rejections import rejection
from fedtune.wire.v1 import link_pb2 as pb

DATA = bytes(range(256)) * 4
PART = pb.Part(key="body", digest=sha256(DATA).digest(), num_bytes=len(DATA))


class Server:
    """The Fetch call of a server that has the bytes, in chunks of 100."""

    def __init__(self, data: bytes = DATA, *, refusals: Sequence[pb.Refusal] = ()) -> None:
        self.data, self.offsets, self.refusals = data, list[int](), list(refusals)

    def fetch(self, request: pb.FetchRequest) -> Iterator[pb.Chunk]:
        self.offsets.append(request.offset)
        if self.refusals:
            yield pb.Chunk(refusal=self.refusals.pop(0))
            return
        for at in range(request.offset, len(self.data), 100):
            yield pb.Chunk(data=self.data[at : at + 100])


class NoBackoff:
    def wait_after_refusal(self, refusal: pb.Refusal) -> None:
        raise ConfigError([])


def fetch(folder: Path, server: Server, inline: Mapping[bytes, bytes] | None = None) -> tuple[Path, list[str]]:
    events = list[str]()
    calls: Any = server
    backoff: Any = NoBackoff()
    entry = Entry(folder, pb.Envelope(), pb.Header())
    job = Job(b"task", pb.Header(), threading.Event())
    downloads = Downloads(calls, backoff, Bandwidth(None), record=lambda kind, **fields: events.append(kind))
    downloads.fetch(job, entry, PART, inline or {})
    return entry.part(PART.digest), events


def test_a_download_goes_on_where_its_file_ends_and_is_not_repeated(tmp_path: Path) -> None:
    server = Server()
    (tmp_path / f"{PART.digest.hex()}.part").write_bytes(DATA[:300])
    path, events = fetch(tmp_path, server)
    assert (path.read_bytes(), server.offsets, events) == (DATA, [300], ["fetched"])
    fetch(tmp_path, server)
    assert server.offsets == [300]


def test_damaged_bytes_are_fetched_anew_once(tmp_path: Path) -> None:
    server = Server()
    (tmp_path / f"{PART.digest.hex()}.part").write_bytes(b"x" * 300)
    path, events = fetch(tmp_path, server)
    assert (path.read_bytes(), server.offsets, events) == (DATA, [300, 0], ["spoilt", "fetched"])
    path.unlink()
    with pytest.raises(WireError, match="got other bytes twice"):
        fetch(tmp_path, Server(b"y" * len(DATA)))


def test_more_bytes_than_were_signed_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="as signed; got more"):
        fetch(tmp_path, Server(DATA + b"z"))
    assert (tmp_path / f"{PART.digest.hex()}.part").stat().st_size <= len(DATA)


def test_inline_bytes_are_used_only_if_they_have_the_signed_digest(tmp_path: Path) -> None:
    server = Server()
    path, _ = fetch(tmp_path, server, {PART.digest: b"other"})
    assert (path.read_bytes(), server.offsets) == (DATA, [0])
    path.unlink()
    path, _ = fetch(tmp_path, server, {PART.digest: DATA})
    assert (path.read_bytes(), server.offsets) == (DATA, [0])


def test_a_passing_refusal_is_waited_for_and_a_final_one_gives_the_task_up(tmp_path: Path) -> None:
    busy = rejection(pb.BUSY, "downloads", "16", "17").refusal
    path, _ = fetch(tmp_path, Server(refusals=[busy, busy]))
    assert path.read_bytes() == DATA
    path.unlink()
    with pytest.raises(StoppedError, match="NOT_WANTED"):
        fetch(tmp_path, Server(refusals=[rejection(pb.NOT_WANTED, "digest", "a part", "none").refusal]))
    with pytest.raises(ConfigError):
        fetch(tmp_path, Server(refusals=[rejection(pb.REVOKED, "roster", "active", "revoked").refusal]))


def test_a_file_is_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    assert hash_file(tmp_path / "file").digest() == PART.digest


def test_a_crash_while_inline_bytes_are_written_leaves_no_torn_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedtune.link.client.downloads.write_private", torn)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path, Server(), {PART.digest: DATA})
    server = Server()
    path, _ = fetch(tmp_path, server, {PART.digest: DATA})
    assert (path.read_bytes(), server.offsets) == (DATA, [])
