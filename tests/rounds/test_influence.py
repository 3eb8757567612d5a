"""How far one update may move the model: attacks on every method, in cohorts of one, two and five."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.messages import (
    AdmittedUpdate,
    Blueprint,
    ClientUpdate,
    Failure,
    LoraResult,
    Plan,
    PlannedClient,
    Size,
    Training,
)
from fedtune.methods import METHODS, with_settings
from fedtune.methods.change import extent_of
from fedtune.methods.method import LinearMethod
from fedtune.methods.server_optimizer import with_server_optimizer
from fedtune.methods.settings import RobustRule, ServerOptimizer
from fedtune.number_formats import CODES, from_wire, to_wire
from fedtune.rounds.influence import EPSILON, LARGEST_CHANGE, Bounds, adam_steps, planned_moves, reach, refuse_outliers
from fedtune.tensors import cast
from tests.methods.conftest import Federate

federate = Federate()
ADAPTERS = sorted(set(METHODS) - {"fedkseed"})
MODULES = {"q": (6, 5), "v": (2, 5)}
HEAD = np.linspace(-0.02, 0.02, 8, dtype=np.float32)


def sized(client: str, **norms: float) -> AdmittedUpdate:
    sizes: Any = {role: Size(norm, f"{role}-part") for role, norm in norms.items()}
    return AdmittedUpdate(ClientUpdate(client, 1, 10, LoraResult({})), sizes=sizes)


def test_a_change_far_above_the_median_is_refused_with_both_numbers() -> None:
    updates = [sized(f"c{i}", change=size) for i, size in enumerate((1, 2, 21, 1))]
    norms, refused = refuse_outliers(updates, 10.0)
    assert norms == {"c0": 1.0, "c1": 2.0, "c3": 1.0}
    assert [(one.client, one.kind, one.code) for one in refused] == [("c2", "refused", "NORM_OVER_CAP")]
    assert "most of it in change-part" in refused[0].reason
    advice = "if it has trained as asked, set rounds.max_norm higher"
    assert f"at most 15, 10 times the cohort's median; got 21; {advice}" in refused[0].reason


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("role", ["change", "factors", "saved", "scalars"])
@pytest.mark.parametrize("norm", [11.0, float("inf"), float("nan")])
def test_each_role_is_compared_for_itself(role: str, norm: float) -> None:
    plain = dict.fromkeys(("change", "factors", "saved", "scalars"), 1.0)
    updates = [sized(name, **plain) for name in "abcd"] + [sized("eve", **{**plain, role: norm})]
    norms, refused = refuse_outliers(updates, 10.0)
    assert [one.client for one in refused] == ["eve"]
    assert sorted(norms) == list("abcd")


@pytest.mark.parametrize(("sizes", "limit"), [((1, 100), 10.0), ((1, 1, 100), None), ((0, 0, 0, 100), 10.0), ((), 1.0)])
def test_without_a_limit_or_a_median_to_trust_all_are_taken(sizes: tuple[float, ...], limit: float | None) -> None:
    norms, refused = refuse_outliers([sized(f"c{i}", change=size) for i, size in enumerate(sizes)], limit)
    assert (len(norms), len(refused)) == (len(sizes), 0)


def planned(name: str, rate: float, steps: int, arm: int | None) -> PlannedClient:
    return PlannedClient(Plan(name, 4, 2.0, Training(learning_rate=rate, steps=steps)), arm=arm)


def test_changes_of_drawn_rates_and_steps_are_compared_for_what_their_plans_let_them_move() -> None:
    plans = {"a": planned("a", 1e-4, 3, 0), "b": planned("b", 1e-4, 3, 0), "c": planned("c", 1e-2, 6, 1)}
    moves = planned_moves(plans)
    assert moves == pytest.approx({"a": 3e-4, "b": 3e-4, "c": 6e-2})
    honest = [sized("a", change=1.0), sized("b", change=1.1), sized("c", change=210.0)]
    assert refuse_outliers(honest, 10.0)[1][0].client == "c"
    assert refuse_outliers(honest, 10.0, moves)[1] == []
    # A small arm is no way past the limit.
    (refused,) = refuse_outliers(
        [sized("a", change=1.0), sized("b", change=20.0), sized("c", change=210.0)], 10.0, moves
    )[1]
    assert refused.client == "b"
    assert "at most 10.5, 10 times the cohort's median for its rate and steps; got 20" in refused.reason
    assert planned_moves({"a": planned("a", 1e-4, 3, None), "b": planned("b", 1e-2, 3, None)}) is None


def test_one_client_that_descends_among_many_that_probe_is_no_outlier_and_neither_are_they() -> None:
    phones = [sized(f"phone-{n:02}", scalars=100.0) for n in range(99)]
    norms, refused = refuse_outliers([*phones, sized("gpu", numbers=1e6)], 3.0)
    assert (len(norms), refused) == (100, [])
    many = [sized(f"gpu-{n:02}", numbers=1e6) for n in range(99)]
    norms, refused = refuse_outliers([*many, sized("phone", scalars=100.0)], 3.0)
    assert (len(norms), refused) == (100, [])


def test_a_liar_of_either_kind_is_refused_among_its_own() -> None:
    phones = [*(sized(f"phone-{n}", scalars=100.0) for n in range(3)), sized("loud", scalars=301.0)]
    gpus = [*(sized(f"gpu-{n}", numbers=1e6) for n in range(3)), sized("large", numbers=3.1e6)]
    norms, refused = refuse_outliers([*phones, *gpus], 3.0)
    assert [(one.client, one.where.partition(",")[0]) for one in refused] == [("large", "numbers"), ("loud", "scalars")]
    assert len(norms) == 6
    # Of two of a kind neither is an outlier, however many there are of the other.
    assert refuse_outliers([*phones[:3], sized("a", numbers=1.0), sized("b", numbers=1e9)], 1.5)[1] == []


def test_the_norm_of_an_update_is_that_of_all_that_moves_in_the_model() -> None:
    assert sized("ann", change=3.0, saved=4.0, factors=100.0, mean=100.0).norm == 5.0
    assert refuse_outliers([sized("ann", change=3.0, saved=4.0)], 10.0)[0] == {"ann": 5.0}


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 2000])
@pytest.mark.parametrize("kind", ["constant", "growing", "random", "worst", "late"])
def test_no_gradients_take_adam_further_than_its_reach(steps: int, kind: str) -> None:
    """Against torch's own optimiser, with the gradients that move a number furthest among others."""
    rng, number = np.random.default_rng(steps), torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([number], lr=0.01, weight_decay=0.0)
    for step in range(steps):
        gradient = {
            "constant": 1.0,
            "growing": 1.5 ** min(step, 200),
            "random": rng.standard_normal(),
            "worst": (0.999 / 0.9) ** min(step, 400),
            "late": float(step + 1 == steps),
        }[kind]
        number.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert abs(number.item()) <= 0.01 * adam_steps(steps) * (1 + 1e-9)
    assert adam_steps(steps) <= 7.3 * steps


