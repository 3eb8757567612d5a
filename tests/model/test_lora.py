from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Factors, delta, draw_a
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model.base import Base
from fedtune.model.lora import global_adapter, layers, read_local, start, with_adapters
from fedtune.tensors import cast

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def logits(base: Base) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = base.model(input_ids=IDS).logits
    return result


def random_adapter(base: Base, ranks: list[int], size: float = 0.2) -> dict[str, Factors]:
    rng = np.random.default_rng(1)
    return {
        name: Factors(
            a=rng.normal(size=(rank, n)).astype(np.float32), b=(size * rng.normal(size=(m, rank))).astype(np.float32)
        )
        for (name, (m, n)), rank in zip(base.modules.items(), ranks, strict=True)
    }


def dense(base: Base, adapter: dict[str, Factors], *, scale: float = 1.0, transposed: bool = False) -> torch.Tensor:
    """The logits with the change added to the weights themselves: the reference that attaching must equal."""
    parameters = dict(base.model.named_parameters())
    before = {name: parameters[f"{name}.weight"].detach().clone() for name in adapter}
    with torch.no_grad():
        for name, factors in adapter.items():
            change = torch.from_numpy(scale * delta(factors)).float()
            parameters[f"{name}.weight"] += change.T if transposed else change
    result = logits(base)
    with torch.no_grad():
        for name, weight in before.items():
            parameters[f"{name}.weight"].copy_(weight)
    return result


def task(blobs: dict[str, Any]) -> TrainLora:
    return TrainLora(a_key=9, blobs=blobs)


PLAN = Plan("c", 4, 2.0, Training(batch=1, learning_rate=0.1, steps=1))


def test_a_frozen_adapter_of_mixed_ranks_equals_the_dense_change(loaded: Any) -> None:
    base = loaded()
    adapter = random_adapter(base, [3, 1, 8, 2])
    expected = dense(base, adapter)
    with with_adapters(base, frozen=adapter):
        torch.testing.assert_close(logits(base), expected, atol=2e-5, rtol=0)


def test_conv1d_layers_take_the_same_factors(loaded: Any) -> None:
    base = loaded("gpt2", targets=["c_attn", "c_proj"])
    adapter = random_adapter(base, [2] * len(base.modules))
    expected = dense(base, adapter, transposed=True)
    with with_adapters(base, frozen=adapter):
        torch.testing.assert_close(logits(base), expected, atol=2e-5, rtol=0)


def test_frozen_and_local_add_up_with_the_scale_on_local_only(loaded: Any) -> None:
    base = loaded()
    one, two = random_adapter(base, [2] * 4), random_adapter(base, [3] * 4, size=0.1)
    both = {
        name: Factors(np.vstack([one[name].a, two[name].a]), np.hstack([one[name].b, 0.5 * two[name].b]))
        for name in one
    }
    expected = dense(base, both)
    with with_adapters(base, frozen=one, local=two, scale=0.5):
        torch.testing.assert_close(logits(base), expected, atol=2e-5, rtol=0)


def test_gradients_reach_the_local_adapter_and_nothing_else(loaded: Any) -> None:
    base = loaded()
    adapter = random_adapter(base, [2] * 4)
    with with_adapters(base, frozen=adapter, local=adapter) as model:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 8
    assert all(".local." in name for name in names)


def test_only_b_is_trained_where_only_b_is_asked_for(loaded: Any) -> None:
    base = loaded()
    with with_adapters(base, local=random_adapter(base, [2] * 4), train="b") as model:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4
    assert all("lora_B.local" in name for name in names)


def test_the_base_is_afterwards_what_it_was_before(loaded: Any) -> None:
    base = loaded(saved=["lm_head"])
    names, before = [name for name, _ in base.model.named_parameters()], logits(base)
    adapter = random_adapter(base, [2] * 4)
    saved = {"lm_head.weight": np.ones_like(base.saved_tensors()["lm_head.weight"])}
    with with_adapters(base, frozen=adapter, local=adapter, saved=saved) as model:
        assert not torch.equal(logits(base), before)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
    assert [name for name, _ in base.model.named_parameters()] == names
    assert torch.equal(logits(base), before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not layers(base.model, "local")


def test_the_base_is_restored_when_the_block_fails(loaded: Any) -> None:
    base = loaded()
    before = logits(base)
    with pytest.raises(KeyError), with_adapters(base, local=random_adapter(base, [2] * 4)):
        raise KeyError
    assert torch.equal(logits(base), before)
    assert not layers(base.model, "local")


def test_modules_to_save_take_the_sent_values_for_the_block(loaded: Any) -> None:
    base = loaded(saved=["lm_head"])
    zero = {"lm_head.weight": np.zeros_like(base.saved_tensors()["lm_head.weight"])}
    with with_adapters(base, saved=zero):
        assert torch.count_nonzero(logits(base)) == 0


def test_a_module_of_rank_zero_is_the_bases_own(loaded: Any) -> None:
    base = loaded()
    before = logits(base)
    empty = {
        name: Factors(np.zeros((0, n), np.float32), np.zeros((m, 0), np.float32))
        for name, (m, n) in base.modules.items()
    }
    with with_adapters(base, frozen=empty):
        assert torch.equal(logits(base), before)


def test_the_local_start_is_drawn_from_the_key_with_b_zero(loaded: Any) -> None:
    base = loaded()
    for name, factors in start(task({}), PLAN, base.modules).items():
        np.testing.assert_array_equal(factors.a, draw_a(9, name, 4, factors.shape[1]))
        assert not factors.b.any()


def test_sent_rows_take_the_first_places_and_b_is_divided_by_the_scale(loaded: Any) -> None:
    base = loaded(targets=["q_proj"])
    name = next(iter(base.modules))
    a, b = np.full((2, 32), 3.0, np.float32), np.full((32, 2), 8.0, np.float32)
    local = start(task({"local": {f"{name}.a": a, f"{name}.b": b}}), PLAN, {name: (32, 32)})[name]
    np.testing.assert_array_equal(local.a[:2], a)
    np.testing.assert_array_equal(local.a[2:], draw_a(9, name, 4, 32)[2:])
    np.testing.assert_array_equal(local.b[:, :2], b / 2)
    assert not local.b[:, 2:].any()


def test_a_start_of_a_rank_above_the_plans_is_refused(loaded: Any) -> None:
    base = loaded(targets=["q_proj"])
    name = next(iter(base.modules))
    sent = {f"{name}.a": np.zeros((5, 32), np.float32)}
    with pytest.raises(ShapeError, match="at most rank 4"):
        start(task({"local": sent}), PLAN, {name: (32, 32)})


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_dense_change_becomes_exact_factors(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    blob = cast({"x.w": weight}, "bf16")
    factors = global_adapter(task({"global": blob}))["x"]
    np.testing.assert_array_equal(delta(factors), blob["x.w"].astype(np.float64))
    assert factors.rank == min(shape)


def test_the_trained_adapter_is_read_back_as_it_was_written(loaded: Any) -> None:
    base = loaded()
    adapter = random_adapter(base, [2, 3, 2, 3])
    with with_adapters(base, local=adapter, scale=2.0) as model:
        read = read_local(model)
    assert read.keys() == adapter.keys()
    for name, factors in adapter.items():
        np.testing.assert_array_equal(read[name].a, factors.a)
        np.testing.assert_array_equal(read[name].b, factors.b)
