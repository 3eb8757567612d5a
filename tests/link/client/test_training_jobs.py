"""Tasks from the policy to the signed update, with a trainer that writes known bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedtune.link.client import pause
from fedtune.link.client.policy import PolicyViolation
from fedtune.link.envelopes import HELLO, TRAIN
from fedtune.link.server.assignments import ReceivedParts, Withdrawn
from fedtune.link.settings import Policy
from fedtune.wire.codec import decode_assignment, encode_assignment
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import assignment
from tests.link.link_server import LinkServer
from tests.link.site import RecordingTrainer, collect_one, post, post_scores, run_site, until


def kept_files(state: Path) -> Sequence[str]:
    """Return the names of all files of a site's runs, beside the site, which may be removing a round's folder."""
    return [name for _, _, names in os.walk(state / "runs") for name in names]


def test_the_reply_to_a_hello_is_the_profile_that_the_trainer_wrote(link: LinkServer) -> None:
    with run_site(link):
        message_id = link.dispatcher.post("site-a", HELLO, b"", {}, seconds=60)
        result = collect_one(link, message_id)
        assert result == ReceivedParts("site-a", {"": b"profile", sha256(b"body").hexdigest(): b"body"}) or isinstance(
            result, ReceivedParts
        )
        assert isinstance(result, ReceivedParts)
        assert {key: bytes(one) for key, one in result.bodies.items()} == {
            "": b"profile",
            sha256(b"body").hexdigest(): b"body",
        }


def test_what_the_policy_forbids_is_declined_unread(link: LinkServer) -> None:
    with run_site(link, Policy(max_rank=1, min_cohort=3)) as running:
        result = collect_one(link, post(link, body=b"x" * 200_000))
        assert isinstance(result, Withdrawn)
        assert result.reason == (
            "declined, RANK_TOO_LARGE: policy.max_rank: allowed 1; got 2; policy.min_cohort: at least 3; got 2"
        )
        assert not running.trainer.done
        assert not [name for name in kept_files(running.state) if sha256(b"x" * 200_000).hexdigest() in name]


def test_an_order_that_the_recipe_does_not_permit_is_declined_before_it_is_fetched(link: LinkServer) -> None:
    differing = "plan.training.steps: expected 10; got 1"
    violation = PolicyViolation(pb.VETO_RECIPE_DIFFERS, differing)
    with run_site(link, check=lambda greeting, header, front: [violation]) as running:
        result = collect_one(link, post(link, body=b"x" * 200_000))
        assert result == Withdrawn("site-a", f"declined, RECIPE_DIFFERS: {differing}")
        assert collect_one(link, post_scores(link)) == result
        link.dispatcher.finish(1, {"adapter/adapter_config.json": b"{}"})
        until(link, lambda: running.kinds().count("declined") == 3)
        assert not running.trainer.done
        assert not [name for name in kept_files(running.state) if sha256(b"x" * 200_000).hexdigest() in name]
        assert "result" not in running.kinds()


def test_a_round_with_other_bytes_each_time_is_done_three_times_at_most(link: LinkServer) -> None:
    with run_site(link) as running:
        results = [collect_one(link, post(link, body=bytes([number]) * 200_000)) for number in range(4)]
        assert isinstance(results[3], Withdrawn)
        assert results[3].reason.endswith("RECIPE_DIFFERS: round 1: expected at most 3 different orders; got one more")
        assert not any(isinstance(result, Withdrawn) for result in results[:3])
        assert len(running.trainer.done) == 3


def test_a_device_that_may_not_work_declines_and_is_asked_again(link: LinkServer) -> None:
    """Asked in vain in more rounds than a client needs to be barred, it comes back."""
    with run_site(link) as running:
        running.trainer.gate.set()
        until(link, lambda: "loaded" in running.kinds())
        pause.pause(running.state, None)
        for number in range(1, 6):
            result = collect_one(link, post(link, number, body=b"x" * 200_000))
            assert result == Withdrawn("site-a", "declined, DEVICE_NOT_READY: this device is paused by its owner")
            assert collect_one(link, post_scores(link, number)) == result
        assert not running.trainer.done
        assert link.dispatcher.blocklist.reason("site-a") == ""
        pause.resume(running.state)
        assert isinstance(collect_one(link, post(link, 6)), ReceivedParts)
        assert [kind for kind in running.kinds() if kind in ("waits", "works")] == ["waits", "works"]


def test_a_device_that_starts_paused_loads_nothing_before_it_resumes(link: LinkServer) -> None:
    pause.pause(link.folder / "state-site-a", None)
    with run_site(link) as running:
        running.trainer.gate.set()
        result = collect_one(link, post(link))
        assert isinstance(result, Withdrawn)
        assert "loaded" not in running.kinds()
        pause.resume(running.state)
        assert isinstance(collect_one(link, post(link, 2)), ReceivedParts)
        assert "loaded" in running.kinds()


def test_the_server_hears_that_a_training_waits(link: LinkServer) -> None:
    with run_site(link, trainer=RecordingTrainer(steps=7, obstacle="not on mains power")) as running:
        message_id = post(link)
        until(link, lambda: "paused at step 7 of 100" in [one.work for one in link.dispatcher.status().values()])
        running.trainer.gate.set()
        assert isinstance(collect_one(link, message_id), ReceivedParts)


@pytest.mark.guarantee("G17")
def test_an_order_that_names_no_base_is_declined(link: LinkServer) -> None:
    nameless = encode_assignment(replace(decode_assignment(assignment("site-a", 1).header, {}), base=""))
    with run_site(link):
        message_id = link.dispatcher.post("site-a", TRAIN, nameless.header, {}, seconds=60)
        result = collect_one(link, message_id)
        assert isinstance(result, Withdrawn)
        assert result.reason.startswith("declined, BASE_NOT_ALLOWED: expected an order that names its base model")


def test_a_reply_that_is_too_large_for_the_policy_never_leaves(link: LinkServer) -> None:
    with run_site(link, Policy(max_up_mib=0.1)) as running:
        result = collect_one(link, post(link))
        assert isinstance(result, Withdrawn)
        assert "policy.max_up_mib: allowed 0.1; got 0.3" in result.reason
        assert not list(running.state.glob("runs/*/*/update"))


def test_a_trainer_that_fails_costs_one_reply_with_its_reason(link: LinkServer) -> None:
    with run_site(link, trainer=RecordingTrainer(fails="expected a base; got none")) as running:
        running.trainer.gate.set()
        assert collect_one(link, post(link)) == Withdrawn("site-a", "expected a base; got none")
        running.trainer.fails = ""
        assert isinstance(collect_one(link, post(link, 2)), ReceivedParts)


def test_what_failed_is_tried_anew_when_it_is_asked_again(link: LinkServer) -> None:
    with run_site(link, trainer=RecordingTrainer(fails="out of memory")) as running:
        running.trainer.gate.set()
        assert collect_one(link, post(link)) == Withdrawn("site-a", "out of memory")
        running.trainer.fails = ""
        assert isinstance(collect_one(link, post(link)), ReceivedParts)  # the same order, as a resumed run asks it


def test_scores_are_sent_and_nothing_of_the_model_stays(link: LinkServer) -> None:
    with run_site(link) as running:
        for number in (0, 1):
            result = collect_one(link, post_scores(link, number))
            assert isinstance(result, ReceivedParts)
            assert bytes(result.bodies["update"]) == b"scores"
        until(link, lambda: not list(running.state.glob("runs/*/0*")))
        scored = [fields for kind, fields in running.events if kind == "scored"]
        assert scored == [{"round": number, "scores": "loss 2.750 on 4 held-out rows"} for number in (0, 1)]
        assert "withdrawn" not in running.kinds()


@pytest.mark.parametrize(("scores", "note", "computed"), [("keep", "keeps its scores", 1), ("refuse", "refuses", 0)])
def test_a_policy_may_keep_scores_or_refuse_to_score(link: LinkServer, scores: Any, note: str, computed: int) -> None:
    with run_site(link, Policy(scores=scores)) as running:
        result = collect_one(link, post_scores(link))
        assert isinstance(result, Withdrawn)
        assert result.reason.startswith("declined, SCORES_NOT_ALLOWED: policy.scores: this site ")
        assert note in result.reason
        assert running.kinds().count("scored") == computed


def test_a_policy_for_training_does_not_stand_in_the_way_of_scores(link: LinkServer) -> None:
    with run_site(link, Policy(min_cohort=3, max_rank=1, max_steps=1, max_rounds=1)):
        assert isinstance(collect_one(link, post_scores(link)), ReceivedParts)
    with run_site(link, Policy(methods=("ffa",)), name="site-b"):
        result = collect_one(link, post_scores(link, name="site-b"))
        assert isinstance(result, Withdrawn)
        assert "policy.methods" in result.reason


def test_a_round_is_one_event_with_what_it_was(link: LinkServer) -> None:
    with run_site(link) as running:
        collect_one(link, post(link))
        link.dispatcher.settle("site-a", 1, None)
        until(link, lambda: "trained" in running.kinds())
        (fields,) = [fields for kind, fields in running.events if kind == "trained"]
        assert (fields["round"], fields["up"], fields["verdict"]) == (1, 300_000, "used")
        assert fields["work"] == "own loss 3.000 to 2.500, rank 2, 0.2 s"


def test_what_does_not_fit_the_disk_is_declined(link: LinkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.link.client.training_jobs.free_bytes", lambda folder: 600 * 2**20)
    with run_site(link):
        assert isinstance(collect_one(link, post(link, body=b"x" * 1000)), ReceivedParts)
        monkeypatch.setattr("fedtune.link.client.training_jobs.free_bytes", lambda folder: 2**20)
        result = collect_one(link, post(link, 2, body=b"x" * 1000))
    assert isinstance(result, Withdrawn)
    assert "do not fit the disk" in result.reason
    with run_site(link, Policy(min_free_mib=0), name="site-b"):  # a board with a small card
        assert isinstance(collect_one(link, post(link, 3, name="site-b", body=b"x" * 1000)), ReceivedParts)


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError, KeyError, SystemExit, KeyboardInterrupt])
def test_whatever_goes_wrong_in_the_training_is_declined_by_its_type_alone(
    link: LinkServer, error: type[BaseException]
) -> None:
    class Broken(RecordingTrainer):
        def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
            raise error("a patient's name")

        score = perform

    with run_site(link, trainer=Broken()) as running:
        reason = f"expected an answer; got {error.__name__}; this site's own log says where"
        assert collect_one(link, post(link)) == Withdrawn("site-a", reason)
        assert collect_one(link, post_scores(link)) == Withdrawn("site-a", reason)
        assert running.thread.is_alive()


@pytest.mark.guarantee("G14")
def test_the_server_hears_how_far_the_trainer_is(link: LinkServer) -> None:
    with run_site(link, trainer=RecordingTrainer(steps=7)) as running:
        message_id = post(link)
        works = "working step 7 of 100"
        until(link, lambda: works in [one.work for one in link.dispatcher.status().values()])
        running.trainer.gate.set()
        assert isinstance(collect_one(link, message_id), ReceivedParts)
