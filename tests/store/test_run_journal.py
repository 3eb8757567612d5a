from __future__ import annotations

import errno
import os
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import StoreError
from fedtune.messages import Failure, Weight
from fedtune.methods import serialization
from fedtune.methods.serialization import digest
from fedtune.rounds.journal import InterruptedRound, RoundJournal
from fedtune.rounds.record import RoundRecord
from fedtune.store import files, journal, run_journal
from fedtune.store.history import History, replay_journal
from fedtune.store.round_records import append_round, read_rounds
from fedtune.store.run_journal import RunJournal
from fedtune.store.verify import verify
from fedtune.tensors import Tensors

INPUTS = {"recipe": "rounds = 4", "threads": 1}
COHORT = {"ann": 3, "bob": 4, "cyd": 5}
ORDERS = {name: f"order of {name}" for name in COHORT}
UPDATES = {"cyd": b"update of cyd", "ann": b"ann's"}
FAILURES = {"bob": Failure.from_text("bob", "out of memory", kind="refused")}
SIZES = {"bob": 99}


@dataclass(frozen=True)
class Small:
    round: int
    tensors: Tensors


@dataclass
class Clock:
    """Shows what it is set to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Disk:
    """Counts the steps that wait for the disk, each of which takes some time by the clock."""

    clock: Clock = field(default_factory=Clock)
    sync_s: float = 0.005
    syncs: int = 0

    def wait(self, *arguments: Any) -> None:
        self.syncs += 1
        self.clock.now += self.sync_s


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(files, "sync", disk.wait)
    monkeypatch.setattr(files, "sync_folder", disk.wait)
    return disk


def state(round: int) -> Sequence[bytes]:
    return [b"state of round ", str(round).encode()]


def before(round: int) -> str:
    return digest(state(round - 1)) if round > 1 else "0" * 64


def begin(kept: RoundJournal, round: int, *, updates: Mapping[str, bytes] = UPDATES) -> None:
    kept.open(round, state=before(round), cohort=COHORT, digests=ORDERS)
    for client, update in updates.items():
        kept.accept(round, client, update)


def complete(kept: RoundJournal, round: int) -> str:
    begin(kept, round)
    kept.close(round, FAILURES, SIZES)
    return kept.commit(round, state(round))


def kinds(run: Path) -> list[str]:
    """Kinds of the journal's records."""
    found: list[str] = []
    journal.read(run / "journal", lambda record: found.append(record.kind))
    return found


