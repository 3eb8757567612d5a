"""The round's transport over any Flower `Grid`: its simulation engine, its SuperLink, or a grid of our own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakValueDictionary

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import RoundError, WireError
from fedtune.flower.common_model import CommonModel
from fedtune.flower.records import arrays, pack, unpack
from fedtune.flower.replies import decode_reply, error_reason, one_line
from fedtune.messages import Client, Failure
from fedtune.rounds.transport import Answer, Reply, Rule, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment
from fedtune.wire.profile import ClientProfile, ModelSpec, decode_profile, encode_terms, fingerprint, label_list

HELLO = f"{MessageType.QUERY}.caps"
TTL_S = 7 * 24 * 3600.0
"""How long Flower keeps an assignment of a round without a deadline."""
DEADLINE_S = 24 * 3600.0
"""Over a network, of a round whose recipe sets none: a client that pretends to come further ends no run."""
WINDOW = 16
"""Replies asked for at once: so many updates are in memory, not a cohort's."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.5
"""Between two looks for replies; doubled as long as none comes."""
LATE_S = 60.0
"""How long Flower keeps assignments after the longest that a round can last: answers until then are counted."""
AGAIN_S = 60.0
"""After which a client that was refused for a passing reason is asked again."""


@dataclass(frozen=True)
class SentMessage:
    """A message that has not been answered."""

    node: int
    kind: Literal["hello", "order"]
    client: str
    """Its name; before the hello what the grid calls it."""
    at: float
    ttl_s: float
    labels: Sequence[str] = ()
    """Class names that a hello asked for."""


@dataclass(frozen=True)
class Rejection:
    """Why a connected node does not take part."""

    reason: str
    until: float
    """When it is asked again, by the transport's clock; infinite where that would change nothing."""
    taken: str = ""
    """The name that another client has, if that is the reason: a restarted client meets its own name until Flower sees
    that the process before it is dead."""


