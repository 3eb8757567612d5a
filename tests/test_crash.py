"""A run that is killed at any step that touches the disk, and resumed, ends in the bytes of one that was left alone."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

import numpy as np
import pytest

from fedtune.config import bind
from fedtune.errors import ConfigError, StoreError
from fedtune.messages import Assignment, Blueprint, Client, ClientUpdate, Failure, LoraResult, Training
from fedtune.planning.fixed import Fixed
from fedtune.rounds.events import Event, RoundFinished
from fedtune.rounds.record import RoundRecord
from fedtune.rounds.transport import Answer, Reply, Rule
from fedtune.runs import context, recording, summary
from fedtune.runs import runner as conducting
from fedtune.runs.context import RunContext
from fedtune.runs.verification import check_results
from fedtune.seeds import derive, generator
from fedtune.store import files, peft
from fedtune.store.blobs import Blobs
from fedtune.store.history import has_begun, replay_journal
from fedtune.store.round_records import read_rounds
from fedtune.store.run_journal import RunJournal
from fedtune.store.verify import verify
from fedtune.wire.codec import EncodedAssignment, decode_assignment, encode_update

ROOT = Path(__file__).parents[1]
ROUNDS = 3
FLEET = [Client(f"client-{i}", 10 + i) for i in range(5)]
BLUEPRINT = Blueprint(modules={"x": (8, 6), "y": (4, 6)}, saved={"bias": np.zeros(3, np.float32)}, max_rank=2, seed=0)
RECIPE = {
    "name": "crash",
    "model": {"base": "no-model"},
    "adapter": {"rank": 2, "targets": ["x", "y"]},
    "method": {"name": "flora", "wire_dtype": "bf16"},
    "client": {"steps": 1, "batch": 1, "learning_rate": 0.1},
    "data": {"source": "no-data", "split": {"kind": "iid", "clients": len(FLEET)}},
}


@cache
def setting(rounds: int = ROUNDS) -> RunContext:
    """Neither model nor data: clients are scripted, and nothing is scored."""
    recipe = bind({**RECIPE, "rounds": {"count": rounds, "cohort": 4}})
    # A rate by which one step can reach whatever a script answers.
    training = Training(batch=1, learning_rate=1000.0, steps=1)
    return RunContext(
        recipe=recipe,
        blueprint=BLUEPRINT,
        planner=Fixed(lambda name: (2, training), alpha="2r", rslora=False),
        base={"name": "no-model", "digest": "base"},
        target=peft.Target("no-model", None, "causal", fan_in_fan_out=False, saved_modules=["bias"]),
        fleet={client.name: client.num_examples for client in FLEET},
        machine={},
    )


class Scripted:
    """Clients that answer from their assignment's seed alone; some fail, and some send what must be refused."""

    def clients(self) -> Sequence[Client]:
        return FLEET

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        for name, order in sorted(orders.items(), reverse=True):
            assignment = decode_assignment(order.header, order.blobs)
            if (assignment.round, name) == (1, "client-1"):
                yield Failure.from_text(name, "out of memory")
            else:
                yield Reply(name, encode_update(trained(assignment)))


def trained(assignment: Assignment) -> ClientUpdate:
    name, rng, rank = assignment.plan.client, generator(assignment.seed), assignment.plan.rank
    factors = {}
    for module, (m, n) in BLUEPRINT.modules.items():
        factors[f"{module}.a"] = rng.standard_normal((rank, n)).astype(np.float32)
        factors[f"{module}.b"] = rng.standard_normal((m, rank)).astype(np.float32)
    if (assignment.round, name) == (2, "client-2"):
        factors["x.a"][0, 0] = np.nan
    if (assignment.round, name) == (3, "client-3"):
        factors["x.b"] *= 1000
    saved = {"bias": rng.standard_normal(3).astype(np.float32)}
    return ClientUpdate(name, assignment.round, 10, LoraResult(factors, saved=saved, base=assignment.base))


