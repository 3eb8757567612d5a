"""A site's half against a real server on loopback, with a trainer that writes what it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ClientError, ConfigError, FedtuneError
from fedtune.link.client import outbox
from fedtune.link.client.client import Client
from fedtune.link.client.policy import Policy
from fedtune.link.envelopes import HELLO, TRAIN
from fedtune.link.pki import authority
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.dispatcher import ReceivedParts, Withdrawn
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import spread
from tests.link.conftest import assignment
from tests.link.server.test_service import Served, served

END_S = 60.0


@dataclass
class Trainer:
    """Writes bytes that depend on the order, and remembers what it was asked."""

    fails: str = ""
    size: int = 300_000
    gate: threading.Event = field(default_factory=threading.Event)
    done: list[Path] = field(default_factory=list)
    kills: int = 0

    def profile(self, into: Path) -> None:
        into.mkdir(parents=True, exist_ok=True)
        (into / "front").write_bytes(b"profile")
        (into / sha256(b"body").hexdigest()).write_bytes(b"body")

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> None:
        self.gate.wait(END_S)
        if self.fails:
            raise ClientError(self.fails)
        assert all(sha256((folder / one).read_bytes()).hexdigest() == one for one in bodies)
        self.done.append(folder)
        into.write_bytes(expected(folder, self.size))

    def kill(self) -> None:
        self.kills += 1
        self.gate.set()


def expected(folder: Path, size: int) -> bytes:
    return (sha256((folder / "front").read_bytes()).digest() * (size // 32 + 1))[:size]


@dataclass
class Site:
    client: Client
    trainer: Trainer
    state: Path
    told: list[tuple[str, dict[str, Any]]]
    thread: threading.Thread
    ended: list[object] = field(default_factory=list)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.told]


@contextmanager
def site(
    link: Served, rules: Policy | None = None, trainer: Trainer | None = None, *, name: str = "site-a", **more: Any
) -> Iterator[Site]:
    """Run a client in a thread until the block ends, which stops it."""
    told: list[tuple[str, dict[str, Any]]] = []
    identity, doing, state = link.identities[name], trainer or Trainer(), link.folder / f"state-{name}"
    state.mkdir(exist_ok=True)
    settings = JoinSettings(f"localhost:{link.port}", backoff_s=0.05, backoff_cap_s=0.2)
    roster = RosterFile(identity.folder / "roster", identity.root)

    def tell(kind: str, **fields: int | str) -> None:
        told.append((kind, dict(fields)))

    client = Client(identity, roster, settings, rules or Policy(), state, doing, tell=tell, **more)
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(client.run())
        except FedtuneError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    made = Site(client, doing, state, told, thread, ended)
    thread.start()
    if trainer is None:
        doing.gate.set()
    try:
        yield made
    finally:
        doing.gate.set()
        client.stop()
        thread.join(END_S)
        assert not thread.is_alive()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as made:
        yield made


def until(link: Served, happened: Callable[[], Any]) -> Any:
    """Return what happens at last."""
    ends = time.monotonic() + END_S
    while not (found := happened()):
        assert time.monotonic() < ends, "it never happened"
        link.hub.wait(0.02)
    return found


def collected(link: Served, message_id: str) -> ReceivedParts | Withdrawn:
    found: ReceivedParts | Withdrawn = until(link, lambda: link.hub.collect([message_id]).get(message_id))
    return found


def post(link: Served, number: int = 1, name: str = "site-a", body: bytes = b"") -> str:
    order = assignment(name, number)
    bodies = {sha256(body).hexdigest(): body} if body else {}
    link.hub.opened(["site-a", "site-b"])
    return link.hub.post(name, TRAIN, order.header, bodies, seconds=60)


def test_a_hello_is_answered_with_what_the_trainer_says(link: Served) -> None:
    with site(link):
        message_id = link.hub.post("site-a", HELLO, b"", {}, seconds=60)
        found = collected(link, message_id)
        assert found == ReceivedParts("site-a", {"": b"profile", sha256(b"body").hexdigest(): b"body"}) or isinstance(
            found, ReceivedParts
        )
        assert isinstance(found, ReceivedParts)
        assert {key: bytes(one) for key, one in found.bodies.items()} == {
            "": b"profile",
            sha256(b"body").hexdigest(): b"body",
        }


def test_an_order_is_fetched_done_pushed_and_receipted(link: Served) -> None:
    with site(link) as made:
        message_id = post(link, body=bytes(range(256)) * 1000)
        found = collected(link, message_id)
        assert isinstance(found, ReceivedParts)
        assert bytes(found.bodies["update"]) == expected(made.trainer.done[0], 300_000)
        link.hub.settle("site-a", 1, None)
        until(link, lambda: "receipt" in made.kinds())
        (entry,) = outbox.entries(made.state, link.hub.run.run)
        assert entry.receipt() is not None
        assert [fields["verdict"] for kind, fields in made.told if kind == "receipt"] == ["ACCEPTED"]


def test_what_the_policy_forbids_is_declined_unread(link: Served) -> None:
    with site(link, Policy(max_rank=1, min_cohort=3)) as made:
        found = collected(link, post(link, body=b"x" * 200_000))
        assert isinstance(found, Withdrawn)
        assert found.reason == (
            "declined, RANK_TOO_LARGE: policy.max_rank: allowed 1; got 2; policy.min_cohort: at least 3; got 2"
        )
        assert not made.trainer.done
        assert not list(made.state.glob(f"runs/*/*/{sha256(b'x' * 200_000).hexdigest()}*"))


def test_an_answer_that_is_too_large_for_the_policy_never_leaves(link: Served) -> None:
    with site(link, Policy(max_up_mib=0.1)) as made:
        found = collected(link, post(link))
        assert isinstance(found, Withdrawn)
        assert "policy.max_up_mib: allowed 0.1; got 0.3" in found.reason
        assert not list(made.state.glob("runs/*/*/update"))


def test_a_trainer_that_fails_costs_one_answer_with_its_reason(link: Served) -> None:
    with site(link, trainer=Trainer(fails="expected a base; got none")) as made:
        made.trainer.gate.set()
        assert collected(link, post(link)) == Withdrawn("site-a", "expected a base; got none")
        made.trainer.fails = ""
        assert isinstance(collected(link, post(link, 2)), ReceivedParts)


def test_what_failed_is_tried_anew_when_it_is_asked_again(link: Served) -> None:
    with site(link, trainer=Trainer(fails="out of memory")) as made:
        made.trainer.gate.set()
        assert collected(link, post(link)) == Withdrawn("site-a", "out of memory")
        made.trainer.fails = ""
        assert isinstance(collected(link, post(link)), ReceivedParts)  # the same order, as a resumed run asks it


def test_an_order_that_is_withdrawn_stops_the_trainer(link: Served) -> None:
    with site(link, trainer=Trainer()) as made:
        message_id = post(link)
        until(link, lambda: "asked" in made.kinds() and any(job.training for job in made.client._jobs.values()))
        link.hub.end(1)
        assert collected(link, message_id) == Withdrawn("site-a", "its round has ended")
        until(link, lambda: made.trainer.kills)
        assert "withdrawn" in made.kinds()


def test_after_a_restart_the_same_bytes_are_sent_and_nothing_is_done_again(link: Served) -> None:
    with site(link) as first:
        message_id = post(link)
        found = collected(link, message_id)
    assert isinstance(found, ReceivedParts)
    with site(link) as second:
        until(link, lambda: "sending" in second.kinds())
        link.hub.settle("site-a", 1, None)
        until(link, lambda: "receipt" in second.kinds())
        assert not second.trainer.done
    sent = [fields["answer"] for one in (first, second) for kind, fields in one.told if kind == "sending"]
    assert len(set(sent)) == 1


def test_who_is_revoked_stops_with_one_sentence(link: Served) -> None:
    with site(link) as made:
        until(link, lambda: "hello" in made.kinds())
        authority.revoke(link.places["ca"], "site-a", now=int(link.time.now))
        spread(link.places["ca"], link.places, to=["server"])
        link.clock.now += 2
        made.thread.join(END_S)
        (error,) = made.ended
        assert isinstance(error, ConfigError)
        assert "REVOKED" in str(error)


def test_the_end_of_the_run_ends_the_client(link: Served) -> None:
    with site(link) as made:
        until(link, lambda: "hello" in made.kinds())
        link.hub.stop(pb.Stop.FINISHED)
        made.thread.join(END_S)
        assert made.ended == ["finished"]


def test_who_does_not_agree_takes_no_part(link: Served) -> None:
    with site(link, agree=lambda greeting: False) as made:
        made.thread.join(END_S)
        assert made.ended == ["stopped"]
        assert not list(made.state.glob("runs/*"))


def test_a_newer_roster_comes_with_the_hello(link: Served) -> None:
    authority.renew(link.places["ca"], now=int(link.time.now))
    spread(link.places["ca"], link.places, to=["server"])
    link.clock.now += 2
    with site(link) as made:
        until(link, lambda: "roster" in made.kinds())
    assert (link.places["site-a"] / "roster").read_bytes() == (link.places["ca"] / "roster").read_bytes()


def test_an_order_that_the_coordinator_did_not_sign_is_dropped(link: Served) -> None:
    link.hub.run = type(link.hub.run)(
        link.hub.run.federation, link.hub.run.run, link.hub.run.recipe, "server", link.identities["site-b"].key
    )
    with site(link) as made:
        post(link)
        until(link, lambda: "refused" in made.kinds())
        assert not made.trainer.done
        assert not outbox.entries(made.state, link.hub.run.run)


def test_a_run_whose_number_is_a_path_is_refused(tmp_path: Path) -> None:
    with served(tmp_path, run="../../../somewhere") as link, site(link) as made:
        made.thread.join(END_S)
        (error,) = made.ended
        assert "16 hex digits" in str(error)
        assert not list(made.state.glob("**/recipe.toml"))


def test_what_does_not_fit_the_disk_is_declined(link: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.link.client.client.free_bytes", lambda folder: 600 * 2**20)
    with site(link):
        assert isinstance(collected(link, post(link, body=b"x" * 1000)), ReceivedParts)
        monkeypatch.setattr("fedtune.link.client.client.free_bytes", lambda folder: 2**20)
        found = collected(link, post(link, 2, body=b"x" * 1000))
    assert isinstance(found, Withdrawn)
    assert "do not fit the disk" in found.reason


def test_nobody_at_the_address_is_told_once_and_tried_again(tmp_path: Path) -> None:
    with served(tmp_path) as link:
        port = link.port
        gone = link
    with site(gone) as made:
        ends = time.monotonic() + END_S
        while "unreached" not in made.kinds():
            assert time.monotonic() < ends
            made.thread.join(0.05)
        assert f"nobody listens on localhost:{port}" in dict(made.told)["unreached"]["reason"]
        assert made.thread.is_alive()
