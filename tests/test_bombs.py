"""Messages that promise or hold too much are refused with a reason, at little memory and time."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU_S = 1.0
"""Of the processor: how busy the machine is otherwise does not count."""


@pytest.mark.guarantee("G2")
def test_bombs_are_refused_at_little_cost(cases: Callable[[int], None]) -> None:
    """In a process of its own, whose memory is that of the decoder alone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    assert len(costs) >= 40
    for name, cost in costs.items():
        assert cost["refusal"] in ("WireError", "StoreError", "RejectionError", "DecodeError"), (name, cost)
        assert cost["growth_mib"] <= 2 * cost["limit_mib"], (name, cost)
        assert cost["cpu_s"] < CPU_S, (name, cost)
        cases(1)


def main() -> None:
    """Read each bomb, and print what it led to, how far memory grew and how long the processor worked."""
    from tests.bombs import BOMBS, LIMIT
    from tests.decoders import EXPECTED

    costs = {}
    for name, (make, read) in BOMBS.items():
        data, refusal = make(), ""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is in use now
        before, began = peak_mib(), time.process_time()
        try:
            read(data)
        except EXPECTED as error:
            refusal = type(error).__name__
        except Exception as error:  # no refusal: the name says which one it is
            refusal = f"{error!r:.200}"
        spent_s, growth_mib = time.process_time() - began, peak_mib() - before
        costs[name] = {"refusal": refusal, "growth_mib": growth_mib, "limit_mib": LIMIT / 2**20, "cpu_s": spent_s}
    print(json.dumps(costs))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
