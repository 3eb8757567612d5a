"""The journal of a search: each step is noted before it is run, and its result before the next one is chosen.

A search that is resumed replays it and chooses as it would have: what is run next follows from the results alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from fedtune.errors import StoreError
from fedtune.search.steps import Cost, Result, Step
from fedtune.store import files, journal
from fedtune.store.journal import End, Journal, Record
from fedtune.store.lock import lock_run

NAME = "search.journal"
ADVICE = "put back a copy of the folder, or start another search"


class SearchJournal:
    """The journal of a search in its folder, whose lock `open` holds."""

    def __init__(
        self, path: Path, end: End, inputs: Mapping[str, str], results: list[Result], step: Step | None
    ) -> None:
        self._journal = Journal(path, end)
        self.inputs = inputs
        """What the search was started with; nothing before `begin`."""
        self.results = results
        """In the order in which they came."""
        self.step = step
        """The step that has begun and has no result yet."""

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Self]:
        """Give the journal of a folder, new or replayed.

        Raises:
            StoreError: if another process writes it, or it is damaged.
        """
        with lock_run(folder):
            own = cls(folder / NAME, *replay(folder))
            try:
                yield own
            finally:
                own._journal.close()

    def begin(self, inputs: Mapping[str, str]) -> None:
        """Note what this process was started with."""
        self._journal.append("start", {"inputs": dict(inputs)})
        self.inputs = self.inputs or inputs

    def start(self, step: Step) -> None:
        """Note the step that is run next."""
        self._journal.append("step", encode_step(step))
        self.step = step

    def finish(self, result: Result) -> None:
        """Note how the step has ended."""
        self._journal.append("result", encode_result(result))
        self.results.append(result)
        self.step = None


def replay(folder: Path) -> tuple[End, Mapping[str, str], list[Result], Step | None]:
    """Return where a search's journal ends, what it was started with, its results, and the step without one.

    Raises:
        StoreError: naming the first record that cannot be trusted.
    """
    path, inputs, results, steps = folder / NAME, list[Mapping[str, str]](), list[Result](), list[Step]()

    def apply(record: Record) -> None:
        try:
            if record.kind == "start":
                inputs.append({str(key): str(value) for key, value in record.fields["inputs"].items()})
            elif record.kind == "step" and len(steps) == len(results):
                steps.append(decode_step(record.fields))
            elif record.kind == "result" and len(steps) == len(results) + 1:
                results.append(decode_result(record.fields, steps[-1]))
            else:
                raise StoreError(f"expected a step and its result in turn; got {record.kind!r}")
        except (KeyError, TypeError, ValueError, AttributeError, StoreError) as error:
            raise StoreError(f"{path}, record {record.n} ({record.kind}): {error}; {ADVICE}") from error

    if not path.exists():
        return End(), {}, [], None
    end = journal.read(path, apply)
    return end, inputs[0] if inputs else {}, results, steps[-1] if len(steps) > len(results) else None


def read_search(folder: Path) -> tuple[Mapping[str, str], Sequence[Result]]:
    """Return what a search was started with, and its results; safe beside a process that runs it.

    Raises:
        StoreError: if the folder holds none, or it is damaged.
    """
    _, inputs, results, _ = replay(folder)
    if not inputs:
        raise StoreError(f"{folder}: expected the folder of a search; got none; make one with fedtune search RECIPE")
    return inputs, results


def encode_step(step: Step) -> Mapping[str, Any]:
    values = {key: json.dumps(value) for key, value in step.values.items()}
    fields = {"trial": step.trial, "since": step.since, "until": step.until, "segment": step.segment, "values": values}
    source = {} if step.source is None else {"source": step.source, "source_segment": step.source_segment}
    return {**fields, **source}


def decode_step(fields: Mapping[str, Any]) -> Step:
    numbers = {key: int(fields[key]) for key in ("trial", "since", "until", "segment")}
    source = {key: int(fields[key]) for key in ("source", "source_segment") if key in fields}
    return Step(**numbers, **source, values={key: plain(json.loads(text)) for key, text in fields["values"].items()})


def plain(value: Any) -> Any:
    """Return lists as tuples, as a bound recipe holds them."""
    return tuple(map(plain, value)) if isinstance(value, list) else value


def encode_result(result: Result) -> Mapping[str, Any]:
    cost = result.cost
    return {
        "trial": result.step.trial,
        # As texts, which give every bit of a number again: records hold no fractions.
        "score": "" if result.score is None else repr(result.score),
        "scores": {str(round): repr(score) for round, score in result.scores.items()},
        "reason": result.reason,
        "state": result.state,
        "client_rounds": cost.client_rounds,
        "bytes_down": cost.bytes_down,
        "bytes_up": cost.bytes_up,
        "seconds": repr(cost.seconds),
    }


def decode_result(fields: Mapping[str, Any], step: Step) -> Result:
    if fields["trial"] != step.trial:
        raise ValueError(f"expected the result of trial {step.trial}; got that of {fields['trial']}")
    cost = {key: int(fields[key]) for key in ("client_rounds", "bytes_down", "bytes_up")}
    return Result(
        step,
        float(fields["score"]) if fields["score"] else None,
        reason=str(fields["reason"]),
        cost=Cost(**cost, seconds=float(fields["seconds"])),
        scores={int(round): float(score) for round, score in fields["scores"].items()},
        state=str(fields["state"]),
    )


def copy_run(source: Path, target: Path) -> None:
    """Copy a run directory that no process writes; `target` is there whole, or not at all.

    Raises:
        StoreError: if it cannot be copied.
    """
    with lock_run(source), files.store_errors(target), files.new_folder(target) as part:
        shutil.copytree(source, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
