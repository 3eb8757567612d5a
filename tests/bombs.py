"""Messages and files that promise or hold too much, each with the decoder that has to refuse it at little cost."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fedtune.directions.seed_ledger import (
    GROUPED_HEADER,
    GROUPED_MAGIC,
    LEDGER_HEADER,
    LEDGER_MAGIC,
    MANIFEST_MAGIC,
    decode_ledger,
    decode_manifest,
)
from fedtune.link.envelopes import KIND
from fedtune.link.pki import codes, dsse, enrollment, roster
from fedtune.link.pki.signing import key_id, sign
from fedtune.messages import ProbeSeeds, Training
from fedtune.methods import METHODS
from fedtune.methods import serialization as states
from fedtune.store.journal import parse_record
from fedtune.wire import codec, scores, settings
from fedtune.wire.profile import decode_profile, decode_terms, encode_profile
from fedtune.wire.v1 import link_pb2 as link
from fedtune.wire.v1 import round_pb2 as pb
from tests.decoders import MEMBER, read_code, read_envelope, read_signed_header
from tests.link.harness import KEY
from tests.link.pki.test_roster import PUBLIC, ROOT
from tests.link.test_fuzz import BLUEPRINT, settings_of
from tests.wire import test_codec, test_profile

LIMIT = 8 * 2**20
"""Bytes: of the largest message or file that any of these decoders looks into."""
MANY = 100_000
Bomb = tuple[Callable[[], bytes], Callable[[bytes], object]]


def front(header: bytes) -> bytes:
    """Return a header as an update begins: its length, itself, and zeros up to the next multiple of 64."""
    data = len(header).to_bytes(4, "little") + header
    return data + bytes(-len(data) % codec.ALIGNMENT)


def update(**fields: Any) -> bytes:
    """Return an update that is a header alone, and lacks nothing but what the fields spoil."""
    given = {"client": "bank-1", "round": 1, "examples": 1, **fields}
    given.setdefault("parts", [pb.Blob(role="tensors"), pb.Blob(role="saved")])
    return front(pb.ClientUpdate(**given).SerializeToString())


def tensors(*specs: pb.TensorSpec, num_bytes: int = 0) -> list[pb.Blob]:
    return [pb.Blob(role="tensors", tensors=specs, num_bytes=num_bytes), pb.Blob(role="saved")]


def spec(name: str, *shape: int) -> pb.TensorSpec:
    return pb.TensorSpec(name=name, dtype=pb.F32, shape=shape)


def groups(depth: int) -> bytes:
    """Return groups within groups, of a field that no message has."""
    return b"\xfb\x3e" * depth + b"\xfc\x3e" * depth


def strings(number: int, count: int, size: int = 1) -> bytes:
    """Return a field of bytes, again and again."""
    tag = number << 3 | 2
    one = (bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])) + bytes([size]) + b"x" * size
    return one * count


def profile(**fields: Any) -> bytes:
    message = pb.ClientProfile.FromString(encode_profile(test_profile.PROFILE).header)
    for name, value in fields.items():
        if isinstance(value, list):
            message.ClearField(name)
            getattr(message, name).extend(value)
        elif isinstance(value, pb.Anatomy):
            message.anatomy.CopyFrom(value)
        else:
            setattr(message, name, value)
    return message.SerializeToString()


def assignment(**fields: Any) -> bytes:
    message = pb.Assignment.FromString(codec.encode_assignment(test_codec.ASSIGNMENT).header)
    message.MergeFrom(pb.Assignment(**fields))
    return message.SerializeToString()


def score_request(**fields: Any) -> bytes:
    return pb.Assignment(verb=pb.SCORE, score=pb.Score(batch=1, **fields)).SerializeToString()


def envelope(header: bytes) -> bytes:
    signed = link.Envelope(header=header, signature=sign(KEY, KIND, header), key_id=key_id(MEMBER.key))
    return signed.SerializeToString()


def ledger(size: int) -> bytes:
    return LEDGER_HEADER.pack(LEDGER_MAGIC, 2, 0, size, 1, 20, 1, bytes(32)) + bytes(400)


def grouped_ledger(*, banks: int = 1, groups: int = 1) -> bytes:
    return GROUPED_HEADER.pack(GROUPED_MAGIC, 2, 0, 4096, 20, 1, bytes(32), banks, groups)


def signed_roster(content: bytes) -> bytes:
    return dsse.make_dsse(roster.KIND, content, ROOT)


def read_state(data: bytes) -> object:
    return states.decode(data, METHODS["flora"].init(BLUEPRINT, settings_of("flora")))


def read_update(data: bytes) -> object:
    return codec.decode_update(data, client="bank-1", limit_bytes=LIMIT)


def read_probe_update(data: bytes) -> object:
    return codec.decode_update(data, client="bank-1", limit_bytes=LIMIT, task=ProbeSeeds)


def read_assignment(data: bytes) -> object:
    return codec.decode_assignment(data, {})


def read_score_request(data: bytes) -> object:
    return scores.decode_score_request(data, {})


def read_scores(data: bytes) -> object:
    return scores.decode_scores(data, client="ann")


def read_profile(data: bytes) -> object:
    return decode_profile(data, {})


def read_record(data: bytes) -> object:
    return parse_record(data, 0, "", 1)


def read_roster(data: bytes) -> object:
    return roster.decode(data, PUBLIC)


read_settings = partial(settings.decode, schema=Training)
NESTED = b"[" * (MANY // 2) + b"]" * (MANY // 2)


def code(content: bytes) -> bytes:
    body = codes._write(zlib.compress(content, 9))
    return f"fedtune.request.{len(body)}.{body}.AAAAAAAA".encode()


BOMBS: Mapping[str, Bomb] = {
    # Codes that are pasted.
    "code: 64 MiB of zeros, compressed": (lambda: code(bytes(64 * 2**20)), read_code),
    "code: a million digits": (lambda: b"fedtune.request.999999." + b"z" * 10**6 + b".AAAAAAAA", read_code),
    "code: pieces within pieces": (lambda: code(bytes(3) + b"\x00\xff\xf0" + bytes(60_000)), read_code),
    # Updates of clients, with tensors.
    "update: a header of 4 GiB": (lambda: b"\xff\xff\xff\xff" + bytes(100), read_update),
    "update: a header up to the limit that is not there": (
        lambda: codec.MAX_HEADER_BYTES.to_bytes(4, "little") + bytes(100),
        read_update,
    ),
    "update: a header above the limit": (lambda: front(bytes(codec.MAX_HEADER_BYTES + 1)), read_update),
    "update: longer than the limit": (lambda: bytes(LIMIT + 1), read_update),
    "update: tensors of rank 2^31": (
        lambda: update(parts=tensors(*(spec(f"{i:05}.a", 2**31, 2**31, 2**31) for i in range(1000)))),
        read_update,
    ),
    "update: a size that overflows 64 bits to 0": (
        lambda: update(parts=tensors(spec("x.a", *[2**31] * 7, 4), num_bytes=0)),
        read_update,
    ),
    "update: 100,000 tensors": (
        lambda: update(parts=tensors(*(spec(f"{i:06}", 0) for i in range(MANY)))),
        read_update,
    ),
    "update: as many tensors as are read, all of one name": (
        lambda: update(parts=tensors(*[spec("x.a", 0)] * 20_000)),
        read_update,
    ),
    "update: 100,000 axes": (lambda: update(parts=tensors(spec("x.a", *[1] * MANY))), read_update),
    "update: no entry, but axes of 2^31": (lambda: update(parts=tensors(spec("x.a", 0, 2**31, 2**31))), read_update),
    "update: a part of 2^64 bytes": (lambda: update(parts=tensors(num_bytes=2**64 - 1)), read_update),
    "update: parts whose sizes wrap around": (
        lambda: update(parts=[pb.Blob(role=role, num_bytes=2**63) for role in ("tensors", "saved")]),
        read_update,
    ),
    "update: 100,000 parts": (lambda: update(parts=[pb.Blob(role="saved")] * MANY), read_update),
    "update: a name of 5 MB": (lambda: update(parts=tensors(spec("x" * 5_000_000, 1), num_bytes=4)), read_update),
    "update: a client of 5 MB": (lambda: update(client="x" * 5_000_000), read_update),
    "update: groups within groups": (lambda: front(groups(MANY)), read_update),
    "update: a million fields of another release": (lambda: front(b"\xf8\x3e\x01" * 1_000_000), read_update),
    "update: a mask of 5 MB and no digest of it": (lambda: update(mask=bytes(5_000_000), kept=b"k"), read_update),
    # Updates of clients, with scalars, and their scores.
    "probe update: longer than the limit": (lambda: bytes(LIMIT + 1), read_probe_update),
    "probe update: a header above the limit": (
        lambda: pb.ProbeUpdate(scalars=bytes(codec.MAX_HEADER_BYTES)).SerializeToString(),
        read_probe_update,
    ),
    "probe update: groups within groups": (lambda: groups(MANY), read_probe_update),
    "numbers: 2^32 of 2 bits in a byte": (
        lambda: pb.ProbeUpdate(numbers=b"x", count=2**32 - 1, bits=2).SerializeToString(),
        read_probe_update,
    ),
    "numbers: as many as a header holds, of 2 bits": (
        lambda: pb.ProbeUpdate(
            numbers=bytes(codec.MAX_HEADER_BYTES - 64), count=4 * (codec.MAX_HEADER_BYTES - 64), bits=2
        ).SerializeToString(),
        read_probe_update,
    ),
    "scores: more than an answer has": (lambda: bytes(scores.MAX_SCORES_BYTES + 1), read_scores),
    "scores: as many metrics as fit": (
        lambda: pb.ScoreUpdate(client="ann", metrics={f"{i}": 1.0 for i in range(1000)}).SerializeToString(),
        read_scores,
    ),
    # What a server sends to a client.
    "assignment: 100,000 bodies": (
        lambda: pb.Assignment(verb=pb.ADAPT, down=[pb.Blob(role="global")] * MANY).SerializeToString(),
        read_assignment,
    ),
    "assignment: settings within settings": (
        lambda: pb.Assignment(
            verb=pb.ADAPT, plan=pb.Plan(rank=1, scale=1.0), settings=NESTED[: settings.MAX_SETTINGS_BYTES]
        ).SerializeToString(),
        read_assignment,
    ),
    "assignment: a verb of 2^31": (
        lambda: pb.Assignment(verb=2**31 - 1).SerializeToString(),  # type: ignore[arg-type]
        read_assignment,
    ),
    "assignment: 2^32 seeds": (
        lambda: pb.Assignment(verb=pb.PROBE, probe=pb.Probe(seeds=2**32 - 1, steps=1, batch=1)).SerializeToString(),
        read_assignment,
    ),
    "assignment: 2^32 numbers": (
        lambda: pb.Assignment(
            verb=pb.DESCEND, descend=pb.Descend(steps=1, batch=1, learning_rate=1.0, bits=8, count=2**32 - 1)
        ).SerializeToString(),
        read_assignment,
    ),
    "assignment: 100,000 stages of pruning": (
        lambda: assignment(surgery=pb.Surgery(stages=[b""] * MANY)),
        read_assignment,
    ),
    "settings: above the limit": (lambda: b" " * (settings.MAX_SETTINGS_BYTES + 1), read_settings),
    "settings: brackets within brackets": (lambda: NESTED[: settings.MAX_SETTINGS_BYTES], read_settings),
    "settings: a number of 16,000 digits": (lambda: b"1" * 16_000, read_settings),
    "settings: a key again and again": (lambda: b"{" + b'"steps":1,' * 1600 + b'"steps":1}', read_settings),
    "score request: a ledger above the limit": (
        lambda: score_request(ledger=bytes(scores.MAX_LEDGER_BYTES + 1)),
        read_score_request,
    ),
    "score request: 100,000 tensors without a ledger": (
        lambda: score_request(trainable=range(MANY)),
        read_score_request,
    ),
    "terms: 100,000 classes": (lambda: pb.Terms(labels=map(str, range(MANY))).SerializeToString(), decode_terms),
    # What a client says of itself and its base.
    "profile: 100,000 modules of one name": (
        lambda: profile(modules=[pb.Module(name="x", out_features=1, in_features=1)] * MANY),
        read_profile,
    ),
    "profile: blocks of 2^32 heads": (
        lambda: profile(
            anatomy=pb.Anatomy(
                family="llama",
                width=2**32 - 1,
                blocks=[
                    pb.Block(prefix=f"{i}", heads=2**32 - 1, kv_heads=1, head_dim=2**32 - 1, channels=2**32 - 1)
                    for i in range(10_000)
                ],
            )
        ),
        read_profile,
    ),
    "profile: a manifest that lists more than it has": (
        lambda: profile(manifest=MANIFEST_MAGIC + struct.pack("<I", 2**32 - 1) + bytes(100)),
        read_profile,
    ),
    "manifest: a name of 4 GiB": (
        lambda: MANIFEST_MAGIC + struct.pack("<II", 1, 2**32 - 1) + bytes(100),
        decode_manifest,
    ),
    "manifest: 255 axes of 2^64": (
        lambda: MANIFEST_MAGIC + struct.pack("<II", 1, 1) + b"x" + bytes([1, 255]) + b"\xff" * 8 * 255 + bytes(32),
        decode_manifest,
    ),
    "manifest: 100,000 tensors without a name": (
        lambda: MANIFEST_MAGIC + struct.pack("<I", MANY) + (struct.pack("<I", 0) + bytes([1, 0]) + bytes(32)) * MANY,
        decode_manifest,
    ),
    "seed ledger: 2^31 seeds": (lambda: ledger(2**31), decode_ledger),
    "seed ledger: no seed": (lambda: ledger(0), decode_ledger),
    "seed ledger: 65535 banks": (lambda: grouped_ledger(banks=2**16 - 1), decode_ledger),
    "seed ledger: 65535 groups": (lambda: grouped_ledger(groups=2**16 - 1), decode_ledger),
    "seed ledger: 2^32 tensors": (lambda: grouped_ledger(groups=0) + struct.pack("<QI", 1, 2**32 - 1), decode_ledger),
    "seed ledger: 256 banks of 64 groups": (lambda: grouped_ledger(banks=256, groups=64) + bytes(2048), decode_ledger),
    # Envelopes of the link.
    "envelope: a header above the limit": (lambda: envelope(bytes(64 * 1024 + 1)), read_envelope),
    "envelope: a header of a megabyte, unsigned": (
        lambda: link.Envelope(header=bytes(2**20), key_id=key_id(MEMBER.key)).SerializeToString(),
        read_envelope,
    ),
    "envelope: groups within groups": (lambda: groups(MANY), read_envelope),
    "signed header: groups within groups": (lambda: groups(16_000), read_signed_header),
    "signed header: as many parts as fit": (lambda: strings(13, 21_000), read_signed_header),
    "signed header: as many names as fit": (lambda: strings(20, 16_000), read_signed_header),
    # Files that people receive.
    "roster: above the limit": (lambda: b"1" * (dsse.MAX_BYTES + 1), read_roster),
    "roster: brackets within brackets": (lambda: NESTED, read_roster),
    "roster: a key again and again": (lambda: b"{" + b'"a":1,' * MANY + b'"a":1}', read_roster),
    "signed roster: brackets within brackets": (lambda: signed_roster(NESTED), read_roster),
    "signed roster: 100,000 members that are none": (
        lambda: signed_roster(
            json.dumps({"federation": "care", "version": 1, "valid_until": 1, "members": [0] * MANY}).encode()
        ),
        read_roster,
    ),
    "request: brackets within brackets": (lambda: NESTED, enrollment.read_request),
    "bundle: above the limit": (lambda: b" " * (enrollment.MAX_BUNDLE_BYTES + 1), enrollment.unpack_bundle),
    "bundle: brackets within brackets": (lambda: NESTED, enrollment.unpack_bundle),
    # What lies on a disk.
    "journal: a record within itself": (lambda: NESTED, read_record),
    "journal: a number of 100,000 digits": (lambda: b'{"n":' + b"1" * MANY + b"}", read_record),
    "state: a header of 2^63 bytes": (lambda: b"\xff" * 7 + b"\x7f" + bytes(100), read_state),
    "state: brackets within brackets": (lambda: len(NESTED).to_bytes(8, "little") + NESTED, read_state),
    "state: a tensor of 2^62 entries": (
        lambda: state(x={"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 0]}),
        read_state,
    ),
}
"""By name: what makes the bytes, and what reads them."""


def state(**entries: Any) -> bytes:
    header = json.dumps({"__metadata__": {"fedtune": '{"values":{},"version":1}'}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header
