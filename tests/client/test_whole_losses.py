"""The losses in the whole model of a client that trained a smaller one, against the server's own model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.methods.flora import METHOD, FloraState
from fedtune.model import pruned_training
from fedtune.model.base import Base, digest
from fedtune.model.lora import with_adapters
from tests.model.test_pruned_training import Loader, Rows, answered, asked, first


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, loaded: Loader) -> Base:
    return loaded(request.param, targets=["all-linear"])


@pytest.mark.parametrize("previous", [0.0, 0.5])
def test_the_losses_in_the_whole_model_are_those_before_and_after_the_server_adds_the_change(
    base: Base, examples: Rows, previous: float
) -> None:
    """By the server's own model, after the aggregation: as a planner is to be paid that cares about the whole one."""
    rows, before = examples(12), digest(base.model)
    state = first(base)
    state = replace(METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)]), ratios={})
    state = replace(state, ratios={"ann": previous})
    order = asked(state, base, 0.5, whole=True)
    pruning = order.lora.pruning
    assert pruning is not None
    assert pruning.whole_requested
    update = answered(order, base, rows, state)
    batches = pruned_training.evaluation_batches(rows, base, batch=4)

    def loss(of: FloraState) -> float:
        with with_adapters(base, frozen=METHOD.adapter(of)) as model:
            return pruned_training.evaluation_loss(model, batches, base)

    measured = update.measured
    assert measured.whole_loss_before == pytest.approx(loss(state), rel=1e-4)
    assert measured.whole_loss_after == pytest.approx(loss(METHOD.aggregate(state, [update])), rel=1e-4)
    plain = answered(asked(state, base, 0.5), base, rows, state)
    assert (plain.measured.whole_loss_before, plain.measured.whole_loss_after) == (None, None)
    # Two forward passes more, which the clock counts; what is trained is the same.
    assert measured.side_tokens == 2 * plain.measured.side_tokens
    for name, tensor in plain.lora.tensors.items():
        np.testing.assert_allclose(update.lora.tensors[name], tensor, atol=1e-6)
    assert digest(base.model) == before


def test_a_client_of_the_whole_model_measures_nothing_twice(base: Base, examples: Rows) -> None:
    rows, state = examples(12), first(base)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    pruning = asked(state, base, 0.0, whole=True).lora.pruning
    assert pruning is not None
    assert not pruning.whole_requested
    came = asked(replace(state, ratios={"ann": 0.5}), base, 0.0, whole=True)
    measured = answered(came, base, rows, state).measured
    assert measured.loss_before != measured.whole_loss_before  # it came from a pruned one
    assert measured.whole_loss_after == pytest.approx(measured.loss_after, rel=1e-5)
