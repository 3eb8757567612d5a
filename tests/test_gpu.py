"""Clients' work on a CUDA device is what it is on the CPU, up to the rounding of sums; needs such a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client.batched import Batched, Resident
from fedtune.client.perform import perform
from fedtune.client.shared_work import SharedWork
from fedtune.client.worker_process import payload
from fedtune.data.encode import Example
from fedtune.lora.adapter import Factors, draw_a
from fedtune.messages import Assignment, ClientUpdate, Plan, PlannedClient, Training, TrainLora
from fedtune.methods import fedkseed
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.model.base import Base, digest, load, load_tokenizer
from fedtune.model.batches import collate
from fedtune.model.descend import at_dense_slope, backward
from fedtune.model.evaluate import evaluate
from fedtune.model.lora import with_adapters
from fedtune.model.loss import cross_entropies, logits_of, summed_loss
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.tensors import Tensors
from tests.client.test_seeds import order as descend_order
from tests.model.test_descend import ledger_of, reached

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Plain SGD: AdamW's first steps are signs of gradients, of which those near zero may be another on another device.
SGD = Training(batch=2, learning_rate=0.5, steps=4, optimizer="sgd", momentum=0.9, autocast="off")
ADAPTER = AdapterSettings(rank=4, targets=("all-linear",))


def settings_of(folder: Path, device: str = DEVICE, dtype: Any = "float32") -> ModelSettings:
    return ModelSettings(base=str(folder), dtype=dtype, device=device)


def base_on(folder: Path, device: str = DEVICE, dtype: Any = "float32") -> Base:
    settings = settings_of(folder, device, dtype)
    return load(settings, ADAPTER, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[Base, Base]:
    """The same base on the CPU and on the device."""
    folder = checkpoints[request.param]
    return base_on(folder, "cpu"), base_on(folder)


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 200, size=6 + 3 * (place % 4)).astype(np.int64) for place in range(20)]
    return [Example(row, row, characters=18, prompt="", reference="", prompt_tokens=0) for row in ids]


def received(base: Base, *, dense: bool = True) -> Tensors:
    """Return a global change, of which the first layer's is dense."""
    rng, tensors = np.random.default_rng(0), dict[str, Any]()
    for place, (name, (m, n)) in enumerate(base.modules.items()):
        if place == 0 and dense:
            tensors[f"{name}.w"] = 0.02 * rng.standard_normal((m, n), np.float32)
        else:
            tensors[f"{name}.a"] = draw_a(0, name, 3, n)
            tensors[f"{name}.b"] = 0.02 * rng.standard_normal((m, 3), np.float32)
    return tensors


def order(base: Base, name: str = "ann", *, rank: int = 4, training: Training = SGD) -> Assignment:
    task = TrainLora(a_key=5, wire_dtype="fp32", blobs={"global": received(base)})
    return Assignment("flora", 1, sum(name.encode()), Plan(name, rank, 2.0, training), task, base.digest)


def check_equal(ours: ClientUpdate, theirs: ClientUpdate, tolerance: float) -> None:
    assert ours.lora.tensors.keys() == theirs.lora.tensors.keys()
    for name, expected in theirs.lora.tensors.items():
        np.testing.assert_allclose(ours.lora.tensors[name], expected, atol=tolerance, rtol=0)
    assert ours.measured.loss_after == pytest.approx(theirs.measured.loss_after, abs=1e-4)
    assert ours.measured.tokens == theirs.measured.tokens


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"accumulation": 3, "clip_norm": 0.05}])
def test_a_client_learns_on_a_gpu_what_it_learns_on_a_cpu(
    changes: dict[str, Any], pair: tuple[Base, Base], rows: list[Example]
) -> None:
    training = replace(SGD, **changes)
    on_cpu, on_gpu = (perform(base, rows, order(base, training=training), threads=1) for base in pair)
    check_equal(on_gpu, on_cpu, 1e-4)
    assert max(np.abs(array).max() for array in on_cpu.lora.tensors.values()) > 1e-2
    assert digest(pair[1].model) == pair[1].digest == pair[0].digest


def test_forward_passes_under_autocast_are_in_bf16_and_learn_nearly_the_same(
    pair: tuple[Base, Base], rows: list[Example]
) -> None:
    base, kinds = pair[1], set[torch.dtype]()
    layer = base.model.get_submodule(next(iter(base.modules)))
    handle = layer.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    half = perform(base, rows, order(base, training=replace(SGD, autocast="bf16")), threads=1)
    handle.remove()
    full = perform(base, rows, order(base), threads=1)
    assert kinds == {torch.bfloat16}
    assert half.measured.loss_before == pytest.approx(full.measured.loss_before, rel=0.02)
    assert half.measured.loss_after == pytest.approx(full.measured.loss_after, rel=0.03)
    assert all(np.isfinite(array).all() for array in half.lora.tensors.values())


