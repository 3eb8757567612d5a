from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedtune.errors import ConfigError, ShapeError
from fedtune.lora.adapter import Factors, delta, draw_a
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model import frozen as frozen_module
from fedtune.model import lora as lora_module
from fedtune.model.base import Base, digest
from fedtune.model.frozen import change_weight, put
from fedtune.model.libraries import threads
from fedtune.model.lora import frozen_change, layers, read_local, start, with_adapters
from fedtune.model.lora_layer import LoraLayer
from fedtune.model.quantised_layers import codes_digest, quantised_layers
from fedtune.model.train import only_adapters_train
from fedtune.tensors import cast

# of stock peft, which asks transformers by an older name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

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
    assert all(name.endswith((".a", ".b")) for name in names)


def test_only_b_is_trained_where_only_b_is_asked_for(loaded: Any) -> None:
    base = loaded()
    with with_adapters(base, local=random_adapter(base, [2] * 4), train="b") as model:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4
    assert all(name.endswith(".b") for name in names)


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
    assert not layers(base.model)


def test_the_base_is_restored_when_the_block_fails(loaded: Any) -> None:
    base = loaded()
    before = logits(base)
    with pytest.raises(KeyError), with_adapters(base, local=random_adapter(base, [2] * 4)):
        raise KeyError
    assert torch.equal(logits(base), before)
    assert not layers(base.model)


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


def test_a_task_freezes_factors_and_dense_changes_side_by_side() -> None:
    rng = np.random.default_rng(0)
    dense = cast({"x.w": rng.normal(size=(3, 5)).astype(np.float32)}, "bf16")
    factors = {"y.a": np.ones((2, 4), np.float32), "y.b": np.ones((6, 2), np.float32)}
    change = frozen_change(task({"global": {**dense, **factors}}))
    np.testing.assert_array_equal(change["x"], dense["x.w"])
    assert isinstance(change["y"], Factors)
    assert change["y"].shape == (6, 4)
    with pytest.raises(ShapeError, match=r"x\.w: expected \(out, in\); got \(3,\)"):
        frozen_change(task({"global": {"x.w": np.zeros(3, np.float32)}}))


def test_the_trained_adapter_is_read_back_as_it_was_written(loaded: Any) -> None:
    base = loaded()
    adapter = random_adapter(base, [2, 3, 2, 3])
    with with_adapters(base, local=adapter, scale=2.0) as model:
        read = read_local(model)
    assert read.keys() == adapter.keys()
    for name, factors in adapter.items():
        np.testing.assert_array_equal(read[name].a, factors.a)
        np.testing.assert_array_equal(read[name].b, factors.b)


def change_of(base: Base, *, dense: bool, rank: int = 3, seed: int = 1, size: float = 0.2) -> dict[str, Any]:
    """A change of every module as it may be sent: factors, or a dense matrix."""
    rng = np.random.default_rng(seed)
    factors = {
        name: Factors(
            a=rng.normal(size=(rank, n)).astype(np.float32), b=(size * rng.normal(size=(m, rank))).astype(np.float32)
        )
        for name, (m, n) in base.modules.items()
    }
    return {name: delta(f).astype(np.float32) for name, f in factors.items()} if dense else dict(factors)


def exact(base: Base, *parts: tuple[dict[str, Any], float]) -> torch.Tensor:
    """The logits in float64, all changes added to float64 weights: the reference."""
    model = copy.deepcopy(base.model).double()
    for change, scale in parts:
        for name, part in change.items():
            layer = model.get_submodule(name)
            whole = torch.from_numpy(scale * (delta(part) if isinstance(part, Factors) else part.astype(np.float64)))
            layer.weight.data += whole.T if base.transposed else whole
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def snapshot(base: Base) -> dict[str, Any]:
    """What must be as before: the objects, where their numbers lie, the numbers, and the types of the modules."""
    return {
        "objects": {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in base.model.named_parameters()},
        "types": {name: type(module) for name, module in base.model.named_modules()},
        "numbers": {name: value.clone().numpy().tobytes() for name, value in base.model.state_dict().items()},
        "attributes": {name: sorted(vars(module)) for name, module in base.model.named_modules()},
    }


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_base_frozen_and_local_are_their_float64_sum(name: str, dense: bool, loaded: Any) -> None:
    base = loaded(name, targets=["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"])
    frozen, local = change_of(base, dense=dense), change_of(base, dense=False, seed=2)
    with with_adapters(base, frozen=frozen, local=local, scale=0.5):
        found = logits(base)
    assert worst(found, exact(base, (frozen, 1.0), (local, 0.5))) < 1e-6


