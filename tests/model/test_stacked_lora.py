from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.lora.adapter import Adapter, Factors, draw_a
from fedtune.model.base import Base
from fedtune.model.lora import with_adapters
from fedtune.model.stacked_lora import Stack, UnbatchableError, unstack, with_stacks


def adapter_of(base: Base, rank: int, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(a=draw_a(seed, name, rank, n), b=0.1 * rng.standard_normal((m, rank)).astype(np.float32))
        for name, (m, n) in base.modules.items()
    }


def test_each_share_of_the_rows_meets_its_own_factors() -> None:
    # Two clients of one row each, rank 1, one channel in and one out: 1 + 2 * 3 * 5 and 1 + 7 * 11 * 13 / 2.
    a, b = torch.tensor([[[3.0]], [[7.0]]]), torch.tensor([[[5.0]], [[11.0]]])
    stack = Stack(torch.nn.Parameter(a), torch.nn.Parameter(b), torch.tensor([[[2.0]], [[0.5]]]))
    inputs = torch.tensor([[[1.0]], [[13.0]]])
    assert stack.change(inputs, torch.ones(2, 1, 1)).flatten().tolist() == [31.0, 501.5]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_outputs_are_those_with_each_adapter_alone(family: str, loaded: Callable[..., Base]) -> None:
    base = loaded(family, targets=("all-linear",))
    ids, scales = torch.arange(3, 27).reshape(4, 6), (2.0, 0.5)
    adapters = [adapter_of(base, 4, 0), adapter_of(base, 2, 1)]
    with torch.no_grad():
        plain = base.model(ids).logits
        with with_stacks(base, adapters, scales=scales, rows=4, train="ab") as stacks:
            together = base.model(ids).logits
        for place, scale in enumerate(scales):
            with with_adapters(base, local=adapters[place], scale=scale):
                alone = base.model(ids[2 * place : 2 * place + 2]).logits
            torch.testing.assert_close(together[2 * place : 2 * place + 2], alone, rtol=1e-4, atol=1e-5)
            assert (alone - plain[2 * place : 2 * place + 2]).abs().max() > 0.1
        assert torch.equal(base.model(ids).logits, plain)
    for own, again in zip(adapters, unstack(stacks, adapters), strict=True):
        for name in base.modules:
            np.testing.assert_array_equal(own[name].a, again[name].a)
            np.testing.assert_array_equal(own[name].b, again[name].b)


def test_what_is_padded_gets_no_gradient(loaded: Callable[..., Base]) -> None:
    base = loaded()
    adapters = [adapter_of(base, 4, 0), adapter_of(base, 1, 1)]
    with with_stacks(base, adapters, scales=(1.0, 1.0), rows=2, train="ab") as stacks:
        base.model(torch.arange(3, 15).reshape(2, 6)).logits.square().sum().backward()
    for stack in stacks.values():
        assert stack.a.grad is not None
        assert stack.b.grad is not None
        assert stack.a.grad[1, :1].abs().min() > 0
        assert not stack.a.grad[1, 1:].any()
        assert not stack.b.grad[1, :, 1:].any()


def test_factors_that_are_not_trained_require_no_gradient(loaded: Callable[..., Base]) -> None:
    base = loaded()
    with with_stacks(base, [adapter_of(base, 2, 0)], scales=[1.0], rows=1, train="b") as stacks:
        assert {(stack.a.requires_grad, stack.b.requires_grad) for stack in stacks.values()} == {(False, True)}


@pytest.mark.parametrize("shape", [(3, 6), (6, 4)])
def test_a_batch_of_other_rows_is_refused(shape: tuple[int, int], loaded: Callable[..., Base]) -> None:
    base = loaded()
    with (
        with_stacks(base, [adapter_of(base, 2, 0)], scales=[1.0], rows=4, train="ab"),
        pytest.raises(UnbatchableError, match="expected an input of"),
    ):
        base.model(torch.ones(shape, dtype=torch.int64))


def test_the_hooks_are_gone_after_an_error(loaded: Callable[..., Base]) -> None:
    base = loaded()

    def fail() -> Any:
        with with_stacks(base, [adapter_of(base, 2, 0)], scales=[1.0], rows=4, train="ab"):
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    assert not any(module._forward_hooks for module in base.model.modules())