def test_the_reach_by_hand() -> None:
    moved = {"x.a": 2 * 3, "x.b": 5 * 2}
    adam = Training(learning_rate=0.1, steps=1)
    assert reach(adam, moved, start=0.0, scale=2.0) == pytest.approx(0.1 * np.sqrt(6 + 4 * 10))
    sgd = Training(learning_rate=0.1, steps=4, optimizer="sgd", clip_norm=2.0)
    assert reach(sgd, moved, start=0.0, scale=3.0) == pytest.approx(0.1 * 4 * 2 * 3)
    assert reach(replace(sgd, momentum=0.5), moved, start=0.0) == pytest.approx(0.1 * 4 * 2 * 2)
    assert reach(replace(sgd, clip_norm=None), moved, start=0.0) == np.inf
    assert reach(replace(sgd, weight_decay=0.5), moved, start=10.0) == pytest.approx((0.8 + 0.2 * 10) / 0.8)
    assert reach(replace(adam, weight_decay=20.0), moved, start=1.0) == np.inf


def poisoned(update: AdmittedUpdate, **changes: Callable[[str, Any], Any]) -> AdmittedUpdate:
    """Return an update with its tensors, or its modules_to_save, made into others."""
    result = update.lora
    parts: Any = {
        part: {name: make(name, array).astype(array.dtype) for name, array in getattr(result, part).items()}
        for part, make in changes.items()
    }
    return replace(update, update=replace(update.update, result=replace(result, **parts)))


ATTACKS: dict[str, dict[str, Callable[[str, Any], Any]]] = {
    "head of 1e30": {"saved": lambda name, array: np.full_like(array, 1e30)},
    "head of 1e3": {"saved": lambda name, array: np.full_like(array, 1e3)},
    "factors of 1e15": {"tensors": lambda name, array: np.full_like(array, 1e15)},
    "a huge, b tiny": {"tensors": lambda name, array: np.full_like(array, 1e15 if name.endswith(".a") else 1e-15)},
    "b huge, a tiny": {"tensors": lambda name, array: np.full_like(array, 1e15 if name.endswith(".b") else 1e-15)},
    "times 1000": {"tensors": lambda name, array: 1000 * array.astype(np.float32)},
    "one number of 1e38": {
        "tensors": lambda name, array: np.where(np.arange(array.size).reshape(array.shape) == 1, 1e38, array)
    },
}
METHODS_TO_ATTACK = [*ADAPTERS, "flora differences", "fedit fedadam"]


