"""Processes of one client that a launcher such as torchrun has started: the first one talks, all follow its orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from fedtune.errors import ClientError
from fedtune.messages import Assignment
from fedtune.wire.codec import decode_assignment, encode_assignment

PATIENCE = timedelta(days=30)
"""For the next order: a round of other clients takes as long as it does."""


ORDER, END = b"order", b"end"
"""What the first piece of a message says."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a client, and which of them this is."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Over which orders are sent: by the CPU, for a GPU's collectives give up after minutes."""

    def announce(self, assignment: Assignment) -> None:
        """Send an order to the other processes in the bytes of the wire; by the first one."""
        if self.size > 1:
            encoded = encode_assignment(assignment)
            named = [piece for name, body in encoded.blobs.items() for piece in (name.encode(), body)]
            send([ORDER, encoded.header, *named], self.group)

    def end(self, note: str = "") -> None:
        """Have the other processes end, with a note for them; by the first one."""
        if self.size > 1:
            send([END, note.encode()], self.group)

    def follow(self, perform: Callable[[Assignment], object]) -> str:
        """Perform every order of the first process until it ends, and return its note; by the others.

        Raises:
            ClientError: if this client's own program fails.
        """
        while (pieces := receive(self.group))[0] == ORDER:
            _, header, *named = pieces
            blobs = {name.decode(): body for name, body in zip(named[::2], named[1::2], strict=True)}
            try:
                perform(decode_assignment(header, blobs))
            except ClientError as error:
                # What all processes find alike costs one round. After an error of their program's own they are at
                # different steps, and the first one would wait for this one: a launcher ends all of them.
                if error.__cause__ is not None:
                    raise
        return pieces[1].decode()


def ranks_here() -> Ranks:
    """Return the processes that a launcher has started with this one; without a launcher this one alone."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return Ranks()
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(distributed.get_rank(), distributed.get_world_size(), group)


def send(pieces: Sequence[bytes], group: Any) -> None:
    """Broadcast pieces of bytes from the first process: how many, their lengths, and all of them as one tensor."""
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    distributed.broadcast(torch.tensor([len(pieces)], dtype=torch.int64), 0, group=group)
    distributed.broadcast(lengths, 0, group=group)
    distributed.broadcast(torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8), 0, group=group)


def receive(group: Any) -> Sequence[bytes]:
    """Return the pieces that the first process sends."""
    count = torch.zeros(1, dtype=torch.int64)
    distributed.broadcast(count, 0, group=group)
    lengths = torch.zeros(int(count), dtype=torch.int64)
    distributed.broadcast(lengths, 0, group=group)
    whole = torch.zeros(int(lengths.sum()), dtype=torch.uint8)
    distributed.broadcast(whole, 0, group=group)
    ends = torch.cumsum(lengths, 0).tolist()
    return [whole[begin:end].numpy().tobytes() for begin, end in zip([0, *ends], ends, strict=False)]
