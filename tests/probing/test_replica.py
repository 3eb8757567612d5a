from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.directions import downlink
from fedtune.directions import sampling as sampling_module
from fedtune.directions.bank import DirectionBank
from fedtune.directions.downlink import MAX_LOG, LoggedRound, LoggedUpdate
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import directions, plain_banks
from fedtune.errors import WireError
from fedtune.messages import SeedState
from fedtune.probing.replica import Replicas, restore
from fedtune.seeds import generator
from fedtune.tensors import Array
from tests.directions.vectors import SEED

BANK = Hadamard(64, SEED)
BASE = bytes(range(32))
E = 20


def ledger(round: int, sums: Array, **changes: Any) -> SeedLedger:
    return replace(SeedLedger(BANK, E, round, BASE, sums), **changes)


class Run:
    """A server's history: a few clients' scalars a round, and the accumulators after each."""

    def __init__(self, rounds: int) -> None:
        rng = generator(5)
        self.sums = [np.zeros(64, np.int32)]
        self.log = list[LoggedRound]()
        for _ in range(rounds):
            clients = [
                LoggedUpdate(
                    int(rng.integers(2**63)), int(rng.integers(1, 128)), rng.integers(-127, 128, 3).astype(np.int8)
                )
                for _ in range(2)
            ]
            self.log.append(LoggedRound(4, clients))
            after = downlink.replay_log(
                self.sums[-1], self.log[-1:], lambda key, count: sampling_module.sample_uniform(key, count, 64)
            )
            self.sums.append(after.astype(np.int32))

    def sent(self, form: Any, round: int, since: int = 0) -> SeedState:
        sums = self.sums[round]
        data = {
            "whole": lambda: downlink.encode_whole(sums),
            "changed": lambda: downlink.encode_changed(sums, self.sums[since]),
            "log": lambda: downlink.encode_log(self.log[since:round]),
        }[form]()
        return SeedState(form, since, data, round, ledger(round, sums).digest)


RUN = Run(24)


def read(
    state: SeedState,
    replicas: Replicas,
    *,
    bank: DirectionBank = BANK,
    exponent: int = E,
    manifest: bytes = BASE,
    sampling: str = "uniform",
) -> SeedLedger | None:
    return restore(state, bank=bank, exponent=exponent, manifest=manifest, sampling=sampling, replicas=replicas)


def arrives(state: SeedState, replicas: Replicas) -> bool:
    """Whether the client stands where the server does, and remembers it."""
    found = read(state, replicas)
    if found is None:
        return False
    kept = replicas.get(BANK, BASE, state.round)
    assert kept is not None
    assert kept.tolist() == found.accumulators.tolist() == RUN.sums[state.round].tolist()
    assert (found.digest, found.round, found.exponent, found.manifest) == (state.digest, state.round, E, BASE)
    assert found.accumulators.dtype == np.int32
    return True


@pytest.mark.parametrize("form", ["changed", "log"])
def test_a_client_of_every_round_follows_from_one_to_the_next(form: str) -> None:
    replicas = Replicas()
    assert all(arrives(RUN.sent(form, round, max(0, round - 1)), replicas) for round in range(25))


@pytest.mark.parametrize("form", ["whole", "changed", "log"])
def test_a_late_joiner_arrives_where_the_server_is(form: str) -> None:
    assert arrives(RUN.sent(form, 7), Replicas())


@pytest.mark.parametrize("form", ["changed", "log"])
def test_missed_rounds_are_made_up_for(form: str) -> None:
    replicas = Replicas()
    assert arrives(RUN.sent("whole", 3), replicas)
    assert arrives(RUN.sent(form, 9, 3), replicas)
    # An older round than the last is still held: the server may not know of the last one.
    assert arrives(RUN.sent(form, 10, 3), replicas)