def method_of(name: str) -> tuple[Any, dict[str, Any]]:
    if name == "fedit fedadam":
        return with_server_optimizer(METHODS["fedit"], ServerOptimizer("fedadam")), {}  # type: ignore[arg-type]
    if name == "flora differences":
        return METHODS["flora"], {"mode": "continue", "wire_dtype": "bf16"}
    return METHODS[name], {}


def training_of(federation: Any, method: Any, state: Any, names: Sequence[str], *, rate: float) -> dict[str, Any]:
    assigned = {name: federation.assign(method, state, (name, 2, 2.0, 3)) for name in names}
    return {
        name: replace(one, plan=replace(one.plan, training=Training(batch=1, learning_rate=rate, steps=10)))
        for name, one in assigned.items()
    }


def answered(federation: Any, asked: Any) -> AdmittedUpdate:
    """An honest answer whose every number moves by at most ten steps of a thousandth."""
    update: AdmittedUpdate = federation.answer(asked, size=0.001)
    saved = {name: array + np.float32(0.002) for name, array in asked.lora.blobs["saved"].items()}
    return replace(update, update=replace(update.update, result=replace(update.lora, saved=saved)))


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("cohort", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "attack"),
    # Without an A there is no tiny B that is an attack.
    [(name, attack) for name in METHODS_TO_ATTACK for attack in ATTACKS if (name, attack) != ("ffa", "a huge, b tiny")],
)
def test_poison_is_refused_by_every_method_in_every_cohort(name: str, attack: str, cohort: int) -> None:
    federation, (method, settings) = federate(MODULES, max_rank=2, saved={"head": HEAD}), method_of(name)
    state, names = federation.state(method, **settings), [f"site-{i}" for i in range(cohort)]
    for _ in range(2):  # from zero, and from what a round has learned
        asked = training_of(federation, method, state, names, rate=1e-3)
        bounds = Bounds(method, state, federation.blueprint)
        updates = {one: answered(federation, asked[one]) for one in names}
        honest = [bounds.bound(updates[one], asked[one]) for one in names]
        assert all(isinstance(one, AdmittedUpdate) for one in honest), honest
        liar = bounds.bound(poisoned(updates["site-0"], **ATTACKS[attack]), asked["site-0"])
        assert isinstance(liar, Failure), liar
        assert (liar.client, liar.kind, liar.code) == ("site-0", "refused", "NORM_OVER_CAP")
        assert "the reach of 10 planned steps" in liar.reason or "most of any change" in liar.reason
        assert liar.reason.endswith(("set rounds.norm_cap higher", "got inf", "got nan"))
        state = method.aggregate(state, honest)


DEEP = {f"layer.{index}": (4, 6) for index in range(24)}


@pytest.mark.parametrize("name", METHODS_TO_ATTACK)
def test_weight_decay_shrinks_what_a_client_starts_from_and_no_honest_update_is_refused_for_it(name: str) -> None:
    """SGD's step is the clipped gradient and the decay; here both point the same way, on factors of a norm above 4."""
    federation, (method, settings) = federate(DEEP, max_rank=2), method_of(name)
    state = federation.state(method, **settings)
    for _ in range(2):
        asked = training_of(federation, method, state, ["anna"], rate=0.01)["anna"]
        training = replace(asked.plan.training, optimizer="sgd", clip_norm=1.0, weight_decay=0.5)
        asked = replace(asked, plan=replace(asked.plan, training=training))
        start = {
            f"{layer}.{side}": getattr(factors, side).copy()
            for layer, factors in federation.start(asked).items()
            for side in asked.lora.train
        }
        end = start
        for _ in range(10):
            norm = float(np.sqrt(sum(np.sum(np.square(array)) for array in end.values()))) or 1.0
            gradient = {part: array / norm for part, array in end.items()}
            end = {part: array - np.float32(0.01) * (gradient[part] + 0.5 * array) for part, array in end.items()}
        if asked.lora.upload == "difference":
            end = {part: array - start[part] for part, array in end.items()}
        result = LoraResult(from_wire(to_wire(end, asked.lora.wire_dtype)), {}, asked.base)
        update = AdmittedUpdate(ClientUpdate("anna", asked.round, 1, result), upload=asked.lora.upload)
        honest = Bounds(method, state, federation.blueprint).bound(update, asked)
        assert isinstance(honest, AdmittedUpdate), honest
        state = method.aggregate(state, [federation.answer(asked, size=0.001)])