def blobs(run: Path) -> set[str]:
    return {path.name for path in (run / "blobs").glob("??/*")}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was stopped after two rounds, of which the first has a line."""
    run = tmp_path / "run"
    run.mkdir()
    with RunJournal.create(run, group_s=99, clock=count().__next__) as kept:  # a flush takes as long as an update
        kept.begin(INPUTS)
        for number in (1, 2):
            complete(kept, number)
    return run


def test_each_step_is_one_record_and_once_a_flush_was_seen_to_cost_more_a_round_of_cheap_clients_is_one_group(
    run: Path,
) -> None:
    assert kinds(run) == ["start", "open", "accept", "close", "commit", "open", "close", "commit"]


def test_a_ledger_knows_which_rounds_have_begun_and_are_committed(run: Path) -> None:
    with RunJournal.reopen(run) as kept:
        assert (kept.begun, kept.committed) == (2, 2)
        kept.begin(INPUTS)
        begin(kept, 3)
        assert (kept.begun, kept.committed) == (3, 2)
    with RunJournal.reopen(run) as kept:
        assert (kept.begun, kept.committed) == (3, 2)


def test_before_its_first_round_a_run_has_begun_none(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path) as kept:
        assert (kept.begun, kept.committed) == (0, 0)


def test_committed_states_are_read_and_not_computed(run: Path) -> None:
    with RunJournal.reopen(run) as kept:
        assert kept.resume(2) == b"state of round 2"
        assert kept.interrupted_round(3) is None


def test_a_round_without_its_line_is_done_again_from_all_that_it_was_made_of(run: Path) -> None:
    with RunJournal.reopen(run) as kept:
        kept.begin(INPUTS)
        assert kept.resume(1) == b"state of round 1"
        assert kept.interrupted_round(2) == InterruptedRound(COHORT, ORDERS, UPDATES, FAILURES, SIZES)
        assert kept.commit(2, state(2)) == digest(state(2))
        assert kept.interrupted_round(3) is None
        complete(kept, 3)
    assert [kind for kind in kinds(run)[8:] if kind != "accept"] == ["start", "open", "close", "commit"]


def test_weights_that_are_not_the_examples_alone_are_read_back(tmp_path: Path) -> None:
    weights = {name: Weight(2**62 + number, 2**20) for number, name in enumerate(COHORT)}
    with RunJournal.create(tmp_path) as kept:
        kept.begin(INPUTS)
        kept.open(1, state="", cohort=COHORT, digests=ORDERS, weights=weights)
    with RunJournal.reopen(tmp_path) as kept:
        again = kept.interrupted_round(1)
        assert again is not None
        assert again.weights == weights


@pytest.mark.parametrize("wrong", [{"ann": 1}, {"ann": [0, 1]}, {"ann": [1, -1]}, {"ann": [1]}, {"ann": ["x", 1]}])
def test_weights_that_no_round_can_have_are_damage(wrong: Any) -> None:
    history = History()
    history.apply("start", {"run": "r", "inputs": INPUTS})
    opening = {"round": 1, "state": "", "cohort": {"ann": 1}, "orders": {"ann": "o"}}
    with pytest.raises(StoreError, match="expected the fields of open"):
        history.apply("open", {**opening, "weights": wrong})
    history.apply("open", {**opening, "weights": {"ann": [3, 2]}})
    assert history.round is not None
    assert history.round.weights == {"ann": Weight(3, 2)}


def test_the_speeds_that_a_round_was_planned_by_are_read_back(tmp_path: Path) -> None:
    """Or a round that is done again would be planned by others."""
    probes = {"ann": (0.1 + 0.2, None), "bob": (3.5, 1e-3)}
    with RunJournal.create(tmp_path) as kept:
        kept.begin(INPUTS)
        kept.open(1, state="", cohort=COHORT, digests=ORDERS, probes=probes)
    with RunJournal.reopen(tmp_path) as kept:
        again = kept.interrupted_round(1)
        assert again is not None
        assert again.probes == probes


@pytest.mark.parametrize("wrong", [{"ann": 1}, {"ann": ["1"]}, {"ann": ["1", "2", "3"]}, {"ann": ["x", "1"]}])
def test_speeds_that_are_none_are_damage(wrong: Any) -> None:
    history = History()
    history.apply("start", {"run": "r", "inputs": INPUTS})
    opening = {"round": 1, "state": "", "cohort": {"ann": 1}, "orders": {"ann": "o"}}
    with pytest.raises(StoreError, match="expected the fields of open"):
        history.apply("open", {**opening, "probes": wrong})


def test_the_first_round_is_done_again_from_the_methods_own_state(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path) as kept:
        kept.begin(INPUTS)
        assert kept.resume(0) is None
        complete(kept, 1)
    with RunJournal.reopen(tmp_path) as kept:
        assert kept.resume(0) is None
        assert kept.interrupted_round(1) is not None


def test_a_round_that_comes_to_another_state_is_refused_with_both_digests(run: Path) -> None:
    with RunJournal.reopen(run) as kept:
        kept.begin(INPUTS)
        kept.resume(1)
        noted, found = digest(state(2))[:12], digest([b"x"])[:12]
        with pytest.raises(
            StoreError, match=f"{run}: round 2: expected the state {noted}.*; got {found}.*the versions"
        ):
            kept.commit(2, [b"x"])
    assert kinds(run)[-1] == "start"


def test_a_state_that_is_not_finite_is_replaced_when_its_round_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release before 0.3.0 committed it, and was stopped before it had written the line."""
    with monkeypatch.context() as earlier:
        earlier.setattr(serialization, "count_not_finite", lambda tensor: 0)
        infinite = serialization.encode(Small(1, {"x": np.array([1, np.inf], np.float32)}))
    finite = serialization.encode(Small(1, {"x": np.ones(2, np.float32)}))
    with RunJournal.create(tmp_path) as journal:
        journal.begin(INPUTS)
        begin(journal, 1)
        journal.close(1, FAILURES, SIZES)
        noted = journal.commit(1, infinite)
        assert journal.why_not_finite(1) == "tensors/x with 1 of 2 that are not"
    with RunJournal.reopen(tmp_path) as journal:
        journal.begin(INPUTS)
        mended = journal.commit(1, finite)
        assert (mended, journal.why_not_finite(1)) == (digest(finite), "")
        assert noted not in blobs(tmp_path)
        with pytest.raises(StoreError, match="expected the state"):  # only what is not finite is replaced
            journal.commit(1, serialization.encode(Small(1, {"x": np.zeros(2, np.float32)})))
    with RunJournal.reopen(tmp_path) as journal:
        journal.begin(INPUTS)
        assert journal.resume(1) == b"".join(finite)
    verify(tmp_path)


