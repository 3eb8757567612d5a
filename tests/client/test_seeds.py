"""A client that descends along seeds: what it sends, what it starts from, and what it does where memory is short."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.client.batched import Batched, Resident, why_alone
from fedtune.client.perform import perform
from fedtune.data.encode import Example
from fedtune.directions.downlink import encode_changed, encode_whole
from fedtune.directions.numbers import LARGEST_NUMBER
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import directions
from fedtune.errors import ClientError, ConfigError, WireError
from fedtune.messages import Assignment, ClientUpdate, DescendSeeds, Plan, ProbeResult, ProbeSeeds, SeedState, Training
from fedtune.model.base import Base, digest
from fedtune.probing.answer import Prober, start_of
from fedtune.probing.replica import Replicas
from fedtune.wire.codec import decode_assignment, decode_update, encode_assignment, encode_update
from tests.model.test_descend import reached

KEYS = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
TRAINING = Training(batch=2, learning_rate=0.02, steps=6)
ZERO = np.zeros(16, np.int32)
MEASURING = Training(batch=2, learning_rate=0.01, steps=5)


@pytest.fixture
def base(loaded: Any) -> Base:
    return loaded(targets=["all-linear"])  # type: ignore[no-any-return]


@pytest.fixture
def rows(examples: Any) -> list[Example]:
    return examples(5)  # type: ignore[no-any-return]


def order(
    base: Base, *, bank: Any = "hadamard", groups: Any = 1, banks: int = 1, bits: Any = 8, **changes: Any
) -> tuple[SeedLedger, Assignment]:
    """Return a state that has moved already, and an order to descend from it."""
    chosen = directions(bank, 16, KEYS[:banks], groups, reached(base, bank))
    sums = np.random.default_rng(0).integers(-(2**12), 2**12, chosen.size).astype(np.int32)
    ledger = SeedLedger(chosen, 20, 5, base.manifest.digest, sums)
    state = SeedState("whole", 0, encode_whole(sums), 5, ledger.digest)
    probe = ProbeSeeds(bank, 16, KEYS[banks - 1], 20, 3, 2**10, state, groups=groups, earlier=KEYS[: banks - 1])
    count = len(range(chosen.size)[chosen.newest])
    task = replace(DescendSeeds(probe, count, 20, bits), **changes)
    return ledger, Assignment("fedkseed", 6, 9, Plan("ann", 1, 1.0, TRAINING), task)


def work(base: Base, rows: Sequence[Example], asked: Assignment, **options: Any) -> ClientUpdate:
    return perform(base, rows, asked, threads=1, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"groups": 4, "bits": 4},
        {"groups": 2, "banks": 2, "bits": 2},
        {"bank": "kron"},
        {"bank": "kron", "groups": "tensor", "banks": 2},
    ],
    ids=str,
)
def test_a_client_learns_by_what_it_sends_and_leaves_the_base_as_it_was(
    settings: dict[str, Any], base: Base, rows: list[Example]
) -> None:
    ledger, asked = order(base, **settings)
    update = work(base, rows, asked)
    found = update.descend
    assert (update.client, update.round, update.num_examples) == ("ann", 6, 5)
    assert found.state == ledger.digest[:8]
    assert len(found.checks) == 16
    assert (found.numbers.shape, found.numbers.dtype.name) == ((asked.descend.count,), "int8")
    assert (found.bits, found.skipped) == (asked.descend.bits, 0)
    assert np.abs(found.numbers).max() <= LARGEST_NUMBER[found.bits]
    assert update.measured.tokens > 0
    assert update.measured.peak_bytes > 0
    before, after = update.measured.loss_before, update.measured.loss_after
    assert before is not None
    assert after is not None
    assert after < before - 0.005
    assert digest(base.model) == base.digest
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_loss_after_is_that_of_the_sums_with_what_it_sends(base: Base, rows: list[Example]) -> None:
    """Another client that starts from them measures the same before its first step."""
    ledger, asked = order(base, bits=2)
    update = work(base, rows, asked, held_out=rows[:2])
    sums = ledger.accumulators + (update.descend.numbers.astype(np.int32) << update.descend.shift)
    after = replace(ledger, round=6, accumulators=sums)
    state = SeedState("whole", 0, encode_whole(sums), 6, after.digest)
    probe = replace(asked.probe, state=state)
    again = work(base, rows, replace(asked, round=7, task=replace(asked.descend, probe=probe)), held_out=rows[:2])
    assert again.measured.loss_before == pytest.approx(update.measured.loss_after, rel=1e-6)


def test_a_repeated_round_gives_the_same_bits_over_the_wire_too(base: Base, rows: list[Example]) -> None:
    _, asked = order(base, groups=2, bits=4)
    sent = encode_assignment(asked)
    first, second = work(base, rows, asked), work(base, rows, decode_assignment(sent.header, sent.blobs))
    assert first.descend.numbers.tobytes() == second.descend.numbers.tobytes()
    one, other = (
        encode_update(replace(update, measured=replace(update.measured, seconds=1.0, peak_bytes=0)))
        for update in (first, second)
    )
    assert one == other
    back = decode_update(one, client="ann", limit_bytes=4096, task=DescendSeeds)
    np.testing.assert_array_equal(back.descend.numbers, first.descend.numbers)


def test_other_data_orders_and_other_clients_send_other_numbers(base: Base, rows: list[Example]) -> None:
    _, asked = order(base)
    sent = {work(base, rows, replace(asked, seed=seed)).descend.numbers.tobytes() for seed in (9, 10)}
    sent.add(work(base, rows[:4], asked).descend.numbers.tobytes())
    assert len(sent) == 3


def test_a_client_that_lacks_the_state_asks_for_the_whole_of_it(base: Base, rows: list[Example]) -> None:
    _, asked = order(base)
    state = replace(asked.probe.state, form="changed", since=4, data=encode_changed(ZERO, ZERO))
    update = work(base, rows, replace(asked, task=replace(asked.descend, probe=replace(asked.probe, state=state))))
    assert isinstance(update.result, ProbeResult)
    assert update.result.lost


def test_an_order_of_another_bank_s_size_is_refused(base: Base, rows: list[Example]) -> None:
    with pytest.raises(ClientError, match=r"ann: expected an order for the 16 numbers of its bank; got one for 32"):
        work(base, rows, order(base, count=32)[1])


def test_accumulators_that_are_not_as_stated_are_refused(base: Base, rows: list[Example]) -> None:
    _, asked = order(base)
    state = replace(asked.probe.state, digest=bytes(32))
    with pytest.raises(WireError, match="expected the state"):
        work(base, rows, replace(asked, task=replace(asked.descend, probe=replace(asked.probe, state=state))))


def test_a_client_without_examples_cannot_descend(base: Base) -> None:
    with pytest.raises(ClientError, match="at least one training example"):
        work(base, [], order(base)[1])


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_quantised_base_descends_with_kron_and_is_refused_with_another_bank(
    dtype: str, loaded: Any, rows: list[Example]
) -> None:
    whole, coded = loaded(targets=["all-linear"]), loaded(targets=["all-linear"], dtype=dtype)
    update = work(coded, rows, order(whole, bank="kron")[1])
    assert update.measured.loss_before is not None
    assert update.measured.loss_after is not None
    assert update.measured.loss_after < update.measured.loss_before
    with pytest.raises(ConfigError, match=r"method\.bank: expected 'kron' over a quantised base"):
        work(coded, rows, order(whole)[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_sixteen_bits_descends(dtype: str, loaded: Any, rows: list[Example]) -> None:
    base = loaded("gpt2", targets=["all-linear"], dtype=dtype)
    update = work(base, rows, order(base, groups=2)[1])
    assert update.measured.loss_before is not None
    assert update.measured.loss_after is not None
    assert update.measured.loss_after < update.measured.loss_before
    assert digest(base.model) == base.digest


@pytest.mark.parametrize("bank", ["hadamard", "kron"])
def test_a_classifier_descends(bank: str, loaded: Any, examples: Any) -> None:
    base = loaded("bert", targets=["all-linear"], task="classification", labels=["a", "b", "c"])
    update = work(base, examples(6, classes=3), order(base, bank=bank, groups=1)[1])
    assert update.measured.loss_before is not None
    assert update.measured.loss_after is not None
    assert update.measured.loss_after < update.measured.loss_before


def test_clients_that_descend_are_not_batched_with_others(base: Base, rows: list[Example]) -> None:
    asked = order(base)[1]
    assert why_alone(base, Resident(rows, (), 1), asked) == "it is no training of an adapter"
    assert Batched(base, {"ann": Resident(rows, (), 1)})([asked]) == {}


def too_little(monkeypatch: pytest.MonkeyPatch, *, at: str) -> None:
    """Let a machine have too little memory: by its own word, or as an allocator finds out in the middle of a step."""
    if at == "estimate":
        monkeypatch.setattr("fedtune.client.seeds.free_bytes", lambda *arguments: 1000)
        return

    def full(*arguments: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("fedtune.model.descend.backward", full)


@pytest.mark.parametrize("at", ["estimate", "step"])
def test_a_client_without_the_memory_probes_where_the_order_allows_it_and_says_so(
    at: str, base: Base, rows: list[Example], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, asked = order(base, fallback=MEASURING)
    plain = replace(asked, plan=replace(asked.plan, training=MEASURING), task=asked.probe)
    expected = work(base, rows, plain)
    too_little(monkeypatch, at=at)
    with caplog.at_level(logging.WARNING):
        update = work(base, rows, asked)
    np.testing.assert_array_equal(update.probe.scalars, expected.probe.scalars)
    assert len(update.probe.scalars) == 5
    assert (update.probe.state, update.probe.checks) == (ledger.digest[:8], expected.probe.checks)
    assert "ann: expected a step that fits into memory" in caplog.text
    assert "it measures losses along seeds instead" in caplog.text
    assert digest(base.model) == base.digest
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("at", ["estimate", "step"])
def test_without_leave_to_probe_it_fails_in_the_words_of_memory(
    at: str, base: Base, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    too_little(monkeypatch, at=at)
    with pytest.raises(ClientError, match=r"ann: expected a step that fits into memory; .*memory ran out; lower desc"):
        work(base, rows, order(base)[1])


def test_another_error_is_no_reason_to_probe(base: Base, rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr("fedtune.model.descend.backward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        work(base, rows, order(base, fallback=MEASURING)[1])


def test_a_limit_of_the_site_counts_as_memory_that_is_not_there(base: Base, rows: list[Example]) -> None:
    asked = order(base, fallback=MEASURING)[1]
    assert isinstance(work(base, rows, asked, max_bytes=10 * 2**20).result, ProbeResult)
    assert work(base, rows, asked, max_bytes=2**40).descend.skipped == 0


def test_a_client_probes_from_the_state_that_it_has_descended_from(base: Base, rows: list[Example]) -> None:
    """Both verbs share what a client remembers of earlier rounds."""
    ledger, asked = order(base)
    replicas = Replicas()
    work(base, rows, asked, replicas=replicas)
    state = replace(asked.probe.state, form="changed", since=5, data=encode_changed(ZERO, ZERO))
    prober: Prober[Any] = Prober(
        base.manifest, base.matrices, collate=lambda rows: rows, at=lambda *_: pytest.fail("measures nothing")
    )
    start = start_of(prober, replace(asked.probe, state=state), replicas)
    assert start is not None
    np.testing.assert_array_equal(start.ledger.accumulators, ledger.accumulators)
