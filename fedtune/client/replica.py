"""What a client remembers of a run between rounds: accumulators it has worked on, so that short messages suffice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fedtune.directions import downlink
from fedtune.directions import sampling as sampling_module
from fedtune.directions.bank import DirectionBank, headroom
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ConfigError, WireError
from fedtune.messages import SeedState
from fedtune.tensors import Array

Key = tuple[str, int, int, bytes]


class Replicas:
    """Accumulators by run and round, the last `downlink.MAX_LOG` rounds of each run; lost with its process."""

    def __init__(self) -> None:
        self._kept: dict[Key, dict[int, Array]] = {}

    def known(self, bank: DirectionBank, manifest: bytes, round: int) -> Array | None:
        """Return the accumulators after a round of a run, None if they are not held; zeros are known to everybody."""
        if round == 0:
            return np.zeros(bank.size, np.int32)
        return self._kept.get(self._key(bank, manifest), {}).get(round)

    def keep(self, ledger: SeedLedger) -> None:
        key = self._key(ledger.bank, ledger.manifest)
        oldest = ledger.round - downlink.MAX_LOG
        before = {round: sums for round, sums in self._kept.get(key, {}).items() if oldest <= round < ledger.round}
        self._kept[key] = {**before, ledger.round: ledger.accumulators}

    @staticmethod
    def _key(bank: DirectionBank, manifest: bytes) -> Key:
        return bank.name, bank.size, bank.key, manifest


def restore(
    state: SeedState, *, bank: DirectionBank, exponent: int, manifest: bytes, sampling: str, replicas: Replicas
) -> SeedLedger | None:
    """Return the ledger that a message stands for, and keep it; None if what it refers to is not held, or another.

    Args:
        state: as it was sent.
        bank: of the run.
        exponent: e of the run.
        manifest: digest of the client's own base.
        sampling: by which the ids of a log are drawn.
        replicas: what the client remembers.

    Raises:
        WireError: if the message cannot be read, or is whole and does not give the state that it states.
    """
    known = replicas.known(bank, manifest, state.since)
    if state.form != "whole" and known is None:
        return None
    sums = read_accumulators(
        state, known, partial(sampling_module.sample_ids, size=bank.size, sampling=sampling), bank.size
    )
    if len(sums) != bank.size or headroom(bank, np.clip(sums, -(2**31), 2**31 - 1)) < 0:
        raise WireError("accumulators: expected sums that fit into 32 bits; got larger ones")
    ledger = SeedLedger(bank, exponent, state.round, manifest, sums.astype(np.int32))
    if ledger.digest != state.digest:
        if state.since > 0:
            return None
        raise WireError(
            f"expected the state {state.digest.hex()[:16]}; got {ledger.digest.hex()[:16]} of this base and what came; "
            "load the same model in the same revision and dtype"
        )
    replicas.keep(ledger)
    return ledger


def read_accumulators(state: SeedState, known: Array | None, draw: Callable[[int, int], Array], size: int) -> Array:
    if state.form == "whole":
        return downlink.decode_whole(state.data, size)
    assert known is not None  # the caller has looked
    if state.form == "changed":
        return downlink.decode_changed(state.data, known)
    rounds = downlink.decode_log(state.data)
    if len(rounds) != state.round - state.since:
        raise WireError(f"log: expected the rounds {state.since + 1} to {state.round}; got {len(rounds)} of them")
    try:
        return downlink.replay_log(known, rounds, draw)
    except (ConfigError, IndexError) as error:  # more distinct seeds than there are, or levels that are not sent
        raise WireError(f"log: expected scalars whose seeds can be drawn; got others ({error})") from error
