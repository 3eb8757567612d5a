from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import NotFiniteError, RoundError, ShapeError
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    Failure,
    LoraResult,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS, with_settings
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.methods.method import Method
from fedtune.methods.serialization import persisted_fields, with_values
from fedtune.methods.settings import RobustRule, ServerOptimizer
from fedtune.number_formats import CODES, from_wire, to_wire
from fedtune.planning.fixed import Fixed
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout, cuts, from_bitmap, linear_shapes, shapes
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import ClientFinished, Note
from fedtune.rounds.journal import InterruptedRound
from fedtune.rounds.loop import RoundResult, run
from fedtune.rounds.schedule import Schedule
from fedtune.tensors import Array, Tensors
from tests.rounds.scripted import LISTED, STEPS, Noted, Script, Scripted, never, probing

pytestmark = pytest.mark.guarantee("G4")

BLOCKS = BlockLayout("llama", (Block("model.layers.0", 4, 2, 2, 16),), width=6)
PLAIN = Blueprint(
    {"x": (4, 6), "y": (3, 5)},
    saved={"head": np.ones((2, 3), np.float32)},
    max_rank=2,
    seed=0,
    manifest=LISTED.encode(),
)
PRUNED = Blueprint(
    dict(zip(BLOCKS.sides, linear_shapes(BLOCKS), strict=True)),
    saved={"head": np.ones((2, 3), np.float32)},
    max_rank=2,
    seed=0,
    anatomy=BLOCKS,
    pruning=PruningSettings(multiple=2, target=0.5, refresh=1),
)
TRAINING = Training(batch=1, learning_rate=0.1, steps=STEPS)


@dataclass(frozen=True)
class Way:
    """A method as a recipe may ask for it."""

    method: Method[Any]
    settings: Any
    blueprint: Blueprint = PLAIN


def way(name: str, blueprint: Blueprint = PLAIN, **chosen: Any) -> Way:
    asked = METHODS[name].settings(**chosen)
    return Way(with_settings(METHODS[name], asked), asked, blueprint)


ADAPTERS = [name for name, method in METHODS.items() if method.task is TrainLora]
WAYS: Mapping[str, Way] = {
    **{name: way(name) for name in ADAPTERS},
    **{f"{name}-{wire}": way(name, wire_dtype=wire) for name in ADAPTERS for wire in ("fp16", "fp32")},
    **{f"{name}-{wire}": way(name, wire_dtype=wire) for name in ("flora", "fedit") for wire in ("bf16", "int4")},
    **{f"flora-{mode}": way("flora", mode=mode, wire_dtype="fp32") for mode in ("reinit", "svt")},
    **{f"{name}-fast": way(name, server_learning_rate=100.0) for name in ADAPTERS},
    **{
        f"{name}-{rule}": way(name, server_optimizer=ServerOptimizer(rule))
        for name in ("fedit", "ffa", "zeropad")
        for rule in ("fedavgm", "fedadam", "fedyogi")
    },
    **{f"fedit-{rule}": way("fedit", robust=RobustRule(rule)) for rule in ("clip", "median")},
    "flora-pruned": way("flora", PRUNED),
    "flora-zero-coverage": way("flora", PRUNED, coverage="zero", mode="reinit"),
    "fedkseed": Way(METHODS["fedkseed"], FedKSeedSettings(seeds=16)),
    "fedkseed-pro": Way(METHODS["fedkseed"], FedKSeedSettings(seeds=16, sampling="pro")),
}


