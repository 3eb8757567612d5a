"""What of an order follows from the server's state, within its bounds and out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from fedtune.config.consent import permission, permission_texts
from fedtune.config.order_rules import FREE, Comparison
from fedtune.messages import BaseDtype, ImportanceName, SeedState, Training, View
from fedtune.number_formats import to_wire
from fedtune.planning.planner import PlanChoices
from fedtune.pruning.structure import Block, BlockLayout
from fedtune.tensors import cast
from tests.config.test_consent import ADAPTERS, ORDERS, PROFILE, SAVED, UP, keys, made, put, recipe_of


def wide(name: str, rows: int, columns: int) -> Mapping[str, Any]:
    return {"local": {name: np.zeros((rows, columns), np.float32)}, "saved": SAVED}


def coded(rank: int, columns: int) -> Mapping[str, Any]:
    """Return A of a layer in codes, with its scales."""
    return to_wire({f"{UP}.a": np.ones((rank, columns), np.float32)}, "int8")


OUT_OF_BOUNDS: Mapping[str, Sequence[tuple[str, str, Any]]] = {
    "Assignment.labels": [("adapters", "labels", ("a", "a")), ("adapters", "labels", ("a", "b"))],
    "Assignment.date": [("adapters", "date", "2026-11-29")],
    "Plan.rank": [("adapters", "plan.rank", rank) for rank in (1, 3, 8, 2**31)],
    "Plan.ratio": [("adapters", "plan.ratio", ratio) for ratio in (0.125, 0.75, 0.875)],
    "TrainLora.blobs": [
        ("adapters", "task.blobs", blobs)
        for blobs in (
            {},
            {"secret": {}, "saved": SAVED},
            {"saved": {"embed_tokens.weight": np.zeros((9, 8), np.float32)}},
            {"saved": {**SAVED, "embed_tokens.weight": np.zeros((9, 8), np.float32)}},
            {"saved": {"norm.weight": np.zeros(9, np.float32)}},
            {"saved": cast(SAVED, "fp16")},
            wide("embed_tokens.a", 4, 8),
            wide(f"{UP}.c", 4, 8),
            wide(f"{UP}.a", 5, 8),
            wide(f"{UP}.a", 4, 9),
            {"local": {f"{UP}.a": np.zeros(8, np.float32)}, "saved": SAVED},
            {"local": {f"{UP}.a": np.zeros((4, 8), np.int8)}, "saved": SAVED},
            {"local": {f"{UP}.a.scales": np.zeros((4, 1), ml_dtypes.bfloat16)}, "saved": SAVED},
            {"local": {**coded(4, 8), f"{UP}.a.scales": np.zeros((4, 1), np.float32)}, "saved": SAVED},
            {"local": {**coded(4, 8), f"{UP}.a.scales": np.zeros((4, 2), ml_dtypes.bfloat16)}, "saved": SAVED},
            {"local": {**coded(4, 8), f"{UP}.a": np.zeros((4, 8), np.float32)}, "saved": SAVED},
            {"local": coded(5, 8), "saved": SAVED},
            {"local": {**coded(4, 8), "x.scales": np.zeros((4, 1), ml_dtypes.bfloat16)}, "saved": SAVED},
            {"global": {f"{UP}.w": np.zeros((33, 8), np.float32)}, "saved": SAVED},
        )
    ],
    "Pruning.stages": [
        ("pruned", "task.pruning.stages", stages)
        for stages in ((b"x",), (b"\xff" * 5,) * 3, (b"\0" * 5,), (b"\x3f\0\0\0\0",))
    ]
    + [("adapters", "task.pruning.stages", (b"\xff" * 5,))],
    "Pruning.previous": [("pruned", "task.pruning.previous", b"x")],
    "Plan.ranks": [
        ("adapters", "plan.ranks", (0, 4)),
        ("adapters", "plan.ranks", (4, 4)),
        ("seeds", "plan.ranks", (1,)),
    ],
    "Plan.back": [("adapters", "plan.back", 0.25), ("pruned", "plan.back", 0.75), ("seeds", "plan.back", 0.5)],
    "Plan.base_dtype": [("adapters", "plan.base_dtype", "nf4"), ("seeds", "plan.base_dtype", "int8")],
    "Plan.view": [("adapters", "plan.view", "deployed"), ("pruned", "plan.view", "deployed")],
    "Plan.importance": [("adapters", "plan.importance", "gain"), ("pruned", "plan.importance", "svd")],
    "Pruning.scores_requested": [],
    "Pruning.moments_requested": [],
    "Pruning.whole_requested": [],
    "ProbeSeeds.exponent": [("seeds", "task.exponent", 3), ("descend", "task.probe.exponent", 30)],
    "ProbeSeeds.shift": [("seeds", "task.shift", 0)],
    "ProbeSeeds.perturbation": [("seeds", "task.perturbation", 2**30), ("seeds", "task.perturbation", 1)],
    "ProbeSeeds.state": [("seeds", "task.state", SeedState("whole", 0, b"", 3, b"d" * 32))],
    "ProbeSeeds.levels": [("seeds", "task.levels", b"x")],
    "ProbeSeeds.calibrate": [("seeds", "task.calibrate", True), ("descend", "task.probe.calibrate", True)],
    "ProbeSeeds.curvatures": [("seeds", "task.curvatures", True)],
    "ProbeSeeds.head": [("seeds", "task.head", SAVED), ("descend", "task.probe.head", SAVED)],
    "Training.learning_rate": [
        ("adapters", "plan.training.learning_rate", 0.02),
        ("seeds", "plan.training.learning_rate", 0.006),
        ("descend", "plan.training.learning_rate", 0.5),
    ],
    # What there is room for only the server's state says; any within the schema's bounds is no more work, and no less.
    "DescendSeeds.largest_shift": [],
    "ScoreRequest.blobs": [
        ("scores", "blobs", {"saved": {}, "local": {f"{UP}.a": np.zeros((4, 8), np.float32)}}),
        ("scores", "blobs", {"saved": {"norm.weight": np.zeros(9, np.float32)}}),
        ("scores", "blobs", {"global": {"embed_tokens.a": np.zeros((4, 8), np.float32)}}),
    ],
    "ScoreRequest.ledger": [("scores", "ledger", b"x")],
    "ScoreRequest.trainable": [("scores", "trainable", (1,))],
    "PersonalRequest.training": [
        ("own scores", "personal.training", Training(steps=3, epochs=None)),
        ("own scores after training", "personal.training", None),
        ("own scores after training", "personal.training", Training(steps=4, epochs=None)),
    ],
    "ScoreRequest.labels": [("scores", "labels", ("a", "a"))],
    "ScoreRequest.date": [("scores", "date", "2026-11-29")],
}
"""By field that is free within bounds: an order, the field's path, and a value outside of them."""


