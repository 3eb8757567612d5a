from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import Recipe, render
from fedtune.deployment.coordinator import (
    coordinate,
    create_dispatcher,
    first_cohort_size,
    max_update_bytes,
    organisation_of,
    readiness_fault,
)
from fedtune.deployment.link_events import on_event, refusal_of
from fedtune.deployment.served_run import accepted_updates, pin_base, run_id
from fedtune.deployment.server_setup import data_at_sites, with_day
from fedtune.errors import ConfigError, RoundError, WireError
from fedtune.link import uploads
from fedtune.link.pki import authority
from fedtune.link.pki.identity import load_identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.assignments import Withdrawn
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.settings import LinkSettings
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    DescendSeeds,
    Failure,
    LoraResult,
    Plan,
    ProbeSeeds,
    Pruning,
    SeedState,
    SumClasses,
    Traffic,
    Training,
    TrainLora,
)
from fedtune.pruning.least_squares import moment_shapes
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout
from fedtune.rounds.admission import largest_update
from fedtune.rounds.events import ClientFinished, RoundFinished, RoundStarted
from fedtune.rounds.record import ClientRecord, RoundRecord
from fedtune.store.run_directory import write_recipe
from fedtune.store.run_journal import RunJournal
from fedtune.wire.codec import encode_assignment
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.harness import Clock, Harness, make_harness, signed_reply, verdict
from tests.store.test_run_journal import INPUTS

RECORD = RoundRecord(round=1, seconds=0.1, state_digest="ab", bytes_up=1, bytes_down=2)
BLUEPRINT = Blueprint({"q": (6, 5)}, {"head": np.zeros((2, 3), np.float32)}, max_rank=4, seed=0)


