"""The accumulators that a client remembers between rounds, so that the server can send changes in place of all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fedtune.directions import downlink
from fedtune.directions import sampling as sampling_module
from fedtune.directions.bank import DirectionBank, headroom
from fedtune.directions.blocks import Groups
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import Grouped, plain_banks
from fedtune.errors import ConfigError, WireError
from fedtune.messages import ProbeSeeds, SeedState
from fedtune.tensors import Array, Tensors

Key = tuple[str, int, Groups, tuple[int, ...], int, bytes]
"""Of a run: its kind of bank, K, its groups and the tensors that are some, the key of its first bank, the manifest."""

REMEMBERED = 2**21
"""Numbers of a run's earlier rounds, 8 MiB; one of these rounds is remembered however many numbers it has."""


class Replicas:
    """Accumulators by run and round, the last `downlink.MAX_LOG` rounds of each run; lost with its process."""

    def __init__(self) -> None:
        self._rounds: dict[Key, dict[int, SeedLedger]] = {}
        self._heads: dict[int, Tensors] = {}
        """By key of a run's first bank."""

    def head(self, probe: ProbeSeeds) -> Tensors:
        """Return the head that takes the place of the base's in a run, as sent or stored; empty where there is none."""
        run = (*probe.earlier, probe.key)[0]
        # A state that builds on earlier ones comes without it; if another is stored the state's digest differs.
        if not probe.state.since:
            self._heads[run] = probe.head
        return self._heads.get(run, {})

    def get(self, bank: DirectionBank, manifest: bytes, round: int) -> Array | None:
        """Return the accumulators after a round of a run, None if they are not stored; round 0 is all zeros.

        They have zeros for the banks that were new since.
        """
        if round == 0:
            return np.zeros(bank.size, np.int32)
        ledger = self._rounds.get(self._key(bank, manifest), {}).get(round)
        if ledger is None:
            return None
        then = [plain.key for plain in plain_banks(ledger.bank)]
        # A run of other later banks is another one, whatever it has in common with this one.
        if then != [plain.key for plain in plain_banks(bank)][: len(then)]:
            return None
        return downlink.pad_zeros(ledger.accumulators, bank.size)

    def store(self, ledger: SeedLedger) -> None:
        """Store a ledger's accumulators, and drop those of rounds that no log can span any more."""
        key = self._key(ledger.bank, ledger.manifest)
        oldest = ledger.round - min(downlink.MAX_LOG, max(1, REMEMBERED // ledger.bank.size))
        # Of later rounds too: a server that was set back would send changes of a history that is no more.
        before = {round: one for round, one in self._rounds.get(key, {}).items() if oldest <= round < ledger.round}
        self._rounds[key] = {**before, ledger.round: ledger}

    @staticmethod
    def _key(bank: DirectionBank, manifest: bytes) -> Key:
        groups, tensors = (bank.groups, bank.tensors) if isinstance(bank, Grouped) else (1, ())
        return bank.name, bank.seeds, groups, tensors, plain_banks(bank)[0].key, manifest


def restore(
    state: SeedState, *, bank: DirectionBank, exponent: int, manifest: bytes, sampling: str, replicas: Replicas
) -> SeedLedger | None:
    """Return the ledger that a message describes, and store its accumulators.

    None if the message builds on accumulators that this client lacks, or that give another state than the server has;
    the server then sends them whole.

    Args:
        state: as the server sent it.
        bank: of the run.
        exponent: e of the run.
        manifest: digest of the client's own base.
        sampling: by which the ids of a log are drawn.
        replicas: what the client remembers.

    Raises:
        WireError: if the message cannot be read, or sends everything and still gives another state than it states.
    """
    known = replicas.get(bank, manifest, state.since)
    if state.form != "whole" and known is None:
        return None
    sums = read_accumulators(
        state, known, partial(sampling_module.sample_ids, size=bank.seeds, sampling=sampling), bank
    )
    # Clipped to 32 bits, beyond which one is refused anyhow: the sum of such numbers could wrap around.
    if headroom(bank, np.clip(sums, -(2**31), 2**31 - 1)) < 0:
        raise WireError("accumulators: expected sums that fit into 32 bits; got larger ones")
    ledger = SeedLedger(bank, exponent, state.round, manifest, sums.astype(np.int32))
    if ledger.digest != state.digest:
        # The remembered accumulators may be wrong, so the whole state is worth asking for.
        if state.since > 0:
            return None
        # Nothing of an earlier round is in it: to ask for the whole state would give the same again.
        raise WireError(
            f"expected the state {state.digest.hex()[:16]}; got {ledger.digest.hex()[:16]} of this base and what came; "
            "load the same model in the same revision and dtype"
        )
    replicas.store(ledger)
    return ledger


def read_accumulators(
    state: SeedState, known: Array | None, sample_ids: Callable[[int, int], Array], bank: DirectionBank
) -> Array:
    """Return the accumulators that a message describes, given those that the client knows.

    Raises:
        WireError: if the message cannot be read.
    """
    if state.form == "whole":
        return downlink.decode_whole(state.data, bank.size)
    assert known is not None  # `restore` has checked
    if state.form == "changed":
        return downlink.decode_changed(state.data, known, banks=len(plain_banks(bank)))
    if bank.size != bank.seeds:
        raise WireError("log: expected one bank of one group; got several; send the numbers whole, or what changed")
    rounds = downlink.decode_log(state.data)
    if len(rounds) != state.round - state.since:
        raise WireError(f"log: expected the rounds {state.since + 1} to {state.round}; got {len(rounds)} of them")
    try:
        return downlink.replay_log(known, rounds, sample_ids)
    except (ConfigError, IndexError) as error:  # more distinct ids than seeds, or levels that were not sent
        raise WireError(f"log: expected scalars whose seeds can be drawn; got others ({error})") from error
