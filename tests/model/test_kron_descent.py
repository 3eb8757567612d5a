"""The gradient of the small matrices beside the layers against gradients of the weights, projected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.model.base import digest
from fedtune.model.batches import collate
from fedtune.model.descend import at_dense_slope
from fedtune.model.kron_descent import at_kron_slope
from fedtune.model.quantised_layers import codes_digest
from fedtune.model.settings import QUANTISED
from tests.model.test_descend import ledger_of, reached, tied
from tests.model.test_kron_forward import hooks, with_values_of


@pytest.mark.parametrize(("groups", "banks"), [(1, 1), ("tensor", 1), (1, 3), ("tensor", 2)])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_losses_and_slopes_are_those_of_rewritten_weights(
    kind: str, everything: bool, groups: Any, banks: int, loaded: Any, examples: Any
) -> None:
    base = loaded(kind.rpartition(" ")[2], targets=["all-linear"])
    base = tied(base) if kind == "tied llama" else base
    ledger = ledger_of(base, "kron", groups=groups, banks=banks, everything=everything)
    ordinals = reached(base, "kron", everything=everything)
    parts = [collate(examples(5)[:3], base), collate(examples(5)[3:], base)]
    with at_dense_slope(base, ledger, ordinals) as position:
        expected_loss, expected = position.slopes(ledger.accumulators, parts)
        dense_rms = position.rms
    with at_kron_slope(base, ledger, ordinals) as position:
        loss, slopes = position.slopes(ledger.accumulators, parts)
        assert position.rms == pytest.approx(dense_rms, rel=1e-6)
        assert position.loss(ledger.accumulators, parts[0]) > 0
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert hooks(base) == 0


def test_no_gradient_of_a_weight_is_ever_computed(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    own, ledger = digest(base.model), ledger_of(base, "kron")
    places = {name: (p.data_ptr(), p._version) for name, p in base.model.named_parameters()}
    with at_kron_slope(base, ledger, reached(base, "kron")) as position:
        position.slopes(ledger.accumulators, [collate(examples(3), base)])
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert digest(base.model) == own
    assert {name: (p.data_ptr(), p._version) for name, p in base.model.named_parameters()} == places


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantised_base_descends_beside_its_codes(name: str, kind: str, loaded: Any, examples: Any) -> None:
    whole, base = loaded(name, targets=["all-linear"]), loaded(name, targets=["all-linear"], dtype=kind)
    ledger = ledger_of(whole, "kron", groups="tensor", everything=True)
    ordinals, codes = reached(whole, "kron", everything=True), codes_digest(base.model)
    values, batch = with_values_of(base, whole), collate(examples(5), base)
    with at_kron_slope(values, ledger, ordinals) as position:
        expected_loss, expected = position.slopes(ledger.accumulators, [batch])
        plain_rms = position.rms
    with at_kron_slope(base, ledger, ordinals) as position:
        loss, slopes = position.slopes(ledger.accumulators, [batch])
        assert position.rms == pytest.approx(plain_rms, rel=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    np.testing.assert_allclose(slopes, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    assert (hooks(base), codes_digest(base.model)) == (0, codes)
