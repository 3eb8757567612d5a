"""The bytes of one message of each kind, from fixed literals and numpy alone: the same on every machine."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.directions import downlink
from fedtune.directions.bank import BANKS
from fedtune.directions.seed_ledger import SeedLedger, describe_base
from fedtune.link.envelopes import assignment_subject, digest, make_part, seal
from fedtune.link.pki import roster
from fedtune.link.pki.roster import Party, Roster
from fedtune.link.pki.signing import public_bytes
from fedtune.messages import (
    Assignment,
    Blueprint,
    ClientUpdate,
    DescendResult,
    DescendSeeds,
    LoraResult,
    Measured,
    Plan,
    ProbeResult,
    ProbeSeeds,
    Pruning,
    SeedState,
    TailRank,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.methods.serialization import encode
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout, BlockStructure, ModelStructure, bitmap
from fedtune.store.journal import End, Journal
from fedtune.tensors import Tensors
from fedtune.wire.codec import EncodedAssignment, encode_assignment, encode_blob, encode_update
from fedtune.wire.profile import ClientProfile, Device, ModelSpec, encode_profile
from fedtune.wire.v1 import link_pb2 as pb

LONGEST_HEX = 256
"""Bytes up to which a message stands here itself beside its digest."""


def numbers(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Return 0, 1/8, 2/8, ... of a shape: exact in every number format used here."""
    count = int(np.prod(shape, dtype=np.int64))
    return (np.arange(count, dtype=np.float32) / 8).reshape(shape).astype(dtype)


FACTORS: Tensors = {
    "layer.q.a": numbers((2, 6)),
    "layer.q.b": numbers((4, 2), ml_dtypes.bfloat16),
    "layer.v.a": numbers((2, 6), np.float16),
    "layer.v.b": np.zeros((0, 2), np.float32),
}
SAVED: Tensors = {"score.bias": numbers(()), "score.weight": np.array([[1.5, -2.0], [np.inf, np.nan]], np.float32)}
TRAINING = Training(batch=4, learning_rate=3e-4, steps=30)
FULL_TRAINING = Training(
    batch=2,
    learning_rate=0.5,
    steps=7,
    accumulation=3,
    optimizer="sgd",
    schedule="cosine",
    warmup=0.25,
    weight_decay=0.125,
    momentum=0.5,
    clip_norm=None,
    dropout=0.0625,
    autocast="off",
    gradient_checkpointing=True,
)
ANATOMY = BlockLayout(
    family="llama",
    blocks=(Block("model.layers.0", 4, 2, 8, 12), Block("model.layers.1", 4, 2, 8, 12)),
    width=32,
    head=64,
    outputs=2,
    number_bytes=2,
)
LARGE = ModelStructure(
    (BlockStructure((0, 1, 2, 3), (0, 1), tuple(range(8))), BlockStructure((0, 1), (0,), tuple(range(0, 12, 2))))
)
SMALL = ModelStructure((BlockStructure((2, 3), (1,), tuple(range(4))), BlockStructure((0, 1), (0,), (0, 2))))