def test_all_forms_give_one_ledger() -> None:
    found = set[bytes]()
    for form in ("whole", "changed", "log"):
        replicas = Replicas()
        assert arrives(RUN.sent("whole", 5), replicas)
        restored_ledger = read(RUN.sent(form, 9, 0 if form == "whole" else 5), replicas)
        assert restored_ledger is not None
        found.add(restored_ledger.encode())
    assert len(found) == 1


@pytest.mark.parametrize("form", ["changed", "log"])
def test_what_refers_to_a_round_that_is_not_held_is_asked_for_again(form: str) -> None:
    replicas = Replicas()
    assert read(RUN.sent(form, 9, 5), replicas) is None
    assert arrives(RUN.sent("whole", 4), replicas)
    assert read(RUN.sent(form, 9, 5), replicas) is None
    assert replicas.get(BANK, BASE, 9) is None
    assert arrives(RUN.sent("whole", 9), replicas)


def test_the_first_round_needs_nothing_to_be_held() -> None:
    assert arrives(RUN.sent("changed", 0), Replicas())
    zeros = Replicas().get(BANK, BASE, 0)
    assert zeros is not None
    assert not zeros.any()


def test_accumulators_of_another_run_under_the_same_key_are_asked_for_again() -> None:
    # The same seed, bank and base with, say, another learning rate: only the digest tells them apart.
    replicas = Replicas()
    replicas.store(ledger(5, RUN.sums[5] + 1))
    for form in ("changed", "log"):
        assert read(RUN.sent(form, 9, 5), replicas) is None
        assert replicas.get(BANK, BASE, 9) is None
    assert arrives(RUN.sent("whole", 9), replicas)


@pytest.mark.parametrize("form", ["whole", "changed", "log"])
def test_another_base_is_told_apart_by_the_digest(form: str) -> None:
    with pytest.raises(WireError, match=r"expected the state [0-9a-f]{16}; got [0-9a-f]{16} of this base"):
        read(RUN.sent(form, 9), Replicas(), manifest=bytes(32))


@pytest.mark.parametrize(
    "change", [{"exponent": E + 1}, {"bank": Hadamard(64, SEED + 1)}, {"bank": Gaussian(64, SEED)}]
)
def test_another_unit_or_bank_is_told_apart_by_the_digest(change: dict[str, Any]) -> None:
    replicas = Replicas()
    with pytest.raises(WireError, match="expected the state"):
        read(RUN.sent("whole", 9), replicas, **change)
    assert replicas.get(change.get("bank", BANK), BASE, 9) is None


def test_what_is_held_of_one_base_or_bank_is_unknown_to_another() -> None:
    replicas = Replicas()
    assert arrives(RUN.sent("whole", 5), replicas)
    assert replicas.get(BANK, bytes(32), 5) is None
    for bank in (Hadamard(64, 0), Hadamard(32, SEED), Gaussian(64, SEED)):
        assert replicas.get(bank, BASE, 5) is None


def test_only_the_rounds_that_a_log_may_span_are_remembered() -> None:
    replicas = Replicas()
    for round in range(1, 25):
        replicas.store(ledger(round, RUN.sums[round]))
        held = [number for number in range(1, 30) if replicas.get(BANK, BASE, number) is not None]
        assert held == list(range(max(1, round - MAX_LOG), round + 1))


def test_a_run_that_starts_again_forgets_the_rounds_beyond() -> None:
    replicas = Replicas()
    for round in (1, 2, 3, 2):
        replicas.store(ledger(round, RUN.sums[round]))
    assert replicas.get(BANK, BASE, 3) is None
    assert replicas.get(BANK, BASE, 1) is not None


def test_two_runs_side_by_side_do_not_disturb_each_other() -> None:
    replicas, other = Replicas(), Hadamard(64, 7)
    for round in (1, 20):
        replicas.store(ledger(round, RUN.sums[round]))
        replicas.store(ledger(round, RUN.sums[round] + 1, bank=other))
    ours, theirs = replicas.get(BANK, BASE, 20), replicas.get(other, BASE, 20)
    assert ours is not None
    assert theirs is not None
    assert (theirs - ours).tolist() == [1] * 64


