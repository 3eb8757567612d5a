"""Counts what the tests marked `guarantee` have checked; `--guarantees FILE` writes the counts as JSON.

A marked test counts 1, a property the examples that ran to their end, and a test with a loop what it gave to `cases`: a
number is only ever what ran, and a test that failed or was skipped counts nothing.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Generator, Iterator
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COUNT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-minutes", type=float, default=1.0, help="how long a federation is attacked in a row")
    parser.addoption("--guarantees", type=Path, help="write here what the tests of guarantees have checked, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--guarantees")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collected(path), "guarantees")


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Say that so many more cases were checked, after they were: `cases(1)` at the end of a loop's body."""
    stash = request.node.stash
    stash[COUNT] = 0

    def count(number: int) -> None:
        stash[COUNT] += number

    return count


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Count the examples of a property."""
    handle = getattr(pyfuncitem.obj, "hypothesis", None)
    if handle is None or not [*pyfuncitem.iter_markers("guarantee")]:
        return (yield)
    inner = handle.inner_test
    pyfuncitem.stash[COUNT] = 0

    @wraps(inner)
    def counted(*args: Any, **options: Any) -> Any:
        result = inner(*args, **options)
        pyfuncitem.stash[COUNT] += 1
        return result

    handle.inner_test = counted
    try:
        return (yield)
    finally:
        handle.inner_test = inner


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the count into the report, which xdist brings from its workers."""
    report = yield
    names = sorted({name for mark in item.iter_markers("guarantee") for name in mark.args})
    if report.when == "call" and names:
        tier = "full" if item.get_closest_marker("slow") else "fast"
        count = item.stash.get(COUNT, 1)
        report.user_properties.append(("guarantee", {"names": names, "tier": tier, "count": count}))
    return report


class Collected:
    """The marked tests that passed, in the process that writes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.guarantees: dict[str, dict[str, dict[str, int]]] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        values: Any = next((value for key, value in report.user_properties if key == "guarantee"), None)
        if values is None or report.when != "call":
            return
        if not report.passed:
            self.failed.append(report.nodeid)
            return
        test = report.nodeid.partition("[")[0].removeprefix("tests/")
        for name in values["names"]:
            counts = self.guarantees.setdefault(name, {}).setdefault(test, {})
            counts[values["tier"]] = counts.get(values["tier"], 0) + values["count"]

    def pytest_sessionfinish(self) -> None:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        record = {
            "release": version("fedtune"),
            "commit": commit,
            "failed": sorted(self.failed),
            "guarantees": {
                name: dict(sorted(self.guarantees[name].items()))
                for name in sorted(self.guarantees, key=lambda name: int(name[1:]))
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n")
