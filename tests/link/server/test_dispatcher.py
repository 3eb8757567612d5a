"""Tasks from the post to the receipt, in every order of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.link import uploads
from fedtune.link.envelopes import HELLO, TRAIN, digest
from fedtune.link.rejections import RejectionError, rejection
from fedtune.link.server.assignments import ReceivedParts, Withdrawn
from fedtune.link.settings import LinkSettings
from fedtune.seeds import derive, generator
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Harness, assignment, make_harness, part, signed_reply, verdict

DATA = b"update of anna"


def test_a_reply_is_delivered_once_and_its_receipt_waits_for_the_round(harness: Harness) -> None:
    message_id, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    assert harness.submit("anna", sent, DATA) is None
    assert harness.dispatcher.collect([message_id]) == {message_id: ReceivedParts("anna", {"update": DATA})}
    assert harness.dispatcher.collect([message_id]) == {}
    assert harness.submit("anna", sent, DATA) is None
    harness.dispatcher.settle("anna", 1, None)
    first = harness.submit("anna", sent, DATA)
    assert verdict(first) == "ACCEPTED"
    assert harness.submit("anna", sent) == first  # the same bytes on every repeat
    assert harness.dispatcher.collect([message_id]) == {}


def test_the_receipt_of_a_refused_update_has_the_reason(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    harness.submit("anna", sent, DATA)
    harness.dispatcher.settle(
        "anna", 1, pb.Refusal(reason=pb.NOT_FINITE, field="q.a", expected="finite numbers", found="1 NaN")
    )
    reply = harness.submit("anna", sent)
    assert verdict(reply) == "REFUSED"
    assert reply is not None
    assert pb.Header.FromString(reply.receipt.header).receipt.refusal.reason == pb.NOT_FINITE


def test_a_silent_client_is_lost_and_its_late_reply_is_kept_for_the_next_question(
    tmp_path: Path,
) -> None:
    harness = make_harness(tmp_path, LinkSettings(lost_s=30, lease_s=10))
    harness.dispatcher.sign_of_life("anna")
    message_id, task, task_digest = harness.post("anna")
    harness.clock.now += 29
    assert harness.dispatcher.collect([message_id]) == {}
    assert not harness.dispatcher.fleet()
    harness.clock.now += 2
    assert harness.dispatcher.collect([message_id]) == {message_id: Withdrawn("anna", "no sign of life for 31 s")}
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    again, _, same = (
        harness.dispatcher.post("anna", "train", *two(assignment("anna", 1)), seconds=60),
        task,
        task_digest,
    )
    assert same == task_digest
    assert harness.dispatcher.collect([again])[again] == ReceivedParts("anna", {"update": DATA})


def two(task: Any) -> tuple[bytes, Mapping[str, bytes]]:
    return task.header, task.blobs


@pytest.mark.guarantee("G14")
def test_a_client_that_may_not_call_any_more_is_neither_asked_nor_waited_for(harness: Harness) -> None:
    """After its revocation it was in the next cohort, which the others then declined, and was waited for."""
    dispatcher, why = harness.dispatcher, dict[str, str]()
    dispatcher.set_exclusion(lambda client: why.get(client, ""))
    ids = [harness.post(name)[0] for name in ("anna", "bert")]
    for name in ("anna", "bert"):
        dispatcher.sign_of_life(name)
    assert not dispatcher.collect(ids)
    assert list(dispatcher.fleet()) == ["anna", "bert"]
    why["bert"] = "it is revoked"
    assert list(dispatcher.fleet()) == ["anna"]
    (result,) = dispatcher.collect(ids).values()
    assert result == Withdrawn("bert", "it is revoked")
    assert not dispatcher.collect(ids)
    # A round that was open before a restart: the order names those alone that are in it still.
    dispatcher.begin_round(["anna", "bert", "cora"])
    assert dispatcher.claim("cora", 7)
    _, order, _ = harness.post("cora", 2)
    assert (order.cohort, list(order.members)) == (2, ["anna", "cora"])
    assert (dispatcher.may_call("anna"), dispatcher.may_call("bert")) == (True, False)


def test_the_same_task_is_the_same_bytes_and_has_one_reply(harness: Harness) -> None:
    first, task, task_digest = harness.post("anna")
    second, again, same = harness.post("anna")
    assert (again, same) == (task, task_digest)
    assert first != second
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert harness.dispatcher.collect([first, second]).keys() == {first, second}


def test_each_hello_is_its_own_and_the_last_one_counts(harness: Harness) -> None:
    ids = [harness.dispatcher.post("anna", HELLO, b"", {}, seconds=60) for _ in range(2)]
    offered = harness.dispatcher.offer("anna", ())
    assert offered is not None
    task = pb.Header.FromString(offered.work.order.header)
    profile = signed_reply("anna", task, digest(offered.work.order), DATA, parts=[part("", DATA)])
    assert verdict(harness.submit("anna", profile, DATA)) == "NOTED"
    assert harness.dispatcher.collect(ids) == {ids[1]: ReceivedParts("anna", {"": DATA})}
    assert harness.dispatcher.offer("anna", ()) is None


def test_a_client_that_needs_more_is_asked_again_within_the_round(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    lost = signed_reply("anna", task, task_digest, b"I have lost the state")
    harness.submit("anna", lost, b"I have lost the state")
    whole = assignment("anna", 1, seed=1)
    harness.dispatcher.post("anna", "train", whole.header, whole.blobs, seconds=60)  # another order of the same round
    assert verdict(harness.submit("anna", lost)) == "NOTED"


def test_three_final_refusals_in_ten_rounds_block_a_client(harness: Harness) -> None:
    final, passing = rejection(pb.SIGNATURE, "", "", "").refusal, rejection(pb.STALLED, "", "", "").refusal
    for _ in range(10):
        harness.dispatcher.count_refusal("anna", passing)
    for _ in range(2):
        harness.dispatcher.count_refusal("anna", final)
    assert not harness.dispatcher.blocklist.reason("anna")
    for _ in range(10):
        harness.dispatcher.begin_round(["anna"])
    harness.dispatcher.count_refusal("anna", final)
    assert not harness.dispatcher.blocklist.reason("anna")  # the first two are too old
    for _ in range(2):
        harness.dispatcher.count_refusal("anna", final)
    assert "3 refusals within 10 rounds, the last SIGNATURE" in harness.dispatcher.blocklist.reason("anna")
    assert ("barred", "anna") in [(kind, fields.get("client")) for kind, fields in harness.events]


def test_every_client_that_asks_hears_of_the_end(harness: Harness) -> None:
    harness.dispatcher.hold("anna", 1)
    assert harness.dispatcher.offer("anna", ()) is None
    harness.dispatcher.stop(pb.Stop.FINISHED)
    assert harness.dispatcher.uninformed_clients() == ["anna"]
    offered = harness.dispatcher.offer("anna", ())
    assert offered is not None
    assert offered.stop.why == pb.Stop.FINISHED
    assert harness.dispatcher.uninformed_clients() == []


def test_the_end_of_a_round_leaves_the_next_one_alone(harness: Harness) -> None:
    harness.post("anna", 1)
    message_id, task, task_digest = harness.post("bob", 2)
    harness.dispatcher.end_round(1)
    harness.submit("bob", signed_reply("bob", task, task_digest, DATA), DATA)
    assert harness.dispatcher.collect([message_id]) == {message_id: ReceivedParts("bob", {"update": DATA})}


def test_the_receipts_of_the_journal_refuse_an_update_for_good_and_three_of_them_block(harness: Harness) -> None:
    for number in (1, 2, 3):
        harness.dispatcher.begin_round(["anna"])
        assert not harness.dispatcher.blocklist.reason("anna")
        _, task, task_digest = harness.post("anna", number)
        sent = signed_reply("anna", task, task_digest, DATA)
        harness.submit("anna", sent, DATA)
        harness.dispatcher.settle("anna", number, pb.Refusal(reason=pb.NOT_FINITE))
        harness.dispatcher.settle("anna", number, pb.Refusal(reason=pb.NOT_FINITE))  # settled twice, counted once
        harness.dispatcher.end_round(number)
        assert verdict(harness.submit("anna", sent)) == "REFUSED"
    assert "the last NOT_FINITE" in harness.dispatcher.blocklist.reason("anna")
    assert not harness.dispatcher.blocklist.reason("bob")


@pytest.mark.parametrize("reason", [pb.ORDER_UNKNOWN, pb.NORM_OVER_CAP, pb.NOT_AGGREGATED])
def test_what_a_client_cannot_know_is_no_fault_of_it(harness: Harness, reason: Any) -> None:
    for _ in range(10):
        harness.dispatcher.count_refusal("anna", rejection(reason, "", "", "").refusal)
    assert not harness.dispatcher.blocklist.reason("anna")


def test_what_a_client_works_on_is_not_offered_to_it_again(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    assert harness.dispatcher.offer("anna", [task_digest]) is None
    again = harness.dispatcher.offer("anna", ())
    assert again is not None
    assert again.work.left_ms == 60_000
    harness.clock.now += 59.5
    again = harness.dispatcher.offer("anna", ())
    assert again is not None
    assert again.work.left_ms == 500
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)
    assert harness.dispatcher.offer("anna", ()) is None


def test_the_server_waits_only_for_clients_that_do_not_know_the_end_yet(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, LinkSettings(lease_s=10))
    for name in ("anna", "bob", "gone"):
        harness.dispatcher.sign_of_life(name)
    harness.clock.now += 11
    for name in ("anna", "bob"):
        harness.dispatcher.sign_of_life(name)
    harness.dispatcher.stop(pb.Stop.FINISHED)
    harness.dispatcher.offer("anna", ())
    assert harness.dispatcher.uninformed_clients() == ["bob"]


def test_at_the_end_every_client_gets_the_result_once_and_then_hears_of_the_end(harness: Harness) -> None:
    dispatcher = harness.dispatcher
    dispatcher.sign_of_life("anna")
    dispatcher.finish(3, {"adapter/b": b"bytes", "adapter/a": memoryview(b"more")})
    offer = dispatcher.offer("anna", ())
    assert offer is not None
    order, task = pb.Header.FromString(offer.work.order.header), digest(offer.work.order)
    assert (order.task, order.round, [one.key for one in order.parts]) == ("result", 3, ["adapter/a", "adapter/b"])
    assert bytes(dispatcher.body("anna", order.parts[0].digest)) == b"more"
    assert dispatcher.offer("anna", [task]) is None  # not before it has that
    assert dispatcher.uninformed_clients() == ["anna"]
    with pytest.raises(RejectionError, match="PARTS"):
        harness.submit("anna", signed_reply("anna", order, task, b"x"))
    reply = harness.submit("anna", signed_reply("anna", order, task, b"", parts=[]))
    assert verdict(reply) == "NOTED"
    last = dispatcher.offer("anna", ())
    assert last is not None
    assert last.stop.why == pb.Stop.FINISHED
    end = pb.Header.FromString(last.stop.end.header)
    assert (end.kind, end.to, end.epoch, end.run) == (pb.END, "anna", dispatcher.epoch, dispatcher.run.run)
    assert dispatcher.uninformed_clients() == []


def test_a_client_that_declines_the_result_hears_of_the_end_all_the_same(harness: Harness) -> None:
    harness.dispatcher.finish(1, {"adapter/a": b"bytes"})
    offer = harness.dispatcher.offer("anna", ())
    assert offer is not None
    order, task = pb.Header.FromString(offer.work.order.header), digest(offer.work.order)
    decline = pb.Decline(veto=pb.TASK_UNKNOWN, note="an earlier release")
    harness.submit("anna", signed_reply("anna", order, task, b"", kind=pb.DECLINE, parts=[], decline=decline))
    last = harness.dispatcher.offer("anna", ())
    assert last is not None
    assert last.stop.why == pb.Stop.FINISHED


# ---- faults of earlier versions, by the test's name ----


def test_a_task_whose_reply_was_noted_can_be_asked_again_in_its_round(harness: Harness) -> None:
    """As `rounds.awaited` does: the short order, the whole one, and, where that is late, the short one again."""
    message_id, task, task_digest = harness.post("anna")
    lost = signed_reply("anna", task, task_digest, b"I have lost the state")
    harness.submit("anna", lost, b"I have lost the state")
    harness.dispatcher.collect([message_id])
    whole, short = assignment("anna", 1, seed=1), assignment("anna", 1)
    harness.dispatcher.post("anna", TRAIN, *two(whole), seconds=60)
    harness.dispatcher.post("anna", TRAIN, *two(short), seconds=60)


def test_the_round_loop_waits_also_beside_a_reply_that_it_does_not_ask_for(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each wait of the round loop ends at once, and one core spins until the end of the run."""
    _, task, task_digest = harness.post("anna")
    harness.submit("anna", signed_reply("anna", task, task_digest, DATA), DATA)  # its id has been forgotten
    waits = list[float]()
    monkeypatch.setattr(harness.dispatcher._wakeup._condition, "wait", waits.append)
    for _ in range(3):
        harness.dispatcher.collect(["another question"])
        harness.dispatcher.wait(1.0)
    assert waits


