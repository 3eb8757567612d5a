"""A client against a real server on loopback, with a trainer that writes known bytes."""

from __future__ import annotations

from fedtune.errors import ConfigError
from fedtune.link.client import outbox
from fedtune.link.pki import authority
from fedtune.link.server.assignments import ReceivedParts, Withdrawn
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster
from tests.link.link_server import LinkServer
from tests.link.site import END_S, RecordingTrainer, collect_one, expected_update, post, run_site, until


def test_a_task_is_fetched_done_pushed_and_receipted(link: LinkServer) -> None:
    with run_site(link) as running:
        message_id = post(link, body=bytes(range(256)) * 1000)
        result = collect_one(link, message_id)
        assert isinstance(result, ReceivedParts)
        assert bytes(result.bodies["update"]) == expected_update(running.trainer.done[0], 300_000)
        link.dispatcher.settle("site-a", 1, None)
        until(link, lambda: "receipt" in running.kinds())
        (entry,) = outbox.load_entries(running.state, link.dispatcher.run.run)
        assert entry.receipt() is not None
        assert [fields["verdict"] for kind, fields in running.events if kind == "receipt"] == ["ACCEPTED"]


def test_a_task_that_is_withdrawn_stops_the_trainer(link: LinkServer) -> None:
    with run_site(link, trainer=RecordingTrainer()) as running:
        message_id = post(link)
        until(link, lambda: "asked" in running.kinds() and any(job.training for job in running.client._jobs.values()))
        link.dispatcher.end_round(1)
        assert collect_one(link, message_id) == Withdrawn("site-a", "its round has ended")
        until(link, lambda: running.trainer.kills)
        assert "withdrawn" in running.kinds()


def test_a_revoked_client_stops_with_one_sentence(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        authority.revoke(link.places["ca"], "site-a", now=int(link.time.now))
        copy_roster(link.places["ca"], link.places, to=["server"])
        link.clock.now += 2
        running.thread.join(END_S)
        (error,) = running.ended
        assert isinstance(error, ConfigError)
        assert "REVOKED" in str(error)


def test_the_end_of_the_run_ends_the_client(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        link.dispatcher.stop(pb.Stop.FINISHED)
        running.thread.join(END_S)
        assert running.ended == ["finished"]


def test_a_site_that_does_not_agree_takes_no_part(link: LinkServer) -> None:
    with run_site(link, agree=lambda greeting: False) as running:
        running.thread.join(END_S)
        assert running.ended == ["stopped"]
        assert not list(running.state.glob("runs/*"))


def test_a_task_that_the_coordinator_did_not_sign_is_dropped(link: LinkServer) -> None:
    link.dispatcher.run = type(link.dispatcher.run)(
        link.dispatcher.run.federation,
        link.dispatcher.run.run,
        link.dispatcher.run.recipe,
        "server",
        link.identities["site-b"].key,
    )
    with run_site(link) as running:
        post(link)
        until(link, lambda: "refused" in running.kinds())
        assert not running.trainer.done
        assert not outbox.load_entries(running.state, link.dispatcher.run.run)
