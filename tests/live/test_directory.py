from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.live.directory import follow_directory, open_directory
from fedtune.live.feed import Feed
from fedtune.store.lock import lock_run
from fedtune.store.round_records import append_round, read_rounds
from tests.report.conftest import WriteRun
from tests.report.conftest import write_run as write_run


def content(feed: Feed) -> Any:
    return feed.since(0)[1]


def wait_for(feed: Feed, wanted: Any) -> Any:
    version = 0
    while True:
        version, _ = feed.since(version)
        if wanted(content(feed)):
            return content(feed)
        assert feed.wait(version, 30.0)


def test_a_finished_run_that_was_copied_is_shown_as_it_is(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(name="ward", clients=3, rounds=4)
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(run)
    shown = content(open_directory(tmp_path / "copy"))
    assert (shown["head"]["name"], shown["head"]["state"]) == ("ward", "finished")
    assert [row["n"] for row in shown["rounds"]] == [0, 1, 2, 3, 4]
    assert set(shown["clients"]) == {"client-0", "client-1", "client-2"}
    assert shown["head"]["connected"] is None


def test_rounds_alone_are_enough(write_run: WriteRun) -> None:
    run = write_run(rounds=2)
    (run / "recipe.toml").unlink()
    (run / "summary.json").unlink()
    shown = content(open_directory(run))
    assert (shown["head"]["name"], shown["head"]["state"]) == ("run", "stopped")


@pytest.mark.parametrize("recipe", ["name = 3\nrounds = 4\n", "[rounds]\ncount = 'many'\n"])
def test_a_recipe_of_other_types_is_no_obstacle(write_run: WriteRun, recipe: str) -> None:
    run = write_run(rounds=2)
    (run / "recipe.toml").write_text(recipe)
    assert content(open_directory(run))["head"]["rounds"] == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a run directory"):
        open_directory(tmp_path)


def test_a_run_that_another_process_writes_is_followed_to_its_end(write_run: WriteRun) -> None:
    run = write_run(rounds=3)
    records, summary = read_rounds(run), (run / "summary.json").read_text()
    (run / "rounds.jsonl").unlink()
    (run / "summary.json").unlink()
    with lock_run(run):
        append_round(run, records[0])
        feed = open_directory(run)
        assert content(feed)["head"]["state"] == "running"
        with follow_directory(run, feed, every_s=0.01):
            append_round(run, records[1])
            wait_for(feed, lambda shown: len(shown["rounds"]) == 2)
            append_round(run, records[2])
            (run / "summary.json").write_text(summary)
            wait_for(feed, lambda shown: len(shown["rounds"]) == 3)
    with follow_directory(run, feed, every_s=0.01):
        append_round(run, records[3])
        wait_for(feed, lambda shown: len(shown["rounds"]) == 4 and shown["head"]["state"] == "finished")


def test_a_line_that_is_damaged_while_a_page_is_open_is_said_on_it(write_run: WriteRun) -> None:
    run = write_run(rounds=2)
    feed = open_directory(run)
    with follow_directory(run, feed, every_s=0.01), (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"version": 1, "round": 9}) + "\n")
        file.flush()
        wait_for(feed, lambda shown: "rounds.jsonl" in [problem["kind"] for problem in shown["problems"]])
