"""Ten thousand damaged envelopes and as many updates: each is refused or changes nothing; memory is bounded."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from fedtune.deployment.link_events import refusal_of
from fedtune.link.envelopes import KIND, digest, verify_envelope
from fedtune.link.pki.roster import Party
from fedtune.link.pki.signing import key_id, public_bytes, sign
from fedtune.link.rejections import RejectionError
from fedtune.link.server.assignments import ReceivedParts
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    Failure,
    LoraResult,
    Measured,
    Outcome,
    Plan,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    SeedState,
    Task,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.methods import serialization as states
from fedtune.rounds.exchange import RoundRequest, decode_and_admit, needs_whole_state
from fedtune.rounds.influence import Bounds
from fedtune.rounds.transport import Reply
from fedtune.seeds import derive, generator
from fedtune.tensors import Array
from fedtune.wire.codec import encode_assignment, encode_update
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import KEY, make_harness, signed_reply
from tests.methods import test_fedkseed as seeds
from tests.methods import test_fedkseed_descent as descents

MUTATIONS = 10_000
GROWTH_MIB = 64
MEMBER = Party("anna", "a", "client", public_bytes(KEY), ("1",), 0, 1)


def resident_mib() -> float:
    """Return the memory of this process, and let its peak start from there: earlier tests may have needed more."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def varint(number: int) -> bytes:
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    return bytes([*result, number])


def field(rng: np.random.Generator) -> bytes:
    """Return a field of protobuf as it may stand in any message: of any number, type and content."""
    number, kind = int(rng.integers(1, 24)), int(rng.integers(6))
    body = rng.bytes(int(rng.integers(0, 40)))
    content = {
        0: varint(int(rng.integers(0, 2**63))),
        1: rng.bytes(8),
        2: varint(len(body)) + body,
        3: b"",  # a group that begins
        4: b"",  # and one that ends
        5: rng.bytes(4),
    }[kind]
    return varint(number << 3 | kind) + content