def conduct(run: Path, reported: list[int] | None = None, rounds: int = ROUNDS) -> None:
    """Conduct the whole run, or what is left of it, and add each round to `reported` that was."""

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished) and reported is not None:
            reported.append(event.record.round)

    run.mkdir(exist_ok=True)
    # By this clock the first flush of a process takes so long that later updates are grouped: some updates last on
    # their own, some together, some when the round closes.
    options = {"group_s": 3, "clock": count().__next__}
    ledgers = {name: partial(getattr(RunJournal, name), **options) for name in ("create", "reopen")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conducting, "RunJournal", SimpleNamespace(**ledgers))
        for module in (context, summary):
            patch.setattr(module, "versions", dict)  # to look them up takes longer than a round
        conducting.run_recipe(setting(rounds), run, Scripted(), resume=True, watch=watch)


@dataclass(frozen=True)
class Ending:
    """What must not depend on how often a run was killed."""

    recipe: str
    digests: Sequence[str]
    """Of every round's state."""
    state: bytes
    """The last one."""
    lines: Sequence[RoundRecord]
    """Of rounds.jsonl, without times."""
    summary: Mapping[str, Any]
    """Without its time."""
    files: Sequence[str]
    adapter: Mapping[str, bytes]
    """Its files."""


def ending(run: Path) -> Ending:
    verify(run)
    history, _ = replay_journal(run)
    return Ending(
        recipe=(run / "recipe.toml").read_text(),
        digests=history.digests,
        state=Blobs(run / "blobs").get(history.digests[-1], "the last state"),
        lines=[replace(record, seconds=0.0) for record in read_rounds(run)],
        summary={**json.loads((run / "summary.json").read_text()), "seconds": 0.0},
        files=sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()),
        adapter={path.name: path.read_bytes() for path in (run / "adapter").iterdir()},
    )


class Killed(BaseException):
    """The process is gone: whoever catches this finds that nothing can be written any more."""


Loss = Literal["nothing", "all", "half", "zeros"]
"""What becomes of what was not synced. nothing: the process died, the machine went on. The others are power cuts. all:
neither names nor bytes got to the disk; half: names did, and of appended bytes the first half; zeros: names and lengths
did, and no bytes."""
STEPS = ("append_to", "create_beside", "write", "sync", "sync_folder", "truncate", "rename", "make_folder", "remove")
SHRINKING = {"truncate", "rename", "remove", "sync_folder"}
"""Steps that a full disk allows."""


