"""Every path of a client's work on a device that is not the CPU, with tensors that have shape and device and no values.

A tensor on the wrong device is an error here, as on a GPU; nothing is computed, and no GPU is needed. The device is
torch's `meta`, on which a build without CUDA can place tensors; `test_gpu.py` holds the values on a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.data.encode import Example
from fedtune.lora.adapter import Adapter, Factors, draw_a
from fedtune.messages import Proximal, TailRank, Training
from fedtune.model import stacked_lora
from fedtune.model.base import Base
from fedtune.model.batches import collate
from fedtune.model.evaluate import evaluate
from fedtune.model.lora import with_adapters
from fedtune.model.loss import cross_entropies, logits_of
from fedtune.model.objective import Hooks
from fedtune.model.stacked_train import Member, train_together
from fedtune.model.train import train
from fedtune.tensors import Array
from tests.model.conftest import examples, loaded

__all__ = ["examples", "loaded"]

DEVICE = torch.device("meta")
TARGETS = {"llama": "q_proj", "gpt2": "c_attn"}
TRAINING = Training(batch=2, learning_rate=0.1, steps=1)


class Ones(TorchDispatchMode):
    """Answers 1 where a value is read from a tensor that has none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            return VALUES[args[0].dtype]
        return func(*args, **(kwargs or {}))


VALUES: Mapping[torch.dtype, float | bool] = {
    torch.float32: 1.0,
    torch.float64: 1.0,
    torch.int64: 1,
    torch.bool: True,
}


def moved(model: nn.Module) -> nn.Module:
    """Put a model on the device, tensor by tensor: `Module.to` cannot exchange tensors without values."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(empty_as(parameter), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = empty_as(buffer)
    return model


def empty_as(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


def values_of_one(tensor: torch.Tensor) -> Array:
    return np.ones(tuple(tensor.shape), np.float32)


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def base(
    request: pytest.FixtureRequest, loaded: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Base]:
    """A base on the device, inside the mode in which every new tensor is without values."""
    real = loaded(request.param, targets=(TARGETS[request.param],))
    # Where an adapter leaves the device: nothing is there to be read.
    monkeypatch.setattr(stacked_lora, "to_numpy", values_of_one)
    model = copy.deepcopy(real.model)
    with FakeTensorMode(), Ones():  # type: ignore[no-untyped-call]
        # Not fused: how many tokens count in a batch is a value.
        yield replace(real, model=moved(model), device=DEVICE, fused=False)


@pytest.fixture
def rows(examples: Callable[[int], list[Example]]) -> list[Example]:
    return examples(3)


def adapter_of(base: Base, rank: int = 4) -> Adapter:
    return {
        name: Factors(draw_a(1, name, rank, n), np.zeros((m, rank), np.float32))
        for name, (m, n) in base.modules.items()
    }


def test_a_tensor_that_is_left_on_the_cpu_is_noticed(base: Base, rows: list[Example]) -> None:
    batch = collate(rows, base)
    elsewhere = replace(batch, labels=torch.zeros(batch.labels.shape, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="same device"):
        cross_entropies(logits_of(base.model, elsewhere, task="causal"), elsewhere.labels, task="causal")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("received", "changes"),
    [
        (True, {"dropout": 0.1, "accumulation": 2}),
        pytest.param(False, {"optimizer": "sgd", "momentum": 0.9, "steps": 2}, marks=SLOW),
        pytest.param(True, {"gradient_checkpointing": True}, marks=SLOW),
    ],
    ids=["received", "sgd", "checkpointed"],
)
def test_training_stays_on_the_device(received: bool, changes: dict[str, Any], base: Base, rows: list[Example]) -> None:
    frozen = {name: Factors(f.a, f.b) for name, f in adapter_of(base, 3).items()} if received else None
    training = replace(TRAINING, **changes)
    with with_adapters(base, frozen=frozen, local=adapter_of(base), scale=2.0, dropout=training.dropout) as model:
        hooks = Hooks(model, (Proximal(0.1), TailRank(0.1, 0.5)))
        trained = train(base, rows, training, key=1, client="ann", rows=rows, hooks=hooks)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(learned) == 2 * len(base.modules)
        assert all(isinstance(p, FakeTensor) and p.device == DEVICE for p in model.parameters())
    assert set(trained.losses) <= {1.0, 2.0}  # ones, one per batch: no value was computed
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_clients_trained_together_stay_on_the_device(base: Base, rows: list[Example]) -> None:
    members = [Member(rows, rows[:1], key, adapter_of(base, rank), 2.0) for key, rank in enumerate((4, 2), start=1)]
    frozen = adapter_of(base, 3)
    learned = train_together(base, members, TRAINING, frozen=frozen, train="ab")
    assert [next(iter(each.final.values())).rank for each in learned] == [4, 2]


def test_evaluation_stays_on_the_device(base: Base, rows: list[Example]) -> None:
    scores = evaluate(base, adapter_of(base), {}, {"test": rows}, batch=2)["test"]
    assert scores["examples"] == 3