def test_a_restarted_server_gives_the_receipts_that_its_journal_promises(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with RunJournal.create(run, group_s=0.0) as journal:
        journal.begin(INPUTS)
        journal.open(1, state="", cohort={"anna": 1, "bob": 1}, digests={"anna": "o", "bob": "o"})
        journal.accept(1, "anna", b"of anna")
        journal.close(1, {"bob": Failure.from_text("bob", "x")}, {"bob": 0})
        journal.commit(1, [b"state"])
    identity = load_identity(enroll_parties(tmp_path / "sites")["server"], role="coordinator", now=int(time.time()))
    dispatcher = create_dispatcher(data_at_sites(RECIPE), run, LinkSettings(), identity, silent)
    restarted, task = Harness(dispatcher, Clock()), pb.Header(federation=identity.federation, run=run_id(run), round=1)
    assert verdict(restarted.submit("anna", signed_reply("anna", task, b"o" * 32, b"of anna"))) == "ACCEPTED"
    assert verdict(restarted.submit("bob", signed_reply("bob", task, b"o" * 32, b"of bob"))) == "LATE"


def promised_state(run: Path) -> str:
    from fedtune.store.history import replay_journal

    return replay_journal(run)[0].digests[-1]


def test_a_run_keeps_its_number(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert len(first) == 16
    assert run_id(tmp_path) == first
    assert run_id(tmp_path / "other") != first


def test_the_largest_reply_follows_from_the_task() -> None:
    plan = Plan("anna", rank=3, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=7))
    task_digest = Assignment("flora", round=3, seed=0, plan=plan, task=TrainLora(a_key=0))
    assert max_update_bytes(encode_assignment(task_digest).header, BLUEPRINT) == largest_update(
        TrainLora, rank=3, scalar_bytes=7, blueprint=BLUEPRINT
    )
    layout = BlockLayout("llama", (Block("layers.0", 2, 2, 64, 4096),), 128)
    settings = PruningSettings(repair="least-squares")
    large = replace(BLUEPRINT, anatomy=layout, pruning=settings)
    pruned = replace(task_digest, task=TrainLora(a_key=0, pruning=Pruning(settings, moments_requested=True)))
    moments = sum(2 * math.prod(shape) for shape in moment_shapes(settings, layout).values())
    assert max_update_bytes(encode_assignment(pruned).header, large) > moments > 2**20
    probe = ProbeSeeds(
        bank="hadamard", seeds=4, key=1, exponent=20, shift=1, perturbation=1,
        state=SeedState("whole", 0, b"\0" * 16, 2, b"d" * 32),
    )  # fmt: skip
    seeds = Assignment("fedkseed", round=3, seed=0, plan=plan, task=probe)
    assert max_update_bytes(encode_assignment(seeds).header, BLUEPRINT) == largest_update(
        ProbeSeeds, rank=1, scalar_bytes=7, blueprint=BLUEPRINT
    )
    for bits, steps, most in ((8, None, 1000), (4, None, 500), (2, 10, 250), (2, 300, 300)):
        measured = Training(batch=1, learning_rate=0.1, steps=steps) if steps else None
        task = DescendSeeds(probe, 1000, 9, bits=bits, fallback=measured)  # type: ignore[arg-type]
        assert max_update_bytes(encode_assignment(replace(seeds, task=task)).header, BLUEPRINT) == largest_update(
            DescendSeeds, rank=1, scalar_bytes=most, blueprint=BLUEPRINT
        )
    head = {"head.weight": np.zeros((3, 5), np.float32), "head.bias": np.zeros(3, np.float32)}
    sums = Assignment("fedit", round=1, seed=0, plan=plan, task=SumClasses(11))
    classifier = replace(BLUEPRINT, saved=head, classes=3)
    assert max_update_bytes(encode_assignment(sums).header, classifier) == 10 * (3 * 5 + 3 + 5) + 1024


RECIPE = """
[model]
base = "none"
[adapter]
rank = 2
targets = ["q"]
[method]
name = "flora"
[client]
steps = 1
batch = 1
learning_rate = 0.1
[rounds]
count = 1
"""


def test_all_means_every_client_in_the_roster(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path, clients=("a", "b", "c"))
    authority.revoke(places["ca"], "c", now=2_000_000_000)
    (places["server"] / "roster").write_bytes((places["ca"] / "roster").read_bytes())
    from fedtune.link.pki.identity import ROOT, parse_root_key

    roster = RosterFile(places["server"] / "roster", parse_root_key((places["server"] / ROOT).read_bytes()))
    assert first_cohort_size(data_at_sites(RECIPE), roster) == 2
    assert first_cohort_size(data_at_sites(RECIPE + "cohort = 1\n"), roster) == 1
    assert first_cohort_size(data_at_sites(RECIPE + "min_clients = 4\n"), roster) == 4
    # Of a party that is not enrolled any more as well: its round may still be open.
    assert [organisation_of(roster, name) for name in ("a", "c", "nobody")] == ["org-a", "org-c", ""]


def test_a_server_is_unready_while_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = enroll_parties(tmp_path)
    from fedtune.link.pki.identity import ROOT, parse_root_key

    roster = RosterFile(places["server"] / "roster", parse_root_key((places["server"] / ROOT).read_bytes()))
    dispatcher = make_harness(tmp_path).dispatcher
    assert readiness_fault(dispatcher, roster) == ""
    monkeypatch.setattr(uploads, "free_bytes", lambda folder: 0)
    assert "disk" in readiness_fault(dispatcher, roster)


def silent(kind: str, **fields: int | str) -> None:
    """Record nothing."""


@pytest.mark.parametrize("kind", ["failed", "late"])
def test_an_update_that_failed_or_came_too_late_waits_for_the_end_of_its_round(tmp_path: Path, kind: Any) -> None:
    harness = make_harness(tmp_path)
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, b"data")
    harness.submit("anna", sent, b"data")
    on_event(
        harness.dispatcher,
        silent,
        ClientFinished(1, Failure.from_text("anna", "no answer in 60 s", kind=kind), Traffic(1, 2)),
    )
    assert harness.submit("anna", sent) is None  # the round may ask for it again
    on_event(harness.dispatcher, silent, RoundFinished(RECORD))
    reply = harness.submit("anna", sent)
    assert reply is not None
    assert pb.Header.FromString(reply.receipt.header).receipt.verdict == pb.LATE


def test_an_update_that_is_refused_for_its_size_beside_the_others_keeps_its_receipt(tmp_path: Path) -> None:
    harness = make_harness(tmp_path)
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, b"data")
    harness.submit("anna", sent, b"data")
    on_event(
        harness.dispatcher,
        silent,
        ClientFinished(1, AdmittedUpdate(ClientUpdate("anna", 1, 10, LoraResult({}))), Traffic(1, 2)),
    )
    first = harness.submit("anna", sent)
    large = Failure.from_text(
        "anna", "expected a change of norm at most 3; got 9", kind="refused", code="NORM_OVER_CAP"
    )
    on_event(harness.dispatcher, silent, ClientFinished(1, large, Traffic(1, 2)))
    assert harness.submit("anna", sent) == first
    assert first is not None
    assert pb.Header.FromString(first.receipt.header).receipt.verdict == pb.ACCEPTED


