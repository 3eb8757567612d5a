"""Steps along seeds: by hand, against the paper's loop, and with losses that are scripted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
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
from fedtune.errors import ClientError, RoundError
from fedtune.messages import ProbeSeeds, SeedState, Training
from fedtune.model import probe as probing
from fedtune.model.base import Base, digest
from fedtune.model.batches import Batch, batches, collate
from fedtune.model.probe import Measurements, around, at_position, clip_scalar, measure, steps_of
from fedtune.model.seed_rebuild import Move, mean_loss
from fedtune.tensors import Array
from tests.model.conftest import bank_of, ledger_of

KEY = 77
DRAWN = sampling.sample_uniform(5, 12, 16)


def probe(bank: Any = "hadamard", **changes: Any) -> ProbeSeeds:
    """Return what to measure at e = 10: a scalar of one moves by 2^3, eps is 32 * 2^-10 = 1/32."""
    asked = ProbeSeeds(bank, 16, 0, exponent=10, shift=3, perturbation=32, state=SeedState("whole", 0, b"", 0, b""))
    return replace(asked, **changes)


def training(steps: int, *, batch: int = 1, learning_rate: float = 0.1) -> Training:
    return Training(batch=batch, learning_rate=learning_rate, steps=steps)


def reached(base: Base, bank: str) -> Sequence[int]:
    return trainable_ordinals(base.manifest, TensorSelection(bank), base.matrices)


def measured(
    base: Base, rows: Sequence[Example], asked: ProbeSeeds, ledger: SeedLedger, drawn: Array = DRAWN, **options: Any
) -> Measurements:
    """Measure on a real base."""
    local = training(len(drawn), **options)
    return measure(base, rows, local, asked, ledger, reached(base, asked.bank), drawn, key=KEY, client="ann")


class Scripted:
    """A position whose losses are a script, and which keeps what it was asked."""

    def __init__(self, *losses: Sequence[float]) -> None:
        self.script = list(losses)
        self.asked: list[Sequence[Move]] = []
        self.moved: list[Move] = []

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        self.asked.append(moves)
        return self.script.pop(0)

    def move(self, seed: int, amount: int) -> None:
        self.moved.append((seed, amount))


Script = Callable[..., tuple[Scripted, Measurements]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, examples: Any) -> Script:
    """Measure where losses are a script: what was asked and done, and what came of it."""

    def run(*losses: Sequence[float], drawn: Sequence[int] | None = None, start: int = 0, **changes: Any) -> Any:
        position, asked = Scripted(*losses), probe(**changes)

        @contextmanager
        def positioned(*arguments: Any) -> Iterator[Scripted]:
            yield position

        monkeypatch.setattr(probing, "at_position", positioned)
        count = len(losses) * (asked.queries if asked.estimator == "one-sided" else 1)
        seeds = np.arange(count, dtype=np.int32) if drawn is None else np.array(drawn, np.int32)
        base: Any = SimpleNamespace(device=torch.device("cpu"), task="causal", pad_id=0, fused=False)
        sums = np.array([start] + [0] * 15, np.int32)
        ledger = SeedLedger(bank_of(asked.bank), 10, 0, bytes(32), sums)
        found = measure(base, examples(3), training(count), asked, ledger, [], seeds, key=KEY, client="ann")
        return position, found

    return run


def test_a_two_sided_step_is_the_slope_times_the_learning_rate_in_units_of_the_wire(scripted: Script) -> None:
    # (2.5 - 2.0) / (2/32) = 8; 0.1 * 8 = 0.8; the step of a scalar is 2^3 * 2^-10 = 1/128; 0.8 * 128 = 102.4
    position, found = scripted([2.5, 2.0], [1.0, 1.0], [2.0, 2.125], drawn=[9, 4, 9])
    assert found.scalars.tolist() == [102, 0, -26]
    assert found.scalars.dtype == np.int8
    assert position.asked == [[(9, -32), (9, 32)], [(4, -32), (4, 32)], [(9, -32), (9, 32)]]
    assert position.moved == [(9, 816), (9, -208)]  # what is zero moves nothing
    assert found.losses == [2.25, 1.0, 2.0625]
    assert found.rms == pytest.approx(math.sqrt((0.8**2 + 0.2**2) / 3))


def test_a_scalar_ends_at_its_bound_and_the_client_moves_by_what_travels(scripted: Script) -> None:
    position, found = scripted([9.0, 0.0], [0.0, 9.0])
    assert found.scalars.tolist() == [127, -127]
    assert position.moved == [(0, 127 * 8), (1, -127 * 8)]


def test_ties_are_rounded_to_the_even_scalar(scripted: Script) -> None:
    # 128 * 0.5 * d * 16 = 1024 d: differences of 1/2048 and 3/2048 are scalars of 0.5 and 1.5 at a rate of 1/2
    assert steps_of([1 / 2048, 0.0], probe(), 0.5, deque()) == [0.5 / 128]
    _, found = scripted([0.5 / 128 / 0.1 / 16, 0.0], [1.5 / 128 / 0.1 / 16, 0.0])
    assert found.scalars.tolist() == [0, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_moves_nothing_and_is_counted(bad: float, scripted: Script) -> None:
    position, found = scripted([2.5, 2.0], [bad, 2.0], [2.0, bad], [2.5, 2.0])
    assert found.scalars.tolist() == [102, 0, 0, 102]
    assert found.skipped == 2
    assert [seed for seed, _ in position.moved] == [0, 3]
    assert found.losses == [2.25, 2.25]
    assert math.isfinite(found.rms)


def test_one_loss_that_is_not_finite_costs_all_queries_of_its_step(scripted: Script) -> None:
    position, found = scripted(
        [1.0, 1.5, math.nan], [1.0, 1.25, 1.0], estimator="one-sided", queries=2, normalise=False
    )
    assert found.skipped == 2
    assert found.scalars.tolist() == [0, 0, 51, 0]  # 0.1 * 0.25 * 32 / 2 * 128 = 51.2
    assert position.asked[1] == [(2, 0), (2, -32), (3, -32)]


def test_nothing_but_losses_that_are_not_finite_is_an_answer_too(scripted: Script) -> None:
    _, found = scripted([math.nan, 1.0], [1.0, math.inf])
    assert (found.scalars.tolist(), found.skipped, found.losses, found.rms) == ([0, 0], 2, [], 0.0)


def test_plain_queries_are_measured_against_the_loss_at_the_weights() -> None:
    asked = probe(estimator="one-sided", queries=2)
    # lr (l_i - l_0) / (N eps) with eps = 1/32
    assert steps_of([2.0, 2.5, 1.75], asked, 0.1, deque()) == pytest.approx([0.1 * 0.5 * 16, -0.1 * 0.25 * 16])
    assert around([3, 5], asked) == [(3, 0), (3, -32), (5, -32)]


def test_normalised_queries_are_divided_by_their_own_spread_instead() -> None:
    asked = probe(estimator="one-sided", queries=4, normalise=True)
    sigma = math.sqrt((0.3**2 + 0.1**2 + 0.1**2 + 0.3**2) / 4)  # of 1.8, 2.0, 2.2, 2.4 about 2.1
    steps = steps_of([2.0, 1.8, 2.0, 2.2, 2.4], asked, 0.1, deque())
    assert steps == pytest.approx([0.1 * d / (4 * sigma) for d in (-0.2, 0.0, 0.2, 0.4)])
    assert steps_of([2.0, 2.0, 2.0, 2.0, 2.0], asked, 0.1, deque()) == [0.0] * 4  # no spread says nothing


def test_two_sides_per_seed_or_one_per_query_and_one_in_the_middle() -> None:
    assert around([7], probe()) == [(7, -32), (7, 32)]


@pytest.mark.parametrize(
    ("clip", "estimator", "losses", "steps"),
    [
        (0.5, "two-sided", [2.5, 2.0], [0.05]),
        (0.5, "two-sided", [2.0, 2.5], [-0.05]),
        (9.0, "two-sided", [2.5, 2.0], [0.8]),
        (math.inf, "two-sided", [1e30, 0.0], [1.6e30]),
        (0.5, "one-sided", [2.0, 2.5, 1.0], [0.025, -0.025]),
    ],
)
def test_a_clip_bounds_the_slope_before_it_is_multiplied(
    clip: float, estimator: Any, losses: Sequence[float], steps: Sequence[float]
) -> None:
    asked = probe(clip=clip, estimator=estimator, queries=2)
    assert steps_of(losses, asked, 0.1, deque()) == pytest.approx(steps)


def test_the_running_clip_holds_from_the_seventeenth_slope_on_and_forgets_the_oldest() -> None:
    sizes = deque[float](maxlen=128)
    assert [clip_scalar(g, 0.0, sizes) for g in [1.0, -100.0] + [1.0] * 14] == [1.0, -100.0] + [1.0] * 14
    # Of one 100 and fifteen ones the 0.9-quantile is 1: from here on the bound is 2.
    assert clip_scalar(-50.0, 0.0, sizes) == -2.0
    assert clip_scalar(1.5, 0.0, sizes) == 1.5
    assert list(sizes)[-2:] == [50.0, 1.5]  # as they were, not as they were clipped
    for _ in range(128):
        clip_scalar(10.0, 0.0, sizes)
    assert len(sizes) == 128
    assert clip_scalar(50.0, 0.0, sizes) == 20.0


def test_the_running_clip_is_one_client_s_of_one_round(scripted: Script) -> None:
    spike = [[1.0, 0.99]] * 16 + [[3.0, 0.0]]
    _, found = scripted(*spike, clip=0.0, drawn=[0] * 17)
    assert found.scalars.tolist()[-1] == 4  # 0.1 * 2 * 0.16 * 128 = 4.096, not at its bound
    _, found = scripted(*spike[15:], clip=0.0)
    assert found.scalars.tolist()[-1] == 127


def test_calibration_measures_every_slope_and_moves_nothing(scripted: Script) -> None:
    position, found = scripted([2.5, 2.0], [2.0, 2.125], calibrate=True)
    assert position.moved == []
    assert not found.scalars.any()
    assert found.rms == pytest.approx(math.sqrt((0.8**2 + 0.2**2) / 2))


def test_a_client_without_examples_says_so(loaded: Any) -> None:
    base = loaded()
    with pytest.raises(ClientError, match="ann: expected at least one training example; got none"):
        measured(base, [], probe(), ledger_of(base, "hadamard"))


def test_sums_that_would_leave_32_bits_are_refused_before_they_do(scripted: Script) -> None:
    scripted([9.0, 0.0], start=2**31 - 1 - 1016)
    for room in (1015, 0):  # the sum of the second would be far below zero if it wrapped around
        with pytest.raises(RoundError, match=r"expected sum \|A\| of at most 2147483647"):
            scripted([9.0, 0.0], start=2**31 - 1 - room)


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
            plus, minus = (loss(perturb(sums, seed, amount), batch) for amount in (-32, 32))
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
    def watched(*arguments: Any) -> Iterator[Spied]:
        with at_position(*arguments) as position:
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
    other = measure(base, rows, local, probe(), ledger, reached(base, "hadamard"), DRAWN, key=KEY + 1, client="ann")
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


STEPS, FINE, SHIFT = 50, 26, 10


def published(base: Base, rows: Sequence[Example], drawn: Array, *, eps: float, rate: float) -> list[Array]:
    """The paper's loop in float32: the same directions, in-place perturbations, scalars that are floats."""
    bank, order = bank_of("gaussian"), batches(len(rows), size=1, key=KEY)
    weights = [base.model.get_parameter(entry.name) for entry in base.manifest.entries]
    start = [weight.double().numpy().copy() for weight in weights]
    with torch.no_grad():
        for seed in drawn.tolist():
            one = perturb(np.zeros(16, np.int32), seed, 1)
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
        result = measure(
            base, examples(6), local, asked, ledger, reached(base, bank), ids, key=KEY, client="ann", rows=others
        )
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
