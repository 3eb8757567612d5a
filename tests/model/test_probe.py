"""Steps along seeds of a real model: by hand, and against the paper's loop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data.encode import Example
from fedtune.directions import sampling
from fedtune.directions.bank import displacement, perturb
from fedtune.directions.downlink import count_scalars
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.errors import ClientError
from fedtune.messages import ProbeSeeds, Training
from fedtune.model import probe as probing
from fedtune.model.base import Base, digest
from fedtune.model.batches import Batch, collate
from fedtune.model.probe import at_position
from fedtune.model.seed_rebuild import DisplacedPosition, RebuiltPosition, mean_loss
from fedtune.probing.measure import Measurements, measure
from fedtune.probing.order import batches
from fedtune.probing.steps import Move, around, steps_of
from fedtune.tensors import Array
from tests.model.conftest import bank_of, ledger_of
from tests.probing.conftest import probe, training

KEY = 77
DRAWN = sampling.sample_uniform(5, 12, 16)


def reached(base: Base, bank: str) -> Sequence[int]:
    return trainable_ordinals(base.manifest, TensorSelection(bank), base.matrices)


def measure_on(
    base: Base,
    examples: Sequence[Example],
    local: Training,
    asked: ProbeSeeds,
    ledger: SeedLedger,
    drawn: Array,
    *,
    key: int = KEY,
    **options: Any,
) -> Measurements:
    """Measure on a real base, as a client does."""
    position = probing.measured_position(base, client="ann", batch=local.batch)
    with position(ledger, reached(base, asked.bank)) as there:
        return measure(
            there, partial(collate, base=base), examples, local, asked, ledger, drawn, key=key, client="ann", **options
        )


def measured(
    base: Base, rows: Sequence[Example], asked: ProbeSeeds, ledger: SeedLedger, drawn: Array = DRAWN, **options: Any
) -> Measurements:
    return measure_on(base, rows, training(len(drawn), **options), asked, ledger, drawn)


def test_memory_that_runs_out_names_what_to_lower(loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded()

    def full(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("fedtune.model.seed_rebuild.mean_loss", full)
    with pytest.raises(ClientError, match=r"ann: expected its batch of 3 to fit; memory ran out; lower client\.batch"):
        measured(base, examples(2), probe(), ledger_of(base, "hadamard"), batch=3)


def test_any_other_error_is_let_through(loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, own = loaded(), digest(loaded().model)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr("fedtune.model.seed_rebuild.mean_loss", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        measured(base, examples(2), probe(), ledger_of(base, "hadamard"))
    assert digest(base.model) == own


def by_hand(
    base: Base, rows: Sequence[Example], asked: ProbeSeeds, ledger: SeedLedger, drawn: Array, rate: float
) -> list[int]:
    """Two-sided steps with batches of one, as the formulas say them, over weights that are set in place."""
    unit = 2.0 ** -(ledger.exponent + ledger.bank.halvings)
    own = {entry.name: base.model.get_parameter(entry.name).clone() for entry in base.manifest.entries}
    sums, scalars, order = ledger.accumulators.astype(np.int64), list[int](), batches(len(rows), size=1, key=KEY)

    def loss(moved: Array, batch: Batch) -> float:
        for ordinal in reached(base, asked.bank):
            entry = base.manifest.entries[ordinal]
            y = displacement(ledger.bank, moved.astype(np.int32), ordinal=ordinal, shape=entry.shape)
            change = unit * torch.from_numpy(y.reshape(entry.shape))
            base.model.get_parameter(entry.name).copy_(own[entry.name] - change)
        return mean_loss(base, batch)

    with torch.no_grad():
        for seed in drawn.tolist():
            batch = collate([rows[place] for place in next(order)], base)
            plus, minus = (loss(perturb(ledger.bank, sums, seed, amount), batch) for amount in (-32, 32))
            slope = (plus - minus) / (2 * 32 * 2.0**-10)
            scalars.append(max(-127, min(127, round(rate * slope * 2**10 / 2**3))))
            sums[seed] += scalars[-1] * 2**3
        for name, weight in own.items():
            base.model.get_parameter(name).copy_(weight)
    return scalars


@pytest.mark.parametrize("bank", ["hadamard", "gaussian", "kron"])
def test_every_step_starts_where_the_one_before_has_ended(bank: str, loaded: Any, examples: Any) -> None:
    """Twelve steps of a real model; kron's losses differ in the last bits, which moves a scalar by one at most."""
    base, rows = loaded(targets=["all-linear"]), examples(5)
    ledger, rate = ledger_of(base, bank), 0.02
    expected = by_hand(base, rows, probe(bank), ledger, DRAWN, rate)
    found = measured(base, rows, probe(bank), ledger, learning_rate=rate)
    np.testing.assert_allclose(found.scalars, expected, atol=1 if bank == "kron" else 0)
    assert np.abs(expected).max() > 10
    assert len(set(DRAWN.tolist())) < len(DRAWN)  # some seed comes twice