@pytest.mark.parametrize("scale", [2.0, 0.5, 1.7])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_and_gradients_are_pefts(name: str, scale: float, loaded: Any) -> None:
    """To the last bit where the scale is a power of two, dropout included: peft draws the same numbers."""
    base = loaded(name, targets=["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"])
    local = change_of(base, dense=False)
    stock = peft_model(copy.deepcopy(base.model), local, scale, dropout=0.3)
    torch.manual_seed(3)
    expected = stock(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    with with_adapters(base, local=local, scale=scale, dropout=0.3) as model:
        only_adapters_train(model)
        torch.manual_seed(3)
        found = model(input_ids=IDS, labels=IDS)
        found.loss.backward()
        tolerance = 0.0 if scale in (2.0, 0.5) else 2e-6  # 1.3e-6 apart with the kernels of torch 2.10
        torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)
        for key, layer in layers(model).items():
            other = stock.get_submodule(f"base_model.model.{key}")
            for ours, theirs in ((layer.a, other.lora_A["default"]), (layer.b, other.lora_B["default"])):
                assert theirs.weight.grad.abs().max() > 0
                torch.testing.assert_close(ours.grad, theirs.weight.grad, rtol=tolerance, atol=tolerance)


def test_autocast_gives_pefts_numbers(loaded: Any) -> None:
    base = loaded()
    local = change_of(base, dense=False)
    stock = peft_model(copy.deepcopy(base.model), local, 2.0, dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = stock(input_ids=IDS).logits
        with with_adapters(base, local=local, scale=2.0, half=True) as model:
            assert torch.equal(model(input_ids=IDS).logits, expected)


def peft_model(model: Any, adapter: dict[str, Factors], scale: float, *, dropout: float) -> Any:
    """The same factors in stock peft, in training mode with the base's own dropout off."""
    rank = next(iter(adapter.values())).rank
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=list(adapter),
        lora_dropout=dropout,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    stock = get_peft_model(model, config).eval()
    for name, factors in adapter.items():
        layer = stock.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = torch.from_numpy(factors.a.copy())
        layer.lora_B["default"].weight.data = torch.from_numpy(factors.b.copy())
        layer.lora_dropout.train()
    return stock


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_bit_for_bit_the_base_after_a_block_that_trains_or_fails(
    name: str, dense: bool, loaded: Any
) -> None:
    targets, saved = (["c_attn"], ["ln_f"]) if name == "gpt2" else (["q_proj", "down_proj"], ["lm_head"])
    base = loaded(name, targets=targets, saved=saved)
    before, digests = snapshot(base), digest(base.model)
    for fails in (False, True):
        with (
            pytest.raises(RuntimeError, match="on purpose") if fails else nullcontext(),
            with_adapters(
                base,
                frozen=change_of(base, dense=dense),
                local=change_of(base, dense=False),
                saved=base.saved_tensors(),
            ) as model,
        ):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            if fails:
                raise RuntimeError("on purpose")
        assert snapshot(base) == before
        assert digest(base.model) == digests


def test_a_change_that_cannot_be_attached_leaves_the_base_as_it_was(loaded: Any, monkeypatch: Any) -> None:
    base, taken = loaded(), list[str]()
    before, real = snapshot(base), frozen_module.change_weight

    def full(*args: Any) -> Any:
        taken.append("")
        if len(taken) == 3:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr("fedtune.model.lora.change_weight", full)
    with pytest.raises(MemoryError), with_adapters(base, frozen=change_of(base, dense=False)):
        pass
    assert snapshot(base) == before


@pytest.mark.parametrize("function", ["put", "to_torch"])
def test_ctrl_c_while_a_change_is_attached_leaves_the_base_as_it_was(
    function: str, loaded: Any, monkeypatch: Any
) -> None:
    """After a layer reads its changed weight, or between two parameters that take the values sent."""
    base, calls = loaded(saved=["lm_head", "norm"]), list[str]()
    saved = {name: array + 1 for name, array in base.saved_tensors().items()}
    before, real = snapshot(base), getattr(lora_module, function)

    def interrupted(*args: Any) -> Any:
        calls.append("")
        if len(calls) == 2 and function == "to_torch":
            raise KeyboardInterrupt
        result = real(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(lora_module, function, interrupted)
    with pytest.raises(KeyboardInterrupt), with_adapters(base, frozen=change_of(base, dense=False), saved=saved):
        pass
    assert snapshot(base) == before


def test_the_copy_of_a_change_is_gone_when_the_next_block_has_none(loaded: Any) -> None:
    """A base that is given to two runs in turn would hold on to it."""
    base = loaded(targets=["q_proj", "v_proj"])
    change = change_of(base, dense=False)
    first, *rest = change
    with with_adapters(base, frozen=change):
        pass
    with with_adapters(base, frozen={first: change[first]}):
        pass
    assert list(base.changed) == [first]
    with with_adapters(base, local=change_of(base, dense=False)):
        pass
    assert rest
    assert not base.changed


def test_clients_of_different_ranks_in_a_row_do_not_see_each_other(loaded: Any) -> None:
    base = loaded()
    for rank, seed in ((3, 1), (5, 2), (1, 3), (5, 2)):
        frozen, local = change_of(base, dense=False, rank=rank, seed=seed), change_of(base, dense=False, rank=rank + 1)
        expected = exact(base, (frozen, 1.0), (local, 1.0))
        with with_adapters(base, frozen=frozen, local=local) as model:
            assert {layer.a.shape[0] for layer in layers(model).values()} == {rank + 1}
            assert worst(logits(base), expected) < 1e-6


def test_clients_of_one_round_share_the_changed_weight_and_later_rounds_its_memory(
    loaded: Any, monkeypatch: Any
) -> None:
    base, products = loaded(), list[Any]()
    real = torch.addmm

    def count(*args: Any, **options: Any) -> Any:
        if "out" in options:
            products.append(0)
        return real(*args, **options)

    monkeypatch.setattr(torch, "addmm", count)
    places, first, second = list[Any](), change_of(base, dense=False), change_of(base, dense=False, seed=2)
    for change in (first, {name: Factors(f.a.copy(), f.b.copy()) for name, f in first.items()}, second):
        expected = exact(base, (change, 1.0))
        with with_adapters(base, frozen=change) as model:
            places.append([model.get_submodule(name).weight.data_ptr() for name in base.modules])
            assert worst(logits(base), expected) < 1e-6
    assert len(products) == 2 * len(base.modules)  # the second client's is not computed again
    assert places[0] == places[1] == places[2]


def test_a_changed_weight_is_not_reused_when_the_base_or_the_threads_are_others(loaded: Any) -> None:
    base = loaded()
    change = change_of(base, dense=False)
    with with_adapters(base, frozen=change):
        pass
    name = next(iter(base.modules))
    with torch.no_grad():
        base.model.get_submodule(name).weight.mul_(2.0)
    expected = exact(base, (change, 1.0))
    with with_adapters(base, frozen=change):
        assert worst(logits(base), expected) < 1e-6
    kept = base.changed[name]
    with threads(torch.get_num_threads() + 1), with_adapters(base, frozen=change) as model:
        assert model.get_submodule(name).weight is not kept.weight


def test_a_block_within_a_block_does_not_write_over_the_outer_ones_weights(loaded: Any) -> None:
    base = loaded()
    one, two = change_of(base, dense=False), change_of(base, dense=True, seed=2)
    before, both = snapshot(base), exact(base, (one, 1.0), (two, 1.0))
    with with_adapters(base, frozen=one):
        outer = logits(base)
        with with_adapters(base, frozen=two):
            assert worst(logits(base), both) < 1e-6
        assert torch.equal(logits(base), outer)
    assert snapshot(base) == before


def test_a_copy_of_an_evaluation_can_be_trained_through(loaded: Any) -> None:
    base = loaded()
    frozen, local = change_of(base, dense=False), change_of(base, dense=False, seed=2)
    with torch.inference_mode(), with_adapters(base, frozen=frozen):
        pass
    with with_adapters(base, frozen=frozen, local=local) as model:
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(layer.a.grad is not None for layer in layers(model).values())


def test_embeddings_tied_to_an_adapted_layer_stay_as_they_are(loaded: Any) -> None:
    base = loaded()
    head, table = base.model.lm_head, base.model.model.embed_tokens
    head.weight = table.weight
    tied = replace(base, modules={"lm_head": tuple(table.weight.shape)})
    change = change_of(tied, dense=False)
    before, rows = snapshot(tied), table.weight.detach().clone()
    with with_adapters(tied, frozen=change):
        assert torch.equal(table.weight, rows)
        states = base.model.model(input_ids=IDS).last_hidden_state
        expected = states @ (rows + torch.from_numpy(delta(change["lm_head"])).float()).T
        torch.testing.assert_close(logits(tied), expected, atol=1e-5, rtol=1e-5)
    assert head.weight is table.weight
    assert snapshot(tied) == before


@pytest.mark.parametrize("half", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("dense", [False, True])
def test_in_16_bits_a_change_far_below_the_weights_is_not_rounded_away(half: str, dense: bool, loaded: Any) -> None:
    """W + change in 16 bits would be W itself: an error of 1. The change beside W is off by its own rounding."""
    base = loaded(dtype=half if half != "autocast" else "float32")
    name = next(iter(base.modules))
    layer = base.model.get_submodule(name)
    # on the grid of bfloat16, as checkpoints in that format are
    layer.weight.data = layer.weight.data.to(torch.bfloat16).to(layer.weight.dtype)
    change = {name: change_of(base, dense=dense, rank=2, size=1e-5)[name]}
    x = torch.randn(64, base.modules[name][1], generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    whole = torch.from_numpy(delta(change[name]) if not dense else change[name].astype(np.float64))
    parts = []
    with with_adapters(base, frozen=change, half=half == "autocast") as model:
        attached = model.get_submodule(name)
        assert attached.weight is layer.weight
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            # what it adds, without the output of W, in whose rounding it would drown
            part = x.to(attached.frozen[0].dtype)
            for matrix in attached.frozen:
                part = torch.nn.functional.linear(part, matrix)
        parts.append(part)
    assert worst(parts[0], x.double() @ whole.T) < 0.02
    merged = (layer.weight.double() + whole).to(torch.bfloat16).double() - layer.weight.double()
    assert worst(x.double() @ merged.T, x.double() @ whole.T) > 0.5


def test_the_copy_of_a_dense_change_is_the_only_one(loaded: Any) -> None:
    base = loaded()
    with with_adapters(base, frozen=change_of(base, dense=True)):
        pass
    assert all(changed.change is None for changed in base.changed.values())
    sizes = sum(changed.weight.nelement() for changed in base.changed.values())
    assert sizes == sum(m * n for m, n in base.modules.values())


def test_a_change_of_a_small_rank_is_no_copy(loaded: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fedtune.model.frozen.SLIGHT", 0)  # the layers of the tiny models are too small for any rank
    base = loaded()
    frozen, local = change_of(base, dense=False), change_of(base, dense=False, seed=2)
    before, expected = snapshot(base), exact(base, (frozen, 1.0), (local, 0.5))
    with with_adapters(base, frozen=frozen, local=local, scale=0.5):
        assert worst(logits(base), expected) < 1e-6
    assert not base.changed
    assert snapshot(base) == before


def test_a_layer_that_is_not_plain_keeps_its_weight(loaded: Any) -> None:
    """As quantised layers: what they multiply by is not their `weight`."""

    class Packed(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight) * 1.0

    base = loaded()
    name = next(iter(base.modules))
    base.model.get_submodule(name).__class__ = Packed
    for dense in (False, True):
        change = change_of(base, dense=dense, rank=2)
        expected = exact(base, (change, 1.0))
        with with_adapters(base, frozen=change) as model:
            assert isinstance(model.get_submodule(name), LoraLayer)
            # a dense change is in bfloat16 there
            assert worst(logits(base), expected) < (0.01 if dense else 1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_changes_stand_beside_quantised_layers_and_never_in_them(kind: str, loaded: Any) -> None:
    """What a layer gives is the product of its values and, in float32, of the changes."""
    base = loaded(targets=["all-linear"], dtype=kind)
    codes, before = codes_digest(base.model), snapshot(base)
    frozen, local = change_of(base, dense=False), change_of(base, dense=False, seed=2)
    values = loaded(targets=["all-linear"])
    for name, layer in quantised_layers(base.model).items():
        values.model.get_submodule(name).weight.data.copy_(layer.weight)
    expected = exact(values, (frozen, 1.0), (local, 0.5))
    with with_adapters(base, frozen=frozen, local=local, scale=0.5):
        assert worst(logits(base), expected) < 1e-5
    assert not base.changed
    assert (codes_digest(base.model), snapshot(base)) == (codes, before)
    name = next(iter(base.modules))
    layer = base.model.get_submodule(name)
    with pytest.raises(ConfigError, match="expected changes beside a quantised base"):
        put(layer, change_weight(values.model.get_submodule(name), frozen[name], None))
    assert base.model.get_submodule(name) is layer
    assert codes_digest(base.model) == codes