@pytest.mark.parametrize("reported", [0, 3])
def test_lines_that_do_not_go_with_the_journal_are_refused(run: Path, reported: int) -> None:
    with (
        RunJournal.reopen(run) as kept,
        pytest.raises(StoreError, match=f"{run}: .* to end with round 2, as the journal does; got {reported}"),
    ):
        kept.resume(reported)


@pytest.mark.parametrize("reported", [0, 1, 3])
def test_a_run_does_not_end_before_the_line_of_its_last_round_is_written(run: Path, reported: int) -> None:
    noted, kept_blobs = kinds(run), blobs(run)
    with RunJournal.reopen(run) as kept:
        with pytest.raises(StoreError, match=f"{run}: .* to end with round 2, as the journal does; got {reported}"):
            kept.finish(reported)
        assert (kinds(run), blobs(run)) == (noted, kept_blobs)


def test_a_line_can_be_missing_only_until_the_next_round_begins(run: Path) -> None:
    with RunJournal.reopen(run) as kept:
        kept.begin(INPUTS)
        begin(kept, 3)
        with pytest.raises(StoreError, match="to end with round 2"):
            kept.resume(1)


def test_what_a_repetition_needs_is_kept_until_the_next_round_begins_and_not_longer(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path, group_s=0) as kept:
        kept.begin(INPUTS)
        for number in range(1, 4):
            complete(kept, number)
            earlier = {digest(state(number - 1))} if number > 1 else set()
            assert blobs(tmp_path) == {digest([each]) for each in UPDATES.values()} | {digest(state(number))} | earlier
        begin(kept, 4, updates={})
        assert blobs(tmp_path) == {digest(state(3))}
        kept.close(4, {name: Failure.from_text(name, "late") for name in COHORT}, dict.fromkeys(COHORT, 0))
        kept.commit(4, state(4))
        kept.finish(4)
        assert blobs(tmp_path) == {digest(state(4))}
        kept.finish(4)
    assert kinds(tmp_path)[-2:] == ["commit", "final"]
    with RunJournal.reopen(tmp_path) as kept:
        assert kept.resume(4) == b"state of round 4"
        with pytest.raises(StoreError, match="to end with round 4"):
            kept.resume(3)


def test_an_open_round_goes_on_with_the_updates_it_has(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path, group_s=0) as kept:
        kept.begin(INPUTS)
        begin(kept, 1)
    with RunJournal.reopen(tmp_path, group_s=0) as kept:
        kept.begin(INPUTS)
        assert kept.resume(0) is None
        assert kept.interrupted_round(1) == InterruptedRound(
            cohort=COHORT, digests=ORDERS, updates=UPDATES, failures=None
        )
        kept.accept(1, "bob", b"bob's")
        kept.close(1, {}, {})
        kept.commit(1, state(1))
    with RunJournal.reopen(tmp_path) as kept:
        opened = kept.interrupted_round(1)
        assert opened is not None
        assert opened.updates == UPDATES | {"bob": b"bob's"}
        assert list(opened.updates) == ["cyd", "ann", "bob"]  # as they arrived
    assert kinds(tmp_path) == ["start", "open", "accept", "accept", "start", "accept", "close", "commit"]


