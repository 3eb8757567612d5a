"""The benchmarks that `fedtune evaluate --tasks` knows: where their files come from, and how their rows are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from fedtune.errors import ConfigError, Fault
from fedtune.evaluation import gsm8k, humaneval, multiple_choice
from fedtune.evaluation.files import Row, read_rows, split_file
from fedtune.evaluation.items import Problem, Question
from fedtune.seeds import derive, generator

Read: TypeAlias = Callable[[Sequence[Row], Sequence[Row], int], Sequence[Question] | Sequence[Problem]]
"""(rows to ask, rows to show, shots) -> items"""


@dataclass(frozen=True)
class Task:
    """A benchmark with published files."""

    name: str
    kind: Literal["choice", "answer", "code"]
    """How it is scored: by the likelihood of options, by what the model writes, or by what its programs do."""
    source: str
    """Where its files can be had."""
    columns: str
    """What its rows must have."""
    shots: int
    """Answered questions before each one, unless the user asks for another number."""
    shown: Sequence[str]
    """Splits whose rows are shown, the first that there is."""
    read: Read


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="mmlu",
            kind="choice",
            source="the data set cais/mmlu (configuration all) or github.com/hendrycks/test",
            columns="question, choices, answer, subject",
            shots=5,
            shown=("dev",),
            read=multiple_choice.mmlu,
        ),
        Task(
            name="arc",
            kind="choice",
            source="the data set allenai/ai2_arc (ARC-Easy or ARC-Challenge)",
            columns="question, choices (text and label), answerKey",
            shots=0,
            shown=("train", "validation"),
            read=multiple_choice.arc,
        ),
        Task(
            name="gsm8k",
            kind="answer",
            source="the data set openai/gsm8k or github.com/openai/grade-school-math",
            columns="question, answer",
            shots=8,
            shown=("train",),
            read=gsm8k.problems,
        ),
        Task(
            name="humaneval",
            kind="code",
            source="the data set openai/openai_humaneval or github.com/openai/human-eval",
            columns="prompt, test, entry_point",
            shots=0,
            shown=(),
            read=humaneval.problems,
        ),
    )
}
"""By the name that --tasks takes."""


@dataclass(frozen=True)
class Asked:
    """One benchmark as it will be asked."""

    task: Task
    path: Path
    """File of the questions."""
    shots: int
    rows: Sequence[Row]
    shot_rows: Sequence[Row]

    def items(self, shots: int | None = None) -> Sequence[Question] | Sequence[Problem]:
        """Return the questions, after another number of shots if one is given."""
        return self.task.read(self.rows, self.shot_rows, self.shots if shots is None else shots)


def load(
    task: Task, *, data: Mapping[str, Path], shots: int | None = None, limit: int | None = None
) -> tuple[Asked, int]:
    """Read a benchmark's files; return it, and how many rows its file has.

    Args:
        task: of the registry.
        data: by task its file or folder, and by `TASK.shots` the file of the rows to show, where it is another.
        shots: answered questions before each one; None for the benchmark's own number.
        limit: ask so many rows, drawn without regard to the order of the file: always the same of one file.

    Raises:
        ConfigError: if a file is not there or not of this benchmark; it says where to get one.
    """
    key, hint = f"--data {task.name}", f"get it from {task.source}; fedtune downloads nothing"
    source = data.get(task.name)
    if source is None:
        expected = f"{key}=PATH, a file or folder of rows with {task.columns}"
        raise ConfigError(Fault("--tasks", expected, f"{task.name} without one", hint))
    number = task.shots if shots is None else shots
    path = split_file(source, ("test", "validation", "val"), key, hint)
    rows = read_rows(path, key)
    taken = draw(len(rows), limit, task.name)
    shown = read_rows(shots_file(task, data, source, hint), f"{key}.shots") if number else []
    asked = Asked(task, path, number, [rows[place] for place in taken], shown)
    asked.items()  # every row is read before a model is loaded
    return asked, len(rows)


def shots_file(task: Task, data: Mapping[str, Path], source: Path, hint: str) -> Path:
    """Return the file of the rows to show: the one that was named, or that of the same folder."""
    key = f"{task.name}.shots"
    if key in data:
        return split_file(data[key], task.shown, f"--data {key}", hint)
    if source.is_dir():
        return split_file(source, task.shown, f"--data {key}", f"{hint}, or set --shots {task.name}=0")
    expected = f"{key}=FILE, whose first rows are shown before each question"
    raise ConfigError(Fault("--data", expected, "none", f"give one, or set --shots {task.name}=0"))


def draw(count: int, limit: int | None, name: str) -> Sequence[int]:
    """Return all places, or so many, drawn by the benchmark's name and in order: files are often sorted by subject."""
    if limit is None or count <= limit:
        return range(count)
    order = generator(derive(0, "evaluate.limit", client=name)).permutation(count)
    return sorted(order[:limit].tolist())