def test_the_line_before_the_first_round_ends_none(tmp_path: Path) -> None:
    harness = make_harness(tmp_path)
    message_id, _, _ = harness.post("anna")
    on_event(harness.dispatcher, silent, RoundFinished(replace(RECORD, round=0)))
    assert harness.dispatcher.collect([message_id]) == {}
    on_event(harness.dispatcher, silent, RoundFinished(RECORD))
    assert harness.dispatcher.collect([message_id]) == {message_id: Withdrawn("anna", "its round has ended")}


def test_three_refused_updates_block_their_client_over_the_rounds(tmp_path: Path) -> None:
    harness = make_harness(tmp_path)
    for turn in (1, 2, 3):
        assert not harness.dispatcher.blocklist.reason("anna")
        on_event(harness.dispatcher, silent, RoundStarted(turn, 3, ("anna",)))
        _, task, task_digest = harness.post("anna", turn)
        harness.submit("anna", signed_reply("anna", task, task_digest, b"data"), b"data")
        bad = Failure.from_text("anna", "q.a: expected finite numbers; got 1", kind="refused", code="NOT_FINITE")
        on_event(harness.dispatcher, silent, ClientFinished(turn, bad, Traffic(1, 2)))
        on_event(harness.dispatcher, silent, RoundFinished(replace(RECORD, round=turn)))
    assert "NOT_FINITE" in harness.dispatcher.blocklist.reason("anna")


def test_a_committed_round_is_recorded_in_numbers(tmp_path: Path) -> None:
    events = list[tuple[str, Mapping[str, Any]]]()
    record = replace(
        RECORD,
        round=2,
        cohort=("anna", "bob", "carl"),
        clients={"anna": ClientRecord("ok"), "bob": ClientRecord("late"), "carl": ClientRecord("ok")},
        seconds=1.2345,
    )
    on_event(
        make_harness(tmp_path).dispatcher, lambda kind, **fields: events.append((kind, fields)), RoundFinished(record)
    )
    ((kind, fields),) = events
    assert kind == "committed"
    assert {name: fields[name] for name in ("round", "updates", "asked", "ms")} == {
        "round": 2,
        "updates": 2,
        "asked": 3,
        "ms": 1234,
    }


@pytest.mark.parametrize(
    ("reason", "field", "expected", "got"),
    [
        ("x" * 1000, "x" * 256, "", ""),
        (f"expected {'e' * 1000}; got {'f' * 1000}", "", "e" * 256, "f" * 256),
        ("a: b: expected c; got d; got e", "a: b", "c", "d; got e"),
        ("", "", "", ""),
    ],
)
def test_the_texts_of_a_refusal_are_cut(reason: str, field: str, expected: str, got: str) -> None:
    result = refusal_of(Failure.from_text("bob", reason, kind="refused", code="TENSOR_NAMES"))
    assert (result.field, result.expected, result.found) == (field, expected, got)
    assert not result.passing


def test_every_reason_of_an_update_that_is_refused_has_a_number_in_the_schema() -> None:
    from fedtune.rounds import admission, exchange

    source = "".join(Path(str(module.__file__)).read_text() for module in (admission, exchange))
    codes = {one for one in re.findall(r'"([A-Z][A-Z_]+)"', source) if "_" in one or one in ("MALFORMED", "SCALARS")}
    assert {"NOT_FINITE", "MALFORMED", "STATE_REBUILT", "WRONG_CLIENT"} <= codes
    for code in codes:
        assert pb.Reason.Name(refusal_of(Failure.from_text("bob", "x", kind="refused", code=code)).reason) == code


