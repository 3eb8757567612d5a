"""The round's transport over any Flower `Grid`: its simulation engine, its SuperLink, or a grid of our own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakValueDictionary

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import RoundError, WireError
from fedtune.flower.records import ERROR, UPDATE, arrays, pack, unpack
from fedtune.messages import Client, Failure
from fedtune.rounds.transport import Answer, Reply, Rule, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment
from fedtune.wire.profile import ClientProfile, ModelSpec, common_model_spec, decode_profile, difference, fingerprint

HELLO = f"{MessageType.QUERY}.caps"
TTL_S = 7 * 24 * 3600.0
"""How long Flower keeps an order of a round without a deadline."""
WINDOW = 16
"""Replies asked for at once: so many updates are in memory, not a cohort's."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.5
"""Between two looks for replies; doubled while nothing comes."""
LONGEST_REASON = 500
LATE_S = 60.0
"""How much longer than a round can last Flower keeps its orders: an answer that comes by then is counted."""
AGAIN_S = 60.0
"""After which a client is asked again that was refused for something that may pass."""


@dataclass(frozen=True)
class SentMessage:
    """A message that has not been answered."""

    node: int
    kind: Literal["hello", "order"]
    client: str
    """Its name; before the hello what the grid calls it."""
    at: float
    ttl_s: float


@dataclass(frozen=True)
class Rejection:
    """Why a connected node takes no part."""

    reason: str
    until: float
    """When it is asked again, by the transport's clock; infinite where that would change nothing."""
    taken: str = ""
    """The name that another client holds, if that is why: a client that starts anew meets its own, until Flower sees
    that the process before it is dead."""