def test_parts_of_a_round_that_has_ended_go_with_it(harness: Harness) -> None:
    _, task, task_digest = harness.post("anna")
    sent = signed_reply("anna", task, task_digest, DATA)
    harness.submit("anna", sent)
    incoming = uploads.IncomingUpload(
        uploads.part_path(harness.dispatcher.folder, "anna", sha256(DATA).digest()), part("update", DATA), 0
    )
    incoming.append(DATA[:5])
    incoming.close()
    harness.dispatcher.end_round(1)
    assert not list(harness.dispatcher.folder.iterdir())


CLIENTS = ("anna", "bob", "carl")
KINDS = ("submit", "submit", "submit", "submit", "collect", "settle", "end", "restart")
VARIANTS = 5
"""Two replies, one of another run, one of the next round, and a decline."""
Action = tuple[str, str, str, int, int]
actions = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(CLIENTS),
    st.sampled_from(CLIENTS),
    st.integers(1, 3),
    st.integers(0, VARIANTS - 1),
)


@dataclass
class Game:
    """A run of three rounds, played in any order; an update counts as soon as the round loop has collected it."""

    folder: Path
    signed: dict[tuple[bytes, str, int, int], tuple[pb.Envelope, bytes]]
    """Answers that have been signed before, in any game: orders are the same bytes each time."""

    def __post_init__(self) -> None:
        self.accepted: dict[tuple[int, str], bytes] = {}
        self.known: dict[tuple[int, str], tuple[pb.Header, bytes]] = {}
        self.ended = 0
        self.start()

    def start(self) -> None:
        digests = {key: sha256(data).hexdigest() for key, data in self.accepted.items()}
        self.harness = make_harness(self.folder, accepted=digests, ended=self.ended)
        self.ids: dict[tuple[int, str], str] = {}
        self.receipts: dict[tuple[str, bytes], bytes] = {}
        self.ask()

    def ask(self) -> None:
        for client in CLIENTS if self.ended < 3 else ():
            key = self.ended + 1, client
            if key not in self.accepted:
                self.ids[key], header, task_digest = self.harness.post(client, self.ended + 1)
                self.known[key] = header, task_digest

    def submit(self, client: str, author: str, number: int, variant: int) -> None:
        if (number, author) not in self.known:
            return
        header, task_digest = self.known[number, author]
        envelope, data = self.answer(header, task_digest, author, number, variant)
        try:
            reply = self.harness.submit(client, envelope, data)
        except RejectionError:
            return
        assert variant != 2, "a reply of another run was taken"
        if reply is not None and reply.WhichOneof("what") == "receipt":
            first = self.receipts.setdefault((client, digest(envelope)), reply.receipt.SerializeToString())
            assert first == reply.receipt.SerializeToString() or variant == 4, "two receipts of one answer"
            if verdict(reply) == "ACCEPTED":
                assert client == author
                assert self.accepted[number, author] == data

    def answer(self, header: pb.Header, task_digest: bytes, author: str, number: int, variant: int) -> Any:
        key = task_digest, author, number, variant
        if key not in self.signed:
            data = f"{author} {number} {variant}".encode()
            changes: Mapping[int, Mapping[str, Any]] = {
                2: {"run": "another"},
                3: {"round": number + 1},
                4: {"kind": pb.DECLINE, "parts": [], "decline": pb.Decline(veto=pb.OPERATOR, note="no")},
            }
            self.signed[key] = signed_reply(author, header, task_digest, data, **changes.get(variant, {})), data
        return self.signed[key]

    def collect(self) -> None:
        """Accept what has come, as the round loop does."""
        for key, message_id in list(self.ids.items()):
            for result in self.harness.dispatcher.collect([message_id]).values():
                if isinstance(result, ReceivedParts) and key[0] == self.ended + 1:
                    assert key not in self.accepted, "an update was delivered twice"
                    assert result.client == key[1]
                    self.accepted[key] = bytes(result.bodies["update"])
                    self.harness.dispatcher.settle(result.client, key[0], None)

    def play(self, script: Sequence[Action]) -> None:
        for kind, client, author, number, variant in script:
            if kind == "submit":
                self.submit(client, author, number, variant)
            elif kind == "collect":
                self.collect()
            elif kind == "settle":  # of any round, whether or not anything has come
                if (number, author) in self.accepted:
                    self.harness.dispatcher.settle(author, number, None)
            elif kind == "end" and all((self.ended + 1, one) in self.accepted for one in CLIENTS):
                self.harness.dispatcher.end_round(self.ended + 1)
                self.ended += 1
                self.ask()
            elif kind == "restart":
                self.start()
        for (number, author), data in self.accepted.items():
            assert data in (f"{author} {number} 0".encode(), f"{author} {number} 1".encode())
        assert not list((self.folder / "spool").iterdir())