def open_round(kept: RoundJournal, round: int, names: Sequence[str]) -> None:
    kept.open(round, state=before(round), cohort=dict.fromkeys(names, 1), digests=dict.fromkeys(names, "o"))


def durable(run: Path) -> int:
    """How many updates a crash would leave."""
    found = replay_journal(run)[0].open
    assert found is not None
    return len(found.updates)


def test_of_slow_clients_every_update_lasts_at_once_those_that_come_together_too(tmp_path: Path, disk: Disk) -> None:
    names = [f"client-{i:02}" for i in range(40)]
    with RunJournal.create(tmp_path, clock=disk.clock) as kept:
        kept.begin(INPUTS)
        open_round(kept, 1, names)
        for number, name in enumerate(names):
            if number % 20 == 0:
                disk.clock.now += 60
            kept.accept(1, name, name.encode())
            assert durable(tmp_path) == number + 1


def test_making_updates_durable_takes_a_small_share_of_a_round_and_one_waits_for_few_others(
    tmp_path: Path, disk: Disk
) -> None:
    names = [f"client-{i:03}" for i in range(400)]
    with RunJournal.create(tmp_path, clock=disk.clock) as kept:
        kept.begin(INPUTS)
        open_round(kept, 1, names)
        disk.syncs, began, waiting = 0, disk.clock.now, list[int]()
        for number, name in enumerate(names):
            disk.clock.now += 0.1
            kept.accept(1, name, name.encode())
            waiting.append(number + 1 - durable(tmp_path))
        assert 0 < disk.syncs * disk.sync_s <= 0.051 * (disk.clock.now - began)
        assert max(waiting) <= 10
        kept.close(1, {}, {})
        opened = kept.interrupted_round(1)
        assert opened is not None
        assert opened.updates == {name: name.encode() for name in names}


def test_after_a_flush_that_took_long_updates_that_come_close_together_are_made_durable_together(
    tmp_path: Path, disk: Disk
) -> None:
    names = [f"client-{i}" for i in range(7)]
    with RunJournal.create(tmp_path, group_s=1.0, clock=disk.clock) as kept:
        kept.begin(INPUTS)
        open_round(kept, 1, names)
        disk.sync_s = 100.0
        kept.accept(1, names[0], names[0].encode())
        disk.sync_s, stalled, lasting = 0.0, disk.clock.now, []
        for name, after in zip(names[1:], [0.5, 0.9, 1.0, 1.5, 2.5, 2.6], strict=True):
            disk.clock.now = stalled + after
            kept.accept(1, name, name.encode())
            lasting.append(durable(tmp_path))
        assert lasting == [1, 1, 4, 4, 6, 6]


def test_large_updates_are_made_durable_whatever_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_journal, "GROUP_BYTES", len(b"update of cyd"))
    with RunJournal.create(tmp_path, group_s=99, clock=count().__next__) as kept:
        kept.begin(INPUTS)
        begin(kept, 1, updates={"bob": b"", **UPDATES})
        assert kinds(tmp_path) == ["start", "open", "accept", "accept"]  # the first, as nothing was flushed yet


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StoreError])
def test_updates_that_came_before_a_run_was_stopped_are_kept(tmp_path: Path, stop: type[BaseException]) -> None:
    def stopped(kept: RunJournal) -> None:
        kept.begin(INPUTS)
        begin(kept, 1)
        raise stop

    with pytest.raises(stop), RunJournal.create(tmp_path, group_s=99, clock=count().__next__) as kept:
        stopped(kept)
    assert kinds(tmp_path) == ["start", "open", "accept", "accept"]
    assert durable(tmp_path) == len(UPDATES)


