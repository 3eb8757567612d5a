"""The signed statement of a run, and what every other one of its coordinator repeats."""

from __future__ import annotations

from hashlib import sha256

from fedtune.link.envelopes import PROTOCOL, verify_envelope
from fedtune.link.pki.roster import Party
from fedtune.link.pki.signing import public_bytes
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import KEY, RUN

SERVER = Party("server", "org", "coordinator", public_bytes(KEY), ("1",), 0, 1)


def test_the_plan_is_signed_and_names_the_recipe_by_its_digest() -> None:
    header, _ = verify_envelope(RUN.plan(), lambda key: SERVER)
    assert header.kind == pb.PLAN
    assert (header.parts[0].digest, header.parts[0].num_bytes) == (sha256(RUN.recipe).digest(), len(RUN.recipe))


def test_every_statement_names_federation_run_author_and_recipe() -> None:
    header, _ = verify_envelope(RUN.seal(pb.Header(kind=pb.ORDER, round=3)), lambda key: SERVER)
    assert (header.protocol, header.federation, header.run, header.author) == (PROTOCOL, "care", RUN.run, "server")
    assert (header.recipe, header.round) == (RUN.recipe_digest, 3)


def test_the_key_is_not_shown() -> None:
    assert "key" not in repr(RUN)
