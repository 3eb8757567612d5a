"""A roster that ends and is renewed while sites are idle, training or sending: no order is lost, no restart needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from fedtune.link.client import outbox
from fedtune.link.pki import authority
from fedtune.link.server.assignments import ReceivedParts
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster
from tests.link.link_server import LinkServer, greeting
from tests.link.site import RecordingTrainer, Site, collect_one, post, run_site, until

DAY_S = 86_400.0
Ended: TypeAlias = Callable[[], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.link.client.backoff.REFUSED_PAUSE_S", 0.02)
    monkeypatch.setattr("fedtune.link.client.delivery.REFUSED_RETRY_S", 0.02)
    monkeypatch.setattr("fedtune.link.client.client.UNVERIFIED_PAUSE_S", 0.02)


def renew(link: LinkServer, *, days: int = 60) -> None:
    """Renew the roster and install it at the server alone; sites have it from there."""
    authority.renew(link.places["ca"], days=days, now=int(link.time.now))
    copy_roster(link.places["ca"], link.places, to=["server"])
    link.clock.now += 2  # the server looks at the file again


def pass_month(link: LinkServer) -> None:
    link.time.now += 31 * DAY_S


@pytest.fixture(params=["renewed in time", "renewed late"])
def ended(request: pytest.FixtureRequest, link: LinkServer) -> Ended:
    """Return what makes the first roster end, with a newer one at the server."""

    def in_time() -> None:
        renew(link)
        pass_month(link)

    def late() -> None:
        pass_month(link)
        until(link, lambda: greeting(link.calls("site-b")).refusal.reason == pb.ROSTER_OLD)
        renew(link)

    return in_time if request.param == "renewed in time" else late


def reply_is_used(link: LinkServer, running: Site, message_id: str) -> None:
    result = collect_one(link, message_id)
    assert isinstance(result, ReceivedParts), result
    link.dispatcher.settle("site-a", 1, None)
    until(link, lambda: "receipt" in running.kinds())
    (entry,) = outbox.load_entries(running.state, link.dispatcher.run.run)
    assert entry.receipt() is not None
    assert (link.places["site-a"] / "roster").read_bytes() == (link.places["ca"] / "roster").read_bytes()
    assert "failed" not in running.kinds()


@pytest.mark.guarantee("G6")
def test_an_idle_site_takes_the_renewed_roster_and_the_next_order(link: LinkServer, ended: Ended) -> None:
    with run_site(link, now=lambda: link.time.now) as running:
        until(link, lambda: "hello" in running.kinds())
        ended()
        reply_is_used(link, running, post(link))


@pytest.mark.guarantee("G6")
def test_a_site_that_trains_meanwhile_loses_nothing(link: LinkServer, ended: Ended) -> None:
    with run_site(link, trainer=RecordingTrainer(), now=lambda: link.time.now) as running:
        message_id = post(link)
        until(link, lambda: any(job.training for job in running.client._jobs.values()))
        ended()
        running.trainer.gate.set()
        reply_is_used(link, running, message_id)
        assert len(running.trainer.done) == 1


@pytest.mark.guarantee("G6")
def test_a_site_that_sends_meanwhile_has_its_receipt(link: LinkServer, ended: Ended) -> None:
    with run_site(link, now=lambda: link.time.now) as running:
        message_id = post(link)
        until(link, lambda: "pushed" in running.kinds())
        ended()
        reply_is_used(link, running, message_id)