def test_a_client_keeps_its_own_copy() -> None:
    replicas = Replicas()
    assert arrives(RUN.sent("whole", 5), replicas)
    found = read(RUN.sent("changed", 6, 5), replicas)
    assert found is not None
    assert arrives(RUN.sent("changed", 7, 5), replicas)


@pytest.mark.parametrize("more", [1, -1])
def test_a_log_of_other_rounds_than_are_missing_is_refused(more: int) -> None:
    state = RUN.sent("log", 9)
    with pytest.raises(WireError, match=f"expected the rounds 1 to 9; got {9 + more} of them"):
        read(replace(state, data=downlink.encode_log(RUN.log[: 9 + more])), Replicas())


@pytest.mark.parametrize("form", ["whole", "changed", "log"])
def test_every_cut_message_raises_nothing_but_a_wire_error(form: str) -> None:
    state = RUN.sent(form, 4)
    for wrong in [*(state.data[:length] for length in range(len(state.data))), state.data + b"\0"]:
        replicas = Replicas()
        with pytest.raises(WireError):
            read(replace(state, data=wrong), replicas)
        assert replicas.get(BANK, BASE, 4) is None


def test_sums_beyond_32_bits_are_refused_before_they_are_hashed() -> None:
    huge = np.full(64, 2**31 - 1, np.int32)
    state = SeedState("whole", 0, downlink.encode_whole(huge), 4, ledger(4, huge).digest)
    with pytest.raises(WireError, match="sums that fit into 32 bits; got larger ones"):
        read(state, Replicas())
    loud = [LoggedRound(24, [LoggedUpdate(1, 1, np.full(60, 127, np.int8))])]
    with pytest.raises(WireError, match="sums that fit into 32 bits; got larger ones"):
        read(SeedState("log", 0, downlink.encode_log(loud), 1, bytes(32)), Replicas())


def test_a_log_of_distinct_seeds_is_read_by_the_same_sampling() -> None:
    one = LoggedRound(4, [LoggedUpdate(3, 1, np.array([1, 2, 3], np.int8))])
    sums = downlink.replay_log(
        np.zeros(64, np.int32), [one], lambda key, count: sampling_module.sample_distinct(key, count, 64)
    )
    sums = sums.astype(np.int32)
    state = SeedState("log", 0, downlink.encode_log([one]), 1, ledger(1, sums).digest)
    found = read(state, Replicas(), sampling="distinct")
    assert found is not None
    assert found.accumulators.tolist() == sums.tolist()
    with pytest.raises(WireError, match="expected the state"):
        read(state, Replicas(), sampling="uniform")


@pytest.mark.parametrize(("sampling", "steps"), [("pro", 3), ("distinct", 65)])
def test_a_log_whose_draws_cannot_be_made_is_refused(sampling: str, steps: int) -> None:
    # `pro` draws by levels that the log does not hold; distinct seeds are at most K.
    log = [LoggedRound(4, [LoggedUpdate(3, 1, np.ones(steps, np.int8))])]
    with pytest.raises(WireError):
        read(SeedState("log", 0, downlink.encode_log(log), 1, bytes(32)), Replicas(), sampling=sampling)


KEYS = (SEED, 5, 6)


