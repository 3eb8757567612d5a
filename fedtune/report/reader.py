"""A run directory as values: the recipe, one record per round, and the summary."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedtune.errors import StoreError
from fedtune.rounds.record import Metrics, RoundRecord
from fedtune.store.round_records import RoundLines, scan
from fedtune.store.run_directory import REMEDY, VERSION
from fedtune.store.typed_json import decode


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one set of examples; a metric that does not apply is None."""

    loss: float | None = None
    """Nats per token."""
    perplexity: float | None = None
    bits_per_character: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    rouge_l: float | None = None
    exact_match: float | None = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    preferred: float | None = None
    examples: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class ClientScores(Scores):
    """Scores on the held-out rows of one named client."""

    client: str = ""


@dataclass(frozen=True)
class TenthScores(Scores):
    """Mean scores of the tenth of clients that a model serves worst, by metric; `examples` are those of the loss."""

    clients: int = 0
    """How many clients the tenth is."""


@dataclass(frozen=True)
class Base:
    name: str
    digest: str = ""
    parameters: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The global model at one moment: on the test data, and over the clients' held-out rows."""

    test: Scores | None = None
    held_out: Mapping[str, Scores] = field(default_factory=dict)
    mean: Scores | None = None
    worst: ClientScores | None = None
    worst_tenth: TenthScores | None = None
    """None for ten clients or fewer, of which it is the worst client."""


@dataclass(frozen=True)
class ModelMean:
    """A model's scores over clients: their mean, and those of the tenth of them that it serves worst."""

    mean: Scores = field(default_factory=Scores)
    worst_tenth: TenthScores = field(default_factory=TenthScores)


@dataclass(frozen=True)
class OwnModels:
    """Clients' own models beside the global one and the base, on the same rows of the same clients."""

    kind: str
    round: int
    clients: int
    examples: int
    base: ModelMean
    server: ModelMean
    own: ModelMean
    stored: int | None = None
    """How many clients have stored one; None where nothing is stored."""


@dataclass(frozen=True)
class ClientTotal:
    examples: int | None = None
    rank: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    failures: int = 0
    verb: str = ""
    """What it did last, in a run in which some clients descend and others probe."""


@dataclass(frozen=True)
class Sample:
    """The answers to one prompt before and after."""

    prompt: str
    before: str
    after: str
    reference: str = ""
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Of the answers `before` and `after`: `rouge_l`, and `loss` of the reference."""


@dataclass(frozen=True)
class FailureRecord:
    round: int
    client: str
    kind: str
    reason: str


@dataclass(frozen=True)
class DeviceField:
    """One number of a device's profile."""

    value: str
    provenance: str = ""
    """datasheet, measured or assumed."""


@dataclass(frozen=True)
class Devices:
    """The devices that clients are simulated on."""

    clients: Mapping[str, str] = field(default_factory=dict)
    """Name of the profile by client."""
    profiles: Mapping[str, Mapping[str, DeviceField]] = field(default_factory=dict)
    clock: str = ""
    """How time is simulated, e.g. of which model the operations are."""


@dataclass(frozen=True)
class ScoredRound:
    """A round with its score and the state after it."""

    round: int
    score: float | None = None
    state_digest: str = ""


@dataclass(frozen=True)
class Selection:
    """Which round's model is the run's result, and why."""

    keep: Literal["last", "best"] = "last"
    metric: str = "loss"
    round: int = 0
    """Whose model is the result."""
    best: ScoredRound | None = None
    last: ScoredRound | None = None
    ended: str = ""
    """Why the run ended before `rounds.count`; empty where it did not."""