ADAPT = Assignment(
    method="flora",
    round=3,
    seed=2**64 - 1,
    plan=Plan("bank-1", rank=8, scale=2.0, training=TRAINING),
    task=TrainLora(a_key=2**63),
)
FULL = replace(
    ADAPT,
    method="hetlora",
    plan=Plan("bank-2", rank=3, scale=0.5, training=FULL_TRAINING, ratio=0.5),
    base="9f3c" * 16,
    task=TrainLora(
        a_key=5,
        train="b",
        upload="difference",
        wire_dtype="fp16",
        terms=(TailRank(0.125, 0.75),),
        blobs={"global": FACTORS, "local": {}, "saved": SAVED},
        pruning=Pruning(
            settings=PruningSettings(
                target=0.75, policy="vote", score="gate", batches=3, refresh=2, multiple=4, stages=2
            ),
            stages=(bitmap(LARGE, ANATOMY), bitmap(SMALL, ANATOMY)),
            previous=bitmap(LARGE, ANATOMY),
            scores_requested=True,
        ),
    ),
)
PROBE = Assignment(
    method="fedkseed",
    round=3,
    seed=7,
    plan=Plan("bank-1", rank=1, scale=1.0, training=Training(batch=3, learning_rate=2e-7, steps=200)),
    task=ProbeSeeds(
        bank="hadamard",
        seeds=4,
        key=2**64 - 1,
        exponent=26,
        shift=5,
        perturbation=33_554,
        state=SeedState("whole", 0, bytes(range(8)), 2, bytes(range(32))),
    ),
)
FULL_PROBE = replace(
    PROBE,
    task=replace(
        PROBE.probe,
        bank="kron",
        state=SeedState("log", 1, bytes(range(16)), 2, bytes(range(32))),
        sampling="pro",
        levels=bytes([255, 1, 2, 3]),
        estimator="one-sided",
        queries=8,
        normalise=True,
        clip=0.5,
        trainable=("model.*", "head"),
        vectors=True,
        embeddings=True,
        calibrate=True,
    ),
)
ASSIGNMENTS: Mapping[str, Assignment] = {
    "adapt": ADAPT,
    "adapt, every field": FULL,
    "adapt, pruning policy local": replace(
        ADAPT, task=replace(ADAPT.lora, pruning=Pruning(settings=PruningSettings(policy="local")))
    ),
    "probe": PROBE,
    "probe, every field": FULL_PROBE,
    "descend": replace(PROBE, task=DescendSeeds(PROBE.probe, count=4, largest_shift=9)),
    "descend, every field": replace(
        FULL_PROBE,
        plan=replace(PROBE.plan, training=Training(batch=3, learning_rate=0.01, steps=8, accumulation=2)),
        task=DescendSeeds(
            replace(FULL_PROBE.probe, groups="tensor", earlier=(1, 2**64 - 2)),
            count=4096,
            largest_shift=24,
            bits=4,
            fallback=PROBE.plan.training,
        ),
    ),
    "probe, what changed": replace(
        PROBE,
        task=replace(
            PROBE.probe,
            bank="gaussian",
            sampling="distinct",
            clip=0.0,
            state=SeedState("changed", 1, b"\x01\x02\x03", 2, bytes(32)),
        ),
    ),
}
UPDATES: Mapping[str, ClientUpdate] = {
    "adapt": ClientUpdate(
        client="bank-1", round=3, num_examples=120, result=LoraResult({"layer.q.a": numbers((2, 6))})
    ),
    "adapt, every field": ClientUpdate(
        client="bank-1",
        round=3,
        num_examples=120,
        result=LoraResult(
            FACTORS,
            saved=SAVED,
            base="9f3c" * 16,
            structure_digest=SMALL.digest,
            mask=bitmap(SMALL, ANATOMY),
            scores={"channels": numbers((2, 4), np.float16), "heads": numbers((2, 2), np.float16)},
        ),
        measured=Measured(
            seconds=1.5,
            peak_bytes=2**33,
            tokens=900,
            loss_before=2.5,
            loss_after=float("nan"),
            importance=0.25,
            side_tokens=77,
        ),
    ),
    "probe": ClientUpdate(
        client="bank-1",
        round=3,
        num_examples=120,
        result=ProbeResult(np.array([0, 1, -1, 127, -127], np.int8), state=b"12345678", checks=bytes(range(16))),
        measured=Measured(seconds=1.5, peak_bytes=3 * 2**20, tokens=900),
    ),
    **{
        f"descend, {bits} bits": ClientUpdate(
            client="bank-1",
            round=3,
            num_examples=120,
            result=DescendResult(
                np.array([bound, -bound, 0, 1, -1], np.int8),
                5,
                bits,  # type: ignore[arg-type]
                b"12345678",
                bytes(range(16)),
                skipped=1,
            ),
            measured=Measured(seconds=1.5, peak_bytes=3 * 2**20, tokens=900, loss_before=2.5, loss_after=2.25),
        )
        for bits, bound in ((8, 127), (4, 7), (2, 1))
    },
    "probe, every field": ClientUpdate(
        client="bank-1",
        round=3,
        num_examples=120,
        result=ProbeResult(np.array([5], np.int8), b"12345678", bytes(range(16)), skipped=1, rms=0.25, lost=True),
        measured=Measured(seconds=1.5, peak_bytes=3 * 2**20 + 1, tokens=900, loss_before=2.5, loss_after=2.25),
    ),
}
FOUNDATION = ModelSpec(
    base="9f3c" * 16,
    modules={"layer.v": (2, 6), "layer.q": (4, 6)},
    saved={"score.weight": numbers((1, 2))},
    saved_modules=("score",),
    labels=("no", "yes"),
    transposed=True,
    parameters=260_000,
)
MANIFEST = describe_base({"b.weight": numbers((3, 4)), "a.bias": numbers((5,), ml_dtypes.bfloat16)})
PROFILES: Mapping[str, ClientProfile] = {
    "plain": ClientProfile("bank-1", 120, replace(FOUNDATION, saved={}, saved_modules=(), labels=()), ("flora",)),
    "every field": ClientProfile(
        "bank-1",
        120,
        replace(
            FOUNDATION,
            modules={"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (12, 32)},
            manifest=MANIFEST.encode(),
            anatomy=ANATOMY,
            transposed=False,
        ),
        methods=("flora", "fedkseed"),
        device=Device(memory_bytes=2**34, cores=8, accelerator="cuda:0"),
    ),
}


def values() -> Mapping[str, Any]:
    """Return length and SHA-256 of every message, and short ones in full."""
    return {
        "assignments": {name: encoded(encode_assignment(one)) for name, one in ASSIGNMENTS.items()},
        "updates": {name: noted(encode_update(one)) for name, one in UPDATES.items()},
        "profiles": {name: encoded(encode_profile(one)) for name, one in PROFILES.items()},
        "bodies": {
            name: noted(encode_blob(tensors).body) for name, tensors in (("factors", FACTORS), ("saved", SAVED))
        },
        "envelopes": envelopes(),
        "roster": noted(signed_roster()),
        "seeds": seeds(),
        "states": {name: noted(b"".join(encode(state))) for name, state in states().items()},
        "journal": journal(),
        "kinds": dict(pb.Kind.items()),
    }


def noted(data: bytes | memoryview) -> Mapping[str, Any]:
    data = bytes(data)
    known = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return known | ({"hex": data.hex()} if len(data) <= LONGEST_HEX else {})


def encoded(message: EncodedAssignment) -> Mapping[str, Any]:
    """Return what is known of a message that has its bodies beside it."""
    return {"header": noted(message.header), "bodies": {name: len(body) for name, body in message.blobs.items()}}


def envelopes() -> Mapping[str, Any]:
    """Return a signed statement of every kind."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    build = "fedtune 0.2.0"  # as a literal: the bytes must not change with the version

    def header(**own: Any) -> pb.Header:
        common = {"protocol": 1, "federation": "care", "run": "0123456789abcdef", "recipe": bytes(32)}
        return pb.Header(**{**common, **own})

    def body(assignment: Assignment) -> tuple[Sequence[Any], tuple[int, str, bytes]]:
        message = encode_assignment(assignment)
        parts = [
            make_part("", message.header),
            *(make_part(name, data) for name, data in sorted(message.blobs.items())),
        ]
        return parts, assignment_subject(message.header, parts)

    made: dict[str, Any] = {}
    made["plan"] = header(author="server", kind=pb.PLAN, parts=[make_part("", b"name = 1\n")], build=build)
    made["hello"] = header(
        author="server", to="anna", kind=pb.ORDER, task="query.caps", parts=[make_part("", b"")], nonce=9
    )
    for name, assignment in (("order", FULL), ("order of a probe", PROBE)):
        parts, (number, base, state) = body(assignment)
        made[name] = header(
            author="server",
            to="anna",
            kind=pb.ORDER,
            task="train",
            round=number,
            base=bytes.fromhex(base),
            state=state,
            cohort=3,
            parts=parts,
        )
    order = digest(seal(made["order"], key))
    shared = {"round": 3, "order": order, "build": build}
    update = encode_update(UPDATES["adapt, every field"])
    made["answer"] = header(
        author="anna", kind=pb.ANSWER, base=bytes(32), state=bytes(32), parts=[make_part("update", update)], **shared
    )
    made["decline"] = header(
        author="anna", kind=pb.DECLINE, decline=pb.Decline(veto=pb.RANK_TOO_LARGE, note="rank 8 is above 4"), **shared
    )
    answer = digest(seal(made["answer"], key))
    refusal = pb.Refusal(reason=pb.BODY_SIZE, field="parts", expected="at most 5", found="6")
    for name, verdict, refused in (
        ("receipt", pb.ACCEPTED, None),
        ("receipt, late", pb.LATE, None),
        ("receipt, refused", pb.REFUSED, refusal),
    ):
        receipt = pb.Receipt(
            answer=answer, verdict=verdict, refusal=refused, journal_records=12, journal_head=bytes(range(32))
        )
        made[name] = header(author="server", to="anna", kind=pb.RECEIPT, receipt=receipt, **shared)
    calls = {
        "hello request": pb.HelloRequest(protocols=[1], federation="care", build=build, roster_version=4),
        "submit request": pb.SubmitRequest(envelope=seal(made["decline"], key)),
    }
    return {name: noted(seal(one, key).SerializeToString(deterministic=True)) for name, one in made.items()} | {
        name: noted(one.SerializeToString(deterministic=True)) for name, one in calls.items()
    }


def signed_roster() -> bytes:
    """Return a roster of two members, one of them revoked."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    members = {
        "anna": Party("anna", "clinic", "client", public_bytes(key), ("1f", "20"), 0, 10, "active"),
        "server": Party("server", "centre", "coordinator", bytes(32), ("21",), 0, 10, "revoked"),
    }
    return roster.encode(Roster("care", 4, 10, members), key)