class Redrawn:
    """A run of two groups that redraws after two rounds and after four."""

    def __init__(self) -> None:
        rng = generator(8)
        self.ledgers = [self.at(0, np.zeros(16, np.int32))]
        for round in range(1, 7):
            bank = self.bank(round)
            sums = downlink.pad_zeros(self.ledgers[-1].accumulators, bank.size)
            sums[bank.newest] += rng.integers(-999, 999, 16).astype(np.int32)
            self.ledgers.append(self.at(round, sums))

    def bank(self, round: int) -> DirectionBank:
        """Return the directions along which a round has moved."""
        return directions("hadamard", 8, KEYS[: 1 + max(0, round - 1) // 2], 2)

    def at(self, round: int, sums: Array) -> SeedLedger:
        return SeedLedger(self.bank(round), E, round, BASE, sums)

    def sent(self, form: Any, round: int, since: int = 0) -> SeedState:
        now = self.ledgers[round]
        banks = len(plain_banks(now.bank))
        data = {
            "whole": lambda: downlink.encode_whole(now.accumulators),
            "changed": lambda: downlink.encode_changed(
                now.accumulators, self.ledgers[since].accumulators if since else now.accumulators * 0, banks=banks
            ),
        }[form]()
        return SeedState(form, since, data, round, now.digest)

    def arrives(self, state: SeedState, replicas: Replicas) -> bool:
        found = read(state, replicas, bank=self.bank(state.round))
        assert found is None or found.encode() == self.ledgers[state.round].encode()
        return found is not None


REDRAWN = Redrawn()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_client_follows_a_run_whose_banks_are_redrawn(step: int) -> None:
    replicas = Replicas()
    assert all(
        REDRAWN.arrives(REDRAWN.sent("changed", round, round - step), replicas) for round in range(step, 7, step)
    )
    assert REDRAWN.arrives(REDRAWN.sent("whole", 6), Replicas())
    assert REDRAWN.arrives(REDRAWN.sent("changed", 6), Replicas())


def test_a_change_of_the_newest_bank_alone_does_not_grow_with_the_banks_before_it() -> None:
    sizes = [len(REDRAWN.sent("changed", round, round - 1).data) for round in range(1, 7)]
    assert sizes == [2 + 32, 2 + 32, *[2 + 2 + 32] * 4]


@pytest.mark.parametrize(
    "other",
    [
        directions("hadamard", 8, [SEED, 9], 2),
        directions("hadamard", 8, [9, 5], 2),
        directions("hadamard", 8, [SEED, 5], 4),
        directions("hadamard", 16, [SEED, 5]),
        directions("hadamard", 8, [SEED, 5], "tensor", [1, 2]),
        directions("hadamard", 8, [SEED], 2),
        directions("hadamard", 16, [SEED]),
        directions("gaussian", 8, [SEED, 5], 2),
    ],
)
def test_runs_of_other_groups_or_banks_share_nothing(other: DirectionBank) -> None:
    replicas = Replicas()
    assert REDRAWN.arrives(REDRAWN.sent("whole", 4), replicas)
    assert replicas.get(other, BASE, 4) is None
    assert replicas.get(REDRAWN.bank(5), BASE, 4) is not None


def test_tensors_that_are_groups_are_part_of_what_is_remembered() -> None:
    one, other = (directions("hadamard", 8, [SEED], "tensor", tensors) for tensors in ((1, 2), (1, 3)))
    replicas = Replicas()
    replicas.store(SeedLedger(one, E, 2, BASE, np.ones(16, np.int32)))
    assert replicas.get(one, BASE, 2) is not None
    assert replicas.get(other, BASE, 2) is None


def test_a_log_over_several_banks_or_groups_is_refused() -> None:
    state = SeedState("log", 0, b"", 0, bytes(32))
    with pytest.raises(WireError, match="log: expected one bank of one group"):
        read(state, Replicas(), bank=REDRAWN.bank(2))


def test_of_many_numbers_fewer_rounds_are_remembered() -> None:
    bank, replicas = directions("hadamard", 4096, [SEED], 64), Replicas()
    for round in range(1, 20):
        replicas.store(SeedLedger(bank, E, round, BASE, np.zeros(bank.size, np.int32)))
    held = [round for round in range(1, 20) if replicas.get(bank, BASE, round) is not None]
    assert held == list(range(11, 20))
    large = directions("hadamard", 4096, range(4), 64)
    for round in range(1, 5):
        replicas.store(SeedLedger(large, E, round, BASE, np.broadcast_to(np.int32(0), large.size)))
    assert [round for round in range(1, 5) if replicas.get(large, BASE, round) is not None] == [2, 3, 4]
