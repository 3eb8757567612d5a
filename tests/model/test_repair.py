from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ShapeError
from fedtune.model.lora import with_adapters
from fedtune.model.repair import Repair, operator, repair_layer, repair_of
from fedtune.model.surgery import layout_of, shrink_further, with_structure
from fedtune.pruning.least_squares import RIDGE
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import ModelStructure, cuts, full_block, shapes, slice_adapter
from tests.model.test_moments import EXACT, measured
from tests.model.test_surgery import CONFIGS, base_of, build, logits, model_of, random_adapter, random_keep, snapshot


def repair_for(name: str, model: Any, settings: PruningSettings = EXACT) -> Repair:
    repair = repair_of(model, measured(name, settings)[0], settings, layout_of(model))
    assert repair is not None
    return repair


def test_by_hand_a_column_that_repeats_another_is_given_to_it() -> None:
    """x2 = 2 x1 + 3 exactly: what column 2 reads is 2 x1 + 3, up to the ridge; x0 says nothing of it."""
    x1 = np.array([-1.0, 1.0])
    covariance = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])
    values, vectors = np.linalg.eigh(covariance)
    moments = {
        "mean": np.array([0.0, x1.mean(), 3.0]),
        "deviation": np.zeros(3),
        "u": vectors * np.sqrt(np.maximum(values, 0)),
    }
    weight = torch.tensor([[5.0, 7.0, 10.0]])
    parameters = repair_layer(weight, torch.tensor([1.0]), moments, np.array([0, 1]))
    assert parameters is not None
    torch.testing.assert_close(parameters[0], torch.tensor([[5.0, 7.0 + 20.0 / (1 + RIDGE)]]))
    torch.testing.assert_close(parameters[1], torch.tensor([1.0 + 30.0]))
    alone = repair_layer(weight, None, {"mean": moments["mean"]}, np.array([0, 1]))  # FLAP's
    assert alone is not None
    assert torch.equal(alone[0], weight[:, :2])
    assert torch.equal(alone[1], torch.tensor([30.0]))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_operator_is_the_closed_form(rank: int) -> None:
    rng = np.random.default_rng(rank)
    u, deviation = torch.from_numpy(rng.normal(size=(8, rank))), torch.from_numpy(rng.random(8))
    kept, rest = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4, 6, 7])
    left, right = operator(u, deviation, kept, rest)
    covariance = u @ u.T + torch.diag(deviation.square())
    inner = covariance[kept][:, kept]
    ridge = RIDGE * inner.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(left @ right, covariance[rest][:, kept] @ torch.linalg.inv(inner + ridge))


def test_inputs_that_never_change_are_repaired_by_their_mean_alone() -> None:
    moments = {"mean": np.array([1.0, 2.0]), "deviation": np.zeros(2), "u": np.zeros((2, 2))}
    parameters = repair_layer(torch.tensor([[3.0, 5.0]]), None, moments, np.array([0]))
    assert parameters is not None
    assert [part.tolist() for part in parameters] == [[[3.0]], [10.0]]


@pytest.mark.parametrize("name", CONFIGS)
def test_repaired_layers_read_their_inputs_nearly_as_the_whole_ones_do(name: str) -> None:
    """And by least squares nearer than by the means, and those nearer than without."""
    model = model_of(name)
    layout, keep = layout_of(model), random_keep(layout_of(model), 5)
    rows, slices, originals = measured(name, EXACT)[1], cuts(keep, layout), repair_for(name, model).whole
    errors = {}
    for settings in (EXACT, replace(EXACT, repair="bias"), None):
        repair = repair_for(name, model, settings) if settings else None
        with with_structure(model, keep, layout, repair):
            error = 0.0
            for layer, x in rows.items():
                module = model.get_submodule(layer)
                own = module.weight.T if isinstance(module, Conv1D) else module.weight
                bias = 0 if module.bias is None else module.bias.double()
                at = slices[layer].into
                small = x if at is None else x[:, torch.from_numpy(at)]
                weight, before = originals[layer]
                wanted = x @ weight.double().T + (0 if before is None else before.double())
                error += float((small @ own.double().T + bias - wanted).square().sum())
        errors[settings.repair if settings else "none"] = error
    assert errors["least-squares"] < errors["bias"] < errors["none"]


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_base_is_bit_for_bit_what_it_was_and_layers_without_a_bias_lose_it_again(name: str) -> None:
    model = build(name)
    layout, values = layout_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    before = snapshot(model)
    with with_structure(model, random_keep(layout, 2), layout, repair_for(name, model)):
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == values.keys()


def test_what_keeps_everything_is_not_repaired_and_without_moments_nothing_is() -> None:
    model = model_of("llama-gqa")
    layout = layout_of(model)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with with_structure(model, full_block(layout), layout, repair_for("llama-gqa", model)):
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert repair_of(model, {}, EXACT, layout) is None
    assert repair_of(model, measured("llama-gqa", EXACT)[0], PruningSettings(), layout) is None


def test_moments_of_another_base_are_refused() -> None:
    model = model_of("llama-gqa")
    with pytest.raises(ShapeError, match=r"moments, .*: expected those of this base's layers"):
        repair_of(model, measured("gpt2", EXACT)[0], EXACT, layout_of(model))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("rank", [2, 40])
def test_a_model_that_shrinks_in_stages_ends_as_one_that_is_cut_at_once(name: str, rank: int) -> None:
    """With a frozen change in the weights (rank 40) and beside them alone (rank 2, no copy)."""
    model = model_of(name)
    layout = layout_of(model)
    second = random_keep(layout, 6)
    first = full_block(layout)
    first = ModelStructure((*second.blocks[:1], *first.blocks[1:]))  # one block is cut already
    base, repair = base_of(model, layout), repair_for(name, model)
    frozen, local = random_adapter(layout, 5, rank=rank), random_adapter(layout)
    found = []
    for stages in ((second,), (first, second)):
        cut = cuts(stages[0], layout)
        with with_structure(model, stages[0], layout, repair):
            small = replace(base, modules=shapes(base.modules, cut))
            with with_adapters(small, frozen=slice_adapter(frozen, cut), local=slice_adapter(local, cut)):
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
                for one, other in pairwise(stages):
                    shrink_further(model, optimizer, one, other, layout, repair=repair)
                found.append(logits(model).detach())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
