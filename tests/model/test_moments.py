from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from fedtune.errors import ClientError
from fedtune.model.importance import listen_to_inputs, readers_of_units
from fedtune.model.moments import Moments, leading_factor, sketch_matrix
from fedtune.model.surgery import layout_of
from fedtune.pruning.least_squares import check_moments
from fedtune.pruning.ranking import PruningSettings
from tests.model.test_surgery import IDS, MASK, model_of

CPU = torch.device("cpu")
EXACT = PruningSettings(repair="least-squares", repair_rank=64)


@lru_cache
def measured(name: str, settings: PruningSettings) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Return moments of a tiny model's inputs, and these inputs by layer, padding left out."""
    model = model_of(name)
    layout = layout_of(model)
    moments, rows = Moments(settings, layout, key=3, device=CPU), dict[str, torch.Tensor]()

    class Rows:
        input_ids, attention_mask, inputs = IDS, MASK, {"input_ids": IDS, "attention_mask": MASK}

    def add(layer: str, x: torch.Tensor, mask: torch.Tensor) -> None:
        rows[layer] = x[mask.bool()].double()
        moments.add(layer, x, mask)

    listen_to_inputs(model, readers_of_units(layout), [Rows()], add, task="")  # type: ignore[list-item]
    found = dict(moments.result())
    check_moments(found, settings, layout)
    return found, rows


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
def test_moments_are_those_of_the_tokens_without_padding(name: str) -> None:
    moments, rows = measured(name, EXACT)
    for layer, x in rows.items():
        assert len(x) == int(MASK.sum())
        u = moments[f"{layer}.u"].astype(np.float64)
        found = u @ u.T + np.diag(moments[f"{layer}.deviation"].astype(np.float64) ** 2)
        scale = float(x.abs().max()) ** 2
        np.testing.assert_allclose(found, np.cov(x.numpy().T, bias=True), atol=2e-3 * scale)
        np.testing.assert_allclose(moments[f"{layer}.mean"], x.mean(dim=0).numpy(), atol=1e-3 * scale**0.5)


def test_a_smaller_rank_keeps_every_variance() -> None:
    exact, rows = measured("llama-gqa", EXACT)
    small, _ = measured("llama-gqa", PruningSettings(repair="least-squares", repair_rank=4))
    for layer, x in rows.items():
        assert small[f"{layer}.u"].shape == (x.shape[1], 4)
        variance = np.square(small[f"{layer}.u"].astype(np.float64)).sum(axis=1) + small[f"{layer}.deviation"] ** 2.0
        np.testing.assert_allclose(variance, x.var(dim=0, correction=0).numpy(), rtol=5e-3, atol=1e-4)
    assert exact.keys() == small.keys()


def test_a_covariance_within_the_sketch_is_found_exactly() -> None:
    rng = np.random.default_rng(0)
    factor = torch.from_numpy(rng.normal(size=(40, 5)))
    covariance, test = factor @ factor.T, sketch_matrix(40, 12, 7).double()
    torch.testing.assert_close(test.T @ test, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    u = leading_factor(covariance @ test, test, 6)
    torch.testing.assert_close(u @ u.T, covariance, atol=1e-5, rtol=1e-5)
    assert torch.equal(sketch_matrix(8, 12, 7), torch.eye(8))


def test_a_layer_whose_inputs_are_all_zero_has_moments_of_zero() -> None:
    u = leading_factor(torch.zeros(6, 4, dtype=torch.float64), sketch_matrix(6, 4, 1).double(), 2)
    assert not u.any()


def test_nothing_that_went_forward_and_infinite_inputs_are_refused() -> None:
    layout = layout_of(model_of("llama-gqa"))
    with pytest.raises(ClientError, match="at least one token"):
        Moments(EXACT, layout, key=0, device=CPU).result()
    moments = Moments(EXACT, layout, key=0, device=CPU)
    for layer in readers_of_units(layout):
        wide = layout.blocks[0].channels if "mlp" in layer else 32
        moments.add(layer, torch.full((1, 2, wide), float("inf")), torch.ones(1, 2))
    with pytest.raises(ClientError, match=r"expected finite numbers; got others; use another model\.dtype"):
        moments.result()