SIGNED: dict[tuple[bytes, str, int, int], tuple[pb.Envelope, bytes]] = {}


@pytest.mark.guarantee("G5")
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(actions, min_size=10, max_size=40))
def test_no_order_of_repeated_swapped_and_stale_replies_counts_anything_twice(
    tmp_path: Path, script: list[Action]
) -> None:
    Game(tmp_path, SIGNED).play(script)


@pytest.mark.guarantee("G5")
@pytest.mark.slow
def test_thousands_of_interleavings_count_each_update_once(tmp_path: Path, cases: Callable[[int], None]) -> None:
    """As above, drawn without looking for the smallest script, and helped on so that runs come to their third round."""
    assert play_interleavings(tmp_path, 2000, cases) > 500


def test_interleavings_count_each_update_once(tmp_path: Path) -> None:
    """The first of them."""
    assert play_interleavings(tmp_path, 150, lambda count: None) > 30


def play_interleavings(folder: Path, count: int, cases: Callable[[int], None]) -> int:
    """Play so many scripts, and return how many of them came to the third round."""
    rng, finished = generator(derive(0, "interleavings")), 0
    for _ in range(count):
        game, script = Game(folder, SIGNED), list[Action]()
        for kind, client, author, number, variant, fits in rng.integers(0, (8, 3, 3, 3, VARIANTS, 4), (40, 6)).tolist():
            sender, number = (client, number + 1) if not fits else (author, min(3, 1 + len(script) // 13))
            script.append((KINDS[kind], CLIENTS[sender], CLIENTS[author], number, variant if not fits else variant % 2))
            if len(script) % 13 == 12:
                script += [("submit", one, one, number, 0) for one in CLIENTS]
                script += [("collect", "anna", "anna", 1, 0), ("end", "anna", "anna", 1, 0)]
        game.play(script)
        finished += game.ended == 3
        cases(1)
    return finished


def test_a_task_from_before_a_restart_is_not_withdrawn_until_its_round_is_posted_again(tmp_path: Path) -> None:
    first = make_harness(tmp_path)
    first.dispatcher.begin_round(["anna"])
    _, _, held = first.post("anna", 3)
    harness = make_harness(tmp_path)  # the process that comes after it
    assert harness.dispatcher.offer("anna", [held]) is None
    harness.dispatcher.begin_round(["anna"])
    assert harness.post("anna", 3)[2] == held
    assert harness.dispatcher.offer("anna", [held]) is None
    gone = harness.dispatcher.offer("anna", [held, b"other"])
    assert gone is not None
    assert gone.withdrawn.order == b"other"


def test_a_task_from_before_a_restart_is_withdrawn_when_the_round_goes_on_without_its_client(tmp_path: Path) -> None:
    harness = make_harness(tmp_path)
    assert harness.dispatcher.offer("bob", [b"held"]) is None
    harness.dispatcher.end_round(3)
    gone = harness.dispatcher.offer("bob", [b"held"])
    assert gone is not None
    assert gone.withdrawn.order == b"held"
