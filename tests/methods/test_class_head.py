from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from fedtune.class_sums import FRACTION_BITS, ClassSums, Head, sum_features
from fedtune.errors import RoundError, ShapeError
from fedtune.messages import (
    AdmittedUpdate,
    Blueprint,
    ClientUpdate,
    Failure,
    Plan,
    PlannedClient,
    SumClasses,
    Training,
    Weight,
)
from fedtune.methods import METHODS, class_head, with_settings
from fedtune.methods.class_head import CAUTION, SHRINKAGE, discriminant, head_round, in_proportion, total_of
from fedtune.methods.method import Method
from fedtune.methods.serialization import encode
from fedtune.methods.settings import ServerOptimizer
from fedtune.rounds.admission import admit
from fedtune.rounds.influence import Bounds, refuse_outliers

LABELS = ("bad", "good")
HEAD = Head("head.weight", "head.bias", 2, 2)
SAVED = {"head.weight": np.zeros((2, 2), np.float32), "head.bias": np.zeros(2, np.float32)}
BLUEPRINT = Blueprint({"layer": (4, 4)}, SAVED, max_rank=2, seed=3, classes=2)
PLAN = PlannedClient(Plan("ann", 2, 1.0, Training(batch=4, steps=7, learning_rate=0.1)))
ROWS = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 0.0], [7.0, 2.0]])
"""Of classes 0, 0, 1, 1: means (2, 1) and (6, 1), of all (4, 1); variances within (2, 2)."""


def sums(rows: Any, labels: Any) -> ClassSums:
    part = sum_features(np.array(rows), np.array(labels), 2, fraction_bits=FRACTION_BITS)
    return replace(part, base="base")


def update(client: str, part: ClassSums, weight: int | None = None) -> AdmittedUpdate:
    own = None if weight is None else Weight(weight, 1)
    return AdmittedUpdate(ClientUpdate(client, 1, part.examples, part), weight=own)


def first(name: str = "fedit", **settings: Any) -> tuple[Method[Any], Any]:
    own = METHODS[name].settings(**settings)
    method = with_settings(METHODS[name], own)
    return head_round(method, BLUEPRINT, LABELS), method.init(BLUEPRINT, own)


def test_the_discriminant_by_hand() -> None:
    head = discriminant(sums(ROWS, [0, 0, 1, 1]), HEAD)
    # The means lie 2 and 0 off the middle, over a variance of 2 in each feature: (1 + 1 + 1 + 1) / (4 - 2).
    variance, distance = 2.0, np.sqrt(4 / 2.0)
    share = 1 / (CAUTION[0] + CAUTION[1] * distance)
    np.testing.assert_allclose(head["head.weight"], share * np.array([[-2, 0], [2, 0]]) / variance, rtol=1e-6)
    bias = np.log(0.5) - share * np.array([4 - 16, 36 - 16]) / (2 * variance)
    np.testing.assert_allclose(head["head.bias"], bias, rtol=1e-6)
    # Halfway between the means both classes are as likely.
    middle = head["head.weight"] @ np.array([4.0, 1.0]) + head["head.bias"]
    assert middle[0] == pytest.approx(middle[1])


def test_variances_are_shrunk_and_priors_counted() -> None:
    rows = [[0.0, 0.0], [2.0, 0.0], [4.0, 1.0], [10.0, 5.0], [14.0, 5.0]]
    head = discriminant(sums(rows, [0, 0, 0, 1, 1]), HEAD)
    within = np.array([8.0 + 8.0, 2 / 3])
    variance = within / 3
    variance = (1 - SHRINKAGE) * variance + SHRINKAGE * variance.mean()
    means, middle = np.array([[2, 1 / 3], [12, 5]]), np.array([6, 11 / 5])
    distance = np.sqrt(np.array([0.6, 0.4]) @ (np.square(means - middle) / variance).sum(1))
    share = 1 / (CAUTION[0] + CAUTION[1] * distance)
    np.testing.assert_allclose(head["head.weight"], share * (means - middle) / variance, rtol=1e-5)
    bias = np.log([0.6, 0.4]) - share * (np.square(means) - np.square(middle)).dot(1 / (2 * variance))
    np.testing.assert_allclose(head["head.bias"], bias, rtol=1e-5)


def test_it_classifies_as_a_naive_bayes_of_one_variance() -> None:
    naive_bayes = pytest.importorskip("sklearn.naive_bayes")
    rng = np.random.Generator(np.random.Philox(1))
    labels = np.array([0, 1] * 100)
    rows = rng.standard_normal((200, 2)) + np.where(labels[:, None] == 0, [0.0, 0.0], [1.5, -0.5])
    head = discriminant(sums(rows, labels), HEAD)
    # Pooled variances: the classes' own are what GaussianNB estimates, of a sample with the class means taken out.
    model = naive_bayes.GaussianNB().fit(rows, labels)
    model.var_[:] = model.var_.mean(0)
    ours = (rows @ head["head.weight"].T + head["head.bias"]).argmax(1)
    assert np.mean(ours == model.predict(rows)) >= 0.99