class GridTransport:
    """Assignments out and updates back as Flower messages; node ids never leave this class.

    A client says hello before its first assignment. Its name is the one that the grid has bound to its key, or the one
    that it gives itself. A client whose base, layers or classes do not fit is refused until it starts anew; one with
    the name of another client is refused until that name is free.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        expected: int = 1,
        least: int = 1,
        patience_s: float = 600.0,
        hello_s: float = 300.0,
        deadline_s: float | None = None,
        closed: bool = False,
        base: str = "",
        labels: Sequence[str] = (),
        organisation: Callable[[str], str] = lambda client: "",
        may_come: Callable[[str], bool] = lambda client: True,
        on_base: Callable[[str], None] = lambda digest: None,
        note: Callable[[str], None] = lambda text: None,
        on_admitted: Callable[[str, int], None] = lambda client, examples: None,
        on_refused: Callable[[str, str, bool], None] = lambda client, reason, final: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Bind a grid.

        Args:
            grid: of the run; the caller closes it.
            expected: clients that must have said hello before the first round.
            least: clients without an unanswered message that a round needs.
            patience_s: seconds to wait for either.
            hello_s: seconds to wait for the hello of a further client when there are enough of them; it loads the base.
            deadline_s: of rounds whose recipe sets none; None: they wait for every client.
            closed: whether no further client can join: then a refused client is not waited for.
            base: digest (hex) of the base that clients must have; empty: the one of the first client.
            labels: class names that clients must use; none: the union over the clients of the first round.
            organisation: returns that of a client by name, where a roster says it.
            may_come: whether a client by name could connect; a round that is resumed waits for no other.
            on_base: called with the digest when the first client has decided which base it is.
            note: receives at once whom the run waits for, who has connected and who is refused.
            on_admitted: called with the name of a client that takes part, and its training examples.
            on_refused: called with name, reason, and whether nothing but a new start of the client can change it.
            clock: seconds from any start.
            sleep: waits so many seconds.
        """
        self._grid, self._clock, self._sleep = grid, clock, sleep
        self._expected, self._least, self._patience_s, self._hello_s = expected, least, patience_s, hello_s
        self._deadline_s, self._closed, self._note, self._organisation = deadline_s, closed, note, organisation
        self._may_come, self._on_admitted, self._on_refused = may_come, on_admitted, on_refused
        self._connected: dict[int, ClientProfile] = {}  # by node; connected clients that have said hello
        self._refused: dict[int, Rejection] = {}  # by node
        self._unanswered: dict[str, SentMessage] = {}  # by message id
        self._waited_s: dict[str, float] = {}  # for hellos of a name that is bound to a key, all together
        self._known: set[str] = set()  # such names that were connected once
        self._unsolicited: list[UnsolicitedReply] = []  # for the next exchange to tell
        self._lasting: dict[str, str] = {}  # clients by message id, of orders that may outlast their round
        self._answers: list[Answer] = []  # to such orders, which nothing has received yet
        self._common = CommonModel(base=base, labels=labels, on_base=on_base)
        # Initial values may be large: clients that agree share one copy, which goes with the last of them.
        self._foundations: WeakValueDictionary[tuple[object, ...], ModelSpec] = WeakValueDictionary()

    def clients(self) -> Sequence[Client]:
        """Return the clients that are connected, have the same base and are not busy with an earlier assignment.

        Raises:
            RoundError: if there are not enough of them after `patience_s`; names those that are.
        """
        began = self._clock()
        if self._common.settled is None:
            self._note(f"waiting for {self._expected} client{'s' * (self._expected > 1)} to say hello")
        self._await_clients(lambda: self._ready() or self._cannot_be_ready())
        if not self._ready():
            raise RoundError(self._too_few_message(self._clock() - began))
        # A client that leaves later must not hold up every round after it.
        self._expected = self._least
        return [self._client(name) for name in sorted(self._free())]

    def _client(self, name: str) -> Client:
        profile = self.profiles[name]
        return Client(
            name,
            profile.num_examples,
            profile.device.memory_bytes,
            self._organisation(name),
            profile.device.s_per_tflop,
            profile.device.s_per_mb,
        )

    def idle(self) -> Sequence[Client]:
        """Return the clients that are connected, fit and not busy, after a look for new ones; does not wait."""
        self._look()
        return [self._client(name) for name in sorted(self._free())]

    def send(self, orders: Mapping[str, EncodedAssignment], seconds: float) -> Sequence[Failure]:
        """Send orders that may outlast their round, and return the failures of clients that they do not reach."""
        if not orders.keys() <= self._nodes().keys():  # after a restart
            self._await_cohort(orders.keys(), 1)
        waiting, failures = self._send(orders, MessageType.TRAIN, seconds + LATE_S)
        self._lasting |= waiting
        return failures

    def receive(self, seconds: float) -> Answer | None:
        """Return the next answer to such an order, or what came unasked; None if none comes in so long."""
        began, pause = self._clock(), FIRST_PAUSE_S
        while True:
            self._look()
            if self._answers:
                return self._answers.pop(0)
            if self._unsolicited:
                return self._unsolicited.pop(0)
            left_s = seconds - (self._clock() - began)
            if left_s <= 0:
                return None
            self._sleep(min(pause, left_s))
            pause = min(2 * pause, LAST_PAUSE_S)

    def withdraw(self, client: str) -> None:
        """Wait no more for a client's order; the client is busy until it answers, or Flower drops the order."""
        self._lasting = {message_id: name for message_id, name in self._lasting.items() if name != client}

    def _look(self) -> None:
        """Greet new clients, and take what has come."""
        self._send_hellos()
        for message_id, sent, reply in self._pull():
            self._sort_reply(message_id, sent, reply)

    @property
    def foundation(self) -> ModelSpec:
        """What the clients have in common; waits for them before the first round.

        Raises:
            RoundError: if they do not come.
        """
        if self._common.settled is None:
            self.clients()
        assert self._common.settled is not None  # `clients` has settled it, or raised
        return self._common.settled

    @property
    def labels(self) -> Sequence[str]:
        """Class names that clients must use, because their own differ or the recipe names them; otherwise none."""
        return self._common.labels

    @property
    def profiles(self) -> Mapping[str, ClientProfile]:
        """What each connected client says of itself, by name."""
        return {
            profile.client: profile for profile in sorted(self._connected.values(), key=lambda profile: profile.client)
        }

    def exchange(self, assignments: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        """Deliver assignments and yield each answer as it comes, and late ones of earlier rounds; see `_exchange`."""
        return self._exchange(assignments, rule, MessageType.TRAIN)

    def evaluate(self, requests: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        """Deliver requests for scores and yield each answer as it comes, as with assignments."""
        return self._exchange(requests, rule, MessageType.EVALUATE)

    def held_out(self) -> Mapping[str, int]:
        """Return the rows that each client without an unanswered message holds out, where it holds out any."""
        free, profiles = set(self._free()), self.profiles
        return {name: one.held_out for name, one in profiles.items() if name in free and one.held_out}

    def _exchange(self, assignments: Mapping[str, EncodedAssignment], rule: Rule, kind: str) -> Iterator[Answer]:
        """Deliver messages and yield each answer as it comes, and late ones of earlier rounds.

        Bodies that many assignments share are hashed and uploaded once. A client without an answer in time is a
        `Failure` of the kind `late`, and busy until it answers or Flower drops its assignment.
        """
        if not assignments.keys() <= self._nodes().keys():  # a resumed round is not preceded by `clients`
            self._await_cohort(assignments.keys(), rule.quorum)
        began = self._clock()
        if rule.deadline_s is None:
            rule = replace(rule, deadline_s=self._deadline_s)
        ttl_s = TTL_S if rule.deadline_s is None else rule.deadline_s + rule.grace_s + LATE_S
        waiting, failures = self._send(assignments, kind, ttl_s)
        yield from failures
        num_replies, pause = 0, FIRST_PAUSE_S
        while waiting:
            before = len(waiting)
            for message_id, sent, reply in self._pull():
                if message_id in waiting:
                    answer = decode_reply(waiting.pop(message_id), reply)
                    num_replies += isinstance(answer, Reply)
                    yield answer
                else:
                    self._sort_reply(message_id, sent, reply)
            yield from self._drain_unsolicited()
            patience_s = 0.0 if num_replies >= rule.quorum else rule.grace_s
            if rule.deadline_s is not None and self._clock() - began >= rule.deadline_s + patience_s:
                break
            if len(waiting) == before:
                self._sleep(pause)
            pause = FIRST_PAUSE_S if len(waiting) < before else min(2 * pause, LAST_PAUSE_S)
        for client in waiting.values():
            yield Failure(client, got=f"no answer in {self._clock() - began:.0f} s", kind="late")
        yield from self._drain_unsolicited()

    def _send(
        self, assignments: Mapping[str, EncodedAssignment], kind: str, ttl_s: float
    ) -> tuple[dict[str, str], Sequence[Failure]]:
        """Push the assignments; return the clients by message id, and the failures of those not reached."""
        nodes, array = self._nodes(), arrays()
        waiting, failures = dict[str, str](), list[Failure]()
        for client, assignment in assignments.items():
            if client not in nodes:
                failures.append(Failure(client, got="left before its assignment was sent"))
                continue
            message = pack(assignment.header, assignment.blobs, array=array)
            sent = SentMessage(nodes[client], "order", client, self._clock(), ttl_s)
            if (message_id := self._push(sent, message, kind)) is None:
                failures.append(Failure(client, got="its assignment was not accepted for delivery"))
            else:
                waiting[message_id] = client
        return waiting, failures

    def _push(self, sent: SentMessage, content: RecordDict, kind: str) -> str | None:
        # One by one: of a message that is refused some grids drop the id and some return None in its place. A list,
        # because a SuperLink's grid walks it twice.
        message_ids = self._grid.push_messages([Message(content, sent.node, kind, ttl=sent.ttl_s)])
        message_id = next((accepted for accepted in message_ids if accepted), None)
        if message_id is not None:
            self._unanswered[message_id] = sent
        return message_id

    def _pull(self) -> Iterator[tuple[str, SentMessage, Message]]:
        """Yield each new reply with its message's id and what was sent."""
        sent_ids = list(self._unanswered)
        for start in range(0, len(sent_ids), WINDOW):
            for reply in self._grid.pull_messages(sent_ids[start : start + WINDOW]):
                # By the message's id alone: the source of a reply is unchecked, and the server's own in error replies.
                message_id = reply.metadata.reply_to_message_id
                if message_id in self._unanswered:
                    sent = self._unanswered.pop(message_id)
                    self._note_wait(sent)
                    yield message_id, sent, reply

    def _await_clients(self, done: Callable[[], bool]) -> None:
        """Send hellos and sort the replies, until `done` or `patience_s` have passed."""
        began, pause = self._clock(), FIRST_PAUSE_S
        while True:
            self._look()
            if done() or self._clock() - began >= self._patience_s:
                return
            self._sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    def _await_cohort(self, cohort: Set[str], quorum: int) -> None:
        """Wait for the clients of a round that is resumed; beside enough of them `hello_s` for the others."""
        began = self._clock()

        def complete() -> bool:
            here = self._nodes().keys()
            enough = len(cohort & here) >= quorum and self._clock() - began >= self._hello_s
            return enough or not any(self._may_come(client) for client in cohort - here)

        self._await_clients(complete)

    def _send_hellos(self) -> None:
        """Send hellos to new clients and those to retry; forget clients that are gone, whose names are free again."""
        bound = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._connected = {node: profile for node, profile in self._connected.items() if node in bound}
        names = self._nodes().keys() | {""}
        self._refused = {node: no for node, no in self._refused.items() if node in bound and no.taken in names}
        # Flower answers for a message that it has dropped; with another grid a client must not stay busy for ever.
        for message_id, sent in list(self._unanswered.items()):
            if self._clock() - sent.at >= sent.ttl_s + LATE_S:
                self._note_wait(self._unanswered.pop(message_id))
        refused = {node for node, no in self._refused.items() if self._clock() < no.until}
        for node in sorted(bound.keys() - self._connected.keys() - refused - self._busy()):
            sent = SentMessage(node, "hello", bound[node], self._clock(), self._patience_s, self._common.labels)
            if self._push(sent, pack(encode_terms(self._common.labels), {}), HELLO) is None:
                self._reject(node, bound[node], "a hello to it was not accepted for delivery", again_s=AGAIN_S)

    def _sort_reply(self, message_id: str, sent: SentMessage, reply: Message) -> None:
        """Admit a client that said hello; keep the answer to an order that lasts; note one to an earlier round."""
        if sent.kind == "hello":
            self._admit(sent, reply)
            return
        answer = decode_reply(sent.client, reply)
        if self._lasting.pop(message_id, None) is not None:
            self._answers.append(answer)
            return
        self._unsolicited.append(
            UnsolicitedReply(sent.client, f"late, dropped: {answer.reason}")
            if isinstance(answer, Failure)
            else UnsolicitedReply(sent.client, "answered after its round had ended; dropped", len(answer.update))
        )

    def _admit(self, sent: SentMessage, reply: Message) -> None:
        if reply.has_error():  # each message starts a new process: the cause may pass, or be mended at the site
            self._reject(sent.node, sent.client, error_reason(reply), again_s=AGAIN_S)
            return
        try:
            hello = unpack(reply.content)
            profile = decode_profile(hello.header, hello.blobs)
        except WireError as error:
            self._reject(sent.node, sent.client, str(error))
            return
        name, common = profile.client, profile.foundation
        common = self._foundations.setdefault(fingerprint(common), common)
        if sent.client and name != sent.client:
            reason = f"expected the name {sent.client!r}, which its key is registered under; it calls itself {name!r}"
            self._reject(sent.node, sent.client, reason)
        elif odd := self._common.find_fault(common, asked=bool(sent.labels)):
            self._reject(sent.node, name, odd)
        elif not self._common.is_current(common):
            if sent.labels == self._common.labels:
                reason = f"expected the classes {label_list(self._common.labels)}; got {label_list(common.labels)}"
                self._reject(sent.node, name, f"{reason}; run the release of the server")
        elif name in self._nodes():
            reason = (
                "another connected client has this name; give each client its own, or wait until the other has gone"
            )
            self._reject(sent.node, name, reason, again_s=AGAIN_S, taken=name)
        else:
            self._common.take(common)
            self._refused.pop(sent.node, None)
            self._connected[sent.node] = replace(profile, foundation=common)
            self._known.add(sent.client)
            count = "" if self._common.settled else f" ({len(self._connected)} of {self._expected})"
            self._note(f"{name} connected: {profile.num_examples} examples{count}")
            self._on_admitted(name, profile.num_examples)

    def _reject(self, node: int, name: str, reason: str, *, again_s: float = math.inf, taken: str = "") -> None:
        reason, before = one_line(reason), self._refused.get(node)
        self._refused[node] = Rejection(reason, self._clock() + again_s, taken)
        self._connected.pop(node, None)
        if before is None or before.reason != reason:  # else it was reported before
            self._unsolicited.append(UnsolicitedReply(name or "unnamed client", f"refused: {reason}", kind="refused"))
            self._note(f"{name or 'unnamed client'} is refused: {reason}")
        self._on_refused(name, reason, math.isinf(again_s))

    def _ready(self) -> bool:
        """Return whether a round can start; the first time that it could, settle what the clients have in common."""
        if any(map(self._is_waited_for, self._open_hellos())) or len(self._connected) < self._expected:
            return False
        if self._common.settled is None and self._connected:
            self._common.unite_labels([profile.foundation for profile in self._connected.values()])
            outdated = [node for node, one in self._connected.items() if not self._common.is_current(one.foundation)]
            for node in outdated:  # said hello before it was known which classes there are: it is asked once more
                del self._connected[node]
            if outdated:
                self._note(f"classes of all sites: {label_list(self._common.labels)}")
                return False
            nodes, profiles = self._nodes(), self.profiles
            self._common.settle(next(iter(profiles.values())).foundation)
            for name, profile in profiles.items():
                if odd := self._common.find_fault(profile.foundation, asked=True):
                    self._reject(nodes[name], name, odd)
        return len(self._connected) >= self._expected and len(self._free()) >= self._least

    def _cannot_be_ready(self) -> bool:
        """Return whether all clients have answered and too few are admitted, where no other client can join."""
        complete = len(self._connected) + len(self._refused) >= self._expected
        return self._closed and not [*self._open_hellos()] and complete and len(self._connected) < self._expected

    def _open_hellos(self) -> Iterator[SentMessage]:
        """Yield the hellos without an answer; a client that was refused is not waited for again."""
        for sent in self._unanswered.values():
            if sent.kind == "hello" and sent.node not in self._refused:
                yield sent

    def _is_waited_for(self, sent: SentMessage) -> bool:
        """Return whether a round waits for a hello, where there are enough clients without it.

        A name that is bound to a key has `hello_s` for all its hellos together, and after the first round none if it
        never took part: else a client that answers no hello would hold up every round, by coming again and again.
        """
        if sent.client and self._common.settled is not None and sent.client not in self._known:
            return False
        return self._clock() - sent.at < self._hello_s - self._waited_s.get(sent.client, 0.0)

    def _note_wait(self, sent: SentMessage) -> None:
        if sent.kind == "hello" and sent.client:
            waited_s = self._waited_s.get(sent.client, 0.0) + self._clock() - sent.at
            self._waited_s[sent.client] = waited_s

    def _nodes(self) -> Mapping[str, int]:
        """Return the nodes of the clients that are here, by name."""
        return {profile.client: node for node, profile in self._connected.items()}

    def _busy(self) -> set[int]:
        return {sent.node for sent in self._unanswered.values()}

    def _free(self) -> Collection[str]:
        busy = self._busy()
        return [name for name, node in self._nodes().items() if node not in busy]

    def _drain_unsolicited(self) -> Iterator[UnsolicitedReply]:
        while self._unsolicited:
            yield self._unsolicited.pop(0)

    def _too_few_message(self, seconds: float) -> str:
        refused = "".join(f"; {reply.client} {reply.reason}" for reply in self._unsolicited[-5:])
        return (
            f"expected at least {self._expected} clients, {self._least} of them free; after {seconds:.0f} s "
            f"{', '.join(self.profiles) or 'none'} had said hello, of which "
            f"{len(self._free())} free{refused}"
        )
