"""A real simulation, killed by SIGKILL at fifty random moments, ends in the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.store.history import has_begun

KILLS = 50
ROOT = Path(__file__).parents[1]


@pytest.mark.guarantee("G12")
@pytest.mark.slow
def test_a_simulation_killed_at_fifty_random_moments_ends_in_the_same_bytes(
    tables: dict[str, Any], tmp_path: Path, cases: Callable[[int], None]
) -> None:
    # In an interpreter of its own: the model is loaded once and the runs are forks, which this one has too many threads
    # for.
    tables |= {"rounds": {"count": 3}, "evaluate": {"every": 0, "examples": 2, "client_examples": 1}}
    (tmp_path / "recipe.json").write_text(json.dumps(tables))
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(KILLS)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == KILLS
    assert counts["resumed"] >= KILLS // 2  # the others were too early for anything to be there
    assert counts["finished"] >= 3
    assert counts["same"] == counts["finished"]
    cases(counts["kills"])


def main(folder: Path, kills: int) -> None:
    """Kill runs until there were so many kills, letting each run go on until it is finished, and count."""
    from fedtune.config import bind
    from fedtune.runs.local import prepare
    from fedtune.seeds import generator

    prepared = prepare(bind(json.loads((folder / "recipe.json").read_text())))
    began = time.monotonic()
    assert wait(started(prepared, folder / "whole"), None) == 0
    usual_s = time.monotonic() - began
    whole, rng = outcome(folder / "whole"), generator(0)
    counts = {"kills": 0, "resumed": 0, "finished": 0, "same": 0}
    run = folder / "run-0"
    while counts["kills"] < kills or has_begun(run):
        resume = has_begun(run)
        counts["resumed"] += resume
        limit_s = float(rng.uniform(0, 1.2 * usual_s)) if counts["kills"] < kills else None
        status = wait(started(prepared, run), limit_s)
        if status == 0:
            counts["finished"] += 1
            counts["same"] += outcome(run) == whole
            run = folder / f"run-{counts['finished']}"
        else:
            assert status == -signal.SIGKILL, status
            counts["kills"] += 1
    print(json.dumps(counts))


def started(prepared: Any, run: Path) -> int:
    """Return the process id of a fork that conducts a run, or goes on with it."""
    from fedtune.runs.local import run_context, transport
    from fedtune.runs.runner import run_recipe

    if pid := os.fork():
        return pid
    status = 1
    try:
        run.mkdir(exist_ok=True)
        with transport(prepared) as engine:
            run_recipe(run_context(prepared), run, engine, resume=has_begun(run), watch=lambda event: None)
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        os._exit(status)


def wait(pid: int, limit_s: float | None) -> int:
    """Kill a process when its time is over, and return how it ended: a status, or minus the signal."""
    watched = os.pidfd_open(pid)
    if not select.select([watched], [], [], limit_s)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(watched)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(run: Path) -> tuple[Any, ...]:
    """Return what two runs of the same recipe must agree on."""
    from fedtune.store import peft

    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    keys = ("round", "state_digest", "test", "held_out", "modules", "bytes_up", "bytes_down")
    return [[line[key] for key in keys] for line in lines], peft.digest(run / "adapter")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
