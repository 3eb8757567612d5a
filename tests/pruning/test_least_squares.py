from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ShapeError
from fedtune.pruning.least_squares import (
    check_moments,
    input_widths,
    moment_shapes,
    moments_to_wire,
    pool_moments,
)
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout
from fedtune.tensors import Array, Tensors

LAYOUT = BlockLayout("llama", (Block("model.layers.0", 4, 2, 2, 6), Block("model.layers.1", 4, 2, 2, 6)), width=8)
EXACT = PruningSettings(repair="least-squares", repair_rank=8)
O_PROJ = "model.layers.0.self_attn.o_proj"


def inputs(seed: int, rows: int = 40, size: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: size * (rng.normal(size=(rows, n)) @ rng.normal(size=(n, n)) + rng.normal(size=n))
        for name, n in input_widths(LAYOUT).items()
    }


def exact_moments(rows: dict[str, Array], settings: PruningSettings = EXACT) -> Tensors:
    moments: dict[str, Array] = {}
    for name, x in rows.items():
        covariance = np.cov(x.T, bias=True)
        values, vectors = np.linalg.eigh(covariance)
        moments[f"{name}.mean"] = x.mean(axis=0)
        if settings.repair == "least-squares":
            moments[f"{name}.u"] = vectors * np.sqrt(np.maximum(values, 0))
            moments[f"{name}.deviation"] = np.zeros(x.shape[1])
    return moments


def covariance(moments: Tensors, name: str) -> Array:
    u = moments[f"{name}.u"].astype(np.float64)
    return np.asarray(u @ u.T + np.diag(np.square(moments[f"{name}.deviation"].astype(np.float64))))


def test_the_layers_that_read_heads_or_channels_are_those_that_are_repaired() -> None:
    assert input_widths(LAYOUT) == {
        "model.layers.0.self_attn.o_proj": 8,
        "model.layers.0.mlp.down_proj": 6,
        "model.layers.1.self_attn.o_proj": 8,
        "model.layers.1.mlp.down_proj": 6,
    }
    assert moment_shapes(replace(EXACT, repair_rank=4), LAYOUT)[f"{O_PROJ}.u"] == (8, 4)
    assert set(moment_shapes(replace(EXACT, repair="bias"), LAYOUT)) == {
        f"{name}.mean" for name in input_widths(LAYOUT)
    }


def test_moments_of_two_clients_are_those_of_their_rows_together() -> None:
    one, other = inputs(1, 30), inputs(2, 10)
    pooled = pool_moments([(exact_moments(one), 0.3), (exact_moments(other), 0.1)], {}, EXACT, LAYOUT)
    together = {name: np.concatenate([one[name], other[name]]) for name in one}
    for name, x in together.items():
        np.testing.assert_allclose(pooled[f"{name}.mean"], x.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(covariance(pooled, name), np.cov(x.T, bias=True), rtol=1e-4, atol=1e-4)


@given(st.integers(1, 8), st.integers(0, 50))
def test_of_any_rank_the_variance_of_every_input_is_exact(rank: int, seed: int) -> None:
    settings = replace(EXACT, repair_rank=rank)
    one, other = exact_moments(inputs(seed)), exact_moments(inputs(seed + 100))
    pooled = pool_moments([(one, 0.5), (other, 0.5)], {}, settings, LAYOUT)
    assert check_moments(pooled, settings, LAYOUT) is pooled
    mean = (one[f"{O_PROJ}.mean"] + other[f"{O_PROJ}.mean"]) / 2
    wanted = sum(
        0.5 * (np.diag(covariance(own, O_PROJ)) + np.square(own[f"{O_PROJ}.mean"] - mean)) for own in (one, other)
    )
    np.testing.assert_allclose(np.diag(covariance(pooled, O_PROJ)), wanted, rtol=1e-4)


def test_one_client_alone_keeps_its_moments_and_a_later_cohort_counts_half() -> None:
    own = exact_moments(inputs(3))
    alone = pool_moments([(own, 0.2)], {}, EXACT, LAYOUT)
    assert all(np.array_equal(alone[name], array.astype(np.float32)) for name, array in own.items())
    other = exact_moments(inputs(4))
    later = pool_moments([(other, 1.0)], alone, EXACT, LAYOUT)
    half = pool_moments([(own, 1.0), (other, 1.0)], {}, EXACT, LAYOUT)
    for name in half:
        if not name.endswith(".u"):
            np.testing.assert_allclose(later[name], half[name], rtol=1e-4, atol=1e-4)


def test_a_client_with_inputs_of_a_thousand_times_the_size_counts_at_most_ten_times_the_median() -> None:
    honest = [exact_moments(inputs(seed)) for seed in (5, 6)]
    huge = exact_moments(inputs(7, size=1000.0))
    pooled = pool_moments([(own, 1 / 3) for own in (*honest, huge)], {}, EXACT, LAYOUT)
    square = max(float(np.mean(np.diag(covariance(own, O_PROJ)) + own[f"{O_PROJ}.mean"] ** 2)) for own in honest)
    assert (
        np.mean(np.diag(covariance(pooled, O_PROJ)) + pooled[f"{O_PROJ}.mean"] ** 2) <= (2 * square + 10 * square) / 3
    )


def test_bias_alone_needs_the_means() -> None:
    settings = replace(EXACT, repair="bias")
    one, other = (exact_moments(inputs(seed), settings) for seed in (8, 9))
    pooled = pool_moments([(one, 1.0), (other, 3.0)], {}, settings, LAYOUT)
    name = f"{O_PROJ}.mean"
    np.testing.assert_allclose(pooled[name], one[name] / 4 + 3 * other[name] / 4, rtol=1e-5)


def test_what_travels_is_finite_whatever_the_numbers() -> None:
    sent = moments_to_wire({"x": np.array([1e9, -1e9, 0.5])})["x"]
    assert sent.dtype == np.float16
    assert sent.tolist() == [65504.0, -65504.0, 0.5]


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: {k: v for k, v in m.items() if k != f"{O_PROJ}.u"}, r"o_proj\.u: expected those of this base's"),
        (lambda m: {**m, "model.layers.2.self_attn.o_proj.u": m[f"{O_PROJ}.u"]}, r"layers\.2.*got another tensor"),
        (lambda m: {**m, f"{O_PROJ}.u": m[f"{O_PROJ}.u"][:6]}, r"o_proj\.u: expected \(8, 8\), as this base is wide"),
        (lambda m: {**m, f"{O_PROJ}.mean": m[f"{O_PROJ}.mean"] * np.nan}, r"o_proj\.mean: expected finite numbers"),
        (lambda m: {**m, f"{O_PROJ}.deviation": m[f"{O_PROJ}.deviation"] - 1}, r"deviation: expected none below 0"),
    ],
)
def test_moments_of_another_base_are_refused_by_name(damage: object, said: str) -> None:
    moments = exact_moments(inputs(10))
    with pytest.raises(ShapeError, match=said):
        check_moments(damage(moments), EXACT, LAYOUT)  # type: ignore[operator]