@pytest.mark.parametrize("name", METHODS_TO_ATTACK)
def test_a_step_that_is_as_small_as_the_spacing_of_16_bits_is_admitted(name: str) -> None:
    """Adam's first step is the learning rate in every number; fp16 rounds 1e-6 up to 17 of its smallest units."""
    federation, (method, settings) = federate(MODULES, max_rank=2), method_of(name)
    state = federation.state(method, **{**settings, "wire_dtype": "fp16"})
    asked = training_of(federation, method, state, ["anna"], rate=1e-6)["anna"]
    asked = replace(asked, plan=replace(asked.plan, scale=1.0, training=replace(asked.plan.training, steps=1)))
    start = federation.start(asked)
    moved = {
        f"{layer}.{side}": getattr(factors, side) * (asked.lora.upload == "factors") + np.float32(1e-6)
        for layer, factors in start.items()
        for side in asked.lora.train
    }
    result = LoraResult(cast(moved, "fp16"), {}, asked.base)
    honest = Bounds(method, state, federation.blueprint).bound(
        AdmittedUpdate(ClientUpdate("anna", asked.round, 1, result), upload=asked.lora.upload), asked
    )
    assert isinstance(honest, AdmittedUpdate), honest


@pytest.mark.parametrize("name", ["zeropad", "ffa"])
def test_a_cap_in_numbers_refuses_no_client_for_the_ranks_that_it_does_not_train(name: str) -> None:
    """A client of rank 1 beside ranks of 4: what enters the mean has zeros where the server has large values."""
    federation, (method, settings) = federate(MODULES, max_rank=4), method_of(name)
    state = federation.state(method, **settings)
    for _ in range(4):
        state = method.aggregate(state, [federation.answer(federation.assign(method, state, ("ann", 4, 1.0, 1)))])
    asked = federation.assign(method, state, ("bob", 1, 1.0, 1))
    small = federation.answer(asked, size=0.001)
    cap = 0.05
    assert isinstance(Bounds(method, state, federation.blueprint, norm_cap=cap).bound(small, asked), AdmittedUpdate)
    large = federation.answer(asked, size=1.0)
    assert isinstance(Bounds(method, state, federation.blueprint, norm_cap=cap).bound(large, asked), Failure)