@dataclass(frozen=True)
class Summary:
    """The content of summary.json."""

    version: int
    name: str
    method: str
    seed: int
    rounds: int
    state: Literal["finished", "interrupted"]
    base: Base
    before: Evaluation
    after: Evaluation
    trainable: int | None = None
    clients: Mapping[str, ClientTotal] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    sample: Sample | None = None
    samples: tuple[Sample, ...] = ()
    """Of `evaluate.prompts`."""
    failures: tuple[FailureRecord, ...] = ()
    adapter_digest: str = ""
    state_digest: str = ""
    selection: Selection = field(default_factory=Selection)
    personal: OwnModels | None = None
    """None where no client has a model of its own."""
    clock_s: float = 0.0
    deployed: Scores | None = None
    """On the test data, of the model as it is deployed, after the last round that scored it."""
    devices: Devices = field(default_factory=Devices)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str | int | float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run directory; name, method and seed come from the summary or, without one, from the recipe."""

    path: Path
    name: str
    method: str
    seed: int
    recipe: str
    """The text of recipe.toml; empty where there is none."""
    rounds: tuple[RoundRecord, ...]
    """Rounds 0, 1, 2, ...; at least one."""
    summary: Summary | None
    torn: bool
    """The last line of rounds.jsonl was cut off by an interruption and is left out."""
    missing: tuple[str, ...] = ()
    """What of the directory is not there, as it may be with a copy: a sentence each."""

    @property
    def state(self) -> str:
        return self.summary.state if self.summary else "interrupted"


def read_run(path: Path) -> Run:
    """Read a run directory.

    A last line that was cut off is left out if the run did not finish; a run that did not finish may lack summary.json.
    Of a copy rounds.jsonl is enough; what else is missing is named.

    Raises:
        StoreError: naming file, line and key of anything that is malformed, or if there are no rounds.
    """
    recipe = read_text(path / "recipe.toml") if (path / "recipe.toml").exists() else ""
    table = recipe_table(path)
    summary = read_summary(path / "summary.json")
    lines = read_lines(path / "rounds.jsonl", finished=summary is not None and summary.state == "finished")
    method = table.get("method", {})
    return Run(
        path=path,
        name=summary.name if summary else str(table.get("name", path.resolve().name)),
        method=summary.method if summary else str(method.get("name", "") if isinstance(method, dict) else method),
        seed=summary.seed if summary else seed_of(table),
        recipe=recipe,
        rounds=lines.records,
        summary=summary,
        torn=lines.torn_bytes > 0,
        missing=tuple(missing_parts(recipe, table, summary, lines.records[-1].round)),
    )


def recipe_table(path: Path) -> Mapping[str, Any]:
    """Return the tables of a run's recipe; none where it is not there.

    Raises:
        StoreError: if it is no TOML.
    """
    file = path / "recipe.toml"
    if not file.exists():
        return {}
    try:
        return tomllib.loads(read_text(file))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StoreError(f"{file}: expected TOML; got {error}; restore it from the run's start") from error


def seed_of(table: Mapping[str, Any]) -> int:
    seed = table.get("seed", 0)
    return seed if isinstance(seed, int) else 0


def missing_parts(recipe: str, table: Mapping[str, Any], summary: Summary | None, last: int) -> Iterator[str]:
    """Yield a sentence for each part of a run directory that a report would show and that is not there."""
    if not recipe:
        known = "name, method and seed are those of summary.json" if summary else "method and seed are not known"
        yield f"recipe.toml is not in the folder: {known}, and what was asked is not shown."
    rounds = table.get("rounds", {})
    count = rounds.get("count") if isinstance(rounds, dict) else None
    if summary is None and (not recipe or count == last):
        yield (
            f"summary.json is not in the folder: the run goes on, stopped after round {last}, or the file was not "
            "copied; versions, answers and scores at the end are not shown."
        )
    if summary is not None and summary.rounds > last:
        yield f"rounds.jsonl ends with round {last} and the run with round {summary.rounds}: copy it again."


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StoreError(f"{path}: expected this file in a run directory; got none; give the folder of a run") from None
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: expected UTF-8 text; got {error}; restore the file") from error


def read_summary(path: Path) -> Summary | None:
    """Return the content of summary.json, or None where there is none.

    Raises:
        StoreError: naming the key of the first value that is malformed.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{path}, line {error.lineno}: expected JSON; got {error.msg}; delete it and resume the run"
        ) from error
    # Brackets within brackets, thousands deep.
    except RecursionError as error:
        raise StoreError(f"{path}: expected JSON; got too deep a one; delete it and resume the run") from error
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise StoreError(f"{path}: expected version {VERSION}; got {version!r}; read it with the fedtune that wrote it")
    return decode(Summary, value, str(path))


def read_lines(path: Path, *, finished: bool) -> RoundLines:
    """Return the records of rounds.jsonl, at least one."""
    if not path.exists():
        raise StoreError(f"{path}: expected this file in a run directory; got none; give the folder of a run")
    lines = scan(path)
    if finished and lines.torn_bytes:
        # A run writes its summary after the last line is on the disk, so no crash of its own can have torn it.
        raise StoreError(
            f"{path}, line {len(lines.records) + 1}: expected a whole line, for summary.json says that the run "
            f"finished; got a line that is cut off; {REMEDY}"
        )
    if not lines.records:
        raise StoreError(f"{path}: expected at least one complete round; got none; let the run finish a round first")
    return lines


def finite(value: float | None) -> float:
    """Return the number, or NaN where there is none that can be drawn."""
    return value if value is not None and math.isfinite(value) else math.nan


def loss_of(metrics: Metrics | None) -> float:
    """Return the loss among a model's scores, or NaN where it was not measured."""
    return finite(metrics.get("loss")) if metrics else math.nan


def scores_of(metrics: Metrics) -> Scores:
    """Return the metrics of a record that a report shows."""
    return decode(Scores, metrics, "scores")
