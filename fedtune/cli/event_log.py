"""Events of the link on standard error: a line of text for people, or a JSON object for log collectors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Literal, TextIO, TypeAlias

from fedtune.link.audit_log import RecordEvent
from fedtune.link.envelopes import RESULT
from fedtune.terminal.text import duration, printable, size

LogFormat: TypeAlias = Literal["text", "json"]

EVENT_TEXTS: Mapping[str, str] = {
    "listening": "listening on {address}",
    "enrolment": "enrolment on {address}",
    "queued": "{client} asks for a certificate; its request waits in the queue; fingerprint {fingerprint}",
    "delivered": "{client} has its certificate",
    "renewed": "{client} has a new certificate",
    "health": "health and metrics on http://{address}/",
    "serving": "run {run}, {rounds} rounds, recipe {recipe:.16}",
    "round": "round {round} of {rounds} begins with {clients}",
    "committed": (
        "round {round}: {updates} of {asked} updates, up {up:size}, down {down:size}, {ms:ms}{scores:tail}; "
        "state {state:.16}"
    ),
    "base": "round 0: the base has {scores}",
    "unused": "round {round}: {client} {why}: {reason}",
    "closed": "closed {reason}",
    "barred": "{client} is blocked: {reason}",
    "refused": "{client} refused: {reason}",
    "declined": "round {round}: {client} declines: {veto}, {reason}",
    "redial": "dials the server again: {reason}",
    "dropped": "{client} drops its order ({code}): {reason}",
    "lost": "{client} is lost in round {round}: {reason}",
    "stopped": "server stopped",
    "complete": "the run is complete after round {rounds}",
    "left": "{client} has gone",
    "rival": "{client}: {reason}",
    "note": "{text}",
    "warning": "warning: {text}",
    "roster": "took the roster version {version}",
    "waits": "waits: this device is {reason}",
    "works": "works again",
    "loaded": "base and data loaded in {seconds} s",
    "finished": "the run is complete",
    "draining": "the server goes down; waiting for it to come back",
    "scored": "round {round}: the global model has {scores}",
    "trained": "round {round}: {work}; up {up:size}, down {down:size}{line}: {verdict}",
    "result": "the model of round {round} is in {path}, {bytes:size}",
    "over": "the run {run} was complete, and no server has answered for {seconds} s; start join again for another run",
    "unreached": "no connection to {server}: {reason}; trying again",
    "reached": "connected again",
    "receipt": "round {round}: {client} {verdict} {reason}",
    "withdrawn": "round {round}: withdrawn by the server",
    "failed": "round {round}: {reason}",
    "cut": "round {round}: the connection was cut after {bytes:size}",
    "put off": "round {round}: put off: {reason}",
    "died": "{reason}",
}
"""Text of an event by kind; kinds that are not here are in the audit log alone."""
FAULTS_ONLY = frozenset({"receipt"})
"""Kinds that people see only when something is wrong."""
OWN_CHOICE = "SCORES_NOT_ALLOWED"
"""Veto that a site's log need not repeat in each round: the site's file says it."""


class FieldText:
    """A field of an event, which formats itself as a size, a time, or printable text."""

    def __init__(self, value: int | str) -> None:
        self._value = value

    def __format__(self, spec: str) -> str:
        match spec:
            case "size":
                return size(float(self._value))
            case "tail":
                return f"; {printable(self._value)}" if self._value else ""
            case "ms":
                return duration(float(self._value) / 1000)
            case _:
                return format(printable(self._value), spec)


def format_event(kind: str, fields: Mapping[str, int | str]) -> str:
    """Return an event as a line of text; empty if people need not see it."""
    text = EVENT_TEXTS.get(kind)
    if text is None or (kind in FAULTS_ONLY and fields.get("verdict") in ("ACCEPTED", "NOTED")):
        return ""
    # A server says what it makes of a decline in a line of its own, except at the end of the run.
    if kind == "declined" and (fields["veto"] == OWN_CHOICE or ("client" in fields and fields.get("task") != RESULT)):
        return ""
    texts = {name: FieldText(value) for name, value in fields.items()}
    for name in ("client", "reason", "scores"):
        texts.setdefault(name, FieldText("this site" if name == "client" else ""))
    # With TLS and gRPC, both ways; not every system counts them.
    line = [size(float(fields[name])) for name in ("line_up", "line_down") if name in fields]
    texts["line"] = FieldText(f" ({' and '.join(line)} on the line)" if line else "")
    return " ".join(text.format_map(texts).split())


def event_writer(form: LogFormat, file: TextIO | None = None, *, now: Callable[[], float] = time.time) -> RecordEvent:
    """Return a function that writes each event to a file, or to standard error without one."""
    out = file if file is not None else sys.stderr

    def record(kind: str, **fields: int | str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now()))
        if form == "json":
            out.write(json.dumps({"time": stamp, "event": kind, **fields}) + "\n")
        elif text := format_event(kind, fields):
            out.write(f"{stamp[11:19]} {text}\n")
        out.flush()

    return record
