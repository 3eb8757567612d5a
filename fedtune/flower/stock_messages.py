"""Messages to clients that know nothing of fedtune, and their replies, matched by the message that each one answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.flower.frozen_change import FROZEN, digest
from fedtune.flower.peft_records import PeftState, arrays_to_record, to_record
from fedtune.flower.replies import error_reason
from fedtune.flower.stock_round import Federation, Order, order, sent_state
from fedtune.messages import Failure


@dataclass(frozen=True)
class Keys:
    """Names that the clients' app and the strategy have agreed on, as the arguments of Flower's FedAvg name them."""

    arrays: str
    config: str
    examples: str


@dataclass(frozen=True)
class Asked:
    """What one client was sent."""

    order: Order | None
    """None: no factors, because its rank is not known yet."""
    message: Message

    @property
    def num_bytes(self) -> int:
        """Of the arrays."""
        return arrays_bytes(self.message.content)


def ask(
    federation: Federation,
    state: Any,
    clients: Mapping[str, tuple[int, int]],
    kind: str,
    config: Mapping[str, Any],
    keys: Keys,
) -> Mapping[str, Asked]:
    """Return a message for each client, with what it is asked.

    Args:
        federation: that they belong to.
        state: of the method, before the round.
        clients: (node id, rank) by name; rank 0 is one that is not known.
        kind: Flower's type of the message.
        config: of the user, for all clients.
        keys: names of the records.
    """
    contents, asked = dict[Any, RecordDict](), dict[str, Asked]()
    for name, (node, rank) in clients.items():
        own = order(federation, state, name, rank) if rank else None
        # Clients that are sent the same numbers share the records: Flower hashes each of them once.
        key = shared_key(own)
        if key not in contents:
            contents[key] = content_of(federation, state, own, config, keys)
        if own is not None and FROZEN in contents[key].array_records:
            own = replace(own, frozen_digest=digest(contents[key].array_records[FROZEN]))
        asked[name] = Asked(own, Message(contents[key], node, kind))
    return asked


def shared_key(own: Order | None) -> tuple[int, int, int]:
    """Return what two clients have in common that are sent the same."""
    if own is None:
        return (0, 0, 0)
    local = own.assignment.lora.blobs.get("local", {})
    sides = [len(a) for key, a in local.items() if key.endswith(".a")]
    # A fresh row of A is the client's own.
    whole = sides and all(rows == own.rank for rows in sides)
    return own.rank, id(local) if whole else 0, 0 if whole else own.assignment.lora.a_key


def content_of(
    federation: Federation, state: Any, own: Order | None, config: Mapping[str, Any], keys: Keys
) -> RecordDict:
    """Return what a client is sent; without an order modules_to_save alone."""
    if own is None:
        alone = PeftState({}, state.saved, federation.prefix)
        return RecordDict({keys.arrays: to_record(alone), keys.config: ConfigRecord(dict(config))})
    alpha = float(federation.alpha(own.rank))
    records: dict[str, Any] = {
        keys.arrays: to_record(sent_state(federation, own)),
        keys.config: ConfigRecord({**config, "lora-rank": own.rank, "lora-alpha": alpha}),
    }
    if own.frozen:
        records[FROZEN] = arrays_to_record({federation.prefix + key: array for key, array in own.frozen.items()})
    return RecordDict(records)


def arrays_bytes(content: RecordDict) -> int:
    """Return the bytes of the arrays in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def read_answers(
    asked: Mapping[str, Asked], replies: Iterable[Message]
) -> tuple[Mapping[str, RecordDict], Sequence[Failure]]:
    """Return the contents of the replies by client, in the order of the clients' names, and who sent none."""
    # By the message that is answered, never by the sender that a reply names itself.
    clients = {one.message.metadata.message_id: name for name, one in asked.items()}
    contents, failures = dict[str, RecordDict](), dict[str, Failure]()
    for reply in replies:
        name = clients.pop(reply.metadata.reply_to_message_id, None)
        if name is None:
            continue
        if reply.has_error():
            failures[name] = Failure.from_text(name, error_reason(reply))
        else:
            contents[name] = reply.content
    failures |= {
        name: Failure(name, expected="a reply in time", got="none", kind="late") for name in sorted(clients.values())
    }
    return dict(sorted(contents.items())), [failures[name] for name in sorted(failures)]
