"""A client against a real server on loopback, with a trainer that writes known bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError
from fedtune.link.client import outbox
from fedtune.link.client.session import Greeting
from fedtune.link.pki import authority
from fedtune.link.provenance import Signer, make_envelope
from fedtune.link.rejections import rejection
from fedtune.link.server.assignments import ReceivedParts, Withdrawn
from fedtune.store import manifest
from fedtune.store.manifest import FileFacts
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster
from tests.link.link_server import LinkServer, run_link_server
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
        assert outbox.complete_run(running.state) == link.dispatcher.run.run


def handed_out(link: LinkServer, changes: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    """The files of a result as a server hands them out, signed, but for the changes."""
    contents = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 500}
    listed = {name: FileFacts(sha256(data).hexdigest(), len(data)) for name, data in contents.items()}
    text = manifest.encode({"fedtune": "0.3.0", "round": 4}, listed)
    run = link.dispatcher.run
    signer = Signer(run.federation, run.author, run.key)
    envelope = make_envelope(listed, sha256(text).hexdigest(), {}, signer, now=int(time.time()))
    files = {**contents, "fedtune.json": text, "manifest.dsse.json": envelope, **(changes or {})}
    return {f"adapter/{name}": data for name, data in files.items() if data}


def result_of(link: LinkServer, files: dict[str, bytes]) -> tuple[dict[str, bytes], list[Any]]:
    """What a site has in its folder after a run whose result is these files, and its events."""
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        link.dispatcher.finish(4, files)
        running.thread.join(END_S)
        assert running.ended == ["finished"]
        folder = running.state / "runs" / link.dispatcher.run.run / "adapter"
        return {path.name: path.read_bytes() for path in folder.glob("*")}, list(running.events)


def test_a_site_verifies_who_has_signed_the_result(link: LinkServer) -> None:
    files = handed_out(link)
    stored, events = result_of(link, files)
    assert stored.pop("manifest.dsse") == files["adapter/manifest.dsse.json"]
    assert {f"adapter/{name}": data for name, data in stored.items()} == {
        name: data for name, data in files.items() if not name.endswith("dsse.json")
    }
    (fields,) = [fields for kind, fields in events if kind == "result"]
    assert "unverified" not in fields


@pytest.mark.guarantee("G19")
@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("adapter_config.json", b"[]", "adapter_config.json: expected the digest"),
        ("manifest.dsse.json", b"", "manifest.dsse: expected a signature; got none"),
        ("manifest.dsse.json", b"{}", "manifest.dsse: expected the keys"),
        ("fedtune.json", b'{"fedtune": "0.3.0"}', "expected the digests of the files beside it"),
        ("readme.md", b"x", "expected only the files that fedtune.json lists"),
    ],
)
def test_a_result_that_does_not_verify_is_not_stored(name: str, data: bytes, reason: str, link: LinkServer) -> None:
    stored, events = result_of(link, handed_out(link, {name: data}))
    assert not stored
    (fields,) = [fields for kind, fields in events if kind == "declined"]
    assert reason in fields["reason"]
    assert "result" not in [kind for kind, _ in events]


def test_a_site_gets_the_result_of_a_server_of_0_2_0_unverified(link: LinkServer) -> None:
    files = {
        "adapter/adapter_config.json": b"{}",
        "adapter/adapter_model.safetensors": bytes(range(256)) * 500,
        "adapter/fedtune.json": b'{"fedtune": "0.2.0"}',
    }
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        link.dispatcher.finish(4, files)
        running.thread.join(END_S)
        assert running.ended == ["finished"]
        folder = running.state / "runs" / link.dispatcher.run.run / "adapter"
        assert {f"adapter/{path.name}": path.read_bytes() for path in folder.iterdir()} == files
        (fields,) = [fields for kind, fields in running.events if kind == "result"]
        assert (fields["round"], fields["path"], fields["bytes"]) == (4, str(folder), 128_022)
        assert fields["unverified"] == "written by fedtune 0.2.0, which signed no results"
        assert not list(running.state.glob("runs/*/0*"))


def test_a_result_whose_files_would_lie_elsewhere_is_declined(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        link.dispatcher.finish(4, {"adapter/../../evil": b"x"})
        running.thread.join(END_S)
        assert running.ended == ["finished"]
        assert "result" not in running.kinds()
        assert not list(running.state.rglob("evil"))


def test_a_site_whose_run_is_complete_does_not_wait_for_its_server_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_link_server(tmp_path) as link:
        with run_site(link) as running:
            until(link, lambda: "hello" in running.kinds())
            link.dispatcher.stop(pb.Stop.FINISHED)
            running.thread.join(END_S)
        gone = link
    monkeypatch.setattr("fedtune.link.client.client.COMPLETE_S", 0.1)
    with run_site(gone) as again:
        again.thread.join(END_S)
        assert again.ended == ["finished"]
        assert again.events[-1] == ("over", {"run": gone.dispatcher.run.run, "seconds": 0})


def test_a_second_process_under_a_name_waits_and_says_so_once(link: LinkServer) -> None:
    with run_site(link) as first:
        until(link, lambda: link.dispatcher.status().get("site-a") and "hello" in first.kinds())
        until(link, lambda: not link.dispatcher.claim("site-a", 1))  # the first one's question is held
        with run_site(link) as second:
            until(link, lambda: "refused" in second.kinds())
            assert [fields["code"] for kind, fields in second.events if kind == "refused"] == ["NAME_IN_USE"]
            first.client.stop()
            until(link, lambda: "hello" in second.kinds())


def test_a_site_that_does_not_fit_the_run_ends_with_the_reason(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        link.dispatcher.refuse("site-a", rejection(pb.SITE_DIFFERS, "", "the base ab", "cd").refusal)
        running.thread.join(END_S)
        (error,) = running.ended
        assert isinstance(error, ConfigError)
        assert "SITE_DIFFERS: expected the base ab; got cd; mend this site's file" in str(error)


def test_a_site_that_does_not_agree_takes_no_part(link: LinkServer) -> None:
    with run_site(link, agree=lambda greeting: False) as running:
        running.thread.join(END_S)
        assert running.ended == ["stopped"]
        assert not list(running.state.glob("runs/*"))


def test_a_site_is_asked_again_when_the_recipe_of_a_run_is_another(link: LinkServer) -> None:
    asked = list[bytes]()

    def agree(greeting: Greeting) -> bool:
        asked.append(greeting.recipe)
        return True

    for _ in range(2):
        with run_site(link, agree=agree) as running:
            until(link, lambda: "hello" in running.kinds())
    assert asked == [b'name = "x"\n']
    # As if the site had accepted another recipe under this run's number.
    (running.state / "runs" / link.dispatcher.run.run / "recipe.toml").write_bytes(b'name = "y"\n')
    with run_site(link, agree=agree):
        until(link, lambda: len(asked) == 2)


def test_a_task_that_the_coordinator_did_not_sign_is_dropped(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        link.dispatcher.run = replace(link.dispatcher.run, key=link.identities["site-b"].key)
        post(link)
        until(link, lambda: "refused" in running.kinds())
        assert not running.trainer.done
        assert not outbox.load_entries(running.state, link.dispatcher.run.run)


def forged_ends(link: LinkServer) -> dict[str, pb.Envelope]:
    """Return statements that a run is complete, by what is wrong with them."""
    run, epoch = link.dispatcher.run, link.dispatcher.epoch

    def end(client: str = "site-a", *, at: int = epoch, **changes: Any) -> pb.Envelope:
        return replace(run, **changes).end(client, epoch=at, number=3, parts=[])

    return {
        "unsigned": pb.Envelope(),
        "by a client": end(key=link.identities["site-b"].key),
        "for another": end("site-b"),
        "of an earlier process": end(at=epoch - 1),
        "of another run": end(run="f" * 16),
        "another statement": run.plan(),
    }


@pytest.mark.guarantee("G6")
def test_the_end_of_the_run_is_believed_only_when_the_coordinator_has_signed_it_now(
    link: LinkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.link.client.client.UNVERIFIED_PAUSE_S", 0.02)
    ends, dispatcher, shown = forged_ends(link), link.dispatcher, list[str]()
    honest = dispatcher._stop_for
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        for wrong, end in ends.items():

            def forged(client: str, wrong: str = wrong, end: pb.Envelope = end) -> pb.Stop:
                shown.append(wrong)
                return pb.Stop(why=pb.Stop.FINISHED, end=end)

            dispatcher._stop_for = forged  # type: ignore[method-assign]
            dispatcher.stop(pb.Stop.FINISHED)
            while shown.count(wrong) < 3:
                link.dispatcher.wait(0.01)
            assert running.thread.is_alive(), wrong
            assert "finished" not in running.kinds()
        # It goes on: it is there for the next task, and for the end when that is signed.
        dispatcher.stopping = None
        assert isinstance(collect_one(link, post(link)), ReceivedParts)
        dispatcher._stop_for = honest  # type: ignore[method-assign]
        dispatcher.stop(pb.Stop.FINISHED)
        running.thread.join(END_S)
        assert running.ended == ["finished"]


@pytest.mark.guarantee("G14")
def test_a_server_that_drains_for_ever_does_not_silence_a_site(
    link: LinkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.link.client.client.MAX_PAUSE_S", 0.02)
    with run_site(link) as running:
        until(link, lambda: "hello" in running.kinds())
        link.dispatcher.stop(pb.Stop.DRAINING, retry_after_s=4e6)  # 46 days
        until(link, lambda: running.kinds().count("hello") > 2)
