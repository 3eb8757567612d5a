"""A tracker: another tool's record of a run, which is sent the numbers of its rounds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

PROJECT = "fedtune"
"""Experiment or project that runs are put in, where the tracker's own environment names no other."""

Rows: TypeAlias = Sequence[tuple[int, Mapping[str, float]]]
"""Rounds in order, each with its finite numbers by metric."""
Value: TypeAlias = str | int | float | bool
TrackerName: TypeAlias = Literal["tensorboard", "mlflow", "trackio", "wandb"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given of a run when it begins, or goes on."""

    name: str
    folder: Path
    """The run directory."""
    id: str = ""
    """By which the tracker knows it from an earlier process; empty for a run that is new to it."""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    """The recipe's settings by dotted key."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Versions, and the digest of the base."""


@dataclass(frozen=True)
class Ending:
    """How a run has ended."""

    state: Literal["finished", "interrupted"]
    result: Path | None = None
    """Folder to send as an artifact; None to send none."""


class Tracker(Protocol):
    """One run in a tracker. Any of these may raise anything: what they call is another package, or a network."""

    @property
    def id(self) -> str:
        """By which the run is taken up again; another one than `TrackedRun.id` if that was not there any more."""
        ...

    @property
    def place(self) -> str:
        """Where the run is, in words for people."""
        ...

    def log(self, rows: Rows) -> None: ...

    def end(self, ending: Ending) -> None: ...


def metric_name(name: str) -> str:
    """Return a metric's name in the characters that every tracker takes; a client's name may hold any.

    >>> metric_name("training/../hôpital:1/after")
    'training/_/h_pital_1/after'
    """
    parts = [re.sub(r"[^A-Za-z0-9_. -]", "_", part) for part in name.split("/")]
    return "/".join("_" if part.strip(". ") == "" else part for part in parts)


def without_password(place: str) -> str:
    """Return an address without user and password, to be shown.

    >>> without_password("https://ana:secret@track.example.org/x")
    'https://track.example.org/x'
    """
    return re.sub(r"(?<=://)[^/@]*@", "", place)
