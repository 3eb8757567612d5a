from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.link import spool
from fedtune.link.hub import Gone, Received
from fedtune.link.refusals import RefusalError, refused
from fedtune.link.settings import LinkSettings
from fedtune.link.statements import HELLO, digest
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.conftest import RUN, Desk, answer, assignment, made, part

DATA = b"update of anna"


def verdict(reply: pb.SubmitReply | None) -> str:
    assert reply is not None
    assert reply.WhichOneof("what") == "receipt", reply
    return pb.Verdict.Name(pb.Header.FromString(reply.receipt.header).receipt.verdict)


def reason(error: pytest.ExceptionInfo[RefusalError]) -> str:
    return pb.Reason.Name(error.value.refusal.reason)


def test_an_answer_is_delivered_once_and_its_receipt_waits_for_the_round(desk: Desk) -> None:
    message_id, order, asked = desk.post("anna")
    sent = answer("anna", order, asked, DATA)
    assert desk.submit("anna", sent, DATA) is None
    assert desk.hub.collect([message_id]) == {message_id: Received("anna", {"update": DATA})}
    assert desk.hub.collect([message_id]) == {}
    assert desk.submit("anna", sent, DATA) is None
    desk.hub.settle("anna", 1, None)
    first = desk.submit("anna", sent, DATA)
    assert verdict(first) == "ACCEPTED"
    assert desk.submit("anna", sent) == first  # the same bytes on every repeat
    assert desk.hub.collect([message_id]) == {}


def test_a_receipt_is_signed_and_names_the_answer_and_the_journal(desk: Desk) -> None:
    desk.hub.journal_end = lambda: (7, "ab" * 32)
    _, order, asked = desk.post("anna")
    sent = answer("anna", order, asked, DATA)
    desk.submit("anna", sent, DATA)
    desk.hub.settle("anna", 1, None)
    reply = desk.submit("anna", sent)
    assert reply is not None
    header = pb.Header.FromString(reply.receipt.header)
    assert (header.kind, header.to, header.run, header.author) == (pb.RECEIPT, "anna", RUN.run, "server")
    assert header.receipt.answer == digest(sent)
    assert (header.receipt.journal_records, header.receipt.journal_head.hex()) == (7, "ab" * 32)


def test_a_refused_update_is_told_to_its_author_with_the_reason(desk: Desk) -> None:
    _, order, asked = desk.post("anna")
    sent = answer("anna", order, asked, DATA)
    desk.submit("anna", sent, DATA)
    desk.hub.settle("anna", 1, pb.Refusal(reason=pb.NOT_FINITE, field="q.a", expected="finite numbers", found="1 NaN"))
    reply = desk.submit("anna", sent)
    assert verdict(reply) == "REFUSED"
    assert reply is not None
    assert pb.Header.FromString(reply.receipt.header).receipt.refusal.reason == pb.NOT_FINITE


def test_what_differs_from_the_order_is_refused_before_a_byte_is_taken(desk: Desk) -> None:
    _, order, asked = desk.post("anna")
    big = pb.Part(key="update", digest=b"d" * 32, num_bytes=1001)
    cases: Mapping[str, Mapping[str, Any]] = {
        "WRONG_FEDERATION": {"federation": "other"},
        "WRONG_RUN": {"run": "another"},
        "KIND_NOT_EXPECTED": {"kind": pb.ORDER},
        "ORDER_UNKNOWN": {"order": b"o" * 32},
        "ROUND_DIFFERS": {"round": 2},
        "RECIPE_DIFFERS": {"recipe": b"r" * 32},
        "BASE_DIFFERS": {"base": b"b" * 32},
        "STATE_DIFFERS": {"state": b"s" * 32},
        "PARTS": {"parts": []},
        "BODY_SIZE": {"parts": [big]},
    }
    for expected, changes in cases.items():
        with pytest.raises(RefusalError) as caught:
            desk.submit("anna", answer("anna", order, asked, DATA, **changes), DATA)
        assert reason(caught) == expected
    assert not list(desk.hub.folder.iterdir())
    assert desk.submit("anna", answer("anna", order, asked, DATA), DATA) is None  # nothing of it stuck


def test_an_order_is_answered_by_its_own_client_alone(desk: Desk) -> None:
    _, order, asked = desk.post("anna")
    desk.post("bob")
    with pytest.raises(RefusalError) as caught:
        desk.submit("bob", answer("bob", order, asked, DATA), DATA)
    assert reason(caught) == "ORDER_UNKNOWN"