class GridTransport:
    """Orders out and updates back as Flower messages; node ids never leave this class.

    A client says hello before its first order. Its name is the one that the grid has bound to its key; where the grid
    knows none, what it calls itself. Who holds another base than most, or takes a name that is taken, is refused; the
    first for the whole run, the second until the name is free.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        expected: int = 1,
        least: int = 1,
        patience_s: float = 600.0,
        hello_s: float = 300.0,
        closed: bool = False,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Bind a grid.

        Args:
            grid: of the run; whoever made it closes it.
            expected: clients that must have said hello before the first round.
            least: clients without an unanswered message that a round needs.
            patience_s: seconds to wait for either.
            hello_s: seconds to wait for the hello of a further client when there are enough of them; it loads the base.
            closed: whether nobody else can join: then a refused client is not waited for.
            note: told at once whom the run waits for, who has come and who is refused.
            clock: seconds from any start.
            sleep: waits so many seconds.
        """
        self._grid, self._clock, self._sleep = grid, clock, sleep
        self._expected, self._least, self._patience_s, self._hello_s = expected, least, patience_s, hello_s
        self._closed, self._note = closed, note
        self._here: dict[int, ClientProfile] = {}  # by node; connected clients that have said hello
        self._refused: dict[int, Rejection] = {}  # by node
        self._open: dict[str, SentMessage] = {}  # by message id
        self._aside: list[UnsolicitedReply] = []  # for the next exchange to tell
        self._foundation: ModelSpec | None = None
        # Initial values may be large: clients that agree share one copy, which goes with the last of them.
        self._foundations: WeakValueDictionary[tuple[object, ...], ModelSpec] = WeakValueDictionary()

    def clients(self) -> Sequence[Client]:
        """Return the clients that are connected, fit together and are not busy with an earlier order.

        Raises:
            RoundError: if there are not enough of them after `patience_s`; names who is there.
        """
        began = self._clock()
        if self._foundation is None:
            self._note(f"waiting for {self._expected} client{'s' * (self._expected > 1)} to say hello")
        self._gather(lambda: self._ready() or self._hopeless())
        if not self._ready():
            raise RoundError(self._too_few(self._clock() - began))
        # A client that leaves later must not hold up every round after it.
        self._expected = self._least
        return [
            Client(name, self.profiles[name].num_examples, self.profiles[name].device.memory_bytes)
            for name in sorted(self._free())
        ]

    @property
    def foundation(self) -> ModelSpec:
        """What the clients have in common; waits for them before the first round.

        Raises:
            RoundError: if they do not come.
        """
        if self._foundation is None:
            self.clients()
        assert self._foundation is not None  # `clients` has settled it, or raised
        return self._foundation

    @property
    def profiles(self) -> Mapping[str, ClientProfile]:
        """What each connected client has said of itself, by name."""
        return {profile.client: profile for profile in sorted(self._here.values(), key=lambda one: one.client)}

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        """Deliver the orders and yield each answer as it comes, and what came late from rounds before.

        Bodies that many orders share are hashed and uploaded once. A client that says nothing in time is a `Failure`
        of the kind `late`, and busy until it answers or Flower drops its order.
        """
        if not orders.keys() <= self._nodes().keys():  # a round that goes on is not preceded by `clients`
            self._gather(lambda: orders.keys() <= self._nodes().keys())
        began = self._clock()
        ttl_s = TTL_S if rule.deadline_s is None else rule.deadline_s + rule.grace_s + LATE_S
        waiting, failures = self._send(orders, ttl_s)
        yield from failures
        came, pause = 0, FIRST_PAUSE_S
        while waiting:
            before = len(waiting)
            for message_id, sent, reply in self._pull():
                if message_id in waiting:
                    answer = decode_reply(waiting.pop(message_id), reply)
                    came += isinstance(answer, Reply)
                    yield answer
                else:
                    self._settle(sent, reply)
            yield from self._noted()
            patience_s = 0.0 if came >= rule.quorum else rule.grace_s
            if rule.deadline_s is not None and self._clock() - began >= rule.deadline_s + patience_s:
                break
            if len(waiting) == before:
                self._sleep(pause)
            pause = FIRST_PAUSE_S if len(waiting) < before else min(2 * pause, LAST_PAUSE_S)
        for client in waiting.values():
            yield Failure(client, got=f"no answer in {self._clock() - began:.0f} s", kind="late")
        yield from self._noted()

    def _send(self, orders: Mapping[str, EncodedAssignment], ttl_s: float) -> tuple[dict[str, str], Sequence[Failure]]:
        """Push the orders; return the clients by message id, and those that cannot be reached."""
        nodes, array = self._nodes(), arrays()
        waiting, failures = dict[str, str](), list[Failure]()
        for client, order in orders.items():
            if client not in nodes:
                failures.append(Failure(client, got="left before its assignment was sent"))
                continue
            message = pack(order.header, order.blobs, array=array)
            sent = SentMessage(nodes[client], "order", client, self._clock(), ttl_s)
            if (message_id := self._push(sent, message, MessageType.TRAIN)) is None:
                failures.append(Failure(client, got="its assignment was not accepted for delivery"))
            else:
                waiting[message_id] = client
        return waiting, failures

    def _push(self, sent: SentMessage, content: RecordDict, kind: str) -> str | None:
        # One by one: of a message that is refused some grids drop the id and some return None in its place. A list,
        # because a SuperLink's grid walks it twice.
        message_ids = self._grid.push_messages([Message(content, sent.node, kind, ttl=sent.ttl_s)])
        message_id = next((one for one in message_ids if one), None)
        if message_id is not None:
            self._open[message_id] = sent
        return message_id

    def _pull(self) -> Iterator[tuple[str, SentMessage, Message]]:
        """Yield what has been answered since: message id, what was sent, and the reply."""
        asked = list(self._open)
        for start in range(0, len(asked), WINDOW):
            for reply in self._grid.pull_messages(asked[start : start + WINDOW]):
                # By the message's id alone: the source of a reply is unchecked, and the server's own in error replies.
                message_id = reply.metadata.reply_to_message_id
                if message_id in self._open:
                    yield message_id, self._open.pop(message_id), reply

    def _gather(self, done: Callable[[], bool]) -> None:
        """Greet who is new and take in what comes, until `done` or `patience_s` have passed."""
        began, pause = self._clock(), FIRST_PAUSE_S
        while True:
            self._greet()
            for _, sent, reply in self._pull():
                self._settle(sent, reply)
            if done() or self._clock() - began >= self._patience_s:
                return
            self._sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    def _greet(self) -> None:
        """Say hello to who is new or may be asked again, and forget who has gone: those names are free again."""
        bound = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._here = {node: profile for node, profile in self._here.items() if node in bound}
        held = self._nodes().keys() | {""}
        self._refused = {node: no for node, no in self._refused.items() if node in bound and no.taken in held}
        # Flower answers for an order that it has dropped; a grid that does not must not keep a client busy for ever.
        self._open = {
            message_id: sent for message_id, sent in self._open.items() if self._clock() - sent.at < sent.ttl_s + LATE_S
        }
        refused = {node for node, no in self._refused.items() if self._clock() < no.until}
        for node in sorted(bound.keys() - self._here.keys() - refused - self._busy()):
            sent = SentMessage(node, "hello", bound[node], self._clock(), self._patience_s)
            if self._push(sent, pack(b"", {}), HELLO) is None:
                self._refuse(node, bound[node], "a hello to it was not accepted for delivery", again_s=AGAIN_S)

    def _settle(self, sent: SentMessage, reply: Message) -> None:
        """Take in a hello, or what nobody waits for any more."""
        if sent.kind == "hello":
            self._welcome(sent, reply)
            return
        answer = decode_reply(sent.client, reply)
        self._aside.append(
            UnsolicitedReply(sent.client, f"late, dropped: {answer.reason}")
            if isinstance(answer, Failure)
            else UnsolicitedReply(sent.client, "answered after its round had ended; dropped", len(answer.update))
        )

    def _welcome(self, sent: SentMessage, reply: Message) -> None:
        if reply.has_error():  # each message starts a new process: what failed may pass, or be put right at the site
            self._refuse(sent.node, sent.client, error_reason(reply), again_s=AGAIN_S)
            return
        try:
            hello = unpack(reply.content)
            profile = decode_profile(hello.header, hello.blobs)
        except WireError as error:
            self._refuse(sent.node, sent.client, str(error))
            return
        name, common = profile.client, profile.foundation
        common = self._foundations.setdefault(fingerprint(common), common)
        if sent.client and name != sent.client:
            reason = f"expected the name {sent.client!r}, which its key is registered under; it calls itself {name!r}"
            self._refuse(sent.node, sent.client, reason)
        elif self._foundation and (odd := difference(self._foundation, common)):
            self._refuse(sent.node, name, odd)
        elif name in self._nodes():
            reason = (
                "another connected client has this name; give each client its own, or wait until the other has gone"
            )
            self._refuse(sent.node, name, reason, again_s=AGAIN_S, taken=name)
        else:
            self._refused.pop(sent.node, None)
            self._here[sent.node] = replace(profile, foundation=common)
            self._note(f"{name} is here, with {profile.num_examples} examples")

    def _refuse(self, node: int, name: str, reason: str, *, again_s: float = math.inf, taken: str = "") -> None:
        reason, before = plain(reason), self._refused.get(node)
        self._refused[node] = Rejection(reason, self._clock() + again_s, taken)
        self._here.pop(node, None)
        if before is None or before.reason != reason:  # else it is known
            self._aside.append(UnsolicitedReply(name or "unnamed client", f"refused: {reason}", kind="refused"))
            self._note(f"{name or 'unnamed client'} is refused: {reason}")

    def _ready(self) -> bool:
        """Return whether a round can start; the first time that it could, settle what the clients have in common."""
        if self._greeting(self._hello_s) or len(self._here) < self._expected:
            return False
        if self._foundation is None and self._here:
            self._foundation = common_model_spec(list(self.profiles.values()))
            nodes = self._nodes()
            for name, profile in self.profiles.items():
                if odd := difference(self._foundation, profile.foundation):
                    self._refuse(nodes[name], name, odd)
        return len(self._here) >= self._expected and len(self._free()) >= self._least

    def _hopeless(self) -> bool:
        """Return whether everybody has answered and too few will do, where nobody else can join."""
        everybody = len(self._here) + len(self._refused) >= self._expected
        return self._closed and not self._greeting(math.inf) and everybody and len(self._here) < self._expected

    def _greeting(self, within_s: float) -> bool:
        """Return whether a first hello that is not older is open; who was refused holds nobody up a second time."""
        return any(
            sent.kind == "hello" and sent.node not in self._refused and self._clock() - sent.at < within_s
            for sent in self._open.values()
        )

    def _nodes(self) -> Mapping[str, int]:
        """Return the nodes of the clients that are here, by name."""
        return {profile.client: node for node, profile in self._here.items()}

    def _busy(self) -> set[int]:
        return {sent.node for sent in self._open.values()}

    def _free(self) -> Collection[str]:
        busy = self._busy()
        return [name for name, node in self._nodes().items() if node not in busy]

    def _noted(self) -> Iterator[UnsolicitedReply]:
        while self._aside:
            yield self._aside.pop(0)

    def _too_few(self, seconds: float) -> str:
        refused = "".join(f"; {each.client} {each.reason}" for each in self._aside[-5:])
        return (
            f"expected at least {self._expected} clients, {self._least} of them free; after {seconds:.0f} s "
            f"{', '.join(self.profiles) or 'nobody'} had said hello, of which "
            f"{len(self._free())} free{refused}"
        )


