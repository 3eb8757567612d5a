"""A run directory read into frozen values: the recipe, one record per round, the summary."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedtune.errors import StoreError

VERSION = 1


@dataclass(frozen=True)
class Scores:
    """One model on one set of examples; a metric that makes no sense there is None."""

    loss: float | None = None
    """Nats per token."""
    perplexity: float | None = None
    bits_per_character: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    rouge_l: float | None = None
    exact_match: float | None = None
    examples: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class ClientScores(Scores):
    """Scores on the held-out rows of one named client."""

    client: str = ""


@dataclass(frozen=True)
class ClientRound:
    """What one client did in one round."""

    status: Literal["ok", "failed", "refused", "late", "unfit"]
    reason: str = ""
    rank: int | None = None
    steps: int | None = None
    examples: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    tokens: int | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    norm: float | None = None
    ratio: float | None = None
    """Pruning ratio that was asked for."""
    why: str = ""
    """What spoke for the planner's choice."""
    deadline_s: float | None = None
    compute_s: float | None = None
    """Simulated or measured on the client's device."""
    transfer_s: float | None = None
    overhead_s: float = 0.0
    importance: float | None = None


@dataclass(frozen=True)
class AsideRecord:
    """What came from a client that the round did not wait for."""

    client: str
    reason: str
    kind: str = "late"


@dataclass(frozen=True)
class ModuleRound:
    """The global change of one module after a round."""

    rank: int
    norm: float | None = None
    energy_kept: float | None = None
    """Share of the squared norm that was kept when the state was cut to its rank, in [0, 1]."""
    singular_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl; round 0 is the base before training."""

    version: int
    round: int
    seconds: float
    cohort: tuple[str, ...] = ()
    loss_before: float | None = None
    loss_after: float | None = None
    test: Scores | None = None
    held_out: Mapping[str, Scores] = field(default_factory=dict)
    clients: Mapping[str, ClientRound] = field(default_factory=dict)
    aside: tuple[AsideRecord, ...] = ()
    bytes_down: int = 0
    bytes_up: int = 0
    modules: Mapping[str, ModuleRound] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the method noted of its state."""
    clock_s: float = 0.0
    """Simulated or measured seconds of the run up to here."""
    deployed: Scores | None = None
    """On the test data, of the model pruned to what is deployed."""


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


@dataclass(frozen=True)
class ClientTotal:
    examples: int | None = None
    rank: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    failures: int = 0


@dataclass(frozen=True)
class Sample:
    prompt: str
    before: str
    after: str


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
    """The devices that clients were taken to be."""

    clients: Mapping[str, str] = field(default_factory=dict)
    """Name of the profile by client."""
    profiles: Mapping[str, Mapping[str, DeviceField]] = field(default_factory=dict)
    clock: str = ""
    """How time was told, e.g. of which model the operations are."""


@dataclass(frozen=True)
class Summary:
    """What stands in summary.json."""

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
    failures: tuple[FailureRecord, ...] = ()
    adapter_digest: str = ""
    state_digest: str = ""
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
    """The text of recipe.toml."""
    rounds: tuple[RoundRecord, ...]
    """At least one, in ascending order of `round`."""
    summary: Summary | None
    torn: bool
    """The last line of rounds.jsonl was cut off by an interruption and is left out."""

    @property
    def state(self) -> str:
        return self.summary.state if self.summary else "interrupted"


def read_run(path: Path) -> Run:
    """Read a run directory.

    A last line that was cut off is left out if the run did not finish; a run that did not finish may lack summary.json.

    Raises: StoreError, naming file and line, for anything else that is missing or malformed.
    """
    recipe = _text(path / "recipe.toml")
    try:
        table = tomllib.loads(recipe)
    except tomllib.TOMLDecodeError as fault:
        raise StoreError(
            f"{path / 'recipe.toml'}: expected TOML; got {fault}; restore it from the run's start"
        ) from fault
    summary = _summary(path / "summary.json")
    rounds, torn = _rounds(path / "rounds.jsonl", may_be_torn=summary is None or summary.state == "interrupted")
    method = table.get("method", {})
    return Run(
        path=path,
        name=summary.name if summary else str(table.get("name", path.name)),
        method=summary.method if summary else str(method.get("name", "") if isinstance(method, dict) else method),
        seed=summary.seed if summary else int(table.get("seed", 0)),
        recipe=recipe,
        rounds=rounds,
        summary=summary,
        torn=torn,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StoreError(f"{path}: expected this file in a run directory; got none; give the folder of a run") from None
    except UnicodeDecodeError as fault:
        raise StoreError(f"{path}: expected UTF-8 text; got {fault}; restore the file") from fault


def _summary(path: Path) -> Summary | None:
    if not path.exists():
        return None
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as fault:
        raise StoreError(
            f"{path}, line {fault.lineno}: expected JSON; got {fault.msg}; delete it and resume the run"
        ) from fault
    summary: Summary = _decode(Summary, value, f"{path}: ")
    return summary


def _rounds(path: Path, *, may_be_torn: bool) -> tuple[tuple[RoundRecord, ...], bool]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{path}: expected this file in a run directory; got none; give the folder of a run") from None
    lines = data.split(b"\n")
    records: list[RoundRecord] = []
    torn = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as fault:  # bad JSON or bad UTF-8
            if may_be_torn and number == len(lines):  # nothing ends this line: the writer was stopped within it
                torn = True
                break
            raise StoreError(f"{where}: expected one JSON object; got {fault}; restore the file from a copy") from fault
        record: RoundRecord = _decode(RoundRecord, value, f"{where}: ")
        if records and record.round <= records[-1].round:
            raise StoreError(
                f"{where}: expected a round after {records[-1].round}; got {record.round}; remove the repeat"
            )
        records.append(record)
    if not records:
        raise StoreError(f"{path}: expected at least one complete round; got none; let the run go on first")
    return tuple(records), torn


def _decode(kind: Any, value: object, where: str) -> Any:
    """Return `value` (parsed JSON) as the annotated type `kind`; keys that the type lacks are ignored."""
    if type(value) is kind and kind in (float, int, str):
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        if type(value) in arguments:  # None, or a number or text as it is wanted
            return value
        return _decode(next(each for each in arguments[::-1] if each is not NoneType), value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise _mismatch(where, " or ".join(map(repr, arguments)), value)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    raise _mismatch(where, getattr(origin or kind, "__name__", str(kind)), value)


def _decode_fields(kind: Any, value: Mapping[str, object], where: str) -> Any:
    hints = _hints(kind)
    if "version" in hints and value.get("version") != VERSION:
        raise StoreError(
            f"{where}expected version {VERSION}; got {value.get('version')!r}; read it with the fedtune that wrote it"
        )
    known: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        if entry.name in value:
            known[entry.name] = _decode(hints[entry.name], value[entry.name], f"{where}.{entry.name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise StoreError(f"{where}: expected the key {entry.name!r}; got none; restore the file from a copy")
    return kind(**known)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _mismatch(where: str, expected: str, value: object) -> StoreError:
    return StoreError(f"{where}: expected {expected}; got {value!r:.60}; restore the file from a copy")


def finite(value: float | None) -> float:
    """Return the number, or NaN where there is none that can be drawn."""
    return value if value is not None and math.isfinite(value) else math.nan