def test_a_base_in_bf16_trains(checkpoints: dict[str, Path], rows: list[Example]) -> None:
    base = base_on(checkpoints["llama"], dtype="bfloat16")
    update = perform(base, rows, order(base, training=replace(SGD, autocast="auto")), threads=1)
    assert all(np.isfinite(array).all() for array in update.lora.tensors.values())
    assert update.measured.loss_after is not None
    assert update.measured.loss_before is not None
    assert update.measured.loss_after < update.measured.loss_before
    assert digest(base.model) == base.digest


def test_dropout_is_drawn_on_the_device_from_the_clients_key(pair: tuple[Base, Base], rows: list[Example]) -> None:
    base, training = pair[1], replace(SGD, dropout=0.3)
    before = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    first, second = (perform(base, rows, order(base, training=training), threads=1) for _ in range(2))
    check_equal(first, second, 1e-5)
    plain = perform(base, rows, order(base), threads=1)
    assert any((plain.lora.tensors[name] != first.lora.tensors[name]).any() for name in plain.lora.tensors)
    after = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    assert torch.equal(before, after)


def fleet(rows: Sequence[Example]) -> dict[str, Resident]:
    return {
        "ann": Resident(rows[:5], rows[16:], 1),
        "bob": Resident(rows[5:8], (), 1),
        "cyd": Resident(rows[8:16], (), 1),
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clients_trained_together_learn_what_each_learns_alone(
    optimizer: Any, pair: tuple[Base, Base], rows: list[Example]
) -> None:
    base, clients = pair[1], fleet(rows)
    training = SGD if optimizer == "sgd" else Training(batch=2, learning_rate=0.01, steps=4, autocast="off")
    blobs = {"global": received(base)}
    orders = [order(base, name, rank=rank, training=training) for name, rank in zip(clients, (4, 2, 4), strict=True)]
    orders = [replace(item, task=replace(item.lora, blobs=blobs)) for item in orders]
    found = Batched(base, clients)(orders)
    assert found.keys() == clients.keys()
    for item in orders:
        own = clients[item.plan.client]
        alone = perform(base, own.examples, item, threads=1, held_out=own.held_out)
        check_equal(found[item.plan.client], alone, 1e-4)


def test_processes_on_one_device_take_the_steps_of_one(checkpoints: dict[str, Path], rows: list[Example]) -> None:
    folder = checkpoints["llama"]
    base, item = base_on(folder), None
    item = order(base)
    work = partial(perform, base, rows, item, threads=1)
    spec = payload(settings_of(folder), ADAPTER, {"ann": rows}, root=Path(), seed=0)
    with SharedWork(*spec, [DEVICE, DEVICE], base=base.digest) as shared:
        together = shared.perform(item, lambda shares: work(shares=shares), threads=1)
    check_equal(together, work(), 1e-4)


def test_scores_on_a_gpu_are_those_on_a_cpu(pair: tuple[Base, Base], rows: list[Example]) -> None:
    scores = []
    for base in pair:
        flat = received(base, dense=False)
        adapter = {name: Factors(flat[f"{name}.a"], flat[f"{name}.b"]) for name in base.modules}
        scores.append(evaluate(base, adapter, {}, {"test": rows}, batch=8)["test"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.parametrize("bank", ["hadamard", "gaussian", "kron"])
def test_a_probe_on_a_gpu_measures_from_the_weights_of_a_cpu(
    bank: Any, checkpoints: dict[str, Path], rows: list[Example]
) -> None:
    results = []
    for base in (base_on(checkpoints["llama"], "cpu"), base_on(checkpoints["llama"])):
        chosen = FedKSeedSettings(seeds=16, scalar_step=2.0**-12, clip="none", bank=bank)
        state = fedkseed.init(base.blueprint(max_rank=1, seed=0, whole=True), chosen)
        sums = np.random.default_rng(0).integers(-60, 61, 16).astype(np.int32)
        state = replace(state, accumulators={"a": sums}, round=5)
        planned = PlannedClient(Plan("ann", 1, 1.0, Training(batch=2, learning_rate=0.01, steps=8)))
        results.append(perform(base, rows, fedkseed.assign(state, 0, planned), threads=1))
        assert digest(base.model) == base.digest
    on_cpu, on_gpu = results
    # The weights that the seeds rebuild are the same bits; a scalar is rounded to eighths of bits after two losses.
    assert (on_gpu.probe.state, on_gpu.probe.checks) == (on_cpu.probe.state, on_cpu.probe.checks)
    assert np.abs(on_gpu.probe.scalars.astype(int) - on_cpu.probe.scalars.astype(int)).max() <= 2
    assert on_gpu.measured.loss_before == pytest.approx(on_cpu.measured.loss_before, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("bank", "groups"), [("hadamard", 1), ("hadamard", 4), ("gaussian", 1), ("kron", "tensor")])
def test_a_descent_on_a_gpu_goes_where_one_on_a_cpu_goes(
    bank: Any, groups: Any, dtype: Any, checkpoints: dict[str, Path], rows: list[Example]
) -> None:
    results = []
    for base in (base_on(checkpoints["llama"], "cpu", dtype), base_on(checkpoints["llama"], dtype=dtype)):
        _, asked = descend_order(base, bank=bank, groups=groups)
        results.append(perform(base, rows, asked, threads=1))
        assert digest(base.model) == base.digest
    on_cpu, on_gpu = (update.descend for update in results)
    # The same weights to the bit; Adam's first steps are signs of slopes, of which those near zero may be another.
    assert (on_gpu.state, on_gpu.checks) == (on_cpu.state, on_cpu.checks)
    moved = [each.numbers.astype(float) * 2.0**each.shift for each in (on_gpu, on_cpu)]
    assert np.asarray(np.corrcoef(np.stack(moved)))[0, 1] > (0.95 if dtype == "float32" else 0.6)
    before = [update.measured.loss_before for update in results]
    assert before[1] == pytest.approx(before[0], rel=1e-4 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projections_on_a_gpu_are_those_of_a_cpu(dtype: Any, checkpoints: dict[str, Path], rows: list[Example]) -> None:
    found = []
    for base in (base_on(checkpoints["llama"], "cpu", dtype), base_on(checkpoints["llama"], dtype=dtype)):
        ledger = ledger_of(base, groups=2, banks=2)
        with at_dense_slope(base, ledger, reached(base)) as position:
            found.append(position.slopes(ledger.accumulators, [collate(rows, base)])[1])
    np.testing.assert_allclose(found[1], found[0], atol=(1e-4 if dtype == "float32" else 0.1) * np.abs(found[0]).max())


@pytest.mark.skipif(DEVICE != "cuda", reason="the memory of a process says nothing of one step")
def test_a_descent_holds_one_gradient_at_a_time_on_a_gpu(checkpoints: dict[str, Path], rows: list[Example]) -> None:
    """Its peak is below what a backward pass takes that holds the gradients of all weights to its end."""
    base = base_on(checkpoints["llama"])
    ledger, batch = ledger_of(base), collate(rows[:1], base)
    peaks = []
    with at_dense_slope(base, ledger, reached(base)) as position:
        position.slopes(ledger.accumulators, [batch])  # what is allocated once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        position.slopes(ledger.accumulators, [batch])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()
        backward(base, [batch])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert 0 < peaks[0] < peaks[1]


@pytest.mark.skipif(DEVICE != "cuda", reason="asks the driver what is free")
def test_a_descent_that_does_not_fit_a_gpu_probes_instead(
    checkpoints: dict[str, Path], rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_on(checkpoints["llama"])
    _, asked = descend_order(base, fallback=Training(batch=2, learning_rate=0.01, steps=4))
    assert perform(base, rows, asked, threads=1).descend.skipped == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    assert len(perform(base, rows, asked, threads=1).probe.scalars) == 4


@pytest.mark.skipif(DEVICE != "cuda", reason="the memory of a process says nothing of one step")
def test_the_memory_of_a_step_is_measured_and_without_logits_it_is_less(
    checkpoints: dict[str, Path], rows: list[Example]
) -> None:
    base = base_on(checkpoints["llama"])
    peak = perform(base, rows, order(base), threads=1).measured.peak_bytes
    assert 0 < peak < torch.cuda.get_device_properties(0).total_memory
    batch = collate(rows * 20, base)
    assert batch.fused
    local = {
        name: Factors(draw_a(1, name, 4, n), np.zeros((m, 4), np.float32)) for name, (m, n) in base.modules.items()
    }
    peaks = []
    for fused in (True, False):
        with with_adapters(base, local=local) as model:
            torch.cuda.reset_peak_memory_stats()
            if fused:
                loss = summed_loss(model, batch, task="causal")
            else:
                loss = cross_entropies(logits_of(model, batch, task="causal"), batch.labels, task="causal")
            loss.backward()
            peaks.append(torch.cuda.max_memory_allocated())
            del loss
    assert peaks[0] < peaks[1]