@dataclass
class Disk:
    """Stands in for the steps of `store.files`: counts them, fails at one of them, and knows what lasts in a folder."""

    root: Path
    at: int = 0
    """The step before, or for a write within, which it fails."""
    fail: Callable[[], None] | None = None
    real: bool = False
    """Whether to sync for real, which costs time."""
    steps: list[str] = field(default_factory=list)
    synced: dict[int, bytes] = field(default_factory=dict)
    """Bytes of files that were synced, by inode."""
    names: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)
    """In folders that were synced, by inode: of everything in them, the inode, and whether it is a folder."""
    held: dict[int, int] = field(default_factory=dict)
    """Open files and folders, by inode: as long as they are, no other one gets it."""

    @contextmanager
    def attached(self, at: int, fail: Callable[[], None]) -> Iterator[None]:
        """Carry out every step in the block, and fail from step `at` on."""
        self.at, self.fail, self.steps = at, fail, []
        with pytest.MonkeyPatch.context() as patch:
            for name in STEPS:
                patch.setattr(files, name, self.step(name, getattr(files, name)))
            yield

    def step(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*args: Any) -> Any:
            self.steps.append(name)
            if self.fail is not None and len(self.steps) >= self.at:
                if len(self.steps) == self.at and name == "write":
                    os.write(args[0], args[1][: len(args[1]) // 2])
                if not (self.fail is full and name in SHRINKING):
                    self.fail()
            if self.real or name not in {"sync", "sync_folder"}:
                done = real(*args)
            if self.real:
                return done
            if name == "sync":
                self.note_file(Path(os.readlink(f"/proc/self/fd/{args[0]}")))
            elif name == "sync_folder":
                self.note_folder(args[0])
            return done if name in {"append_to", "create_beside"} else None

        return taken

    def note_file(self, path: Path) -> None:
        self.synced[self.hold(path)] = path.read_bytes()

    def note_folder(self, path: Path) -> None:
        for each in path.iterdir():
            self.hold(each)
        self.names[self.hold(path)] = entries(path)

    def hold(self, path: Path) -> int:
        """Keep a file's or a folder's inode, and return it."""
        inode = path.stat().st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def crash(self, loss: Loss) -> None:
        """Leave in the folder what a crash leaves; after a power cut, all of that lasts."""
        if loss != "nothing":
            kept = list(self.kept(self.root.stat().st_ino, self.root, self.root, loss))
            self.renew()
            for path, content in kept:
                path.mkdir() if content is None else path.write_bytes(content)
            for path in [self.root, *self.root.rglob("*")]:
                self.note_folder(path) if path.is_dir() else self.note_file(path)

    def kept(self, inode: int, now: Path | None, path: Path, loss: Loss) -> Iterator[tuple[Path, bytes | None]]:
        """Yield what is left of a folder: files with their bytes, and folders before what is in them.

        Args:
            inode: of the folder.
            now: where it lies; None if its name is gone.
            path: where it will lie.
            loss: what becomes of what was not synced.
        """
        names = self.names.get(inode, {}) if loss == "all" or now is None else entries(now)
        for name, (inner, folder) in names.items():
            yield path / name, None if folder else self.content(inner, loss)
            if folder:
                yield from self.kept(inner, self.find(inner), path / name, loss)

    def content(self, inode: int, loss: Loss) -> bytes:
        synced, path = self.synced.get(inode, b""), self.find(inode)
        if loss == "all" or path is None:
            return synced
        now = path.read_bytes()
        rest = now[len(synced) :]
        if not now.startswith(synced):
            return now
        return synced + (rest[: len(rest) // 2] if loss == "half" else bytes(len(rest)))

    def find(self, inode: int) -> Path | None:
        return next((path for path in self.root.rglob("*") if path.stat().st_ino == inode), None)

    def renew(self) -> None:
        """Empty the folder."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        self.forget()

    def forget(self) -> None:
        for descriptor in self.held.values():
            os.close(descriptor)
        self.held, self.synced, self.names = {}, {}, {}


def entries(folder: Path) -> dict[str, tuple[int, bool]]:
    return {path.name: (path.stat().st_ino, path.is_dir()) for path in folder.iterdir()}


def die() -> None:
    raise Killed


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


NEVER = 10**9
LOSSES: Sequence[Loss] = ("nothing", "all", "half", "zeros")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    yield disk
    disk.forget()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ending, Sequence[str]]:
    """How a run ends that nothing happens to, and the steps it takes."""
    root = tmp_path_factory.mktemp("undisturbed")
    disk = Disk(root)
    with disk.attached(NEVER, die):
        conduct(root / "run")
    disk.forget()
    check_results(root / "run")
    return ending(root / "run"), disk.steps


def test_the_run_has_many_steps_and_every_kind_of_outcome(undisturbed: tuple[Ending, Sequence[str]]) -> None:
    end, steps = undisturbed
    assert len(steps) >= 96
    assert set(steps) == set(STEPS)
    kinds = {client.status for record in end.lines for client in record.clients.values()}
    assert kinds == {"ok", "failed", "refused"}
    assert len(set(end.digests)) == ROUNDS


def offset(every: int) -> int:
    """Return the first of every so many steps: another one with each commit, so that in time all are tried."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        return int(subprocess.run(git, capture_output=True, text=True, check=True).stdout, 16) % every
    return derive(setting().recipe.seed, "test.crash") % every


FIFTH = pytest.param(5, id="every fifth step")
EVERY = pytest.param(1, id="every step", marks=pytest.mark.slow)


@pytest.mark.guarantee("G12")
@pytest.mark.parametrize(
    ("first", "every"),
    [
        pytest.param("half", 5, id="half, every fifth step"),
        *(pytest.param(loss, 1, id=f"{loss}, every step", marks=pytest.mark.slow) for loss in LOSSES),
    ],
)
def test_a_run_killed_at_any_step_and_again_while_it_recovers_ends_in_the_same_bytes(
    disk: Disk, undisturbed: tuple[Ending, Sequence[str]], first: Loss, every: int, cases: Callable[[int], None]
) -> None:
    end, steps = undisturbed
    for at in range(1 + offset(every), len(steps) + 1, every):
        second, again = LOSSES[at % len(LOSSES)], 1 + at * 7 % 29
        disk.renew()
        reported: list[int] = []
        for loss, number in ((first, at), (second, again)):
            with suppress(Killed), disk.attached(number, die):
                conduct(disk.root / "run", reported)
            disk.crash(loss)
            assert set(reported) <= {line.round for line in read_rounds(disk.root / "run")}
        with disk.attached(NEVER, die):
            conduct(disk.root / "run")
        assert ending(disk.root / "run") == end, (at, steps[at - 1], first, again, second)
        cases(1)


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("every", [FIFTH, EVERY])
def test_a_disk_that_is_full_at_any_step_stops_the_run_clearly_and_it_goes_on_when_space_is_back(
    disk: Disk, undisturbed: tuple[Ending, Sequence[str]], every: int, cases: Callable[[int], None]
) -> None:
    end, steps = undisturbed
    for at in range(1 + offset(every), len(steps) + 1, every):
        disk.renew()
        with disk.attached(at, full):
            if set(steps[at - 1 :]) - SHRINKING:
                with pytest.raises(StoreError, match=r"No space left on device; free some space .*--resume"):
                    conduct(disk.root / "run")
            else:
                conduct(disk.root / "run")
        verify_if_begun(disk.root / "run")
        with disk.attached(NEVER, full):
            conduct(disk.root / "run")
        assert ending(disk.root / "run") == end, (at, steps[at - 1])
        cases(1)


@pytest.mark.guarantee("G12")
@pytest.mark.parametrize("unreached", ["write_result", "append_round"])
def test_a_run_killed_between_a_commit_and_its_line_is_not_cut_to_fewer_rounds_and_ends_in_the_same_bytes(
    disk: Disk, undisturbed: tuple[Ending, Sequence[str]], monkeypatch: pytest.MonkeyPatch, unreached: str
) -> None:
    end, _ = undisturbed
    run, reported, real = disk.root / "run", list[int](), getattr(recording, unreached)

    def killed(*arguments: Any) -> Any:
        if reported and reported[-1] == ROUNDS - 1:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(recording, unreached, killed)
    with pytest.raises(Killed):
        conduct(run, reported)
    monkeypatch.undo()
    assert (len(replay_journal(run)[0].digests), read_rounds(run)[-1].round) == (ROUNDS, ROUNDS - 1)
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"rounds.count: expected at least {ROUNDS}, .* got {ROUNDS - 1}"):
        conduct(run, rounds=ROUNDS - 1)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == left
    conduct(run)
    assert ending(run) == end


def verify_if_begun(run: Path) -> None:
    if has_begun(run):
        verify(run)


@pytest.mark.guarantee("G12")
@pytest.mark.parametrize("trials", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_really_killed_again_and_again_ends_in_the_same_bytes(
    tmp_path: Path, undisturbed: tuple[Ending, Sequence[str]], trials: int, cases: Callable[[int], None]
) -> None:
    end, steps = undisturbed
    command = [sys.executable, "-P", __file__, str(tmp_path), str(trials), str(len(steps))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert len(kills) == trials
    assert all(kills)  # every run was killed at least once
    for trial in range(trials):
        assert ending(tmp_path / str(trial) / "run") == end, (trial, kills[trial])
        cases(len(kills[trial]))


def main() -> None:
    """Conduct runs in child processes that kill themselves at drawn steps, until each run has ended; print the steps.

    The children are forked, not started anew: a fresh interpreter takes longer to load than the run itself.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("trials", type=int)
    parser.add_argument("steps", type=int)
    args = parser.parse_args()
    kills = []
    for trial in range(args.trials):
        root, rng = args.folder / str(trial), generator(derive(trial, "test.kill"))
        root.mkdir()
        drawn: list[int] = []
        while True:
            # The first kill always hits; after that, a drawn step may lie behind the run's end.
            step = int(rng.integers(1, args.steps + 1))
            child = os.fork()
            if child == 0:
                killed_at(step, partial(conduct, root / "run"))
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                drawn.append(step)
            elif status == 0:
                break
            else:
                sys.exit(f"trial {trial}: a child ended with the status {status} after kills at {drawn}")
        kills.append(drawn)
    print(json.dumps(kills))


def killed_at(step: int, work: Callable[[], None]) -> NoReturn:
    """Do the work in this process, which kills itself with SIGKILL at a step that touches the disk, and exit."""
    code = 1
    try:
        with Disk(Path(os.devnull), real=True).attached(step, kill):  # a root that nothing can empty
            work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


if __name__ == "__main__":
    main()
