from __future__ import annotations

from fedtune.report.reader import read_run
from fedtune.report.tables import failures
from tests.report.conftest import WriteRun


def test_failures_are_listed_without_a_summary(write_run: WriteRun) -> None:
    path = write_run(clients=3, rounds=2)
    with_summary = failures(read_run(path))
    (path / "summary.json").unlink()
    assert list(failures(read_run(path))) == list(with_summary)
    assert len(with_summary) > 0