def asked_for(assignment: Assignment, blueprint: Blueprint) -> tuple[Mapping[str, Tensors], bytes]:
    """Return what an honest client sends, by role, and the digest of the structure that it was trained in."""
    task, rank = assignment.lora, assignment.plan.rank
    modules, digest, scores = blueprint.modules, b"", {}
    if task.pruning is not None:
        keep = from_bitmap(task.pruning.stages[-1], BLOCKS) if task.pruning.stages else None
        modules = modules if keep is None else shapes(modules, cuts(keep, BLOCKS))
        digest = keep.digest if keep else b""
        if task.pruning.scores_requested:
            parts, block = (keep.blocks[0] if keep else None), BLOCKS.blocks[0]
            sizes = {"heads": len(parts.q) if parts else block.heads, "channels": len(parts.ff) if parts else 16}
            scores = {name: np.ones(size, np.float16) for name, size in sizes.items()}
    rng = np.random.default_rng(sum(assignment.plan.client.encode()) + assignment.round)
    factors = {f"{name}.a": rng.standard_normal((rank, n)) for name, (_, n) in modules.items()}
    factors |= {f"{name}.b": 0.1 * rng.standard_normal((m, rank)) for name, (m, _) in modules.items()}
    trained = {k: v.astype(np.float32) for k, v in sorted(factors.items()) if k[-1] in task.train}
    sent = to_wire(trained, task.wire_dtype, key=assignment.seed)
    saved = {name: value + np.float32(0.1) for name, value in blueprint.saved.items()}
    return {"factors": sent, "saved": saved, "scores": scores}, digest


Patterns = Sequence[int]
"""Bits of float32 that are written into a client's numbers, in turn; of a narrower format it is their upper part."""


def overwritten(array: Array, bits: Patterns, offset: int) -> Array:
    wide = np.array([bits[(place + offset) % len(bits)] for place in range(array.size)], np.uint32)
    if array.dtype == CODES["int4"]:  # each in the lower half of a byte
        narrow = (wide >> 28).astype(np.uint8)
    else:
        narrow = (wide >> (32 - 8 * array.itemsize)).astype(f"u{array.itemsize}")
    return narrow.view(array.dtype).reshape(array.shape)


def client(blueprint: Blueprint, lies: Mapping[str, Patterns], measured: int = 0) -> Script:
    """Return a client that overwrites the numbers of some roles, and of a calibration the size that it measured."""

    def reply(assignment: Assignment) -> ClientUpdate:
        name, number = assignment.plan.client, assignment.round
        if not isinstance(assignment.task, TrainLora):
            honest = probing()(assignment)
            assert isinstance(honest, ClientUpdate)
            drawn = np.resize(np.array(lies.get("scalars", [1]), np.uint32).astype(np.uint8).view(np.int8), STEPS)
            size = float(np.uint32(measured).view(np.float32)) if lies else 0.5
            calibrating = {"scalars": np.empty(0, np.int8), "rms": size}
            return replace(
                honest,
                result=replace(honest.probe, **(calibrating if assignment.probe.calibrate else {"scalars": drawn})),
            )
        roles, digest = asked_for(assignment, blueprint)
        sent = {
            role: {k: overwritten(v, lies[role], at) if role in lies else v for at, (k, v) in enumerate(part.items())}
            for role, part in roles.items()
        }
        result_ = LoraResult(sent["factors"], sent["saved"], assignment.base, digest, scores=sent["scores"])
        return ClientUpdate(name, number, 10, result_)

    return reply


def run_way(
    chosen: Way, replies: Mapping[str, Script], *, count: int = 1, start: Any = None, watch: Any = None, **options: Any
) -> list[RoundResult]:
    pruned = chosen.blueprint.pruning is not None
    context = RoundContext(
        method=chosen.method,
        settings=chosen.settings,
        planner=Fixed(
            lambda name: (2, TRAINING),
            alpha="2r",
            rslora=False,
            ratio=lambda name: 0.5 if pruned else 0.0,
            ranking=not pruned,
        ),
        transport=Scripted(replies),
        schedule=Schedule(count=count, **options.pop("schedule", {})),
        blueprint=chosen.blueprint,
        base="base",
        watch=watch or (lambda event: None),
        **options,
    )
    return list(run(context, start=start))


def moved(state: Any, bits: Patterns, largest: float) -> Any:
    """Return a state of which every float32 tensor holds such numbers, up to what can be sent."""
    values = {
        path: {
            name: np.clip(overwritten(a, bits, at), -largest, largest) if a.dtype == np.float32 else a
            for at, (name, a) in enumerate(v.items())
        }
        for path, v in persisted_fields(state)
        if isinstance(v, Mapping) and v and all(isinstance(part, np.ndarray) for part in v.values())
    }
    return with_values(state, values)