def test_what_is_free_has_bounds() -> None:
    assert OUT_OF_BOUNDS.keys() == FREE.keys()
    for cases in OUT_OF_BOUNDS.values():
        for kind, path, value in cases:
            text, make = ORDERS[kind]
            assert path in keys(text, put(make(), path, value)), (kind, path, value)


def test_codes_with_their_scales_are_within_the_bounds() -> None:
    text, make = ORDERS["adapters"]
    assert keys(text, put(make(), "task.blobs", {"local": coded(4, 8), "global": coded(4, 8), "saved": SAVED})) == set()


DEEP = BlockLayout("llama", tuple(Block(f"model.layers.{at}", 4, 2, 2, 32) for at in range(4)), width=8)
DEEP_PROFILE = replace(
    PROFILE,
    foundation=replace(
        PROFILE.foundation, modules={f"model.layers.{at}.mlp.up_proj": (32, 8) for at in range(4)}, anatomy=DEEP
    ),
)
FORMATS: Sequence[BaseDtype] = ("nf4",)
VIEWS: Sequence[View] = ("deployed",)
ARMS = PlanChoices(tops=(0.5, 0.25), backs=(0.5,), base_dtypes=FORMATS, views=VIEWS)


def plan_faults(choices: PlanChoices, **plan: Any) -> set[str]:
    """Return the fields of a plan that go beyond what a planner of such choices may ask."""
    recipe, order = recipe_of(ADAPTERS), made(ADAPTERS)
    order = replace(order, plan=replace(order.plan, **plan))
    allowed = replace(permission(recipe, "site-a", 40), choices=choices)
    comparison = Comparison(recipe, DEEP_PROFILE, allowed, order, order)
    return {name for name, rule in FREE.items() if name.startswith("Plan.") and rule(comparison)} - {"Plan.ratio"}


def test_a_planner_that_names_arms_may_choose_just_these() -> None:
    assert plan_faults(ARMS, ranks=(0, 0, 4, 4), back=0.5, base_dtype="nf4", view="deployed") == set()
    assert plan_faults(ARMS, ranks=(0, 0, 0, 4)) == set()
    assert plan_faults(ARMS, ranks=(0, 4, 4, 4)) == {"Plan.ranks"}
    assert plan_faults(ARMS, ranks=(4, 4, 0, 0)) == {"Plan.ranks"}
    assert plan_faults(ARMS, ranks=(0, 0, 2, 4)) == {"Plan.ranks"}
    assert plan_faults(ARMS, back=0.25) == {"Plan.back"}
    assert plan_faults(ARMS, back=float("nan")) == {"Plan.back"}
    assert plan_faults(ARMS, base_dtype="int8") == {"Plan.base_dtype"}
    others: dict[str, Any] = {"ranks": (0, 0, 4, 4), "back": 0.5, "base_dtype": "nf4", "view": "deployed"}
    assert plan_faults(PlanChoices(), **others) == {"Plan.ranks", "Plan.back", "Plan.base_dtype", "Plan.view"}