def seeds() -> Mapping[str, Any]:
    """Return what stands in files and messages of seeds: manifests, ledgers, and the forms of accumulators."""
    sums = np.array([0, 5, -7, 30_000] * 16, np.int32)
    wide, known = sums * 10, np.where(np.arange(64) % 8 == 0, sums + 1, sums).astype(np.int32)
    logged = downlink.LoggedRound(5, (downlink.LoggedUpdate(2**64 - 1, 127, np.array([1, -1, 127], np.int8)),))
    made = {
        "manifest": MANIFEST.encode(),
        "whole, 16 bits": downlink.encode_whole(sums),
        "whole, 32 bits": downlink.encode_whole(wide),
        "changed": downlink.encode_changed(sums, known),
        "log": downlink.encode_log([logged, logged]),
    }
    for name, bank in BANKS.items():
        made[f"ledger, {name}"] = SeedLedger(bank(64, 12_345), 26, 3, MANIFEST.digest, sums).encode()
    return {name: noted(data) for name, data in made.items()}


def states() -> Mapping[str, Any]:
    """Return the first state of every method, and one whose tensors and counts are other than the first's."""
    blueprint = Blueprint(
        modules={"layer.q": (4, 6), "layer.v": (3, 6)}, saved={"score.weight": numbers((2, 3))}, max_rank=2, seed=11
    )
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        if name == "fedkseed":
            described = replace(blueprint, saved={}, manifest=MANIFEST.encode())
            first = method.init(described, method.settings(seeds=64, sampling="pro"))
        else:
            first = method.init(blueprint, method.settings())
        found[name] = first
        found[f"{name}, later"] = replace(first, **later(first))
    return found