def assert_finite(state: Any) -> None:
    for path, value in persisted_fields(state):
        if isinstance(value, Mapping):
            assert all(np.isfinite(part).all() for part in value.values()), path


def bits(value: float) -> Patterns:
    return [np.float32(value).view(np.uint32).item()]


SPECIAL = [bits(x)[0] for x in (0.0, -0.0, 1.0, 1e-45, 1e15, 1e19, 1e30, 3.4028235e38, np.inf)]
BITS = st.lists(st.sampled_from(SPECIAL) | st.integers(0, 2**32 - 1), min_size=1, max_size=4)
ROLES = st.dictionaries(st.sampled_from(["factors", "saved", "scores", "scalars"]), BITS, min_size=1)
FINITE = st.lists(st.floats(-(2.0**50), 2.0**50, width=32).map(lambda x: bits(x)[0]), min_size=1, max_size=4)
ATTACKS = given(st.lists(ROLES, min_size=1, max_size=3), st.integers(0, 2**32 - 1), st.none() | FINITE, st.booleans())


@pytest.mark.parametrize(
    "name", [*METHODS, "fedit-fp16", "ffa-fast", "zeropad-fedadam", "fedit-clip", "flora-pruned", "flora-svt"]
)
@settings(max_examples=4, deadline=None)
@ATTACKS
def test_any_update_on_any_state_is_refused_or_leaves_a_finite_state(
    name: str, lies: Sequence[Mapping[str, Patterns]], measured: int, start: Patterns | None, bounded: bool
) -> None:
    check_attacked(name, lies, measured, start, bounded=bounded)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=100, deadline=None)
@ATTACKS
def test_any_update_on_any_state_is_refused_or_leaves_a_finite_state_many_times(
    name: str, lies: Sequence[Mapping[str, Patterns]], measured: int, start: Patterns | None, bounded: bool
) -> None:
    check_attacked(name, lies, measured, start, bounded=bounded)


def check_attacked(
    name: str, lies: Sequence[Mapping[str, Patterns]], measured: int, start: Patterns | None, *, bounded: bool
) -> None:
    """Run two rounds with two honest clients and some liars, from the first state or one that holds such numbers."""
    chosen = WAYS[name]
    replies = {"ann": client(chosen.blueprint, {}), "bob": client(chosen.blueprint, {})}
    replies |= {f"liar{i}": client(chosen.blueprint, lie, measured) for i, lie in enumerate(lies)}
    first = chosen.method.init(chosen.blueprint, chosen.settings)
    state = first if start is None else moved(first, start, 100.0 if "fp16" in name else 2.0**50)
    try:
        results = run_way(chosen, replies, count=2, start=state, schedule={} if bounded else UNBOUNDED)
    except RoundError as error:
        # From a state that was drawn, or that liars have moved, it may be that no client can go on.
        assert start is not None or str(error).startswith("round 2: ")  # noqa: PT017
        return
    for result in results:
        assert_finite(result.state)
        assert result.outcomes.keys() == replies.keys()


UNBOUNDED = {field.name: None for field in fields(Schedule) if field.name in ("max_norm", "norm_cap")}
"""Without the bounds of admission, so that what is tested here is all that stands between an update and the state."""


