"""What a step takes, counted on the model, against what autograd then stores."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedtune.errors import ClientError
from fedtune.messages import Training
from fedtune.model import descend_memory
from fedtune.model.batches import collate
from fedtune.model.descend import at_dense_slope
from fedtune.model.descend_memory import (
    check_free,
    count_cores,
    free_bytes,
    report_out_of_memory,
    spare_bytes,
    step_bytes,
    step_sizes,
    stored_by_length,
    stored_bytes,
    with_length,
)
from fedtune.model.kron_descent import at_kron_slope
from fedtune.model.machine import resident_bytes
from fedtune.probing.order import batches
from tests.model.test_descend import ledger_of, reached

TRAINING = Training(batch=2, steps=3, learning_rate=0.1)


@pytest.mark.parametrize(("name", "task"), [("llama", "causal"), ("gpt2", "causal"), ("bert", "classification")])
def test_what_a_long_batch_stores_is_foretold_from_two_short_ones(
    name: str, task: str, loaded: Any, examples: Any
) -> None:
    classes = 3 if task == "classification" else 0
    options = {"task": task, "labels": ["a", "b", "c"]} if classes else {}
    base = loaded(name, targets=["all-linear"], **options)
    rows = [with_length(row, base.positions) for row in (examples(4, classes=3) if classes else examples(4))]
    ledger = ledger_of(base)
    with at_dense_slope(base, ledger, reached(base)) as position:
        position.move(ledger.accumulators)
        stored = stored_by_length(base, rows[0])
        batch = collate([*rows[:3], with_length(rows[3], 5)], base)
        assert 4 * stored(base.positions) == pytest.approx(stored_bytes(base, batch), rel=0.25)


def test_nothing_is_stored_where_nothing_is_trained(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    assert stored_bytes(base, collate(examples(3), base)) == 0


def test_counting_lets_go_of_activations_and_of_the_copy_of_the_weights(loaded: Any, examples: Any) -> None:
    """Each client would otherwise take as much memory as the model has, until there is none."""
    base = loaded(targets=["all-linear"])
    ledger, alive = ledger_of(base), list[weakref.ref[torch.Tensor]]()
    softmax = torch.nn.functional.softmax

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        # Its backward pass reads its own output.
        alive.append(weakref.ref(out := softmax(*args, **options)))
        return out

    with at_dense_slope(base, ledger, reached(base)) as position, pytest.MonkeyPatch.context() as patch:
        position.move(ledger.accumulators)
        patch.setattr(torch.nn.functional, "softmax", watched)
        patch.setattr(base.model.config, "_attn_implementation", "eager")
        assert stored_bytes(base, collate(examples(3), base)) > 0
    gc.collect()
    assert alive
    assert not any(reference() is not None for reference in alive)


def test_kron_stores_less_than_a_bank_that_needs_gradients_of_weights(loaded: Any, examples: Any) -> None:
    base, found = loaded(targets=["all-linear"]), []
    batch = collate([with_length(row, 40) for row in examples(4)], base)
    for bank, at in (("hadamard", at_dense_slope), ("kron", at_kron_slope)):
        ledger = ledger_of(base, bank)
        with at(base, ledger, reached(base, bank)) as position:
            position.move(ledger.accumulators)
            found.append(stored_bytes(base, batch))
    assert 0 < found[1] < found[0]


def test_the_largest_step_grows_with_batch_and_length(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    ledger = ledger_of(base)
    short, long = ([with_length(row, length) for row in examples(4)] for length in (8, 32))

    def need(rows: Any, training: Training) -> float:
        return step_bytes(base, rows, training, key=3, gradients=1000.0)

    with at_dense_slope(base, ledger, reached(base)) as position:
        position.move(ledger.accumulators)
        plain = need(short, TRAINING)
        assert need(long, TRAINING) > 3 * plain
        assert need(short, replace(TRAINING, batch=4)) > 1.5 * plain
        assert need(short, replace(TRAINING, accumulation=4)) == plain
        assert step_bytes(base, short, TRAINING, key=3, gradients=10**9) > plain + 2 * 10**9 - 10**4


def test_sizes_are_those_of_the_batches_that_will_come() -> None:
    lengths, training = [3, 9, 4, 5, 7], Training(batch=2, steps=2, accumulation=2, learning_rate=0.1)
    order = batches(5, size=2, key=3)
    expected = [(len(batch), max(lengths[place] for place in batch)) for batch in (next(order) for _ in range(4))]
    assert step_sizes(lengths, training, key=3) == expected


def test_a_limit_bounds_what_is_free() -> None:
    device = torch.device("cpu")
    free = free_bytes(device)
    assert free > 0
    assert free_bytes(device, 1) == 0
    limit = resident_bytes() + 10 * 2**20
    assert 0 < free_bytes(device, limit) <= 20 * 2**20


def test_more_than_is_free_is_refused_by_name_with_the_numbers() -> None:
    check_free(100.0, "all", free=100, client="ann")
    message = r"ann: expected a step that fits into memory; got 3 GB for all, and 1 GB are free: memory ran out; lower"
    with pytest.raises(ClientError, match=message):
        check_free(3e9, "all", free=10**9, client="ann")


def test_only_errors_of_memory_are_put_into_these_words() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(ClientError, match="memory ran out"), report_out_of_memory("ann"):
            raise error
    with pytest.raises(RuntimeError, match="broken"), report_out_of_memory("ann"):
        raise RuntimeError("broken")


def test_work_may_take_half_of_its_share_of_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(descend_memory, "available_bytes", lambda: 4096)
    monkeypatch.setattr(descend_memory, "count_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert spare_bytes(cpu) == 4096 // 4 // 2
    monkeypatch.setattr(descend_memory, "resident_bytes", lambda: 100)
    assert spare_bytes(cpu, 300) == 100
    assert spare_bytes(cpu, 99) == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert spare_bytes(cpu) == 4096 // 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert spare_bytes(cuda) == 505


def test_a_process_has_a_core() -> None:
    assert count_cores() >= 1