class Spied:
    """A position that keeps by how much each accumulator was moved."""

    def __init__(self, position: Any, size: int) -> None:
        self.position, self.sums = position, np.zeros(size, np.int64)

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        found: Sequence[float] = self.position.losses(batch, moves)
        return found

    def move(self, seed: int, amount: int) -> None:
        self.sums[seed] += amount
        self.position.move(seed, amount)


@pytest.mark.parametrize("bank", ["hadamard", "gaussian", "kron"])
@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
def test_the_client_has_moved_by_what_the_server_will_add_for_it(
    bank: str, estimator: Any, loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, spied = loaded(), list[Spied]()

    @contextmanager
    def watched(*arguments: Any, **options: Any) -> Iterator[Spied]:
        with at_position(*arguments, **options) as position:
            spied.append(Spied(position, 16))
            yield spied[0]

    monkeypatch.setattr(probing, "at_position", watched)
    own, asked = digest(base.model), probe(bank, estimator=estimator, queries=4)
    found = measured(base, examples(4), asked, ledger_of(base, bank), batch=2, learning_rate=0.3)
    assert np.abs(found.scalars.astype(int)).max() <= 127
    np.testing.assert_array_equal(spied[0].sums, count_scalars(DRAWN, found.scalars, 16) << 3)
    assert spied[0].sums.any()
    assert digest(base.model) == own


def test_the_same_key_gives_the_same_scalars_and_another_one_others(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(6)
    ledger = ledger_of(base, "hadamard")
    first, second = (measured(base, rows, probe(), ledger, learning_rate=0.02) for _ in range(2))
    np.testing.assert_array_equal(first.scalars, second.scalars)
    local = training(12, learning_rate=0.02)
    other = measure_on(base, rows, local, probe(), ledger, DRAWN, key=KEY + 1)
    assert first.scalars.tolist() != other.scalars.tolist()


def test_tokens_are_counted_as_often_as_they_go_forward(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(2)  # of 6 and 9 tokens, both in every batch
    once = 12 * (6 + 9)
    ledger = ledger_of(base, "hadamard")
    assert measured(base, rows, probe(), ledger, batch=2).tokens == 2 * once
    queries = probe(estimator="one-sided", queries=4)
    assert measured(base, rows, queries, ledger, batch=2).tokens == 5 * once // 4


@pytest.mark.parametrize("bank", ["hadamard", "gaussian", "kron"])
def test_padding_weighs_nothing_a_batch_s_loss_is_the_mean_over_its_tokens(
    bank: str, loaded: Any, examples: Any
) -> None:
    base, rows = loaded(), examples(4)
    moves = [(3, -32), (3, 32)]
    with at_position(base, ledger_of(base, bank), reached(base, bank)) as position, torch.inference_mode():
        together = position.losses(batch := collate(rows, base), moves)
        alone = [(position.losses(one, moves), one.count) for one in (collate([row], base) for row in rows)]
    assert not batch.attention_mask.all()
    assert batch.count == sum(count for _, count in alone)
    for side in range(2):
        mean = sum(losses[side] * count for losses, count in alone) / batch.count
        assert together[side] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    ("bank", "bytes_free", "kind"),
    [
        ("hadamard", 2**40, DisplacedPosition),
        ("hadamard", 0, RebuiltPosition),
        ("gaussian", 0, DisplacedPosition),
    ],
)
def test_displacements_are_stored_where_there_is_room_for_them(
    bank: str,
    bytes_free: int,
    kind: Any,
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = loaded()
    monkeypatch.setattr(probing, "spare_bytes", lambda device, limit: bytes_free)
    with caplog.at_level("INFO"), at_position(base, ledger_of(base, bank), reached(base, bank)) as position:
        assert type(position) is kind
    [said] = caplog.messages
    assert said.startswith("weights are rebuilt" if kind is RebuiltPosition else "displacements stay in memory")


def test_a_client_keeps_within_the_memory_that_it_was_given(
    loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, asked = loaded(), list[Any]()

    def spare(device: torch.device, limit: int | None) -> int:
        asked.append(limit)
        return 0

    monkeypatch.setattr(probing, "spare_bytes", spare)
    position = probing.measured_position(base, client="ann", batch=2, max_bytes=7)
    with position(ledger_of(base, "hadamard"), reached(base, "hadamard")):
        assert asked == [7]


def test_a_client_without_the_room_gives_the_same_scalars(
    loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = loaded(dtype="bfloat16"), examples(6)
    ledger, asked = ledger_of(base, "hadamard"), probe(estimator="one-sided", queries=4)
    found = measured(base, rows, asked, ledger, learning_rate=0.3)
    monkeypatch.setattr(probing, "spare_bytes", lambda device, limit: 0)
    again = measured(base, rows, asked, ledger, learning_rate=0.3)
    np.testing.assert_array_equal(found.scalars, again.scalars)
    assert found.losses == again.losses
    assert found.scalars.any()


STEPS, FINE, SHIFT = 50, 26, 10


def published(base: Base, rows: Sequence[Example], drawn: Array, *, eps: float, rate: float) -> list[Array]:
    """The paper's loop in float32: the same directions, in-place perturbations, scalars that are floats."""
    bank, order = bank_of("gaussian"), batches(len(rows), size=1, key=KEY)
    weights = [base.model.get_parameter(entry.name) for entry in base.manifest.entries]
    start = [weight.double().numpy().copy() for weight in weights]
    with torch.no_grad():
        for seed in drawn.tolist():
            one = perturb(bank, np.zeros(16, np.int32), seed, 1)
            z = [
                torch.from_numpy(displacement(bank, one, ordinal=ordinal, shape=entry.shape) / 2.0).view(entry.shape)
                for ordinal, entry in enumerate(base.manifest.entries)
            ]
            batch, losses = collate([rows[place] for place in next(order)], base), []
            for times in (1, -2):
                for weight, along in zip(weights, z, strict=True):
                    weight.add_(along, alpha=times * eps)
                losses.append(mean_loss(base, batch))
            g = (losses[0] - losses[1]) / (2 * eps)
            for weight, along in zip(weights, z, strict=True):
                weight.add_(along, alpha=eps).sub_(along, alpha=rate * g)
    return [weight.double().numpy() - before for weight, before in zip(weights, start, strict=True)]


@pytest.mark.parametrize(("scalars", "tolerance"), [("fine", 1e-4), ("int8", 2e-2)])
def test_fifty_steps_of_the_papers_loop_end_at_the_same_weights(
    scalars: str, tolerance: float, loaded: Any, examples: Any
) -> None:
    """Where a step is rounded to the displacement unit, 2^-26, what is left is float32's noise in the loop: 1e-5 of it.

    Scalars of 8 bits are off by half of one; here most are below 64, and the ends differ by 0.7 parts in a hundred.
    """
    rows, drawn = examples(5), sampling.sample_uniform(9, STEPS, 16)  # more steps than seeds
    eps, rate = 2.0**-7, 5e-5
    theirs = published(loaded(), rows, drawn, eps=eps, rate=rate)
    base = loaded()
    asked = probe("gaussian", exponent=FINE, shift=SHIFT, perturbation=2 ** (FINE - 7))
    sums = np.zeros(16, np.int64)
    ledger = SeedLedger(bank_of("gaussian"), FINE, 0, base.manifest.digest, sums.astype(np.int32))
    if scalars == "int8":
        found = measured(base, rows, asked, ledger, drawn, learning_rate=rate)
        assert np.abs(found.scalars.astype(int)).max() < 127  # none was cut off
        sums += count_scalars(drawn, found.scalars, 16) << SHIFT
    else:
        order = batches(len(rows), size=1, key=KEY)
        with at_position(base, ledger, reached(base, "gaussian")) as position, torch.inference_mode():
            for seed in drawn.tolist():
                batch = collate([rows[place] for place in next(order)], base)
                (step,) = steps_of(position.losses(batch, around([seed], asked)), asked, rate, deque())
                position.move(seed, round(step * 2**FINE))
                sums[seed] += round(step * 2**FINE)
    off = size = 0.0
    for ordinal, (entry, change) in enumerate(zip(base.manifest.entries, theirs, strict=True)):
        y = displacement(ledger.bank, sums.astype(np.int32), ordinal=ordinal, shape=entry.shape)
        ours = -(2.0 ** -(FINE + 1)) * y.reshape(entry.shape)
        off, size = off + np.square(ours - change).sum(), size + np.square(change).sum()
    assert math.sqrt(off / size) < tolerance


@pytest.mark.parametrize("bank", ["hadamard", "gaussian", "kron"])
def test_losses_before_and_after_are_taken_on_the_same_rows(
    bank: Any, loaded: Callable[..., Base], examples: Callable[[int], list[Example]]
) -> None:
    """Scalars that are all rounded to 0 move nothing, so nothing is gained, whatever batches the steps see."""
    base, others = loaded(targets=["all-linear"]), examples(5)
    ledger = ledger_of(base, bank)
    asked, ids = probe(bank, exponent=10), DRAWN[:4]

    def losses(learning_rate: float) -> tuple[float, float]:
        local = training(len(ids), batch=2, learning_rate=learning_rate)
        result = measure_on(base, examples(6), local, asked, ledger, ids, rows=others)
        assert result.loss_before is not None
        assert result.loss_after is not None
        return result.loss_before, result.loss_after

    before, after = losses(1e-12)
    assert before == after
    again, moved = losses(0.5)
    assert again == before
    assert moved != before
    with at_position(base, ledger, reached(base, bank)) as position, torch.inference_mode():
        batch = collate(others, base)
        assert before == pytest.approx(position.losses(batch, [(3, 0)])[0], rel=1e-5)
