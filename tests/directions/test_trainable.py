from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.seed_ledger import Manifest, describe_base
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.errors import ConfigError

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (9, 4),
    "layers.0.q.bias": (4,),
    "layers.0.q.weight": (4, 4),
    "layers.1.q.weight": (4, 4),
    "norm.weight": (4,),
    "scale": (),
}
LAYERS = ("layers.1.q.weight", "layers.0.q.weight", "absent.weight")


def manifest(**more: tuple[int, ...]) -> Manifest:
    return describe_base({name: np.zeros(shape, np.float32) for name, shape in {**SHAPES, **more}.items()})


def names(reach: TensorSelection, base: Manifest | None = None) -> list[str]:
    base = base or manifest()
    return [base.entries[ordinal].name for ordinal in trainable_ordinals(base, reach, LAYERS)]


@pytest.mark.parametrize("bank", ["hadamard", "gaussian"])
def test_a_dense_bank_moves_every_tensor_in_rising_order(bank: str) -> None:
    assert trainable_ordinals(manifest(), TensorSelection(bank), ()) == tuple(range(len(SHAPES)))
    # More than two dimensions are nothing to a dense bank, and its options for kron neither.
    assert "experts" in names(TensorSelection(bank, vectors=True), manifest(experts=(2, 3, 4)))


def test_kron_moves_the_matrices_of_linear_layers_alone() -> None:
    assert names(TensorSelection("kron")) == ["layers.0.q.weight", "layers.1.q.weight"]


def test_kron_moves_vectors_and_numbers_where_it_is_told_to() -> None:
    assert names(TensorSelection("kron", vectors=True)) == [
        *("layers.0.q.bias", "layers.0.q.weight", "layers.1.q.weight", "norm.weight", "scale")
    ]


def test_kron_moves_all_matrices_where_it_is_told_to() -> None:
    assert names(TensorSelection("kron", embeddings=True)) == ["embed.weight", "layers.0.q.weight", "layers.1.q.weight"]


def test_both_together_move_all() -> None:
    assert names(TensorSelection("kron", vectors=True, embeddings=True)) == sorted(SHAPES)


def test_patterns_take_what_any_of_them_names_once_and_in_rising_order() -> None:
    assert names(TensorSelection("hadamard", ("norm.*", "layers.1.*", "*.weight"))) == [
        *("embed.weight", "layers.0.q.weight", "layers.1.q.weight", "norm.weight")
    ]


def test_patterns_know_upper_from_lower_case() -> None:
    with pytest.raises(ConfigError, match=r"'NORM\.\*', which names none"):
        names(TensorSelection("hadamard", ("NORM.*",)))


def test_a_pattern_and_the_bank_must_both_allow_a_tensor() -> None:
    assert names(TensorSelection("kron", ("layers.0.*",))) == ["layers.0.q.weight"]
    assert names(TensorSelection("kron", ("layers.0.*",), vectors=True)) == ["layers.0.q.bias", "layers.0.q.weight"]


def test_every_pattern_that_names_nothing_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        names(TensorSelection("hadamard", ("norm.*", "head.*", "layers.7.*")))
    assert [fault.path for fault in caught.value.faults] == ["method.trainable"] * 2
    assert [fault.got for fault in caught.value.faults] == [
        *("'head.*', which names none", "'layers.7.*', which names none")
    ]


def test_kron_refuses_fused_experts_by_name_unless_they_are_left_out() -> None:
    base = manifest(experts=(2, 3, 4))
    with pytest.raises(ConfigError, match=r"at most two dimensions for 'kron'; got experts of shape \(2, 3, 4\)"):
        names(TensorSelection("kron"), base)
    assert names(TensorSelection("kron", ("layers.*",)), base) == ["layers.0.q.weight", "layers.1.q.weight"]


@pytest.mark.parametrize(
    "reach",
    [TensorSelection("kron", ("norm.*",)), TensorSelection("kron", ("embed.*",)), TensorSelection("kron", ("*.bias",))],
)
def test_nothing_left_to_move_is_a_fault(reach: TensorSelection) -> None:
    with pytest.raises(ConfigError, match="at least one tensor that the bank moves; got none"):
        names(reach)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        names(TensorSelection("kron", ("head.*", "experts")), manifest(experts=(2, 3, 4)))
    assert [fault.path for fault in caught.value.faults] == ["method.trainable", "method.bank"]
