from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.evaluation.tasks import TASKS, draw, load
from tests.evaluation.conftest import arc_row, gsm8k_row, mmlu_row, write

ROWS = {"mmlu": mmlu_row, "arc": arc_row, "gsm8k": gsm8k_row}
"""Of the tasks that show answered questions."""


@pytest.mark.parametrize("name", ROWS)
def test_a_folder_gives_questions_and_shots(name: str, tmp_path: Path) -> None:
    row, task = ROWS[name], TASKS[name]
    write(tmp_path / "test.jsonl", *(row(k) for k in range(3)))
    write(tmp_path / f"{task.shown[0]}-00000-of-00001.jsonl", *(row(k) for k in range(10, 20)))
    asked, count = load(task, data={name: tmp_path}, shots=2)
    assert (count, len(asked.items()), asked.path.name) == (3, 3, "test.jsonl")
    assert asked.items()[0].prompt.count("\n\n") == 2 + (name == "mmlu")  # mmlu introduces the subject first
    assert len(asked.items(0)[0].prompt) < len(asked.items()[0].prompt)


@pytest.mark.parametrize("name", TASKS)
def test_without_files_it_says_where_to_get_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--data {name}=PATH.*get it from the data set .*downloads nothing"):
        load(TASKS[name], data={})
    with pytest.raises(ConfigError, match=r"which is not there; get it from the data set .*downloads nothing"):
        load(TASKS[name], data={name: tmp_path / "none"})
    with pytest.raises(ConfigError, match=r"expected a file such as test.jsonl or .*; got an empty folder"):
        load(TASKS[name], data={name: tmp_path})


def test_shots_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    test = write(tmp_path / "a.jsonl", gsm8k_row(1))
    with pytest.raises(ConfigError, match=r"expected gsm8k.shots=FILE, .*set --shots gsm8k=0"):
        load(TASKS["gsm8k"], data={"gsm8k": test})
    shown = write(tmp_path / "b.jsonl", gsm8k_row(5), gsm8k_row(6))
    asked, _ = load(TASKS["gsm8k"], data={"gsm8k": test, "gsm8k.shots": shown}, shots=1)
    assert "What is 5 plus 1?" in asked.items()[0].prompt
    write(tmp_path / "folder" / "test.jsonl", gsm8k_row(1))
    with pytest.raises(ConfigError, match=r"expected a file such as train.jsonl in .*; got test.jsonl; .*gsm8k=0"):
        load(TASKS["gsm8k"], data={"gsm8k": tmp_path / "folder"})


def test_files_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ConfigError, match="a file of rows"):
        load(TASKS["arc"], data={"arc": tmp_path / "x.txt"})
    (tmp_path / "y.jsonl").write_text("")
    with pytest.raises(ConfigError, match="at least one row"):
        load(TASKS["arc"], data={"arc": tmp_path / "y.jsonl"})
    (tmp_path / "z.jsonl").write_text('{"question": ')
    with pytest.raises(ConfigError, match="one JSON object per line"):
        load(TASKS["arc"], data={"arc": tmp_path / "z.jsonl"})
    write(tmp_path / "two" / "test.jsonl", arc_row())
    write(tmp_path / "two" / "test-1.jsonl", arc_row())
    with pytest.raises(ConfigError, match=r"one file test\.\*.*name the file itself"):
        load(TASKS["arc"], data={"arc": tmp_path / "two"})


def test_a_limit_draws_the_same_items_from_the_whole_file() -> None:
    places = draw(1000, 50, "mmlu")
    assert places == draw(1000, 50, "mmlu") == sorted(set(places))
    assert len(places) == 50
    assert min(places) < 200
    assert max(places) > 800
    assert set(draw(1000, 20, "mmlu")) < set(places)
    assert list(draw(3, 5, "mmlu")) == [0, 1, 2]