def test_a_planner_of_ranks_by_module_stays_below_the_plan_and_names_every_module() -> None:
    free = PlanChoices(module_ranks=True)
    assert plan_faults(free, ranks=(0, 3, 4, 1)) == set()
    for ranks in ((0, 3, 5, 1), (0, 3, 1, 1), (4,), (4,) * 5, (0,) * 4):
        assert plan_faults(free, ranks=ranks) == {"Plan.ranks"}, ranks
    assert plan_faults(free, ranks=(0, 3, 8, 1), rank=8) == set()  # the plan's own rank has a rule beside


def test_ranks_by_module_are_those_that_the_planner_lists() -> None:
    few = PlanChoices(ranks=(1, 2, 4), module_ranks=True)
    assert plan_faults(few, ranks=(0, 2, 4, 1)) == set()
    assert plan_faults(few, ranks=(0, 3, 4, 1)) == {"Plan.ranks"}


def test_scores_of_modules_are_measured_where_the_recipe_says_so_and_as_it_says() -> None:
    gain: ImportanceName = "gain"
    assert plan_faults(PlanChoices(importance=(gain,)), importance="gain") == set()
    assert plan_faults(PlanChoices(importance=(gain,)), importance="svd") == {"Plan.importance"}


DRAWN = """
name = "x"
seed = 7
model = { base = "none" }
adapter = { rank = 4, targets = ["q_proj", "up_proj"], modules_to_save = ["norm"] }
method = "flora"
planner = { name = "expgrad", learning_rates = [0.001, 0.01], steps = [4, 6], dropouts = [0.0, 0.1] }
client = { steps = 6, batch = 4, learning_rate = 0.001 }
rounds = { count = 5, schedule = "linear" }
data = { source = "at the sites", split = { kind = "files" } }
"""


def test_an_order_trains_with_the_values_of_one_arm_of_the_planner_at_the_rounds_rate() -> None:
    order = made(DRAWN)
    assert keys(DRAWN, order) == set()

    def asked(rate: float, steps: int, dropout: float) -> set[str]:
        training = replace(order.plan.training, learning_rate=rate, steps=steps, dropout=dropout)
        return keys(DRAWN, put(order, "plan.training", training))

    for rate in (0.001, 0.01):
        assert asked(rate, 4, 0.1) == asked(rate, 6, 0.0) == set()
    assert asked(0.005, 4, 0.1)
    assert asked(0.01, 5, 0.1)
    assert asked(0.01, 4, 0.2)
    # Each value is of an arm: what no list names stays as the recipe has it.
    other = put(order, "plan.training", replace(order.plan.training, learning_rate=0.01, steps=4, batch=8))
    assert keys(DRAWN, other)
    plain = DRAWN.replace('name = "expgrad", learning_rates = [0.001, 0.01], steps = [4, 6], dropouts = [0.0, 0.1]', "")
    assert keys(plain.replace("planner = {  }", 'planner = "fixed"'), put(order, "plan.training.dropout", 0.1))
    texts = permission_texts(recipe_of(DRAWN), "site-a")
    assert texts["training"] == "client.learning_rate 0.001, 0.01; client.steps 4, 6; client.dropout 0, 0.1"


PIPE = """
name = "x"
seed = 7
model = { base = "none" }
adapter = { rank = 4, targets = ["q_proj", "up_proj"], modules_to_save = ["norm"] }
method = "fedpipe"
client = { steps = 6, batch = 4, accumulation = 2 }
rounds = { count = 5 }
data = { source = "at the sites", split = { kind = "files" } }
"""


def test_batches_may_be_split_where_a_step_sees_as_many_examples() -> None:
    order = made(PIPE)
    assert keys(PIPE, order) == set()
    for batch, accumulation in ((2, 4), (1, 8)):
        split = put(put(order, "plan.training.batch", batch), "plan.training.accumulation", accumulation)
        assert keys(PIPE, split) == set()
        fixed = PIPE.replace('"fedpipe"', '"flora"')
        assert keys(fixed, split) == {"plan.training.batch", "plan.training.accumulation"}
    for batch, accumulation in ((2, 2), (4, 1), (8, 1), (1, 4)):
        other = put(put(order, "plan.training.batch", batch), "plan.training.accumulation", accumulation)
        assert keys(PIPE, other) & {"plan.training.batch", "plan.training.accumulation"}
