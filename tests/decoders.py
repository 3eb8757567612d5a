"""Every function that reads bytes from outside, each with bytes that it takes: for tests that change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from fedtune.directions.bank import BANKS
from fedtune.directions.seed_ledger import SeedLedger, decode_ledger, decode_manifest, describe_base
from fedtune.directions.space import directions
from fedtune.errors import FedtuneError
from fedtune.link.envelopes import KIND, verify_envelope
from fedtune.link.pki import authority, codes, delegation, dsse, enrollment, invitations, registrar, roster
from fedtune.link.pki.roster import Party
from fedtune.link.pki.signing import key_id, public_bytes, sign
from fedtune.link.rejections import RejectionError
from fedtune.lora.adapter import Factors
from fedtune.messages import DescendSeeds, ProbeSeeds, Training
from fedtune.methods import METHODS
from fedtune.methods import serialization as states
from fedtune.store import peft
from fedtune.store.journal import parse_record
from fedtune.wire import codec, scores, settings
from fedtune.wire.profile import decode_profile, decode_terms, encode_profile, encode_terms
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import KEY, signed_reply
from tests.link.pki.registry import NOW, make_registry
from tests.link.pki.test_roster import PUBLIC, ROOT, ROSTER
from tests.link.test_fuzz import BLUEPRINT, settings_of
from tests.wire import test_codec, test_descend, test_probe, test_profile, test_scores

LIMIT = 1 << 20
MEMBER = Party("anna", "a", "client", public_bytes(KEY), ("1",), 0, 1)
EXPECTED = (FedtuneError, RejectionError, DecodeError)
"""What a decoder may raise; gRPC answers a message that cannot be parsed with an error of the call."""


@dataclass(frozen=True)
class Decoder:
    """A reader of bytes from outside."""

    name: str
    data: bytes
    """That it takes."""
    read: Callable[[bytes], object]


def read_code(data: bytes) -> bytes:
    return codes.decode("request", data.decode("utf-8", "replace"))


def decoders(folder: Path) -> list[Decoder]:
    """Return all of them; `folder` is for those that read files."""
    task = pb.Header(federation="care", run="0123456789abcdef", round=1)
    good = signed_reply("anna", task, b"t" * 32, b"the update")
    assignment = codec.encode_assignment(test_codec.ASSIGNMENT)
    blob = codec.encode_blob(test_codec.A)
    profile = encode_profile(test_profile.PROFILE)
    request = scores.encode_score_request(test_scores.REQUEST)
    manifest = describe_base({"layer.q.weight": np.ones((4, 6), np.float32)})
    ledger = SeedLedger(BANKS["hadamard"](64, 7), 20, 3, b"m" * 32, np.arange(64, dtype="<i4"))
    grouped = SeedLedger(
        directions("hadamard", 8, [7, 8], "tensor", [1, 3, 4, 9]), 20, 3, b"m" * 32, np.arange(64, dtype="<i4")
    )
    signed_roster = roster.encode(ROSTER, ROOT)
    payload, _ = dsse.parse_dsse(signed_roster, roster.KIND, "roster")
    record = dsse.canonical_json({"epoch": 1, "kind": "open", "n": 0, "prev": "", "unix_ms": 5, "round": 1})
    adapter = peft.write(
        folder / "adapter",
        {"x": Factors(a=np.ones((2, 3), np.float32), b=np.ones((4, 2), np.float32))},
        {},
        peft.Target("base", None, "causal", fan_in_fan_out=False, saved_modules=()),
        {},
    )
    registry = make_registry(folder / "registry")
    registry.renew()
    anchors = (registry.ca / "ca.crt").read_bytes(), registry.server.root
    invitation = invitations.Code("fl.example.org:9001", "fl.example.org:9000", "anna", "a", *anchors, bytes(32))
    base = authority.current_roster(registry.ca)
    renewals = delegation.split_file(registry.data)
    renewed, _ = dsse.parse_dsse(renewals[1], delegation.KIND, "renewals")
    own = registry.registrar.key
    first = METHODS["flora"].init(BLUEPRINT, settings_of("flora"))
    return [
        Decoder(
            "update",
            codec.encode_update(test_codec.UPDATE),
            lambda data: codec.decode_update(data, client="bank-1", limit_bytes=LIMIT),
        ),
        Decoder("pasted code", codes.encode("request", b"a request").encode(), read_code),
        Decoder(
            "probe update",
            codec.encode_update(test_probe.UPDATE),
            lambda data: codec.decode_update(data, client="bank-1", limit_bytes=LIMIT, task=ProbeSeeds),
        ),
        Decoder(
            "update of a client that descends",
            codec.encode_update(test_descend.UPDATE),
            lambda data: codec.decode_update(data, client="bank-1", limit_bytes=LIMIT, task=DescendSeeds),
        ),
        Decoder(
            "order to descend",
            codec.encode_assignment(test_descend.ASSIGNMENT).header,
            lambda data: codec.decode_assignment(data, {}),
        ),
        Decoder("assignment", assignment.header, lambda data: codec.decode_assignment(data, assignment.blobs)),
        Decoder(
            "probe assignment",
            codec.encode_assignment(test_probe.ASSIGNMENT).header,
            lambda data: codec.decode_assignment(data, {}),
        ),
        Decoder("body", blob.body, lambda data: codec.decode_blob(blob.header, data)),
        Decoder(
            "settings", settings.encode(test_codec.ASSIGNMENT.plan.training), partial(settings.decode, schema=Training)
        ),
        Decoder("profile", profile.header, lambda data: decode_profile(data, profile.blobs)),
        Decoder("terms", encode_terms(("no", "yes")), decode_terms),
        Decoder("score request", request.header, lambda data: scores.decode_score_request(data, request.blobs)),
        Decoder(
            "scores", scores.encode_scores(test_scores.SCORES), lambda data: scores.decode_scores(data, client="ann")
        ),
        Decoder("seed ledger", ledger.encode(), decode_ledger),
        Decoder("seed ledger of groups", grouped.encode(), decode_ledger),
        Decoder("manifest", manifest.encode(), decode_manifest),
        Decoder("envelope", good.SerializeToString(), read_envelope),
        Decoder("signed header", good.header, read_signed_header),
        Decoder("roster", signed_roster, lambda data: roster.decode(data, PUBLIC)),
        Decoder("signed roster", payload, lambda data: roster.decode(dsse.make_dsse(roster.KIND, data, ROOT), PUBLIC)),
        Decoder("roster with renewals", registry.data, lambda data: roster.decode(data, registry.server.root)),
        Decoder(
            "signed renewals",
            renewed,
            lambda data: roster.apply_renewals(
                base,
                delegation.decode_renewals(
                    renewals[0], dsse.make_dsse(delegation.KIND, data, own), registry.registrar.delegation, "care"
                ),
            ),
        ),
        Decoder("invitation", codes.decode("invitation", invitations.encode(invitation)), invitations.decode),
        Decoder(
            "request of a registrar",
            registrar.ask(registry.server, now=NOW),
            lambda data: registrar.read_ask(data, base, days=7, now=NOW),
        ),
        Decoder(
            "enrollment request",
            enrollment.make_request(folder / "anna", name="anna", org="a", role="client"),
            enrollment.read_request,
        ),
        Decoder("state", b"".join(states.encode(first)), lambda data: states.decode(data, first)),
        Decoder("journal record", record, lambda data: parse_record(data, 0, "", 1)),
        *(
            Decoder(f"file {path.name}", path.read_bytes(), partial(read_file, path, path.read_bytes()))
            for path in sorted(adapter.iterdir())
        ),
    ]


def read_envelope(data: bytes) -> object:
    return verify_envelope(pb.Envelope.FromString(data), {key_id(MEMBER.key): MEMBER}.get)


def read_signed_header(header: bytes) -> object:
    """Verify a header that a member of bad faith has signed."""
    envelope = pb.Envelope(header=header, signature=sign(KEY, KIND, header), key_id=key_id(MEMBER.key))
    return verify_envelope(envelope, {key_id(MEMBER.key): MEMBER}.get)


def read_file(path: Path, good: bytes, data: bytes) -> object:
    """Read the adapter with one of its files changed."""
    path.write_bytes(data)
    try:
        return peft.read(path.parent)
    finally:
        path.write_bytes(good)