def test_an_update_that_was_refused_is_not_promised(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        ledger.open(1, state="", cohort={"anna": 1, "bob": 1}, digests={"anna": "o", "bob": "o"})
        assert accepted_updates(tmp_path) == ({}, 0)
        ledger.accept(1, "anna", b"of anna")
        assert accepted_updates(tmp_path) == (
            {(1, "anna"): sha256(b"of anna").hexdigest()},
            0,
        )  # durable before the receipt is given
        ledger.close(1, {"bob": Failure.from_text("bob", "x", kind="refused", code="NOT_FINITE")}, {"bob": 3})
    assert accepted_updates(tmp_path) == ({(1, "anna"): sha256(b"of anna").hexdigest()}, 0)


def test_two_clients_with_the_same_bytes_are_both_promised(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path, group_s=0.0) as ledger:
        ledger.begin(INPUTS)
        names = ("anna", "bob", "carl")
        ledger.open(1, state="", cohort=dict.fromkeys(names, 1), digests=dict.fromkeys(names, "o"))
        for name in names:
            ledger.accept(1, name, b"the same")
    assert accepted_updates(tmp_path)[0] == {(1, name): sha256(b"the same").hexdigest() for name in names}


def test_a_runs_number_is_hexadecimal_and_its_own(tmp_path: Path) -> None:
    result = {run_id(tmp_path / str(one)) for one in range(20)}
    assert len(result) == 20
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in result)
    path = tmp_path / "0" / "link" / "id"
    path.write_text("00112233445566aa\n")  # as an editor may leave it
    assert run_id(tmp_path / "0") == "00112233445566aa"


def test_what_is_no_assignment_has_no_largest_reply() -> None:
    with pytest.raises(WireError):
        max_update_bytes(b"\xff\xff", BLUEPRINT)


def test_a_server_is_unready_while_its_roster_has_expired_or_is_spoilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.link.pki.identity import ROOT, parse_root_key

    places = enroll_parties(tmp_path)
    clock = Clock()
    roster = RosterFile(
        places["server"] / "roster", parse_root_key((places["server"] / ROOT).read_bytes()), clock=clock
    )
    dispatcher = make_harness(tmp_path).dispatcher
    monkeypatch.setattr(uploads, "free_bytes", lambda folder: 2**40)
    assert readiness_fault(dispatcher, roster) == ""
    (places["server"] / "roster").write_bytes(b"spoilt")
    clock.now += 2
    roster.current()
    assert "roster" in readiness_fault(dispatcher, roster)
    monkeypatch.setattr("fedtune.deployment.coordinator.time.time", lambda: roster.current().valid_until + 1)
    assert "expired" in readiness_fault(dispatcher, roster)


def test_an_address_that_is_taken_is_refused_before_a_run_directory_is_written(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = LinkSettings(listen=listen, identity=str(places["server"]), health="")
        with pytest.raises(ConfigError, match=r"link\.listen"):
            coordinate(data_at_sites(RECIPE), tmp_path / "run", settings, tmp_path, record=silent)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_names_a_trainer_is_refused_before_a_run_directory_is_written(tmp_path: Path) -> None:
    named = data_at_sites(RECIPE, overrides=['client.trainer="os:getcwd"'])
    with pytest.raises(ConfigError, match=r"client\.trainer: expected none in a recipe that is served"):
        coordinate(named, tmp_path / "run", LinkSettings(identity=str(tmp_path)), tmp_path, record=silent)
    assert not (tmp_path / "run").exists()


def test_the_recipe_that_sites_get_is_the_same_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = list[bytes]()

    def stop(recipe: Recipe, run: Path, dispatcher: Dispatcher, *rest: Any, **named: Any) -> None:
        sent.append(dispatcher.run.recipe)
        # What the rounds write as soon as the first sites are here.
        pin_base(run, "ab" * 32)
        write_recipe(run, render(with_day(replace(recipe, model=replace(recipe.model, digest="ab" * 32)))))
        raise RoundError("stopped")

    monkeypatch.setattr("fedtune.deployment.coordinator.serve_rounds", stop)
    monkeypatch.setattr("fedtune.deployment.coordinator.check_resumable", lambda run, recipe: None)
    places = enroll_parties(tmp_path)
    settings = LinkSettings(listen="127.0.0.1:0", identity=str(places["server"]), health="", drain_s=0.1)
    run = tmp_path / "run"
    for resume in (False, True):
        recipe = data_at_sites(str(run / "recipe.toml") if resume else RECIPE)
        with pytest.raises(RoundError, match="stopped"):
            coordinate(recipe, run, settings, tmp_path, resume=resume, record=silent)
    assert sent[0] == sent[1]
    assert b"date = " in sent[0]
