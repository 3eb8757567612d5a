"""The gRPC link as a Flower `Grid`: any Flower server app runs over it, under the names of the federation's roster."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.flower import shim
from fedtune.flower.records import ERROR, HEADER, STYPE, TENSORS, unpack
from fedtune.link.server.assignments import Body, Withdrawn
from fedtune.link.server.dispatcher import Dispatcher

TTL_S = 7 * 24 * 3600.0
"""Of a message that has none."""


class LinkGrid(Grid):
    """Messages as tasks of a dispatcher; a client that declines, fails or is lost replies with an error."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Bind a dispatcher, and give this process the identity that Flower's messages read: one run per process."""
        shim.enter_task()
        self._dispatcher = dispatcher
        self._names: dict[int, str] = {}  # by node id
        self._shells: dict[str, Message] = {}  # addresses of messages without their content, by message id

    def set_run(self, run: shim.Run) -> None:
        """Do nothing: the run is the dispatcher's."""

    @property
    def run(self) -> shim.Run:
        return shim.Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Sequence[shim.NodeInfo]:
        """Return the clients with recent signs of life, under the names of the roster."""
        nodes = {node_of(name, times): name for name, times in self._dispatcher.fleet().items()}
        self._names |= nodes
        return [shim.NodeInfo(node_id=node, name=name) for node, name in nodes.items()]

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """Post each message to its client, and return their ids; "" for one that has no such client."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if node not in self._names:
            return ""
        content, ttl_s = unpack(message.content), message.metadata.ttl or TTL_S
        message_id = self._dispatcher.post(self._names[node], kind, content.header, content.blobs, seconds=ttl_s)
        shim.stamp(message, message_id)
        shell = Message(RecordDict(), node, kind, ttl=ttl_s)
        shim.stamp(shell, message_id)
        self._shells[message_id] = shell
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """Return the replies that are here; does not wait for others."""
        replies = []
        waiting = [message_id for message_id in message_ids if message_id in self._shells]
        for message_id, result in self._dispatcher.collect(waiting).items():
            shell = self._shells.pop(message_id)
            if isinstance(result, Withdrawn):
                replies.append(Message(Error(ERROR, result.reason), reply_to=shell))
            else:
                replies.append(Message(reply_content(result.bodies), reply_to=shell))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """Push messages and return the replies that come in time."""
        waiting, replies = set(self.push_messages(messages)) - {""}, list[Message]()
        ends = time.monotonic() + (TTL_S if timeout is None else timeout)
        while waiting and (left := ends - time.monotonic()) > 0:
            received = self.pull_messages(waiting)
            replies += received
            waiting -= {reply.metadata.reply_to_message_id for reply in received}
            if waiting and not received:
                self.wait(min(left, 1.0))
        return replies

    def wait(self, seconds: float) -> None:
        """Wait until a reply or a client has come, at most so long."""
        self._dispatcher.wait(seconds)


def node_of(name: str, readmissions: int = 0) -> int:
    """Return the node id of a client: the same in every process, and above any that Flower's own tools give.

    One that comes again after it was refused is another node, which has to say hello, as after a restart in Flower.
    """
    text = f"{name} {readmissions}" if readmissions else name
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") | 2**63


def reply_content(bodies: Mapping[str, Body]) -> RecordDict:
    """Return the content of a reply; large bodies stay where they lie, in files that are mapped and not read."""
    tensors = ArrayRecord()
    for key, body in bodies.items():
        if key:
            array = Array("uint8", (len(body),), STYPE, b"")
            array.data = body  # type: ignore[assignment]  # a view where Flower, which would only send it on, has bytes
            tensors[key] = array
    return RecordDict({HEADER: ConfigRecord({"proto": bytes(bodies.get("", b""))}), TENSORS: tensors})
