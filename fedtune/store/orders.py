"""The orders of an asynchronous run in its journal: each is checked against those that no round has settled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import isfinite
from typing import Any

from fedtune.errors import StoreError
from fedtune.messages import Client
from fedtune.rounds.journal import Ask


@dataclass(frozen=True)
class Place:
    """Where the bytes of an update are stored: updates that were made durable together share a blob."""

    blob: str
    offset: int
    length: int


@dataclass(frozen=True)
class Sent:
    """The order of one client."""

    round: int
    """In which it was sent: its client starts from the state before it."""
    ask: int
    """Which of the round's asks it was part of, from 0."""
    now_s: float
    """Seconds of the run then."""
    client: Client
    order: str
    """SHA-256 (hex) of its assignment, or `unfit`."""
    update: Place | None = None
    """None while none is accepted."""


def ask_fields(ask: Ask) -> Mapping[str, Any]:
    """Return the fields of a record of orders: as texts what records hold no numbers for."""
    stated = {
        "memory": {client.name: client.memory_bytes for client in ask.clients if client.memory_bytes},
        "organisations": {client.name: client.organisation for client in ask.clients if client.organisation},
    }
    return {
        "round": ask.round,
        "now": repr(ask.now_s),
        "clients": {client.name: client.num_examples for client in ask.clients},
        "orders": dict(ask.digests),
        **{key: values for key, values in stated.items() if values},
    }


def read_ask(fields: Mapping[str, Any], place: int, unsettled: Mapping[str, Sent]) -> Mapping[str, Sent]:
    """Return the orders of a record, by client.

    Args:
        fields: of the record.
        place: of the ask in its round.
        unsettled: orders that are out.

    Raises:
        StoreError: if a client has no order, or one of an earlier ask.
    """
    clients, orders = dict(fields["clients"]), dict(fields["orders"])
    if clients.keys() != orders.keys():
        raise StoreError(f"expected an order for each client of {sorted(clients)}; got {sorted(orders)}")
    if twice := sorted(clients.keys() & unsettled.keys()):
        raise StoreError(f"expected clients without an order; got another for {twice[0]}")
    memory, organisations = dict(fields.get("memory", {})), dict(fields.get("organisations", {}))
    now_s = float(fields["now"])
    if not isfinite(now_s):
        raise ValueError("now")
    return {
        name: Sent(
            int(fields["round"]),
            place,
            now_s,
            Client(name, int(examples), int(memory.get(name, 0)), str(organisations.get(name, ""))),
            str(orders[name]),
        )
        for name, examples in sorted(clients.items())
    }


def with_updates(unsettled: Mapping[str, Sent], fields: Mapping[str, Any]) -> Mapping[str, Sent]:
    """Return the orders that a record's updates answer, with the places of these.

    Raises:
        StoreError: if an update answers none, or one that has an answer.
    """
    stored = dict[str, Sent]()
    for client, offset, length in fields["updates"]:
        if client not in unsettled or client in stored or unsettled[client].update is not None:
            raise StoreError(f"expected one update of each client in {sorted(unsettled)}; got another of {client}")
        stored[client] = replace(unsettled[client], update=Place(fields["blob"], offset, length))
    return stored


def check_settled(unsettled: Mapping[str, Sent], used: Sequence[str], failures: Iterable[str]) -> None:
    """Raise a StoreError unless a buffer's clients have updates, and those that failed have orders."""
    failed = set(failures)
    lacking = [name for name in used if name not in unsettled or unsettled[name].update is None]
    unknown = sorted(failed - unsettled.keys())
    if lacking or unknown or failed & set(used) or len(set(used)) < len(used):
        wrong = [*lacking, *unknown, *sorted(failed & set(used))] or list(used)
        raise StoreError(f"expected a buffer of accepted updates, each of a client with an order; got {wrong[0]}")


def grouped_asks(orders: Iterable[Sent]) -> Sequence[Ask]:
    """Return orders as they were sent together, the earliest first."""
    ordered = sorted(orders, key=lambda one: (one.round, one.ask, one.client.name))
    asks = []
    for (number, _), group in groupby(ordered, key=lambda one: (one.round, one.ask)):
        members = list(group)
        digests = {one.client.name: one.order for one in members}
        asks.append(Ask(number, members[0].now_s, tuple(one.client for one in members), digests))
    return tuple(asks)
