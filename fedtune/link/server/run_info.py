"""What all signed statements of a coordinator's run have in common: federation, run id, recipe, author and key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.link.envelopes import PROTOCOL, build_version, make_part, seal
from fedtune.wire.v1 import link_pb2 as pb


@dataclass(frozen=True)
class RunInfo:
    """The run that a coordinator serves, and the key that signs for it."""

    federation: str
    run: str
    """Run id: 16 hex digits."""
    recipe: bytes
    """TOML."""
    author: str
    """The coordinator's name."""
    # Not in the repr: a traceback or a log would show the private key.
    key: Ed25519PrivateKey = field(repr=False)

    @property
    def recipe_digest(self) -> bytes:
        return sha256(self.recipe).digest()

    def plan(self) -> pb.Envelope:
        """Return the signed statement that this is the recipe of the run."""
        return self.seal(pb.Header(kind=pb.PLAN, parts=[make_part("", self.recipe)], build=build_version()))

    def end(self, client: str, *, epoch: int, number: int, parts: Sequence[pb.Part]) -> pb.Envelope:
        """Return the signed statement for a client that the run is complete.

        Args:
            client: whom it is for.
            epoch: of the server process; a run may go on for more rounds, and what an earlier process said must not end
                it again.
            number: of the last round.
            parts: names and digests of the files of the result.
        """
        return self.seal(pb.Header(kind=pb.END, to=client, epoch=epoch, round=number, parts=parts))

    def prove(self, client: str, *, nonce: int, epoch: int, certificate: bytes) -> pb.Envelope:
        """Return the signed statement for a client that this connection, whose certificate it names, is the server's.

        The client has drawn the nonce: what was signed for another, or before, proves nothing.
        """
        parts = [make_part("", certificate)]
        return self.seal(pb.Header(kind=pb.SERVER, to=client, nonce=nonce, epoch=epoch, parts=parts))

    def seal(self, header: pb.Header) -> pb.Envelope:
        """Fill in what is common to all statements of the run, and return the header signed."""
        header.protocol, header.federation, header.run, header.author = PROTOCOL, self.federation, self.run, self.author
        header.recipe = self.recipe_digest
        return seal(header, self.key)