def test_features_that_never_vary_leave_the_head_finite() -> None:
    head = discriminant(sums([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]], [0, 0, 1]), HEAD)
    assert all(np.isfinite(array).all() for array in head.values())
    one_each = discriminant(sums([[1.0, 0.0], [2.0, 0.0]], [0, 1]), HEAD)
    assert all(np.isfinite(array).all() for array in one_each.values())


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"fedkseed"}))
def test_every_method_starts_from_the_head(name: str) -> None:
    method, state = first(name)
    parts = [update("ann", sums(ROWS[:3], [0, 0, 1])), update("bob", sums(ROWS[3:], [1]))]
    after = method.aggregate(state, parts)
    assert after.round == 1
    head = discriminant(sums(ROWS, [0, 0, 1, 1]), HEAD)
    assert {key: array.tolist() for key, array in after.saved.items()} == {k: a.tolist() for k, a in head.items()}
    sent = METHODS[name].assign(after, 3, PLAN)
    assert sent.round == 2
    np.testing.assert_array_equal(sent.lora.blobs["saved"]["head.bias"], head["head.bias"])
    # Nothing else has moved.
    assert encode(replace(after, saved=state.saved, round=0)) == encode(state)


def test_a_server_optimiser_and_a_robust_rule_start_from_the_head() -> None:
    method, state = first(server_optimizer=ServerOptimizer("fedadam"))
    after = method.aggregate(state, [update("ann", sums(ROWS, [0, 0, 1, 1]))])
    assert (after.round, after.inner.round) == (1, 1)
    assert after.saved["head.weight"].any()


def test_the_order_of_clients_changes_no_bit() -> None:
    method, state = first()
    rng = np.random.Generator(np.random.Philox(2))
    parts = [update(name, sums(rng.standard_normal((5, 2)), [0, 1, 0, 1, 1])) for name in "abc"]
    ends = {b"".join(encode(method.aggregate(state, list(order)))) for order in permutations(parts)}
    assert len(ends) == 1


def test_a_capped_client_counts_as_little_as_its_weight_says() -> None:
    heavy, light = sums([[8.0, 0.0]] * 4, [1] * 4), sums(ROWS, [0, 0, 1, 1])
    # Of 4 examples each, the first counts as one: whole numbers of a finer grid.
    total = total_of([update("eve", heavy, 2**20), update("ann", light, 4 * 2**20)])
    assert [int(count) for count in total.counts] == [2 * 2**20, 3 * 2**20]
    assert int(total.sums[1, 0]) == (8 + 12) * 2**FRACTION_BITS * 2**20
    assert int(in_proportion(light, 2).squares[0]) == int(light.squares[0]) // 2


def test_a_class_without_an_example_is_refused_by_name() -> None:
    method, state = first()
    with pytest.raises(RoundError, match=r"expected an example of each class.*got none of class 'good' at any"):
        method.aggregate(state, [update("ann", sums([[1.0, 1.0]], [0]))])


def test_a_base_without_a_head_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"adapter\.head"):
        head_round(METHODS["fedit"], replace(BLUEPRINT, saved={}), LABELS)


def test_the_order_asks_for_sums_and_nothing_else() -> None:
    method, state = first()
    order = method.assign(state, 3, PLAN)
    assert order.task == SumClasses(FRACTION_BITS)
    assert (order.plan.training.batch, order.plan.training.steps, order.plan.rank) == (4, 1, 1)
    assert order == class_head.assign("fedit", state, 3, PLAN)


@pytest.mark.guarantee("G4")
def test_a_client_counts_as_its_enrolled_examples_at_most() -> None:
    method, state = first()
    order = replace(method.assign(state, 3, PLAN), base="base")
    part = sums(ROWS, [0, 0, 1, 1])
    sent = ClientUpdate("ann", 1, 4, part)
    assert isinstance(admit(sent, order, BLUEPRINT, num_examples=4), AdmittedUpdate)
    lies = {
        "EXAMPLES_RANGE": (sent, 3),
        "WRONG_ROUND": (replace(sent, round=2), 4),
        "WRONG_CLIENT": (replace(sent, client="bob"), 4),
        "WRONG_BASE": (replace(sent, result=replace(part, base="other")), 4),
        "SCALAR_RANGE": (replace(sent, result=replace(part, squares=part.squares // 2)), 4),
    }
    for code, (lie, enrolled) in lies.items():
        refused = admit(lie, order, BLUEPRINT, num_examples=enrolled)
        assert isinstance(refused, Failure)
        assert refused.code == code


@pytest.mark.guarantee("G4")
def test_features_far_above_the_cohorts_are_refused() -> None:
    method, state = first()
    order = method.assign(state, 3, PLAN)
    bound = Bounds(method, state, BLUEPRINT).bound
    parts = [bound(update(name, sums(ROWS, [0, 0, 1, 1])), order) for name in ("ann", "bob", "cid")]
    # All of its examples at the same far point.
    parts.append(bound(update("eve", sums([[200.0, -200.0]] * 4, [1] * 4)), order))
    admitted = [part for part in parts if isinstance(part, AdmittedUpdate)]
    assert len(admitted) == 4
    _, refused = refuse_outliers(admitted, 10.0)
    assert [failure.client for failure in refused] == ["eve"]
    assert "the features of its examples" in refused[0].reason
    assert refuse_outliers(admitted, None)[1] == []
