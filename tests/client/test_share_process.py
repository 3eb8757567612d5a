from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from fedtune.client.perform import perform
from fedtune.client.share_process import load_payload, result_digest, serve
from fedtune.client.worker_process import payload
from fedtune.data.encode import Example
from fedtune.messages import Assignment, Measured, Plan, Training, TrainLora
from fedtune.model.base import Base
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.shares import ALONE
from fedtune.simulation.fork_server import write_payload
from fedtune.wire.codec import encode_assignment


def assignment(base: Base) -> Assignment:
    training = Training(batch=2, learning_rate=0.01, steps=2)
    return Assignment("fedit", 1, 3, Plan("ann", 2, 2.0, training), TrainLora(a_key=1), base.digest)


def test_it_loads_what_the_first_process_has_and_answers_with_the_digest_of_its_result(
    checkpoints: dict[str, Path], examples: Callable[[int], list[Example]]
) -> None:
    settings = ModelSettings(base=str(checkpoints["llama"]), dtype="float32", device="cuda", processes=2)
    rows = {"ann": examples(4)}
    adapter = AdapterSettings(targets=("q_proj",))
    spec, parts = payload(settings, adapter, rows, root=Path(), seed=0, held_out={"ann": examples(2)})
    base, loaded = load_payload(write_payload(spec, parts), "cpu")
    assert base.device.type == "cpu"
    assert loaded.keys() == {"train/ann", "held_out/ann"}
    first, second = Pipe()
    order = encode_assignment(assignment(base))
    for part in (json.dumps({"threads": 1, "bodies": list(order.blobs)}).encode(), order.header, *order.blobs.values()):
        first.send_bytes(part)
    with pytest.raises(StopIteration):
        serve(Once(second), ALONE, base, loaded)  # type: ignore[arg-type]
    own = perform(base, rows["ann"], assignment(base), threads=1, held_out=examples(2))
    answers = [json.loads(first.recv_bytes()) for _ in range(2)]
    assert answers == [{"base": base.digest}, {"result": result_digest(own)}]


class Once:
    """A connection that ends after one assignment."""

    def __init__(self, connection: Connection[bytes, bytes]) -> None:
        self.connection, self.sent = connection, 0

    def recv_bytes(self) -> bytes:
        if self.sent == 2:
            raise StopIteration
        return self.connection.recv_bytes()

    def send_bytes(self, data: bytes) -> None:
        self.sent += 1
        self.connection.send_bytes(data)


def test_the_digest_of_a_result_leaves_out_what_was_measured(
    loaded: Callable[..., Base], examples: Callable[[int], list[Example]]
) -> None:
    base = loaded()
    update = perform(base, examples(3), assignment(base), threads=1)
    other = replace(update, measured=Measured(seconds=99.0))
    assert result_digest(other) == result_digest(update)
    changed = {name: np.array(array) * 2 for name, array in update.lora.tensors.items()}
    assert result_digest(replace(update, result=replace(update.lora, tensors=changed))) != result_digest(update)