def test_a_round_of_a_hundred_cheap_clients_costs_a_handful_of_syncs(tmp_path: Path, disk: Disk) -> None:
    names, syncs = [f"client-{i:03}" for i in range(100)], []
    with RunJournal.create(tmp_path, clock=disk.clock) as kept:
        kept.begin(INPUTS)
        for number in (1, 2, 3):
            disk.syncs = 0
            open_round(kept, number, names)
            for name in names:
                disk.clock.now += 0.001
                kept.accept(number, name, name.encode())
            kept.close(number, {}, {})
            kept.commit(number, state(number))
            syncs.append(disk.syncs)
    assert max(syncs[1:]) <= 9
    assert syncs[0] <= 14  # and the first flush of all, whose cost nobody knew


@pytest.mark.guarantee("G20")
def test_a_second_writer_and_a_second_beginning_are_refused(run: Path) -> None:
    with RunJournal.reopen(run), pytest.raises(StoreError, match=f"process {os.getpid()} does"), RunJournal.reopen(run):
        pass
    with pytest.raises(StoreError, match="expected a new run; it holds one; pass --resume"), RunJournal.create(run):
        pass


def test_a_run_that_was_stopped_before_it_began_can_only_be_started_anew(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path):
        pass
    for use in (RunJournal.inputs, lambda run: RunJournal.reopen(run).__enter__()):
        with pytest.raises(StoreError, match="expected a run that has begun; it was stopped before"):
            use(tmp_path)
    with RunJournal.create(tmp_path) as kept:
        kept.begin(INPUTS)
    assert RunJournal.inputs(tmp_path) == INPUTS


def test_what_a_process_left_half_done_that_was_killed_before_the_run_began_is_gone_too(tmp_path: Path) -> None:
    (tmp_path / ".recipe.toml.abc.partial").write_text("half")
    with RunJournal.create(tmp_path):
        assert not list(tmp_path.glob("*.partial"))


def test_every_start_is_recorded_and_all_are_of_one_run(run: Path) -> None:
    with RunJournal.reopen(run) as kept:
        assert kept.first == INPUTS
        kept.begin({**INPUTS, "threads": 2})
        assert replay_journal(run)[0].inputs == [INPUTS, {**INPUTS, "threads": 2}]
        assert kept.first == INPUTS
    history, end = replay_journal(run)
    assert end.epoch == 2
    assert len(history.run) == 16


def test_nothing_is_written_before_a_run_has_begun(tmp_path: Path) -> None:
    with RunJournal.create(tmp_path) as kept, pytest.raises(StoreError, match="expected a journal to begin with start"):
        begin(kept, 1)


def test_a_refused_step_is_not_in_the_journal(run: Path) -> None:
    noted = kinds(run)
    with RunJournal.reopen(run) as kept:
        with pytest.raises(StoreError, match=f"{run}: expected round 3 to begin once"):
            begin(kept, 2)
        with pytest.raises(StoreError, match="expected a round that waits"):
            kept.close(2, FAILURES, SIZES)
        with pytest.raises(StoreError, match="expected an update or a failure of each client"):
            closed_early(kept)
    assert kinds(run) == [*noted, "open"]


def closed_early(kept: RoundJournal) -> None:
    begin(kept, 3, updates={})
    kept.close(3, FAILURES, SIZES)


def test_what_a_killed_process_left_half_done_is_gone_after_reopening(run: Path) -> None:
    append_round(run, RoundRecord(round=0, seconds=0.5))
    append_round(run, RoundRecord(round=1, seconds=0.5))
    whole = {path: path.read_bytes() for path in (run / "journal", run / "rounds.jsonl")}
    for path, data in whole.items():
        path.write_bytes(data + data[:9])
    (run / ".adapter.abc.partial").mkdir()
    (run / ".adapter.abc.partial" / "a").write_text("half")
    (run / "blobs" / ".blob.abc.partial").write_text("half")
    stray = run / "blobs" / "ab" / ("ab" + "0" * 62)
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("of no record")
    (run / ".gitignore").write_text("mine")
    with RunJournal.reopen(run):
        pass
    assert {path: path.read_bytes() for path in whole} == whole
    assert not stray.exists()
    assert not list(run.rglob("*.partial"))
    assert (run / ".gitignore").exists()
    assert [record.round for record in read_rounds(run)] == [0, 1]