def test_the_first_whole_answer_wins(desk: Desk) -> None:
    message_id, order, asked = desk.post("anna")
    desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    with pytest.raises(RefusalError) as caught:
        desk.submit("anna", answer("anna", order, asked, b"another"), b"another")
    assert reason(caught) == "CONFLICT"
    desk.hub.settle("anna", 1, None)
    with pytest.raises(RefusalError) as caught:
        desk.submit("anna", answer("anna", order, asked, b"another"), b"another")
    assert reason(caught) == "CONFLICT"
    assert desk.hub.collect([message_id])[message_id] == Received("anna", {"update": DATA})


def test_an_answer_that_has_not_come_whole_may_be_replaced(desk: Desk) -> None:
    message_id, order, asked = desk.post("anna")
    reply = desk.submit("anna", answer("anna", order, asked, b"never pushed"))
    assert reply is not None
    assert [one.offset for one in reply.wanted.parts] == [0]
    desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    assert desk.hub.collect([message_id])[message_id] == Received("anna", {"update": DATA})


def test_inline_bytes_of_another_digest_are_refused(desk: Desk) -> None:
    _, order, asked = desk.post("anna")
    sent = answer("anna", order, asked, DATA)
    with pytest.raises(RefusalError) as caught:
        desk.hub.submit("anna", digest(sent), pb.Header.FromString(sent.header), {sha256(DATA).digest(): b"other"})
    assert reason(caught) == "DIGEST"


def test_a_pushed_part_is_delivered_as_a_view_of_its_file(desk: Desk) -> None:
    message_id, order, asked = desk.post("anna")
    sent = answer("anna", order, asked, DATA)
    reply = desk.submit("anna", sent)
    assert reply is not None
    wanted = reply.wanted.parts[0].digest
    part = desk.hub.part("anna", digest(sent), wanted)
    incoming = spool.Incoming(spool.place(desk.hub.folder, "anna", wanted), part, 0)
    incoming.append(DATA)
    assert incoming.finish()
    incoming.close()
    desk.hub.arrived("anna", digest(sent), wanted)
    assert desk.submit("anna", sent) is None
    (found,) = desk.hub.collect([message_id]).values()
    assert isinstance(found, Received)
    desk.hub.settle("anna", 1, None)
    assert not list(desk.hub.folder.iterdir())
    assert bytes(found.bodies["update"]) == DATA  # also after the file has gone
    with pytest.raises(RefusalError) as caught:
        desk.hub.part("anna", digest(sent), wanted)
    assert reason(caught) == "NOT_WANTED"


def test_what_comes_after_its_round_is_late_and_no_byte_of_it_is_taken(desk: Desk) -> None:
    message_id, order, asked = desk.post("anna")
    desk.hub.end(1)
    assert desk.hub.collect([message_id]) == {message_id: Gone("anna", "its round has ended")}
    assert verdict(desk.submit("anna", answer("anna", order, asked, DATA))) == "LATE"
    offered = desk.hub.offer("anna", [asked])
    assert offered is not None
    assert offered.withdrawn.order == asked


def test_an_update_that_an_earlier_process_accepted_is_accepted_again_and_delivered_never(tmp_path: Path) -> None:
    desk = made(tmp_path, accepted={(1, "anna"): sha256(DATA).hexdigest()}, ended=1)
    order, front = assignment("anna", 1), pb.Header(federation="care", run=RUN.run, round=1)
    assert order.header
    assert verdict(desk.submit("anna", answer("anna", front, b"o" * 32, DATA))) == "ACCEPTED"
    assert verdict(desk.submit("anna", answer("anna", front, b"p" * 32, b"other"))) == "LATE"


def test_an_order_that_is_about_to_be_asked_again_is_waited_for(tmp_path: Path) -> None:
    desk = made(tmp_path, ended=1)
    front = pb.Header(federation="care", run=RUN.run, round=2)
    reply = desk.submit("anna", answer("anna", front, b"o" * 32, DATA))
    assert reply is not None
    assert reply.WhichOneof("what") == "busy"
    desk.post("anna", 2)
    with pytest.raises(RefusalError) as caught:
        desk.submit("anna", answer("anna", front, b"o" * 32, DATA))
    assert reason(caught) == "ORDER_UNKNOWN"


def test_a_decline_is_told_with_its_veto_and_the_client_may_be_asked_again(desk: Desk) -> None:
    message_id, order, asked = desk.post("anna")
    note = pb.Decline(veto=pb.RANK_TOO_LARGE, note="policy.max_rank: allowed 1;\x1b[2J got 2")
    no = answer("anna", order, asked, b"", kind=pb.DECLINE, parts=[], decline=note)
    assert verdict(desk.submit("anna", no)) == "NOTED"
    (gone,) = desk.hub.collect([message_id]).values()
    assert gone == Gone("anna", "declined, RANK_TOO_LARGE: policy.max_rank: allowed 1; [2J got 2")
    again, order, asked = desk.post("anna")
    desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    assert desk.hub.collect([again])[again] == Received("anna", {"update": DATA})


