"""A further process of one client: it holds the base on its own device, and computes its share of every batch."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedtune.client.perform import perform
from fedtune.client.worker_process import HELD_OUT, TRAIN
from fedtune.data import transfer
from fedtune.data.encode import Example
from fedtune.errors import FedtuneError
from fedtune.messages import ClientUpdate, Measured
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.shares import Shares, connect
from fedtune.rounds.failures import failure_of
from fedtune.simulation.fork_server import read_payload
from fedtune.wire.codec import decode_assignment, encode_update


def main() -> None:
    """Serve the first process; the last arguments are place, size, device, store, and three descriptors."""
    place, size, device, store, *descriptors = sys.argv[-7:]
    payload, messages, life = map(int, descriptors)
    os.umask(0o077)
    # The read ends when the first process is gone, however it ended: no process with a client's data outlives it.
    threading.Thread(target=lambda: (os.read(life, 1), os._exit(0)), daemon=True).start()
    connection: Connection[bytes, bytes] = Connection(messages)
    try:
        connection.send_bytes(b"{}")
        shares = connect(Path(store), int(place), int(size))
        serve(connection, shares, *load_payload(payload, device))
    except EOFError:
        pass
    except BaseException as error:  # its text may quote data, which goes no further than to the first process
        reason = str(error) if isinstance(error, FedtuneError) else failure_of(f"process {place}", error).reason
        connection.send_bytes(json.dumps({"failed": reason}).encode())
        # The process ends with it: the others wait for its sums until its sockets are closed.
        raise


def load_payload(descriptor: int, device: str) -> tuple[Base, Mapping[str, list[Example]]]:
    """Return the base on a device, and the examples of every client; see `worker_process.payload`."""
    spec, parts = read_payload(descriptor)
    model = replace(ModelSettings(**spec["model"]), device=device, processes=1)
    root = Path(spec["root"])
    base = load(
        model,
        AdapterSettings(**spec["adapter"]),
        tokenizer=load_tokenizer(model, root),
        root=root,
        seed=spec["seed"],
        labels=spec["labels"],
    )
    return base, {name: list(transfer.decode(part)) for name, part in parts.items()}


def serve(
    connection: Connection[bytes, bytes], shares: Shares, base: Base, examples: Mapping[str, list[Example]]
) -> None:
    """Compute this process's share of one assignment after the other, until the first process closes the connection."""
    connection.send_bytes(json.dumps({"base": base.digest}).encode())
    while True:
        head: Mapping[str, Any] = json.loads(connection.recv_bytes())
        header = connection.recv_bytes()
        bodies = {digest: connection.recv_bytes() for digest in head["bodies"]}
        assignment = decode_assignment(header, bodies)
        name = assignment.plan.client
        update = perform(
            base,
            examples[f"{TRAIN}{name}"],
            assignment,
            threads=head["threads"],
            held_out=examples.get(f"{HELD_OUT}{name}", ()),
            shares=shares,
        )
        connection.send_bytes(json.dumps({"result": result_digest(update)}).encode())


def result_digest(update: ClientUpdate) -> str:
    """Return the digest of what was trained, which is the same in every process; what was measured is not."""
    return sha256(encode_update(replace(update, measured=Measured()))).hexdigest()


if __name__ == "__main__":
    main()
