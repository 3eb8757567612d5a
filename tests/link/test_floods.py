"""Floods of the full tier: the benchmark's six, beside honest members in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"(\w+) +[\d.]+ uploads/s, +([\d.]+)x +dials +(\d+)%, +\S+ ms +memory +([+-][\d.]+) MB"
    r" +audit +([\d.]+) MB/day, stderr +([\d.]+) MB/day"
)


def measure(*floods: str) -> dict[str, tuple[float, ...]]:
    """Return ratio, share of dials, memory, and bytes written to audit log and standard error, by flood."""
    script = [sys.executable, str(ROOT / "benchmarks/floods.py"), "--seconds", "6"]
    script += ["--floods", *floods] if floods else []
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [LINE.fullmatch(line) for line in done.stdout.splitlines() if not line.startswith("none")]
    assert lines, done.stderr[-2000:]
    assert all(lines), done.stdout
    return {line[1]: tuple(map(float, line.groups()[1:])) for line in lines if line is not None}


@pytest.mark.slow
@pytest.mark.guarantee("G14")
def test_honest_members_get_in_and_upload_whatever_flood_there_is() -> None:
    results = measure()
    assert len(results) == 6
    # Once more, alone: what else the machine did in those seconds is no flood.
    if slow := [name for name, (ratio, *_) in results.items() if ratio < 0.3]:
        results |= measure(*slow)
    for name, (ratio, dials, memory, audit, errors) in results.items():
        assert dials == 100, (name, results)
        # Two thirds and more when nothing else runs; the flood has the same cores as the server here.
        assert ratio >= 0.3, (name, results)
        assert memory < 100, (name, results)
        # It was 8,800. A few lines within six seconds make tens of a day.
        assert audit + errors < 200, (name, results)
