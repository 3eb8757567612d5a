"""How what happens on the link is written: one line a person reads, or one JSON object a log collector does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Literal, TextIO, TypeAlias

from fedtune.cli.text import duration, printable, size
from fedtune.link.audit_log import RecordEvent

Form: TypeAlias = Literal["text", "json"]

TEXTS: Mapping[str, str] = {
    "listening": "listening on {address}",
    "health": "health and metrics on http://{address}/",
    "serving": "run {run}, {rounds} rounds, recipe {recipe:.16}",
    "round": "round {round} of {rounds} begins with {clients}",
    "committed": (
        "round {round}: {updates} of {asked} updates, up {up:size}, down {down:size}, {ms:ms}; state {state:.16}"
    ),
    "unused": "round {round}: {client} {why}: {reason}",
    "barred": "{client} is barred: {reason}",
    "refused": "{client} refused: {reason}",
    "declined": "round {round}: {client} declines: {veto}, {reason}",
    "lost": "{client} is lost in round {round}: {reason}",
    "stopped": "stopped",
    "note": "{text}",
    "warning": "warning: {text}",
    "roster": "took the roster version {version}",
    "loaded": "base and data loaded in {seconds} s",
    "finished": "the run is complete",
    "draining": "the server goes down; waiting for it to come back",
    "unreached": "no connection to {server}: {reason}; trying on",
    "reached": "connected again",
    "receipt": "round {round}: {client} {verdict} {reason}",
    "withdrawn": "round {round}: not wanted any more",
    "failed": "round {round}: {reason}",
    "cut": "round {round}: the connection was cut after {bytes:size}",
    "put off": "round {round}: put off: {reason}",
    "died": "{reason}",
}
"""By kind, what a person is told; kinds that are not here stand in the audit log alone."""
QUIET = frozenset({"receipt"})
"""Told to a person only when something is wrong."""


class JsonWriter:
    """A number that can be formatted as a size or a time, and a text that is made printable."""

    def __init__(self, value: int | str) -> None:
        self._value = value

    def __format__(self, how: str) -> str:
        match how:
            case "size":
                return size(float(self._value))
            case "ms":
                return duration(float(self._value) / 1000)
            case _:
                return format(printable(self._value), how)


def human(kind: str, fields: Mapping[str, int | str]) -> str:
    """Return one line, or nothing where a person need not be told."""
    text = TEXTS.get(kind)
    if text is None or (kind in QUIET and fields.get("verdict") in ("ACCEPTED", "NOTED")):
        return ""
    known = {name: JsonWriter(value) for name, value in fields.items()}
    for name in ("client", "reason"):
        known.setdefault(name, JsonWriter("this site" if name == "client" else ""))
    return " ".join(text.format_map(known).split())


def event_writer(form: Form, file: TextIO | None = None, *, now: Callable[[], float] = time.time) -> RecordEvent:
    """Return what writes each event to a file, standard error without one."""
    out = file if file is not None else sys.stderr

    def tell(kind: str, **fields: int | str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now()))
        if form == "json":
            out.write(json.dumps({"time": stamp, "event": kind, **fields}) + "\n")
        elif text := human(kind, fields):
            out.write(f"{stamp[11:19]} {text}\n")
        out.flush()

    return tell