@pytest.mark.parametrize("name", METHODS_TO_ATTACK)
def test_a_cap_in_numbers_takes_the_place_of_the_plans_and_none_leaves_all_that_is_finite(
    name: str,
) -> None:
    federation, (method, settings) = federate(MODULES, max_rank=2, saved={"head": HEAD}), method_of(name)
    state = federation.state(method, **settings)
    asked = training_of(federation, method, state, ["anna"], rate=1e-3)["anna"]
    large = poisoned(answered(federation, asked), saved=lambda name, array: np.full_like(array, 50.0))
    norm = float(np.linalg.norm(50.0 - HEAD))

    def with_cap(cap: Any, update: AdmittedUpdate = large) -> AdmittedUpdate | Failure:
        return Bounds(method, state, federation.blueprint, norm_cap=cap).bound(update, asked)

    assert isinstance(with_cap(norm * 0.99), Failure)
    admitted = with_cap(norm * 1.01)
    assert isinstance(admitted, AdmittedUpdate), admitted
    assert admitted.sizes["saved"].norm == pytest.approx(norm, rel=1e-6)
    assert isinstance(with_cap(None), AdmittedUpdate)
    assert isinstance(
        with_cap(None, poisoned(large, saved=lambda name, array: np.full_like(array, 1e30))), AdmittedUpdate
    )


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("name", METHODS_TO_ATTACK)
def test_where_the_optimizer_has_no_reach_a_change_is_bounded_all_the_same(name: str) -> None:
    federation, (method, settings) = federate(MODULES, max_rank=2, saved={"head": HEAD}), method_of(name)
    state = federation.state(method, **settings)
    asked = training_of(federation, method, state, ["anna"], rate=1e-3)["anna"]
    free = replace(asked.plan.training, optimizer="sgd", clip_norm=None)
    asked = replace(asked, plan=replace(asked.plan, training=free))
    bounds, honest = Bounds(method, state, federation.blueprint), answered(federation, asked)
    assert isinstance(bounds.bound(honest, asked), AdmittedUpdate)
    for part in ("saved", "tensors"):
        outcome = bounds.bound(poisoned(honest, **{part: lambda name, a: np.full_like(a, LARGEST_CHANGE)}), asked)
        assert isinstance(outcome, Failure)
        assert f"at most {LARGEST_CHANGE:.4g}" in outcome.reason


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("rule", ["none", "clip", "median"])
def test_what_enters_a_robust_rule_is_bounded_like_what_enters_a_mean(rule: Any) -> None:
    """A huge A and a tiny B: the change of the layers is small, and so it must not be all that is looked at."""
    chosen = METHODS["fedit"].settings(robust=RobustRule(rule), wire_dtype="fp32")
    method = with_settings(METHODS["fedit"], chosen)
    blueprint = Blueprint({"x": (4, 6)}, saved={}, max_rank=2, seed=0)
    lie = {"x.a": np.full((2, 6), 1e15, np.float32), "x.b": np.full((4, 2), 1e-15, np.float32)}
    update = AdmittedUpdate(ClientUpdate("eve", 1, 10, LoraResult(lie)), upload="difference")
    state = method.init(blueprint, chosen)
    displaced = dict(method.displacement(state, update))
    assert displaced.keys() == {"local/x.a", "local/x.b"}
    assert abs(displaced["local/x.a"]).min() > 1e14
    plan = Plan("eve", rank=2, scale=1.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    bounds = Bounds(method, state, blueprint, norm_cap=1e3)
    refused = bounds.bound(update, method.assign(state, 0, PlannedClient(plan)))
    assert isinstance(refused, Failure)
    assert refused.code == "NORM_OVER_CAP"


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("name", ["fedit", "zeropad", "ffa", "fedit fedadam"])
def test_no_mean_is_further_from_the_servers_values_than_it_is_bounded_by_without_computing_it(name: str) -> None:
    """Over random states, ranks and updates; where the bound is not enough, the mean itself is looked at."""
    for key in range(20):
        federation, (method, settings) = federate(MODULES, max_rank=4, saved={"head": HEAD}), method_of(name)
        state = federation.state(method, **settings)
        rank = 4 if METHODS[name.split()[0]].ranks == "equal" else 1 + key % 4
        for round in range(key % 3):
            whole = federation.assign(method, state, ("anna", 4, 1.0, round))
            state = method.aggregate(state, [answered(federation, whole)])
        asked = federation.assign(method, state, ("anna", rank, 1.0, 3))
        update = federation.answer(asked, size=10.0 ** (key % 7 - 3))
        bounds = Bounds(method, state, federation.blueprint)
        exact = float(np.sqrt(sum(float(np.vdot(part, part)) for _, part in method.displacement(state, update))))
        extent = extent_of(method.change(state, federation.blueprint, asked, update))
        assert exact > 0
        assert not bounds.mean_is_within(exact * 0.99, extent)
        assert bounds.mean_is_within(1e6 + 1e3 * exact, extent)


def test_a_mean_of_something_else_is_always_computed() -> None:
    federation, method = federate(MODULES, max_rank=2), METHODS["fedit"]
    assert isinstance(method, LinearMethod)
    other = replace(method, averages_factors=False, contribution=lambda state, update: {"x": np.full(3, 1e9, "f4")})
    other = replace(other, current=lambda state: {"x": np.zeros(3, np.float32)})
    state = federation.state(other)
    asked = training_of(federation, other, state, ["anna"], rate=1e-3)["anna"]
    refused = Bounds(other, state, federation.blueprint).bound(federation.answer(asked, size=0.001), asked)
    assert isinstance(refused, Failure)
    assert refused.where == "mean, most of it in x"


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("dtype", sorted(CODES))
@pytest.mark.parametrize("small", [0.0, 0.02, 0.06, 0.14, 1.0])
def test_no_rounding_of_codes_lengthens_a_change_beyond_what_its_bound_allows(dtype: str, small: float) -> None:
    """A group of one large number and many small ones is lengthened most: each of those may become a whole step."""
    moved = np.full((40, 64), small, np.float32)
    moved[:, 0] = 1.0
    ratios = [
        np.linalg.norm(from_wire(to_wire({"x.a": moved}, dtype, key=key))["x.a"]) / np.linalg.norm(moved)
        for key in range(20)
    ]
    assert max(ratios) <= 1 + EPSILON[dtype]
    assert EPSILON[dtype] <= 0.5
