"""Signed receipts: what became of a reply, given again as the same bytes on every repeat."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from fedtune.link.envelopes import build_version
from fedtune.link.server.run_info import RunInfo
from fedtune.wire.v1 import link_pb2 as pb

MAX_RECEIPTS = 10_000
"""Kept in memory; one that was dropped is signed anew, from the digests of the accepted updates."""


class Receipts:
    """Receipts of a run, and which updates it has accepted; not thread-safe, the dispatcher holds its lock."""

    def __init__(
        self, accepted: Mapping[tuple[int, str], str], ended: int, unsettled: Mapping[str, int] | None = None
    ) -> None:
        """Go on from what the journal holds.

        Args:
            accepted: SHA-256 (hex) of the accepted updates by round and client.
            ended: number of the last round that is over.
            unsettled: by client, the round of an order that outlasts rounds and is not settled.
        """
        self._unsettled = unsettled or {}
        self._accepted, self._ended = dict(accepted), ended
        self._given: dict[tuple[str, bytes], tuple[bytes, pb.Envelope]] = {}  # by client and task: reply, receipt
        self.journal_end: Callable[[], tuple[int, str]] = lambda: (0, "")
        """Number of records of the run's journal, and the digest (hex) of the last."""

    @property
    def ended(self) -> int:
        """Number of the last round that is over."""
        return self._ended

    def may_be_posted(self, client: str, number: int) -> bool:
        """Return whether the round loop will post a client's order of a round, as far as the journal says."""
        # Of an asynchronous run, orders of rounds that are over may be out when its server is started again.
        return number == self._ended + 1 or self._unsettled.get(client) == number

    def end_round(self, number: int, working: Collection[str] = ()) -> None:
        self._ended = max(self._ended, number)
        self._unsettled = {client: since for client, since in self._unsettled.items() if client in working}

    def find_receipt(self, client: str, task: bytes) -> tuple[bytes, pb.Envelope] | None:
        """Return the reply digest and the receipt that a client's task has; None if it has none."""
        return self._given.get((client, task))

    def give(
        self,
        run: RunInfo,
        client: str,
        reply: bytes,
        header: pb.Header,
        verdict: pb.Verdict,
        refusal: pb.Refusal | None = None,
    ) -> pb.Envelope:
        """Return a new signed receipt.

        Args:
            run: whose coordinator signs.
            client: author of the reply.
            reply: digest of the reply's header.
            header: of the reply.
            verdict: what became of it.
            refusal: why, where it was refused.
        """
        # With the journal's end in every receipt, a site can prove later that the journal was cut or written anew.
        records, head = self.journal_end()
        return run.seal(
            pb.Header(
                kind=pb.RECEIPT,
                to=client,
                round=header.round,
                order=header.order,
                receipt=pb.Receipt(
                    answer=reply,
                    verdict=verdict,
                    refusal=refusal,
                    journal_records=records,
                    journal_head=bytes.fromhex(head),
                ),
                build=build_version(),
            )
        )

    def remember(self, client: str, task: bytes, reply: bytes, receipt: pb.Envelope) -> None:
        """Keep a receipt for repeats, and drop the oldest ones beyond `MAX_RECEIPTS`."""
        self._given[(client, task)] = reply, receipt
        # The first key of a dict is its oldest: any client can cause receipts, so memory must be bounded.
        while len(self._given) > MAX_RECEIPTS:
            del self._given[next(iter(self._given))]

    def forget(self, client: str, task: bytes) -> None:
        """Drop the receipt of a task that is asked again: what an earlier reply led to does not count any more."""
        self._given.pop((client, task), None)

    def accept(self, client: str, header: pb.Header) -> None:
        """Note the digests of an accepted reply, as the journal has them, for repeats after its receipt was dropped."""
        for part in header.parts:
            self._accepted[(header.round, client)] = part.digest.hex()

    def is_accepted(self, client: str, header: pb.Header) -> bool:
        """Return whether a reply carries the update that this run, or an earlier process of it, accepted."""
        # By the update's digest: the journal names blobs, and not the headers that brought them.
        return any(self._accepted.get((header.round, client)) == part.digest.hex() for part in header.parts)
