"""Seconds until the command and a site are ready: imports, help, and `fedtune join` until its server has it."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.link.federation import COMMAND, Federation, federation  # noqa: E402

RECIPE = """
[model]
base = "none"
[adapter]
rank = 1
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
SITE = '[model]\nbase = "none"\n[adapter]\ntargets = ["q"]\n[data]\nsource = "none"\n'
BARE = "import grpc, numpy, pydantic, cryptography"
"""What the start of a site cannot do without."""
STARTS = {
    "python": ["-c", "pass"],
    "python, grpc numpy pydantic cryptography": ["-c", BARE],
    "import fedtune": ["-c", "import fedtune"],
    "fedtune --help": ["-c", COMMAND, "--help"],
    "fedtune join --help": ["-c", COMMAND, "join", "--help"],
}
"""Processes that end by themselves, by their name in the table: arguments of Python."""


def measure(repeats: int, once: Callable[[], tuple[float, float]]) -> str:
    """Return median and range of (seconds, processor seconds); the first, which fills the disk's cache, is left out."""
    once()
    seconds, work = zip(*(once() for _ in range(repeats)), strict=True)
    return "".join(f"{median(one):8.2f} ({min(one):.2f} to {max(one):.2f})" for one in (seconds, work))


def run(arguments: list[str]) -> tuple[float, float]:
    """Return the seconds of a process, and those of a processor."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, work


def join(running: Federation, number: Iterator[int]) -> tuple[float, float]:
    """Return the same from the start of `fedtune join` until the server says that it has the site, without a base."""
    known = len(running.events("server", "hello"))
    began = time.perf_counter()
    site = running.folder / "site-a" / "site.toml"
    process = running.start(f"site {next(number)}", "-c", COMMAND, "join", str(site), "--log", "json")
    running.until(lambda: len(running.events("server", "hello")) > known)
    seconds = time.perf_counter() - began
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    process.kill()
    process.wait()
    return seconds, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print a line for each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(f"{'':46}seconds, and those of a processor: median and range of {given.repeats}")
    for name, arguments in STARTS.items():
        print(f"{name:46}{measure(given.repeats, partial(run, arguments))}", flush=True)
    # Two sites, so that the round does not begin with the one that is measured.
    sites = ["site-a", "site-b"]
    with (
        tempfile.TemporaryDirectory() as folder,
        federation(Path(folder), RECIPE, sites, site=dict.fromkeys(sites, SITE)) as running,
    ):
        running.serve()
        running.until(lambda: running.events("server", "listening"))
        print(f"{'fedtune join, until connected':46}{measure(given.repeats, partial(join, running, count()))}")


if __name__ == "__main__":
    main()
