from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune.client.site import from_file
from fedtune.client.site_process import load
from fedtune.config import bind
from fedtune.link.client import pause, training_server
from fedtune.link.client.conditions import PAUSED, Conditions, StepGate
from fedtune.link.settings import Policy
from fedtune.messages import Assignment, Plan, ScoreRequest, Training, TrainLora
from fedtune.wire.codec import decode_update, encode_assignment
from fedtune.wire.profile import decode_profile
from fedtune.wire.scores import decode_scores, encode_score_request
from tests.cli.test_flower_server import site_files

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def site(tmp_path: Path, tables: dict[str, Any]) -> Path:
    assert bind(tables).name
    return site_files(tmp_path, tables, ("client-0",))[0]


def assignment() -> Assignment:
    plan = Plan("client-0", rank=2, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    return Assignment("flora", round=1, seed=0, plan=plan, task=TrainLora(a_key=0))


def test_a_profile_and_an_update_are_written_to_files(site: Path, tmp_path: Path) -> None:
    assert training_server.handle(load, str(site), {"do": "profile", "into": str(tmp_path / "profile")}) == {"done": {}}
    contents = {path.name: path.read_bytes() for path in (tmp_path / "profile").iterdir()}
    profile = decode_profile(contents.pop("front"), contents)
    assert profile.client == "client-0"
    order = encode_assignment(assignment())
    (tmp_path / "front").write_bytes(order.header)
    request = {"do": "perform", "folder": str(tmp_path), "bodies": [], "into": str(tmp_path / "update")}
    measured = training_server.handle(load, str(site), request)["done"]
    assert measured["seconds"] > 0
    assert None not in measured.values()
    update = decode_update((tmp_path / "update").read_bytes(), client="client-0", limit_bytes=10**7)
    assert update.lora.base == from_file(str(site)).base.digest


def test_scores_are_written_to_a_file_and_returned(site: Path, tmp_path: Path) -> None:
    base = from_file(str(site)).base.digest
    (tmp_path / "front").write_bytes(encode_score_request(ScoreRequest("client-0", "flora", 0, base, batch=4)).header)
    request = {"do": "score", "folder": str(tmp_path), "bodies": [], "into": str(tmp_path / "update")}
    returned = training_server.handle(load, str(site), request)["done"]
    scores = decode_scores((tmp_path / "update").read_bytes(), client="client-0")
    assert returned == {**scores.metrics, "seconds": scores.seconds}
    assert scores.metrics["loss"] > 0


@pytest.mark.parametrize(("policy", "kept", "sent"), [("send", 2, 2), ("keep", 2, 0), ("refuse", 0, 0)])
def test_losses_leave_as_the_policy_for_scores_says(
    site: Path, tmp_path: Path, policy: str, kept: int, sent: int
) -> None:
    site.write_text(site.read_text().replace("[policy]", f'[policy]\nscores = "{policy}"'))
    from_file.cache_clear()
    order = encode_assignment(assignment())
    (tmp_path / "front").write_bytes(order.header)
    request = {"do": "perform", "folder": str(tmp_path), "bodies": [], "into": str(tmp_path / "update")}
    own = training_server.handle(load, str(site), request)["done"]
    measured = decode_update((tmp_path / "update").read_bytes(), client="client-0", limit_bytes=10**7).measured
    assert len({"loss_before", "loss_after"} & own.keys()) == kept
    assert sum(loss is not None for loss in (measured.loss_before, measured.loss_after)) == sent


@pytest.mark.parametrize("send", [False, True])
def test_energy_leaves_a_site_that_lets_it_alone(site: Path, tmp_path: Path, send: bool) -> None:
    order = encode_assignment(assignment())
    (tmp_path / "front").write_bytes(order.header)
    request = {"do": "perform", "folder": str(tmp_path), "bodies": [], "into": str(tmp_path / "update")}
    energy = training_server.Energy(lambda: 12.5, send=send)
    own = training_server.handle(load, str(site), request, energy=energy)["done"]
    measured = decode_update((tmp_path / "update").read_bytes(), client="client-0", limit_bytes=10**7).measured
    assert own["joules"] == 12.5  # for the site's own log
    assert measured.joules == (12.5 if send else None)


def test_what_cannot_be_done_is_said_and_what_nobody_foresaw_keeps_its_text(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = training_server.handle(load, str(tmp_path / "none.toml"), {"do": "profile", "into": str(tmp_path)})
    assert "none.toml" in failed["failed"]

    def broken(site: object, request: Mapping[str, Any], energy: object) -> None:
        raise ValueError("a row of the data: secret")

    monkeypatch.setattr(training_server, "run_request", broken)
    failed = training_server.handle(load, str(site), {"do": "profile", "into": str(tmp_path)})
    assert failed == {"failed": "expected an answer; got ValueError; this site's own log says where"}
    assert "secret" in capsys.readouterr().err


def test_a_beat_says_how_far_a_request_is_and_nothing_between_two() -> None:
    lines = io.StringIO()
    beat = training_server.Beat(lines)
    beat.say()
    beat.begin()
    beat.step(3, 10)
    beat.say()
    beat.end({"done": {}})
    beat.say()
    at, done = (json.loads(line) for line in lines.getvalue().splitlines())
    assert at["at"][:2] == [3, 10]
    assert at["at"][2] > 0  # this process has computed something
    assert done == {"done": {}}


def test_a_beat_says_why_the_work_waits_between_two_steps(tmp_path: Path) -> None:
    lines = io.StringIO()
    beat = training_server.Beat(lines)

    def sleep(seconds: float) -> None:
        beat.say()
        pause.resume(tmp_path)

    beat.gate = StepGate(Conditions(Policy(), tmp_path), sleep=sleep)
    beat.begin()
    pause.pause(tmp_path, None)
    beat.step(3, 10)
    beat.say()
    beat.end({"done": {}})
    waiting, working, _ = (json.loads(line) for line in lines.getvalue().splitlines())
    assert (waiting["at"][:2], waiting["waits"]) == ([3, 10], PAUSED)
    assert working["at"][:2] == [3, 10]
    assert "waits" not in working


@pytest.mark.guarantee("G15")
def test_without_space_for_an_update_nothing_of_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Working:
        client, scores = "site-a", "send"

        def in_run(self, folder: Path) -> object:
            return self

        def perform(self, assignment: object) -> None:
            (tmp_path / "update").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "front").write_bytes(encode_assignment(assignment()).header)
    request = {"do": "perform", "folder": str(tmp_path), "bodies": [], "into": str(tmp_path / "update")}
    failed = training_server.handle(lambda site, on_step: Working(), "", request)  # type: ignore[arg-type,return-value]
    assert failed == {
        "failed": "site-a: expected space for an update on this site's disk; got none; the next round is tried again",
        "passing": True,
    }
    assert not (tmp_path / "update").exists()


@pytest.mark.parametrize("error", [MemoryError, SystemExit, KeyboardInterrupt, ValueError])
def test_whatever_ends_a_request_is_a_reason_without_a_word_of_the_data(
    error: type[BaseException],
) -> None:
    def broken(*args: object) -> Any:
        raise error("a patient's name")

    failed = training_server.handle(broken, "site.toml", {"do": "perform"})["failed"]
    assert failed == f"expected an answer; got {error.__name__}; this site's own log says where"


@pytest.mark.guarantee("G15")
def test_a_profile_that_finds_no_space_is_tried_again_later(tmp_path: Path) -> None:
    def full(site: str, on_step: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failed = training_server.handle(full, "site.toml", {"do": "profile", "into": str(tmp_path)})
    assert failed == {"failed": "expected space on this site's disk; got none; free some", "passing": True}


SERVED = """
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from fedtune.errors import ClientError
from fedtune.link.client import conditions, training_server
from fedtune.link.settings import Policy

conditions.POLL_S = 0.01
training_server.BEAT_S = 0.01

@dataclass
class Stepping:
    on_step: Any
    client, scores = "site-a", "send"
    def perform(self, assignment):
        for step in (1, 2, 3):
            self.on_step(step, 3)
        raise ClientError("three steps are done")

def load(site, on_step):
    return Stepping(on_step)

state = Path(sys.argv[1])
training_server.serve(sys.argv, load, lambda site: conditions.Conditions(Policy(), state))
"""


@pytest.mark.slow
def test_a_process_that_is_paused_waits_between_two_steps_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "front").write_bytes(encode_assignment(assignment()).header)
    pause.pause(tmp_path, None)
    request = {"do": "perform", "folder": str(tmp_path), "bodies": [], "into": str(tmp_path / "update")}
    theirs, requests = os.pipe()
    replies, theirs_out = os.pipe()
    their_life, life = os.pipe()
    given = (theirs, theirs_out, their_life)
    command = [sys.executable, "-c", SERVED, str(tmp_path), *map(str, given)]
    with subprocess.Popen(command, pass_fds=given) as process, os.fdopen(replies) as lines:
        for descriptor in given:
            os.close(descriptor)
        os.write(requests, json.dumps(request).encode() + b"\n")
        waiting = json.loads(next(line for line in lines if "waits" in line))
        assert (waiting["at"][:2], waiting["waits"]) == ([1, 3], PAUSED)
        pause.resume(tmp_path)
        failed = json.loads(next(line for line in lines if "failed" in line))
        assert failed == {"failed": "three steps are done"}
        os.close(requests)
        assert process.wait(60) == 0
    os.close(life)