def test_a_client_without_a_sign_of_life_is_lost_and_its_late_answer_is_kept_for_who_asks_again(tmp_path: Path) -> None:
    desk = made(tmp_path, LinkSettings(lost_s=30, lease_s=10))
    desk.hub.sign_of_life("anna")
    message_id, order, asked = desk.post("anna")
    desk.clock.now += 29
    assert desk.hub.collect([message_id]) == {}
    assert desk.hub.fleet() == []
    desk.clock.now += 2
    assert desk.hub.collect([message_id]) == {message_id: Gone("anna", "no sign of life for 31 s")}
    desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    again, _, same = (desk.hub.post("anna", "train", *two(assignment("anna", 1)), seconds=60), order, asked)
    assert same == asked
    assert desk.hub.collect([again])[again] == Received("anna", {"update": DATA})


def two(order: Any) -> tuple[bytes, Mapping[str, bytes]]:
    return order.header, order.blobs


def test_a_held_call_is_a_sign_of_life(tmp_path: Path) -> None:
    desk = made(tmp_path, LinkSettings(lease_s=10))
    desk.hub.hold("anna", 1)
    desk.clock.now += 1000
    assert desk.hub.fleet() == ["anna"]
    desk.hub.hold("anna", -1)
    desk.clock.now += 11
    assert desk.hub.fleet() == []
    assert not desk.hub.status()["anna"].connected


def test_the_same_order_is_the_same_bytes_and_has_one_answer(desk: Desk) -> None:
    first, order, asked = desk.post("anna")
    second, again, same = desk.post("anna")
    assert (again, same) == (order, asked)
    assert first != second
    desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    assert desk.hub.collect([first, second]).keys() == {first, second}


def test_each_hello_is_its_own_and_the_last_one_counts(desk: Desk) -> None:
    ids = [desk.hub.post("anna", HELLO, b"", {}, seconds=60) for _ in range(2)]
    offered = desk.hub.offer("anna", ())
    assert offered is not None
    order = pb.Header.FromString(offered.work.order.header)
    profile = answer("anna", order, digest(offered.work.order), DATA, parts=[part("", DATA)])
    assert verdict(desk.submit("anna", profile, DATA)) == "NOTED"
    assert desk.hub.collect(ids) == {ids[1]: Received("anna", {"": DATA})}
    assert desk.hub.offer("anna", ()) is None


def test_a_client_that_needs_more_is_asked_again_within_the_round(desk: Desk) -> None:
    _, order, asked = desk.post("anna")
    lost = answer("anna", order, asked, b"I have lost the state")
    desk.submit("anna", lost, b"I have lost the state")
    whole = assignment("anna", 1, seed=1)
    desk.hub.post("anna", "train", whole.header, whole.blobs, seconds=60)  # another order of the same round
    assert verdict(desk.submit("anna", lost)) == "NOTED"


@pytest.mark.parametrize(
    ("limits", "free", "expected"),
    [(LinkSettings(day_gib=1e-8), 10**12, "QUOTA"), (LinkSettings(free_mib=1), 2**20, "DISK_LOW")],
)
def test_quota_and_disk_are_looked_at_first_and_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: LinkSettings, free: int, expected: str
) -> None:
    desk = made(tmp_path, limits)
    monkeypatch.setattr(spool, "room", lambda folder: free)
    _, order, asked = desk.post("anna")
    with pytest.raises(RefusalError) as caught:
        desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    assert reason(caught) == expected
    assert caught.value.refusal.passing


def test_a_quota_is_of_the_last_24_hours(tmp_path: Path) -> None:
    desk = made(tmp_path, LinkSettings(day_gib=20 / 2**30))
    for hours in (0, 25):
        desk.clock.now += 3600 * hours
        number = 1 if not hours else 2
        _, order, asked = desk.post("anna", number)
        desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    assert desk.hub.status()["anna"].num_bytes == len(DATA)


def test_another_build_is_refused_where_one_is_pinned(tmp_path: Path) -> None:
    desk = made(tmp_path, LinkSettings(build="fedtune 0.0.1"))
    _, order, asked = desk.post("anna")
    with pytest.raises(RefusalError) as caught:
        desk.submit("anna", answer("anna", order, asked, DATA), DATA)
    assert reason(caught) == "BUILD_DIFFERS"