def spoilt(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the bytes with one of the things done to them that go wrong on wires, disks and in bad clients."""
    result = bytearray(data)
    place = int(rng.integers(len(result)))
    match int(rng.integers(9)):
        case 0:
            result[place] ^= 1 << int(rng.integers(8))
        case 1:
            result[place] = int(rng.integers(256))
        case 2:
            del result[place:]
        case 3:
            result[place:place] = rng.bytes(int(rng.integers(1, 64)))
        case 4:
            end = min(len(result), place + int(rng.integers(1, 64)))
            result[place:end] = rng.bytes(end - place)
        case 5:
            other = int(rng.integers(len(result)))
            result[place], result[other] = result[other], result[place]
        case 6:  # a varint that says how long, how many, or which
            result[place : place + 1] = b"\xff" * int(rng.integers(1, 9)) + b"\x7f"
        case 7:
            result += field(rng)
        case 8:  # two stretches change places
            one, two, three, four = sorted(rng.integers(0, len(result) + 1, 4).tolist())
            result[:] = result[:one] + result[three:four] + result[two:three] + result[one:two] + result[four:]
    return bytes(result)


def mutations(data: bytes, purpose: str, count: int = MUTATIONS) -> Iterator[bytes]:
    rng = generator(derive(0, purpose))
    for _ in range(count):
        yield spoilt(data, rng)


@pytest.mark.guarantee("G6")
def test_spoilt_envelopes_are_refused_even_where_they_are_signed(tmp_path: Path, cases: Callable[[int], None]) -> None:
    """Half of them are signed after they were spoilt, as a bad client would: then the header itself is at fault."""
    harness = make_harness(tmp_path)
    message_id, task, task_digest = harness.post("anna")
    data = b"the update"
    good = signed_reply("anna", task, task_digest, data)
    members = {key_id(MEMBER.key): MEMBER}
    outcomes, before = Counter[str](), resident_mib()
    for number, result in enumerate(mutations(good.SerializeToString(), "envelopes")):
        if number % 2:
            header = spoilt(good.header, generator(derive(number, "header")))
            result = pb.Envelope(
                header=header, signature=sign(KEY, KIND, header), key_id=good.key_id
            ).SerializeToString()
        try:
            envelope = pb.Envelope.FromString(result)
        except DecodeError:  # gRPC's own answer to that is an error of the call
            outcomes["no envelope"] += 1
            continue
        try:
            header_found, author = verify_envelope(envelope, members.get)
            assert author == MEMBER
            reply = harness.dispatcher.submit("anna", digest(envelope), header_found, {})
            # With the same values in the fields that count it is a valid reply of anna.
            assert reply is not None
            assert reply.WhichOneof("what") in ("wanted", "receipt")
            outcomes["taken"] += 1
        except RejectionError as error:
            outcomes[pb.Reason.Name(error.refusal.reason)] += 1
    assert sum(outcomes.values()) == MUTATIONS
    cases(MUTATIONS)
    assert len(outcomes) > 8, outcomes
    assert outcomes["taken"] < MUTATIONS / 10
    assert peak_mib() - before < GROWTH_MIB
    assert harness.dispatcher.collect([message_id]) == {}
    assert (
        harness.submit("anna", good, data) is None
    )  # whatever came before it, the whole answer is the one that counts
    assert harness.dispatcher.collect([message_id]) == {message_id: ReceivedParts("anna", {"update": data})}


MODULES = {"layer.q": (6, 5), "layer.v": (4, 5)}
BLUEPRINT = Blueprint(modules=MODULES, saved={}, max_rank=2, seed=0)
CLIENTS = ("anna", "bob", "carl")
TRAIN = TrainLora(a_key=0)
FIRST = METHODS["flora"].init(BLUEPRINT, METHODS["flora"].settings(mode="reinit"))


def assignment(client: str, task: Task = TRAIN) -> Assignment:
    plan = Plan(client, rank=2, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=8))
    return Assignment("flora", round=1, seed=0, plan=plan, task=task, base="9f3c")


def update(client: str) -> ClientUpdate:
    drawn, tensors = generator(derive(0, "update", client=client)), {}
    for name, (m, n) in MODULES.items():
        tensors[f"{name}.a"] = drawn.standard_normal((2, n)).astype(np.float32)
        tensors[f"{name}.b"] = drawn.standard_normal((m, 2)).astype(np.float32)
    return ClientUpdate(client, 1, 10, LoraResult(tensors, base="9f3c"))


def round_request(assignments: dict[str, Assignment]) -> RoundRequest:
    return RoundRequest(
        round=1,
        planned={name: PlannedClient(one.plan) for name, one in assignments.items()},
        assignments=assignments,
        encoded={name: encode_assignment(one) for name, one in assignments.items()},
        enrolled=dict.fromkeys(assignments, 10),
        blueprint=BLUEPRINT,
        refuse=lambda update: "",
        assign_whole=lambda planned: None,
        bound=Bounds(METHODS["flora"], FIRST, BLUEPRINT, norm_cap=None).bound,
    )


@pytest.mark.guarantee("G3")
def test_spoilt_updates_are_refused_and_the_sum_is_the_one_without_them(cases: Callable[[int], None]) -> None:
    around = round_request({name: assignment(name) for name in CLIENTS})
    good = {name: encode_update(update(name)) for name in CLIENTS}
    honest = [decode_and_admit(Reply(name, good[name]), around) for name in CLIENTS[:2]]
    assert all(isinstance(one, AdmittedUpdate) for one in honest)
    method = METHODS["flora"]
    first = method.init(BLUEPRINT, settings_of("flora"))
    without = states.digest(states.encode(method.aggregate(first, honest)))  # type: ignore[arg-type]
    outcomes, before = Counter[str](), resident_mib()
    for result in mutations(good["carl"], "updates"):
        outcome = decode_and_admit(Reply("carl", result), around)
        if isinstance(outcome, Failure):
            assert outcome.kind == "refused"
            assert outcome.client == "carl"
            assert outcome.code in pb.Reason.keys()  # noqa: SIM118
            outcomes[outcome.code] += 1
            used = [one for one in (*honest, outcome) if isinstance(one, AdmittedUpdate)]
            if sum(outcomes.values()) % 1000 == 1:
                assert states.digest(states.encode(method.aggregate(first, used))) == without
                cases(1)
        else:  # spoilt in its numbers alone: finite, and bounded by the cohort's norms
            assert outcome.lora.tensors.keys() == update("carl").lora.tensors.keys()
            outcomes["numbers"] += 1
    assert sum(outcomes.values()) == MUTATIONS
    assert len(outcomes) >= 5, outcomes
    assert peak_mib() - before < GROWTH_MIB


def settings_of(name: str) -> Any:
    from fedtune.config import bind

    return bind(
        {
            "model": {"base": "none"},
            "adapter": {"rank": 2, "targets": ["q"]},
            "method": {"name": name},
            "client": {"steps": 1, "batch": 1, "learning_rate": 0.1},
            "rounds": {"count": 1},
            "data": {"source": "none", "split": {"kind": "files"}},
        }
    ).method


def test_spoilt_scalars_are_refused() -> None:
    probe = ProbeSeeds(
        bank="hadamard", seeds=64, key=1, exponent=20, shift=1, perturbation=1,
        state=SeedState("whole", 0, b"\0" * 256, 0, b"d" * 32),
    )  # fmt: skip
    around = replace(
        round_request({name: assignment(name, probe) for name in CLIENTS}),
        bound=Bounds(METHODS["fedkseed"], seeds.first(), BLUEPRINT).bound,
    )
    scalars = np.array([1, -2, 3, 0, 127, -127, 5, 6], np.int8)
    given = ProbeResult(scalars, state=b"s" * 8, checks=b"c" * 16)
    data = encode_update(ClientUpdate("carl", 1, 10, given))
    outcomes, before = Counter[str](), resident_mib()
    for result in mutations(data, "scalars"):
        outcome = decode_and_admit(Reply("carl", result), around)
        if isinstance(outcome, Failure):
            assert outcome.kind == "refused"
            assert outcome.code in pb.Reason.keys()  # noqa: SIM118
            outcomes[outcome.code] += 1
        else:
            assert outcome.probe.lost or (len(outcome.probe.scalars) == 8 and outcome.probe.scalars.min() >= -127)
            outcomes["scalars"] += 1
    assert sum(outcomes.values()) == MUTATIONS
    assert peak_mib() - before < GROWTH_MIB


@pytest.mark.guarantee("G3")
def test_spoilt_replies_to_seeds_are_refused_and_the_sums_are_those_without_them(
    cases: Callable[[int], None],
) -> None:
    method, state = METHODS["fedkseed"], seeds.rounds(seeds.first(), 2)
    before_all, names = states.digest(states.encode(state)), ("ann", "bob", "cleo")
    around = RoundRequest(
        round=state.round + 1,
        planned={},
        assignments=(orders := {name: seeds.assigned(state, name) for name in names}),
        encoded={name: encode_assignment(one) for name, one in orders.items()},
        enrolled=dict.fromkeys(names, 200),
        blueprint=BLUEPRINT,
        refuse=lambda update: method.refuse(state, update),
        assign_whole=lambda planned: None,
        bound=Bounds(method, state, BLUEPRINT).bound,
    )
    good = {name: encode_update(seeds.random_answer(state, name).update) for name in names}
    honest = [decode_and_admit(Reply(name, good[name]), around) for name in names]
    assert all(isinstance(one, AdmittedUpdate) for one in honest)

    def summed(*outcomes: Outcome) -> str:
        return states.digest(
            states.encode(method.aggregate(state, [one for one in outcomes if isinstance(one, AdmittedUpdate)]))
        )

    without, with_all = summed(*honest[:2]), summed(*honest)
    assert without != with_all
    outcomes, before = Counter[str](), resident_mib()
    for number, result in enumerate(mutations(good["cleo"], "seeds")):
        outcome = decode_and_admit(Reply("cleo", result), around)
        if isinstance(outcome, Failure):
            assert (outcome.client, outcome.kind) == ("cleo", "refused")
            assert outcome.code in pb.Reason.keys()  # noqa: SIM118
            outcomes[outcome.code] += 1
            if not number % 10:
                assert summed(honest[0], outcome, honest[1]) == without
                cases(1)
        elif needs_whole_state(outcome):
            outcomes["lost"] += 1
        else:
            assert outcome.client == "cleo"
            assert len(outcome.probe.scalars) == 4
            assert outcome.probe.scalars.min() >= -127
            outcomes["numbers"] += 1
            if not number % 10:
                assert summed(honest[0], outcome, honest[1]) != without
    assert sum(outcomes.values()) == MUTATIONS
    assert len(outcomes) >= 4, outcomes
    assert states.digest(states.encode(state)) == before_all
    assert peak_mib() - before < GROWTH_MIB


@pytest.mark.guarantee("G4")
def test_spoilt_numbers_of_a_client_that_descends_are_refused_or_within_their_order() -> None:
    state = descents.first(verbs=("descend",), seeds=64)
    order = descents.asked(state, "carl", "descend")
    around = replace(
        round_request({name: order for name in ("carl",)}),
        enrolled={"carl": 10},
        refuse=partial(METHODS["fedkseed"].refuse, state),
        bound=Bounds(METHODS["fedkseed"], state, BLUEPRINT).bound,
    )
    numbers = np.arange(64) * 37 % 255 - 127
    good = descents.descended(state, "carl", numbers.tolist(), 3).update
    assert isinstance(decode_and_admit(Reply("carl", encode_update(good)), around), AdmittedUpdate)
    outcomes, most = Counter[str](), 127 << order.descend.largest_shift
    for result in mutations(encode_update(good), "numbers", 400):
        outcome = decode_and_admit(Reply("carl", result), around)
        if isinstance(outcome, Failure):
            assert outcome.kind == "refused"
            assert outcome.code in pb.Reason.keys()  # noqa: SIM118
            outcomes[outcome.code] += 1
        elif not needs_whole_state(outcome):
            after = METHODS["fedkseed"].aggregate(state, [outcome])
            assert np.abs(after.sums.astype(np.int64)).max() <= most
            outcomes["numbers"] += 1
    assert len(outcomes) >= 4, outcomes


Change = tuple[str, Callable[[ClientUpdate, np.random.Generator], ClientUpdate]]


def tensor(update: ClientUpdate, rng: np.random.Generator, make: Callable[[Array], Array]) -> ClientUpdate:
    """Return the update with one of its tensors made into another."""
    name = sorted(update.lora.tensors)[int(rng.integers(len(update.lora.tensors)))]
    return replace(
        update, result=replace(update.lora, tensors={**update.lora.tensors, name: make(update.lora.tensors[name])})
    )


def number(value: float) -> Callable[[ClientUpdate, np.random.Generator], ClientUpdate]:
    def made(update: ClientUpdate, rng: np.random.Generator) -> ClientUpdate:
        def change(array: Array) -> Array:
            result = array.copy()
            result.flat[int(rng.integers(result.size))] = value
            return result

        return tensor(update, rng, change)

    return made


def renamed(update: ClientUpdate, rng: np.random.Generator) -> ClientUpdate:
    name = sorted(update.lora.tensors)[int(rng.integers(len(update.lora.tensors)))]
    rest = {key: array for key, array in update.lora.tensors.items() if key != name}
    return replace(
        update,
        result=replace(
            update.lora, tensors={**rest, f"{name}\n\x1b[2J{rng.integers(10**6)}": update.lora.tensors[name]}
        ),
    )


def longer(array: Array) -> Array:
    return np.concatenate([array, array])


CHANGES: Sequence[Change] = (
    ("NOT_FINITE", number(np.nan)),
    ("NOT_FINITE", number(np.inf)),
    ("NOT_FINITE", number(-np.inf)),
    ("TENSOR_NAMES", renamed),
    ("TENSOR_NAMES", lambda one, rng: replace(one, result=replace(one.lora, tensors={}))),
    (
        "TENSOR_NAMES",
        lambda one, rng: replace(one, result=replace(one.lora, saved={"head": np.ones((2, 2), np.float32)})),
    ),
    ("TENSOR_SHAPE RANK_RANGE", lambda one, rng: tensor(one, rng, longer)),
    ("TENSOR_SHAPE RANK_RANGE", lambda one, rng: tensor(one, rng, lambda array: np.ascontiguousarray(array.T))),
    ("TENSOR_SHAPE RANK_RANGE", lambda one, rng: tensor(one, rng, lambda array: array[:, :-1].copy())),
    ("TENSOR_SHAPE RANK_RANGE", lambda one, rng: tensor(one, rng, lambda array: array.reshape(-1))),
    ("TENSOR_DTYPE", lambda one, rng: tensor(one, rng, lambda array: array.astype(np.int8))),
    ("NORM_OVER_CAP NOT_FINITE", lambda one, rng: tensor(one, rng, lambda array: array * np.float32(1e36))),
    ("WRONG_CLIENT MALFORMED", lambda one, rng: replace(one, client="anna")),
    ("WRONG_ROUND", lambda one, rng: replace(one, round=int(rng.integers(2, 100)))),
    ("WRONG_BASE", lambda one, rng: replace(one, result=replace(one.lora, base="0000"))),
    ("EXAMPLES_RANGE MALFORMED", lambda one, rng: replace(one, num_examples=int(rng.integers(11, 2**31)))),
    ("LOSS_RANGE", lambda one, rng: replace(one, measured=Measured(loss_before=float("nan")))),
    ("LOSS_RANGE", lambda one, rng: replace(one, measured=Measured(loss_after=1e13))),
)


@pytest.mark.guarantee("G3")
def test_well_formed_updates_that_lie_are_refused_by_name_and_never_summed(cases: Callable[[int], None]) -> None:
    around = round_request({name: assignment(name) for name in CLIENTS})
    honest = [decode_and_admit(Reply(name, encode_update(update(name))), around) for name in CLIENTS[:2]]
    method, good = METHODS["flora"], update("carl")
    first = method.init(BLUEPRINT, settings_of("flora"))

    def summed(*outcomes: Outcome) -> str:
        used = [one for one in outcomes if isinstance(one, AdmittedUpdate)]
        return states.digest(states.encode(method.aggregate(first, used)))

    without, before, seen = summed(*honest), resident_mib(), Counter[str]()
    rng = generator(derive(0, "lies"))
    for turn in range(200 * len(CHANGES)):
        codes, change = CHANGES[turn % len(CHANGES)]
        result = decode_and_admit(Reply("carl", encode_update(change(good, rng))), around)
        assert isinstance(result, Failure), (codes, turn)
        assert result.kind == "refused"
        assert result.code in codes.split(), result
        events = refusal_of(result)
        assert pb.Reason.Name(events.reason) == result.code
        for text in (events.field, events.expected, events.found):
            assert text.isprintable()
            assert len(text) <= 256
        if turn < 200:
            assert summed(honest[0], result, honest[1]) == without
            cases(1)
        seen[result.code] += 1
    assert len(seen) >= 9, seen
    assert isinstance(decode_and_admit(Reply("carl", encode_update(good)), around), AdmittedUpdate)
    assert peak_mib() - before < GROWTH_MIB


@pytest.mark.parametrize("data", [b"", b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f" + bytes(100)])
def test_headers_that_promise_what_is_not_there_cost_nothing(data: bytes) -> None:
    before = resident_mib()
    outcome = decode_and_admit(Reply("carl", data), round_request({"carl": assignment("carl")}))
    assert isinstance(outcome, Failure)
    assert peak_mib() - before < GROWTH_MIB


def test_a_header_that_promises_tensors_without_end_costs_nothing() -> None:
    from fedtune.wire.v1 import round_pb2

    header = round_pb2.ClientUpdate(client="carl", round=1, examples=1)
    part = header.parts.add(role="tensors")
    for number in range(1000):
        part.tensors.add(name=f"{number:05}.a", dtype=round_pb2.F32, shape=[2**31, 2**31, 2**31])
    header.parts.add(role="saved")
    front = header.SerializeToString()
    front = len(front).to_bytes(4, "little") + front
    before = resident_mib()
    outcome = decode_and_admit(
        Reply("carl", front + bytes(-len(front) % 64)), round_request({"carl": assignment("carl")})
    )
    assert isinstance(outcome, Failure)
    assert outcome.kind == "refused"
    assert peak_mib() - before < GROWTH_MIB