def refused(result: RoundResult) -> Mapping[str, str]:
    """By client, the code of the refusal."""
    return {name: why.code for name, why in result.outcomes.items() if isinstance(why, Failure)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_head_that_only_the_servers_step_makes_infinite_costs_its_client_alone(name: str) -> None:
    chosen, fleet = WAYS[f"{name}-fast"], {who: client(PLAIN, {}) for who in ("ann", "bob", "cyd")}
    honest = run_way(chosen, fleet, schedule=UNBOUNDED)[0]
    attacked = run_way(chosen, fleet | {"eve": client(PLAIN, {"saved": bits(3e38)})}, schedule=UNBOUNDED)[0]
    assert refused(attacked) == {"eve": "NOT_AGGREGATED"}
    assert attacked.digest == honest.digest
    assert attacked.norms.keys() == fleet.keys()


@pytest.mark.parametrize("rule", ["fedadam", "fedyogi"])
def test_a_change_whose_square_leaves_float32_is_refused_before_it_is_in_the_optimizers_memory(rule: str) -> None:
    fleet = {"ann": client(PLAIN, {}), "eve": client(PLAIN, {"saved": bits(1e25)})}
    assert refused(run_way(WAYS[f"fedit-{rule}"], fleet, schedule=UNBOUNDED)[0]) == {"eve": "NOT_AGGREGATED"}


def factors_of(a: float, b: float) -> Script:
    """Return a client whose factors hold one number each."""

    def reply(assignment: Assignment) -> ClientUpdate:
        honest = client(PLAIN, {})(assignment)
        assert isinstance(honest, ClientUpdate)
        sides = {".a": a, ".b": b}
        plain = from_wire(honest.lora.tensors).items()
        lie = {key: np.full(value.shape, sides[key[-2:]], np.float32) for key, value in plain}
        return replace(honest, result=replace(honest.lora, tensors=to_wire(lie, assignment.lora.wire_dtype)))

    return reply


def test_of_two_who_are_harmless_alone_one_is_refused_and_the_honest_ones_stay() -> None:
    """Means of factors have cross terms: 1e30 x 1 and 1 x 1e30 are finite, and the product of their means is not."""
    fleet = {"ann": client(PLAIN, {}), "eve": factors_of(1e30, 1.0), "eva": factors_of(1.0, 1e30)}
    result = run_way(WAYS["fedit"], fleet, schedule=UNBOUNDED)[0]
    ((larger, code),) = refused(result).items()
    assert larger in ("eva", "eve")
    assert code == "NOT_AGGREGATED"
    others = {name: script for name, script in fleet.items() if name != larger}
    assert run_way(WAYS["fedit"], others, schedule=UNBOUNDED)[0].digest == result.digest


def test_what_only_the_wire_format_cannot_hold_is_refused_too() -> None:
    """Finite in float32, infinite in fp16: no client could train on it, in this round or after any resume."""
    chosen = way("fedit", wire_dtype="fp16", server_learning_rate=3.0)
    fleet = {"ann": client(PLAIN, {}), "eve": factors_of(6e4, 0.1)}
    result = run_way(chosen, fleet, count=2, schedule=UNBOUNDED)
    assert [refused(each) for each in result] == [{"eve": "NOT_AGGREGATED"}] * 2


def failing(error: Exception, culprits: set[str], *, together: bool = False) -> Way:
    """Return FedIT that raises while culprits are in the sum: any of them, or only all of them together."""
    honest = METHODS["flexlora"]

    def aggregate(state: Any, updates: Sequence[AdmittedUpdate]) -> Any:
        there = culprits & {update.client for update in updates}
        if there and (not together or there == culprits):
            raise error
        return honest.aggregate(state, updates)

    return Way(replace(honest, aggregate=aggregate), honest.settings())


@pytest.mark.parametrize(
    "error",
    [
        np.linalg.LinAlgError("SVD did not converge"),
        OverflowError("too large"),
        FloatingPointError("underflow"),
        ZeroDivisionError("division by zero"),
        ValueError("cannot convert float NaN to integer"),
        ShapeError("expected one (out, in)"),
        NotFiniteError("x.s: expected finite numbers"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("culprits", [{"bob"}, {"ann", "dan"}, {"ann", "bob", "cyd"}], ids=len)
def test_whatever_arithmetic_raises_costs_those_alone_without_whom_it_does_not(
    error: Exception, culprits: set[str]
) -> None:
    fleet, seen = {name: client(PLAIN, {}) for name in ("ann", "bob", "cyd", "dan")}, list[Any]()
    result = run_way(failing(error, culprits), fleet, watch=seen.append)[0]
    assert refused(result) == dict.fromkeys(sorted(culprits), "NOT_AGGREGATED")
    assert {
        e.outcome.client for e in seen if isinstance(e, ClientFinished) and isinstance(e.outcome, Failure)
    } == culprits
    assert str(error) in next(iter(why.reason for why in result.outcomes.values() if isinstance(why, Failure)))
    rest = {name: fleet[name] for name in fleet if name not in culprits}
    assert result.digest == run_way(failing(error, culprits), rest)[0].digest


def test_of_those_who_fail_only_together_the_largest_is_refused() -> None:
    fleet = {name: client(PLAIN, {}) for name in ("ann", "bob", "cyd", "dan")}
    norms = run_way(WAYS["flexlora"], fleet)[0].norms
    assert norms["bob"] < norms["cyd"]  # not the first by name
    result = run_way(failing(ValueError("x"), {"bob", "cyd"}, together=True), fleet)[0]
    assert refused(result) == {"cyd": "NOT_AGGREGATED"}


def test_a_round_that_no_refusal_mends_is_final_and_says_what_was_tried() -> None:
    fleet = {name: client(PLAIN, {}) for name in ("ann", "bob")}
    with pytest.raises(RoundError, match=r"expected a finite state .*got no state; .*(ann, bob|bob, ann)") as error:
        run_way(failing(ValueError("no state"), set(fleet)), fleet)
    assert error.value.final


def test_min_clients_is_checked_again_and_names_who_was_refused() -> None:
    fleet = {name: client(PLAIN, {}) for name in ("ann", "bob", "cyd")}
    with pytest.raises(RoundError, match=r"at least 3 .*got 2 of 3: bob refused: expected an update with which"):
        run_way(failing(ValueError("x"), {"bob"}), fleet, schedule={"min_clients": 3})


def test_memory_that_runs_out_is_no_clients_fault() -> None:
    fleet = {name: client(PLAIN, {}) for name in ("ann", "bob")}
    with pytest.raises(RoundError, match=r"expected room to aggregate 2 updates; memory ran out; .*resume") as error:
        run_way(failing(MemoryError(), {"bob"}), fleet)
    assert not error.value.final


def test_a_fault_of_the_method_itself_is_not_blamed_on_a_client() -> None:
    with pytest.raises(TypeError, match="a fault of the method"):
        run_way(failing(TypeError("a fault of the method"), {"bob"}), {n: client(PLAIN, {}) for n in ("ann", "bob")})


@pytest.mark.parametrize("closed", [True, False])
def test_a_resume_refuses_the_same_updates_and_comes_out_the_same(closed: bool) -> None:
    chosen, fleet, noted = WAYS["fedit"], {n: client(PLAIN, {}) for n in ("ann", "bob")}, Noted()
    fleet |= {"eve": factors_of(1e30, 1.0), "eva": factors_of(1.0, 1e30)}
    whole = run_way(chosen, fleet, schedule=UNBOUNDED, journal=noted)[0]
    updates = {name: noted.noted[name] for name in fleet}
    interrupted = InterruptedRound(dict.fromkeys(fleet, 10), noted.noted["digests"], updates, {} if closed else None)
    again = run_way(chosen, dict.fromkeys(fleet, never), schedule=UNBOUNDED, journal=Noted(interrupted))[0]
    assert (again.digest, again.outcomes, again.norms) == (whole.digest, whole.outcomes, whole.norms)
    assert refused(again)


def test_a_robust_rule_names_the_clients_whose_change_it_cuts_as_the_round_ends() -> None:
    chosen = way("fedit", robust=RobustRule("clip", bound=10.0))
    seen: list[Any] = []
    run_way(chosen, {"ann": client(PLAIN, {}), "eve": factors_of(50.0, 1.0)}, schedule=UNBOUNDED, watch=seen.append)
    notes = [event.text for event in seen if isinstance(event, Note)]
    assert len(notes) == 1
    assert notes[0].startswith("round 1: clipped to a norm of 10: eve (")