def test_three_final_refusals_in_ten_rounds_bar_a_client(desk: Desk) -> None:
    final, passing = refused(pb.SIGNATURE, "", "", "").refusal, refused(pb.STALLED, "", "", "").refusal
    for _ in range(10):
        desk.hub.note_refusal("anna", passing)
    for _ in range(2):
        desk.hub.note_refusal("anna", final)
    assert not desk.hub.bars.why("anna")
    for _ in range(10):
        desk.hub.opened(["anna"])
    desk.hub.note_refusal("anna", final)
    assert not desk.hub.bars.why("anna")  # the first two are too old
    for _ in range(2):
        desk.hub.note_refusal("anna", final)
    assert "3 refusals within 10 rounds, the last SIGNATURE" in desk.hub.bars.why("anna")
    assert ("barred", "anna") in [(kind, fields.get("client")) for kind, fields in desk.told]


def test_who_stops_tells_everybody_who_asks(desk: Desk) -> None:
    desk.hub.hold("anna", 1)
    assert desk.hub.offer("anna", ()) is None
    desk.hub.stop(pb.Stop.FINISHED)
    assert desk.hub.untold() == ["anna"]
    offered = desk.hub.offer("anna", ())
    assert offered is not None
    assert offered.stop.why == pb.Stop.FINISHED
    assert desk.hub.untold() == []


def test_a_body_is_given_to_whom_it_was_sent_and_kept_as_long(desk: Desk) -> None:
    for client in ("anna", "bob"):
        desk.hub.post(client, HELLO, b"front", {"k": b"shared"}, seconds=60)
    wanted = sha256(b"shared").digest()
    assert desk.hub.body("anna", wanted) == desk.hub.body("bob", wanted) == b"shared"
    for client, digested in (("carl", wanted), ("anna", sha256(b"other").digest())):
        with pytest.raises(RefusalError) as caught:
            desk.hub.body(client, digested)
        assert reason(caught) == "NOT_WANTED"


CLIENTS = ("anna", "bob", "carl")
Action = tuple[str, str, str, int, int]
actions = st.tuples(
    st.sampled_from(["submit", "submit", "submit", "collect", "settle", "end", "restart"]),
    st.sampled_from(CLIENTS),
    st.sampled_from(CLIENTS),
    st.integers(1, 3),
    st.integers(0, 1),
)


@settings(
    max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(st.lists(actions, min_size=10, max_size=40))
def test_no_order_of_repeated_swapped_and_stale_answers_counts_anything_twice(
    tmp_path_factory: pytest.TempPathFactory, script: list[Action]
) -> None:
    folder = tmp_path_factory.mktemp("interleaving")
    accepted: dict[tuple[int, str], bytes] = {}
    desk, ended, ids, known = made(folder), 0, dict[tuple[int, str], str](), dict[tuple[int, str], Any]()

    def ask() -> None:
        if ended == 3:
            return
        for client in CLIENTS:
            if (ended + 1, client) not in accepted:
                message_id, header, asked = desk.post(client, ended + 1)
                ids[ended + 1, client], known[ended + 1, client] = message_id, (header, asked)

    def collect() -> None:
        """Accept what has come, as the round loop does."""
        for key, message_id in list(ids.items()):
            for found in desk.hub.collect([message_id]).values():
                if isinstance(found, Received) and key[0] == ended + 1:
                    assert key not in accepted, "an update was delivered twice"
                    assert found.client == key[1]
                    accepted[key] = bytes(found.bodies["update"])
                    desk.hub.settle(found.client, key[0], None)

    ask()
    for kind, client, author, number, variant in script:
        if kind == "submit" and (number, author) in known:
            header, asked = known[number, author]
            data = f"{author} {number} {variant}".encode()
            try:
                reply = desk.submit(client, answer(author, header, asked, data), data)
            except RefusalError:
                continue
            if reply is not None and reply.WhichOneof("what") == "receipt" and verdict(reply) == "ACCEPTED":
                assert client == author
                assert accepted[number, author] == data
        elif kind == "collect":
            collect()
        elif kind == "end" and all((ended + 1, one) in accepted for one in CLIENTS):
            desk.hub.end(ended + 1)
            ended += 1
            ask()
        elif kind == "restart":
            digests = {key: sha256(data).hexdigest() for key, data in accepted.items()}
            desk = made(folder, accepted=digests, ended=ended)
            ids.clear()
            ask()
    for (number, author), data in accepted.items():
        assert data.decode().startswith(f"{author} {number} ")