def decode_reply(client: str, reply: Message) -> Reply | Failure:
    """Return what a client's reply to an order is; only its outer form is looked at."""
    if reply.has_error():
        dead = reply.error.code != ERROR and "ActorDiedError" in (reply.error.reason or "")
        return Failure.from_text(client, error_reason(reply), code="WORKER_DIED" if dead else "")
    try:
        content = unpack(reply.content)
    except WireError as error:
        return Failure.from_text(client, str(error), kind="refused")
    if content.blobs.keys() != {UPDATE}:
        got = f"{sorted(content.blobs)[:5]}"
        return Failure(client, expected=f"one body, {UPDATE!r}", got=got, kind="refused")
    return Reply(client, content.blobs[UPDATE])


def error_reason(reply: Message) -> str:
    """Return the reason of an error reply: fedtune's own as it is, of Flower's with its code, the two ends."""
    reason = plain(reply.error.reason or "no reason given")
    if reply.error.code == ERROR:
        return reason[:LONGEST_REASON]
    if len(reason) > LONGEST_REASON:  # a traceback: its kind stands at the front, what happened at the end
        reason = f"{reason[: LONGEST_REASON // 2]} ... {reason[-LONGEST_REASON // 2 :]}"
    return f"Flower error {reply.error.code}: {reason}"


def plain(text: str) -> str:
    """Return a client's text as one line without control characters: errors carry it to logs that escape nothing."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())