def test_a_reader_changes_nothing(run: Path) -> None:
    with (run / "journal").open("ab") as file:
        file.write(b"torn")
    data = (run / "journal").read_bytes()
    assert RunJournal.inputs(run) == INPUTS
    assert (run / "journal").read_bytes() == data


@pytest.mark.parametrize(
    ("round", "what"), [(1, "expected the state of round 1"), (2, "expected the update of cyd, ann in round 2")]
)
def test_a_missing_or_damaged_blob_is_named_by_what_it_is(run: Path, round: int, what: str) -> None:
    name = digest(state(1)) if round == 1 else digest(list(UPDATES.values()))
    path = run / "blobs" / name[:2] / name
    data = path.read_bytes()
    for spoil in (lambda: path.write_bytes(data[:-1] + b"?"), path.unlink):
        spoil()
        with RunJournal.reopen(run) as kept, pytest.raises(StoreError, match=what):
            kept.interrupted_round(2) if round == 2 else kept.resume(1)


def test_a_full_disk_stops_the_run_and_loses_nothing_that_was_noted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def filled(kept: RunJournal) -> None:
        kept.begin(INPUTS)
        begin(kept, 3)
        monkeypatch.setattr(files, "write", full)
        kept.close(3, FAILURES, SIZES)

    noted = kinds(run)
    with (
        pytest.raises(StoreError, match="No space left on device; free some space"),
        RunJournal.reopen(run, group_s=99, clock=count().__next__) as kept,
    ):
        filled(kept)
    monkeypatch.undo()
    assert kinds(run) == [*noted, "start", "open", "accept"]
    with RunJournal.reopen(run) as kept:
        kept.begin(INPUTS)
        opened = kept.interrupted_round(3)
        assert opened is not None
        assert opened.updates == {"cyd": UPDATES["cyd"]}
        kept.accept(3, "ann", UPDATES["ann"])
        kept.close(3, FAILURES, SIZES)
        assert kept.commit(3, state(3)) == digest(state(3))


def test_reasons_in_any_language_come_back(tmp_path: Path) -> None:
    failures = {
        "ann": Failure.from_text("ann", "kein Platz: ü \n \U0001f4be \ud800", kind="refused"),
        "bob": Failure.from_text("bob", "", kind="late"),
        "cyd": Failure.from_text("cyd", "x" * 10000),
    }
    with RunJournal.create(tmp_path) as kept:
        kept.begin(INPUTS)
        begin(kept, 1, updates={})
        kept.close(1, failures, dict.fromkeys(failures, 0))
    with RunJournal.reopen(tmp_path) as kept:
        opened = kept.interrupted_round(1)
        assert opened is not None
        assert opened.failures == failures


def test_a_random_run_that_is_reopened_at_random_forgets_nothing(tmp_path: Path) -> None:
    rng, told, number = random.Random(0), dict[str, bytes](), 0
    names = [f"client-{i}" for i in range(8)]

    def reopened() -> Generator[RunJournal, None, None]:
        while True:
            with RunJournal.reopen(tmp_path, group_s=rng.choice([0, 99]), clock=count().__next__) as kept:
                kept.begin(INPUTS)
                yield kept

    with RunJournal.create(tmp_path) as kept:
        kept.begin(INPUTS)
    ledgers = reopened()
    for number in range(1, 6):
        kept, told = next(ledgers), {}
        kept.open(number, state=before(number), cohort=dict.fromkeys(names, 1), digests=dict.fromkeys(names, "o"))
        for name in rng.sample(names, 6):
            if rng.random() < 0.4:
                kept = next(ledgers)
            told[name] = rng.randbytes(rng.randint(0, 50))
            kept.accept(number, name, told[name])
        kept = next(ledgers)
        failures = {name: Failure.from_text(name, "late", kind="late") for name in names if name not in told}
        sizes = {name: rng.randint(0, 50) for name in failures}
        kept.close(number, failures, sizes)
        kept = next(ledgers)
        assert kept.interrupted_round(number) == InterruptedRound(
            dict.fromkeys(names, 1), dict.fromkeys(names, "o"), told, failures, sizes
        )
        kept.commit(number, state(number))
    ledgers.close()
