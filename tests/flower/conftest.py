"""A Grid in memory, a clock that is turned by hand, and clients for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, MessageType, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedtune.flower import shim
from fedtune.flower.grid_transport import HELLO, GridTransport
from fedtune.flower.records import UPDATE, pack
from fedtune.messages import Assignment, ClientUpdate, LoraResult, Plan, Training, TrainLora
from fedtune.rounds.transport import Work
from fedtune.wire.codec import EncodedAssignment, blob_encoder, decode_assignment, encode_assignment, encode_update
from fedtune.wire.profile import ClientProfile, ModelSpec, encode_profile

NODE = 2**62
"""Node ids start here: beyond 2^53, where numpy would round them."""
MODULES = {"layer.q": (4, 6), "layer.v": (4, 6)}
FOUNDATION = ModelSpec(base="9f3c" * 16, modules=MODULES, parameters=48)

Node = Callable[[Message], RecordDict | Error | None]
"""What a client does with a message; None: nothing yet, and it is asked again at the next look for replies."""


@pytest.fixture(autouse=True)
def flower_task() -> Iterator[None]:
    """Give each test the identity that `Message(...)` reads."""
    shim.enter_task()
    yield
    shim.leave_task()


def carried(message: Message) -> Message:
    """Return the message as it is after a journey as bytes."""
    objects = get_all_nested_objects(message)
    arrived = inflate_object_from_contents(
        message.object_id, {key: one.deflate() for key, one in objects.items()}, keep_object_contents=False
    )
    assert isinstance(arrived, Message)
    shim.stamp(arrived, message.metadata.message_id)
    return arrived


class MemoryGrid(Grid):
    """A Grid whose nodes are functions, called when somebody looks for their reply."""

    def __init__(self, nodes: Mapping[int, Node], *, names: Mapping[int, str] | None = None) -> None:
        self.nodes, self.names = dict(nodes), dict(names or {})
        self.sent: dict[str, Message] = {}
        self.pushed: list[tuple[int, str]] = []
        """Node and type of every message."""
        self.order: Callable[[Sequence[Message]], Sequence[Message]] = lambda replies: replies
        self.refuse: Callable[[Message], list[str | None] | None] = lambda message: None
        """What `push_messages` returns in place of an id, for a message that is not accepted."""
        self.number = count(1)

    def set_run(self, run: shim.Run) -> None: ...

    @property
    def run(self) -> shim.Run:
        return shim.Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Ask every node once; those that have no reply by then have none in time."""
        return self.pull_messages([one for one in self.push_messages(list(messages)) if one])

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[shim.NodeInfo]:
        return [shim.NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        assert isinstance(messages, list), "a SuperLink's grid walks its argument twice"
        ids: list[str | None] = []
        for message in messages:
            self.pushed.append((message.metadata.dst_node_id, message.metadata.message_type))
            if (instead := self.refuse(message)) is not None:
                ids += instead
                continue
            shim.stamp(message, f"message-{next(self.number)}")
            self.sent[message.metadata.message_id] = carried(message)
            ids.append(message.metadata.message_id)
        return ids  # type: ignore[return-value]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            message = self.sent.get(message_id)
            if message is None or (node := self.nodes.get(message.metadata.dst_node_id)) is None:
                continue
            content = node(message)
            if content is not None:
                reply = Message(content, reply_to=message)
                del self.sent[message_id]
                replies.append(carried(reply))
        return self.order(replies)


@dataclass
class Clock:
    """Time that passes only when somebody sleeps."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def profile(name: str, *, examples: int = 10, foundation: ModelSpec = FOUNDATION) -> ClientProfile:
    return ClientProfile(name, examples, foundation, methods=("flora",))


def greeting(said: ClientProfile) -> RecordDict:
    encoded = encode_profile(said)
    return pack(encoded.header, encoded.blobs)


def echo(assignment: Assignment) -> ClientUpdate:
    """Return what the client was sent."""
    return ClientUpdate(
        client=assignment.plan.client,
        round=assignment.round,
        num_examples=10,
        result=LoraResult(
            {name: np.array(tensor) for name, tensor in assignment.lora.blobs["global"].items()}, base=assignment.base
        ),
    )


def client(
    name: str,
    *,
    work: Work = echo,
    foundation: ModelSpec = FOUNDATION,
    answers: Callable[[Message], bool] = lambda message: True,
) -> Node:
    """Return a node that says hello and works; `answers` says whether a message is answered by now."""

    def node(message: Message) -> RecordDict | Error | None:
        if not answers(message):
            return None
        if message.metadata.message_type == HELLO:
            return greeting(profile(name, foundation=foundation))
        assert message.metadata.message_type == MessageType.TRAIN
        header = message.content.config_records["fedtune.header"]["proto"]
        assert isinstance(header, bytes)
        blobs = {key: array.data for key, array in message.content.array_records["fedtune.tensors"].items()}
        return pack(b"", {UPDATE: encode_update(work(decode_assignment(header, blobs)))})

    return node


def running(app: ClientApp, *, node_config: UserConfig, run_config: UserConfig | None = None) -> Node:
    """Return a node that runs a ClientApp, as a SuperNode and the simulation engine do."""

    def node(message: Message) -> RecordDict | Error | None:
        context = Context(
            run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config=run_config or UserConfig()
        )
        reply = app(message, context)
        return reply.error if reply.has_error() else reply.content

    return node


def silent_until(clock: Clock, seconds: float, *, kind: str = MessageType.TRAIN) -> Callable[[Message], bool]:
    """Return an `answers` that holds messages of a kind back until the clock shows so many seconds."""
    return lambda message: message.metadata.message_type != kind or clock() >= seconds


NEVER = math.inf


def orders(*names: str, round: int = 1) -> dict[str, EncodedAssignment]:
    """Return one order for each client, over one body that they share."""
    blob = {
        f"{module}.{side}": np.full(shape, 0.5, np.float32)
        for module in MODULES
        for side, shape in (("a", (2, 6)), ("b", (4, 2)))
    }
    encode = blob_encoder()
    assignment = Assignment(
        method="flora",
        round=round,
        seed=3,
        plan=Plan("", 2, 2.0, Training(batch=1, learning_rate=0.1, steps=1)),
        task=TrainLora(a_key=4, blobs={"global": blob}),
        base=FOUNDATION.base,
    )
    return {
        name: encode_assignment(replace(assignment, plan=replace(assignment.plan, client=name)), encode=encode)
        for name in names
    }


def fleet(*names: str, **changed: Node) -> MemoryGrid:
    """Return a grid of clients with these names, some of them changed, on nodes of large ids."""
    return MemoryGrid({NODE + i: changed.get(name, client(name)) for i, name in enumerate(names)})


def over(
    grid: Grid, clock: Clock, *, expected: int = 1, least: int = 1, patience_s: float = 600.0, **more: Any
) -> GridTransport:
    return GridTransport(
        grid, expected=expected, least=least, patience_s=patience_s, clock=clock, sleep=clock.sleep, **more
    )