def later(state: Any) -> Mapping[str, Any]:
    """Return fields of a state after some rounds: its own tensors with other numbers, and what begins empty."""
    changed: dict[str, Any] = {"round": state.round + 2}
    for each in fields(state):
        value = getattr(state, each.name)
        if isinstance(value, Mapping) and value and all(isinstance(one, np.ndarray) for one in value.values()):
            changed[each.name] = {
                name: (numbers(one.shape) * 8).astype(one.dtype) for name, one in sorted(value.items())
            }
    known = {each.name for each in fields(state)}
    # What the first state leaves empty.
    filled: Mapping[str, Any] = {
        "ranks": {"ann": 2, "bob": 1},
        "delta": {"layer.q.a": numbers((3, 6)), "layer.q.b": numbers((4, 3))},
        "ratios": {"ann": 0.5},
        "worth": {"heads": numbers((2, 4), np.float64), "channels": numbers((2, 6), np.float64)},
        "order": {"heads": numbers((2, 4), np.float64)},
        "scored": 2,
        "acknowledged": {"ann": 1, "bob": 2},
        "past": {"1": np.arange(64, dtype=np.int32)},
        "log": {"1": np.arange(9, dtype=np.uint8)},
        "calibrated": True,
        "longest": 4,
    }
    return changed | {name: value for name, value in filled.items() if name in known}


def journal() -> Mapping[str, Any]:
    """Return the bytes of a journal of one round, at a clock that stands still."""
    rows: Sequence[tuple[str, Mapping[str, Any]]] = (
        ("start", {"run": "0123456789abcdef", "inputs": {"recipe": 'name = "ä"\n', "seed": 1, "list": ["x", 2]}}),
        ("open", {"round": 1, "state": "aa", "cohort": {"ann": 3}, "orders": {"ann": "bb"}}),
        ("accept", {"round": 1, "blob": "cc", "updates": [["ann", 0, 5]]}),
        ("close", {"round": 1, "blob": "", "updates": [], "failures": {"bob": ["late", "too late"]}, "sizes": {}}),
        ("commit", {"round": 1, "state": "dd"}),
        ("final", {"round": 1}),
    )
    with tempfile.TemporaryDirectory() as folder, mock.patch("time.time_ns", return_value=1_700_000_000_000_000_000):
        path = Path(folder) / "journal"
        writing = Journal(path, End())
        for kind, own in rows:
            writing.append(kind, own)
        writing.close()
        data = path.read_bytes()
    heads, offset = list[str](), 0
    while offset < len(data):
        length, _ = struct.unpack_from("<II", data, offset)
        heads.append(hashlib.sha256(data[offset + 8 : offset + 8 + length]).hexdigest())
        offset += 8 + length
    return {"file": noted(data), "heads": heads}
