from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import RoundError
from fedtune.lora import lowrank
from fedtune.lora.adapter import Factors, delta, unpack
from fedtune.messages import (
    AdmittedUpdate,
    Blueprint,
    ClientUpdate,
    LoraResult,
    Plan,
    PlannedClient,
    Training,
    Upload,
    cohort_weights,
)
from fedtune.methods import pruning
from fedtune.methods import serialization as states
from fedtune.methods.flora import METHOD, FloraState
from fedtune.pruning.ranking import PruningSettings, rank_units, structure_at
from fedtune.pruning.structure import (
    Block,
    BlockLayout,
    BlockStructure,
    ModelStructure,
    bitmap,
    cuts,
    from_bitmap,
    linear_shapes,
    shapes,
    slice_factors,
)
from fedtune.tensors import Array, cast

ANATOMY = BlockLayout("llama", tuple(Block(f"model.layers.{i}", 4, 2, 2, 16) for i in range(2)), width=6)
MODULES = dict(zip(ANATOMY.sides, linear_shapes(ANATOMY), strict=True))
SETTINGS = PruningSettings(multiple=2, target=0.5)
TRAINING = Training(batch=1, learning_rate=1.0, steps=1)
EXAMPLES = {"ann": 3, "bob": 1, "cyd": 2}


def worth(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"heads": rng.random(8).astype(np.float32), "channels": rng.random(32).astype(np.float32)}


def first(**changes: Any) -> FloraState:
    """The first state over an order that the recipe brought along."""
    pruned = replace(SETTINGS, **changes.pop("pruning", {}))
    blueprint = Blueprint(
        modules=MODULES,
        saved={},
        max_rank=4,
        seed=0,
        anatomy=ANATOMY,
        pruning=pruned,
        ranking=changes.pop("order", worth()),
    )
    return METHOD.init(blueprint, METHOD.settings(**{"wire_dtype": "fp32", "coverage": "zero"} | changes))


def plan(client: str, ratio: float, rank: int = 2) -> Plan:
    return Plan(client, rank=rank, scale=2.0, training=TRAINING, ratio=ratio)


def update(state: FloraState, asked: Plan, seed: int = 0) -> AdmittedUpdate:
    """What a client sends whose factors moved at random, and what an admission found it to be."""
    order = METHOD.assign(state, 0, PlannedClient(asked))
    assert order.lora.pruning is not None
    keep = from_bitmap(order.lora.pruning.stages[-1], ANATOMY) if order.lora.pruning.stages else None
    rng = np.random.default_rng([seed, *asked.client.encode()])
    tensors = {}
    for name, shape in MODULES.items():
        m, n = shape if keep is None else slice_factors(zeros(shape), cuts(keep, ANATOMY)[name]).shape
        tensors[f"{name}.a"] = rng.standard_normal((asked.rank, n)).astype(np.float32)
        tensors[f"{name}.b"] = rng.standard_normal((m, asked.rank)).astype(np.float32)
    result = LoraResult(tensors, structure_digest=keep.digest if keep else b"")
    sent = ClientUpdate(asked.client, state.round + 1, EXAMPLES[asked.client], result)
    # Whole factors elsewhere, so that a sum can be held against them.
    upload: Upload = "difference" if state.settings.mode == "continue" else "factors"
    return AdmittedUpdate(sent, keep, asked.ratio, upload=upload)


def with_result(update: AdmittedUpdate, **changes: Any) -> AdmittedUpdate:
    return replace(update, update=replace(update.update, result=replace(update.lora, **changes)))


def zeros(shape: tuple[int, int]) -> Factors:
    return Factors(a=np.zeros((1, shape[1])), b=np.zeros((shape[0], 1)))


def scattered(factors: Factors, keep: ModelStructure | None, name: str) -> Array:
    """A pruned change in the base's coordinates, dense, in float64: the reference."""
    dense = np.zeros(MODULES[name])
    if keep is None:
        return delta(factors)
    cut = cuts(keep, ANATOMY)[name]
    out = range(dense.shape[0]) if cut.out is None else cut.out.tolist()
    into = range(dense.shape[1]) if cut.into is None else cut.into.tolist()
    dense[np.ix_(list(out), list(into))] = delta(factors)
    return dense


@settings(max_examples=30, deadline=None)
@given(
    ratios=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=3, max_size=3),
    ranks=st.lists(st.sampled_from([1, 2, 4]), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_the_stack_of_scattered_factors_is_the_dense_sum(ratios: list[float], ranks: list[int], seed: int) -> None:
    state = first(mode="reinit")
    updates = [
        update(state, plan(name, ratio, rank), seed) for name, ratio, rank in zip(EXAMPLES, ratios, ranks, strict=True)
    ]
    after = METHOD.aggregate(state, updates)
    for name in MODULES:
        exact = sum(
            share * scattered(unpack(each.lora.tensors)[name], each.structure, name)
            for each, share in cohort_weights(updates, "examples")
        )
        found = delta(lowrank.unpack(after.delta)[name].factors)
        np.testing.assert_allclose(found, exact, atol=1e-6 * max(1.0, float(np.abs(exact).max())))


@settings(max_examples=20, deadline=None)
@given(ratios=st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_training_on_adds_what_each_pruned_client_changed(ratios: list[float], seed: int) -> None:
    state = first(mode="continue", state_max_rank="exact")
    for number in range(2):
        updates = [
            update(state, plan(name, ratio), seed + number) for name, ratio in zip(EXAMPLES, ratios, strict=True)
        ]
        after = METHOD.aggregate(state, updates)
        total = {name: delta(low.factors) for name, low in lowrank.unpack(state.delta).items()}
        for each, share in cohort_weights(updates, "examples"):
            sent = METHOD.assign(state, 0, PlannedClient(plan(each.client, each.ratio)))
            start = started(sent, each.structure)
            for name, moved in unpack(each.lora.tensors).items():
                before = start[name]
                end = Factors(a=before.a + moved.a, b=before.b + moved.b)
                change = scattered(end, each.structure, name) - scattered(before, each.structure, name)
                total[name] = total[name] + share * change
        for name, low in lowrank.unpack(after.delta).items():
            np.testing.assert_allclose(delta(low.factors), total[name], atol=2e-5 * float(np.abs(total[name]).max()))
        state = after


def started(order: Any, keep: ModelStructure | None) -> dict[str, Factors]:
    """Where a client's factors start, in its own coordinates and with the scale in b, as it makes them itself."""
    from fedtune.model.lora import start
    from fedtune.model.pruned_training import slice_task, slices_of, structures_of

    parts = structures_of(order.lora.pruning, ANATOMY)
    own = start(slice_task(order.lora, keep, parts.sent, ANATOMY), order.plan, MODULES, slices_of(keep, ANATOMY))
    return {name: Factors(a=f.a, b=f.b * np.float32(order.plan.scale)) for name, f in own.items()}


@pytest.mark.parametrize("mode", ["reinit", "svt", "continue"])
@pytest.mark.parametrize("coverage", ["normalised", "zero"])
def test_clients_that_keep_everything_are_plain_flora_to_the_bit(mode: str, coverage: str) -> None:
    pruned = first(mode=mode, coverage=coverage)
    plain = replace(pruned, anatomy=None, pruning=None, order={})
    for number in range(2):
        updates = [update(pruned, plan(name, 0.0), number) for name in EXAMPLES]
        pruned, plain = METHOD.aggregate(pruned, updates), METHOD.aggregate(plain, updates)
        for key, array in plain.delta.items():
            np.testing.assert_array_equal(pruned.delta[key], array)


def test_equal_masks_are_the_same_with_and_without_coverage() -> None:
    with_it, without = (first(mode="reinit", coverage=kind) for kind in ("normalised", "zero"))
    updates = [update(with_it, plan(name, 0.5)) for name in EXAMPLES]
    one, other = METHOD.aggregate(with_it, updates), METHOD.aggregate(without, updates)
    for key, array in one.delta.items():
        np.testing.assert_array_equal(other.delta[key], array)


def test_coverage_by_hand() -> None:
    """Two clients of 3 and 1 examples; rows kept by the first alone move 3/4 of the way, or all of it."""
    small = BlockLayout("bert", (Block("x", 2, 2, 1, 2),), width=2)
    wide = ModelStructure((BlockStructure((0, 1), (0, 1), (0, 1)),))
    narrow = ModelStructure((BlockStructure((0, 1), (0, 1), (0,)),))
    name = "x.intermediate.dense"
    low = {f"{name}.a": np.array([[1.0, 0.0]]), f"{name}.b": np.array([[2.0]])}
    high = {f"{name}.a": np.array([[0.0, 2.0]]), f"{name}.b": np.array([[1.0], [4.0]])}
    cohort = cohort_weights(
        [
            AdmittedUpdate(ClientUpdate("1", 1, 3, LoraResult(low)), narrow),
            AdmittedUpdate(ClientUpdate("2", 1, 1, LoraResult(high)), wide),
        ],
        "examples",
    )

    def total(floor: float | None) -> list[list[float]]:
        scale = {} if floor is None else pruning.coverage(cohort, [name], small, weights="examples", floor=floor)
        dense = np.zeros((2, 2))
        for each, share in cohort:
            f = unpack(each.lora.tensors)[name]
            b = np.zeros((2, 1))
            b[list(each.structure.blocks[0].ff if each.structure else ())] = f.b
            dense += share * delta(pruning.scale_by_coverage({name: Factors(a=f.a, b=b)}, scale)[name])
        return dense.tolist()

    assert total(None) == [[1.5, 0.5], [0.0, 2.0]]
    assert total(0.2) == [[1.5, 0.5], [0.0, 8.0]]
    assert total(0.5) == [[1.5, 0.5], [0.0, 4.0]]


def test_coverage_counts_rows_among_the_clients_that_have_trained_the_layer() -> None:
    """Of eight examples, four have the layer, of which one has its second row too: shares of 1/2 and 1/8."""
    small = BlockLayout("bert", (Block("x", 2, 2, 1, 2),), width=2)
    wide = ModelStructure((BlockStructure((0, 1), (0, 1), (0, 1)),))
    narrow = ModelStructure((BlockStructure((0, 1), (0, 1), (0,)),))
    name, other, head = "x.intermediate.dense", "x.output.dense", "classifier"

    def sent(client: str, examples: int, structure: ModelStructure | None, *names: str) -> AdmittedUpdate:
        tensors = {f"{one}.{side}": np.ones((1, 1), np.float32) for one in names for side in "ab"}
        return AdmittedUpdate(ClientUpdate(client, 1, examples, LoraResult(tensors)), structure)

    updates = [sent("1", 3, narrow, name, other), sent("2", 1, wide, name, other, head), sent("3", 4, None, other)]
    cohort = cohort_weights(updates, "examples")
    scales = pruning.coverage(cohort, [name, other, head, "unseen"], small, weights="examples", floor=0.2)
    assert scales.keys() == {name, other, head}
    assert np.allclose(np.asarray(scales[name].out), [2.0, 5.0])  # of 1/8 the floor is left
    assert np.allclose(np.asarray(scales[other].into), [1.0, 8 / 5])
    assert (scales[name].into, scales[name].whole, scales[other].out) == (None, 1.0, None)
    assert scales[head].whole == 5.0
    exact = pruning.coverage(cohort, [name, head], small, weights="examples", floor=0.01)
    assert np.allclose(np.asarray(exact[name].out), [2.0, 8.0])
    assert exact[head].whole == 8.0


LLAMA = ANATOMY
GPT2 = BlockLayout("gpt2", tuple(Block(f"h.{i}", 4, 4, 2, 16) for i in range(2)), width=8)


def random_keep(anatomy: BlockLayout, rng: np.random.Generator) -> ModelStructure:
    blocks = []
    for block in anatomy.blocks:
        kv = sorted(rng.permutation(block.kv_heads)[: rng.integers(1, block.kv_heads + 1)].tolist())
        each = int(rng.integers(1, block.group + 1))
        q = [h * block.group + i for h in kv for i in sorted(rng.permutation(block.group)[:each].tolist())]
        ff = sorted(rng.permutation(block.channels)[: rng.integers(1, block.channels)].tolist())
        blocks.append(BlockStructure(tuple(q), tuple(kv), tuple(ff)))
    return ModelStructure(tuple(blocks))


@pytest.mark.parametrize("anatomy", [LLAMA, GPT2], ids=["gqa", "gpt2"])
@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("seed", range(3))
def test_coverage_in_a_round_is_the_dense_reference(anatomy: BlockLayout, weights: str, seed: int) -> None:
    """D_out (sum of p_k times the scattered changes) D_in in float64, D = 1 / max(c, .2), by what each client kept."""
    rng, modules = np.random.default_rng(seed), dict(zip(anatomy.sides, linear_shapes(anatomy), strict=True))
    blueprint = Blueprint(
        modules, saved={}, max_rank=4, seed=0, anatomy=anatomy, pruning=PruningSettings(policy="local", multiple=1)
    )
    state = METHOD.init(blueprint, METHOD.settings(wire_dtype="fp32", mode="reinit", weights=weights))
    updates, sizes = [], {"ann": 3, "bob": 1, "cyd": 2}
    for name, examples in sizes.items():
        keep, tensors = random_keep(anatomy, rng), {}
        for layer, (m, n) in shapes(modules, cuts(keep, anatomy)).items():
            tensors[f"{layer}.a"] = rng.standard_normal((2, n)).astype(np.float32)
            tensors[f"{layer}.b"] = rng.standard_normal((m, 2)).astype(np.float32)
        sent = ClientUpdate(name, 1, examples, LoraResult(tensors, structure_digest=keep.digest))
        updates.append(AdmittedUpdate(sent, keep))
    after = METHOD.aggregate(state, updates)
    shares = sizes if weights == "examples" else dict.fromkeys(sizes, 1)
    for layer, (m, n) in modules.items():
        total, rows_held, columns_held = np.zeros((m, n)), np.zeros(m), np.zeros(n)
        for each in updates:
            assert each.structure is not None
            cut, share = cuts(each.structure, anatomy)[layer], shares[each.client] / sum(shares.values())
            out = np.arange(m) if cut.out is None else cut.out
            into = np.arange(n) if cut.into is None else cut.into
            total[np.ix_(out, into)] += share * delta(unpack(each.lora.tensors)[layer])
            rows_held[out] += share
            columns_held[into] += share
        by = [np.where(held > 0, 1 / np.maximum(held, 0.2), 1.0) for held in (rows_held, columns_held)]
        expected = by[0][:, None] * total * by[1]
        found = delta(lowrank.unpack(after.delta)[layer].factors)
        np.testing.assert_allclose(found, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


def test_a_ranking_that_was_brought_along_holds_and_nobody_is_asked_for_scores() -> None:
    state = first(pruning={"ranking": "private/pruning.json"})
    order = METHOD.assign(state, 0, PlannedClient(plan("ann", 0.5)))
    assert order.lora.pruning is not None
    assert not order.lora.pruning.scores_requested
    assert order.lora.pruning.settings.ranking is None  # a path of the server's machine does not travel
    again = first(pruning={"refresh": 2})
    wanted = [
        METHOD.assign(replace(again, round=done), 0, PlannedClient(plan("ann", 0.5))).lora.pruning for done in range(3)
    ]
    assert [each.scores_requested for each in wanted if each is not None] == [False, True, True]


def test_what_nobody_holds_keeps_its_place_in_a_ranking_that_was_brought_along() -> None:
    state = first()
    sent = update(state, plan("ann", 0.5))
    assert sent.structure is not None
    sizes = {
        "heads": sum(len(b.q) for b in sent.structure.blocks),
        "channels": sum(len(b.ff) for b in sent.structure.blocks),
    }
    scores = {key: np.ones(size, np.float16) for key, size in sizes.items()}
    after = METHOD.aggregate(state, [with_result(sent, scores=scores)])
    held = np.isin(np.arange(16), sent.structure.blocks[0].ff)
    np.testing.assert_array_equal(after.order["channels"][:16][~held], state.order["channels"][:16][~held])


def test_first_contact_is_in_the_structure_that_fits() -> None:
    state = first()
    small = METHOD.assign(state, 0, PlannedClient(plan("new", 0.75), first_ratio=0.5)).lora.pruning
    assert small is not None
    assert small.previous == bitmap(state.structure(0.5), ANATOMY)  # type: ignore[arg-type]
    known = METHOD.assign(
        replace(state, ratios={"new": 0.25}), 0, PlannedClient(plan("new", 0.75), first_ratio=0.5)
    ).lora.pruning
    assert known is not None
    assert known.previous == bitmap(state.structure(0.25), ANATOMY)  # type: ignore[arg-type]


def test_the_order_of_arrival_changes_nothing() -> None:
    state = first()
    updates = [update(state, plan(name, ratio)) for name, ratio in zip(EXAMPLES, (0.0, 0.5, 0.75), strict=True)]
    one, other = METHOD.aggregate(state, updates), METHOD.aggregate(state, updates[::-1])
    assert all(np.array_equal(one.delta[key], other.delta[key]) for key in one.delta)
    assert one.ratios == other.ratios == {"ann": 0.0, "bob": 0.5, "cyd": 0.75}


def test_what_goes_down_is_a_slice_of_what_others_get() -> None:
    state = first(mode="svt", tau=1.0)
    state = METHOD.aggregate(state, [update(state, plan(name, 0.0)) for name in EXAMPLES])
    whole, half = (METHOD.assign(state, 0, PlannedClient(plan("dan", ratio))) for ratio in (0.0, 0.5))
    assert half.lora.pruning is not None
    # Its last participation was none, so it is sent the whole model, in which it measures the loss before.
    assert half.lora.pruning.previous == b""
    assert half.lora.blobs["global"].keys() == whole.lora.blobs["global"].keys()
    state = replace(state, ratios={"dan": 0.25})
    half = METHOD.assign(state, 0, PlannedClient(plan("dan", 0.5)))
    assert half.lora.pruning is not None
    larger = from_bitmap(half.lora.pruning.previous, ANATOMY)
    for name, factors in dense(half.lora.blobs["global"]).items():
        cut = cuts(larger, ANATOMY)[name]
        wide = dense(whole.lora.blobs["global"])[name]
        wide = wide if cut.out is None else wide[cut.out]
        np.testing.assert_allclose(factors, wide if cut.into is None else wide[:, cut.into], atol=1e-5)


def dense(blob: Any) -> dict[str, Array]:
    found = {key.removesuffix(".w"): array for key, array in blob.items() if key.endswith(".w")}
    rest = unpack({key: array for key, array in blob.items() if not key.endswith(".w")})
    return found | {name: delta(factors) for name, factors in rest.items()}


def test_nobody_is_pruned_before_there_is_an_order() -> None:
    state = first(order={})
    assert METHOD.assign(state, 0, PlannedClient(plan("ann", 0.0))).lora.pruning is not None
    with pytest.raises(RoundError, match="expected an order of heads and channels before ann is pruned"):
        METHOD.assign(state, 0, PlannedClient(plan("ann", 0.5)))


@pytest.mark.parametrize(("refresh", "last"), [(2, 5), (0, 1)])
def test_scores_are_asked_for_at_first_and_every_so_many_rounds(refresh: int, last: int) -> None:
    state = first(order={}, pruning={"refresh": refresh}, mode="reinit")
    wanted = []
    for number in range(5):
        asked = [plan(name, 0.0 if number == 0 else 0.5) for name in EXAMPLES]
        order = METHOD.assign(state, 0, PlannedClient(asked[0]))
        assert order.lora.pruning is not None
        wanted.append(order.lora.pruning.scores_requested)
        updates = [update(state, each) for each in asked]
        if order.lora.pruning.scores_requested:
            updates = [with_result(each, scores=cast(scored(each.structure, number), "fp16")) for each in updates]
        state = METHOD.aggregate(state, updates)
    assert wanted == [True, False, refresh == 2, False, refresh == 2]
    assert state.scored == last


def scored(keep: ModelStructure | None, seed: int) -> dict[str, Array]:
    from fedtune.pruning.ranking import at_structure

    return dict(at_structure(worth(seed), keep, ANATOMY))


def test_votes_make_an_order_and_local_masks_none() -> None:
    voting = first(order={}, pruning={"policy": "vote"}, mode="reinit")
    order = rank_units(worth(5), ANATOMY, voting.pruning or SETTINGS)
    mask = bitmap(structure_at(order, ANATOMY, SETTINGS, 0.5), ANATOMY)
    updates = [with_result(update(voting, plan(name, 0.0)), mask=mask) for name in EXAMPLES]
    after = METHOD.aggregate(voting, updates)
    found = after.structure(0.5)
    assert found is not None
    assert bitmap(found, ANATOMY) == mask
    own = first(order={}, pruning={"policy": "local"}, mode="reinit")
    assert (
        METHOD.assign(own, 0, PlannedClient(plan("ann", 0.5))).lora.pruning
        == pruning.pruning_task(own, PlannedClient(plan("ann", 0.5)))[0]
    )
    assert METHOD.aggregate(own, updates).order == {}


def test_a_state_with_an_order_is_written_and_read() -> None:
    from fedtune.methods import serialization as states

    state = first(mode="reinit")
    scores = cast(scored(state.structure(0.5), 1), "fp16")
    updates = [with_result(update(state, plan(name, 0.5)), scores=scores) for name in EXAMPLES]
    after = METHOD.aggregate(state, updates)
    again = states.decode(b"".join(states.encode(after)), state)
    assert again.ratios == after.ratios
    assert again.scored == after.scored == 1
    assert all(np.array_equal(again.order[key], after.order[key]) for key in after.order)
    assert again.structure(0.5) == after.structure(0.5)


TWO = {"repair": "none", "adapters": "two"}


def test_a_ranking_is_not_renewed_in_a_round_of_the_repair_adapter() -> None:
    """What such a round teaches would be lost with the old ranking, and its clients hold no whole model to measure."""
    settings = TWO | {"repair": "bias", "refresh": 3}
    state = replace(first(pruning=settings), scored=1, round=3)
    for ratio in (0.5, 0.75):
        asked = pruning.pruning_task(state, PlannedClient(plan("ann", ratio)))[0]
        assert asked is not None
        assert not asked.scores_requested
    later = pruning.pruning_task(replace(state, round=4), PlannedClient(plan("ann", 0.0)))[0]
    assert later is not None
    assert later.scores_requested
    assert later.moments_requested


def of_view(state: FloraState, client: str, seed: int = 0, *, rank: int = 2, view: Any = "deployed") -> AdmittedUpdate:
    asked = replace(plan(client, 0.5, rank), view=view)
    return replace(update(state, asked, seed), view=view)


def dense_of(adapter: Any) -> dict[str, Array]:
    return {name: delta(factors) for name, factors in adapter.items()}


@pytest.mark.parametrize("mode", ["reinit", "continue"])
def test_the_repair_adapter_is_summed_exactly_and_never_enters_the_whole_model(mode: str) -> None:
    """In a mixed round each adapter is, bit for bit, what its own clients alone would have made of it."""
    state = first(pruning=TWO, mode=mode, state_max_rank="exact")
    state = METHOD.aggregate(state, [update(state, plan("ann", 0.0))])
    before = METHOD.adapter(state)
    own = [of_view(state, "ann"), of_view(state, "cyd", rank=3)]
    after = METHOD.aggregate(state, own)
    assert states.digest(states.encode(replace(after, second={}, second_structure={}, round=1, ratios={}))) == (
        states.digest(states.encode(replace(state, round=1, ratios={})))
    )
    second, structure = METHOD.second(after)
    assert structure == state.structure(0.5).digest  # type: ignore[union-attr]
    if mode == "reinit":
        for name, change in dense_of(second).items():
            parts = [
                (scattered(one, u.structure, name), share)
                for u, share in cohort_weights(own, "examples")
                for one in [Factors(a=u.lora.tensors[f"{name}.a"], b=u.lora.tensors[f"{name}.b"])]
            ]
            np.testing.assert_allclose(change, sum(share * part for part, share in parts), atol=1e-4)
    mixed = METHOD.aggregate(state, [update(state, plan("bob", 0.25)), *own])
    alone = METHOD.aggregate(state, [update(state, plan("bob", 0.25))])
    assert {k: v.tobytes() for k, v in mixed.delta.items()} == {k: v.tobytes() for k, v in alone.delta.items()}
    assert {k: v.tobytes() for k, v in mixed.second.items()} == {k: v.tobytes() for k, v in after.second.items()}
    for name, factors in METHOD.adapter(after).items():
        np.testing.assert_array_equal(delta(factors), delta(before[name]))


def test_clients_of_the_deployed_view_train_on_from_the_repair_adapter_beside_the_frozen_change() -> None:
    state = first(pruning=TWO, mode="continue", state_max_rank="exact")
    state = METHOD.aggregate(state, [update(state, plan("ann", 0.0), 1)])
    order = METHOD.assign(state, 0, PlannedClient(replace(plan("bob", 0.5), view="deployed")))
    keep = state.structure(0.5)
    assert keep is not None
    assert "local" not in order.lora.blobs or not any(array.any() for array in order.lora.blobs["local"].values())
    state = METHOD.aggregate(state, [of_view(state, "ann", 2)])
    order = METHOD.assign(state, 0, PlannedClient(replace(plan("bob", 0.5), view="deployed")))
    assert order.lora.pruning is not None
    assert from_bitmap(order.lora.pruning.previous, ANATOMY) == keep
    cut = cuts(keep, ANATOMY)
    model = METHOD.global_model(state)
    for name, factors in model.at(keep).items():
        sent = sum(
            dense(order.lora.blobs.get(role, {})).get(name, np.zeros(delta(slice_factors(factors, cut[name])).shape))
            for role in ("global", "local")
        )
        np.testing.assert_allclose(sent, delta(slice_factors(factors, cut[name])), atol=1e-4)
    # The whole model, and any other structure, have the first adapter alone.
    for other in (None, state.structure(0.25)):
        assert model.at(other) is model.adapter
    whole = METHOD.assign(state, 0, PlannedClient(plan("bob", 0.0)))
    for name, change in dense_of(model.adapter).items():
        sent = sum(
            dense(whole.lora.blobs.get(role, {})).get(name, np.zeros(change.shape)) for role in ("global", "local")
        )
        np.testing.assert_allclose(sent, change, atol=1e-4)


def test_what_training_on_the_repair_adapter_has_changed_is_added_to_it() -> None:
    state = first(pruning=TWO, mode="continue", state_max_rank="exact")
    state = METHOD.aggregate(state, [of_view(state, "ann", 2)])
    before, sent = dense_of(METHOD.second(state)[0]), of_view(state, "bob", 3)
    after = dense_of(METHOD.second(METHOD.aggregate(state, [sent]))[0])
    local = state.repair.local_start(sent)
    keep = sent.structure
    for name in MODULES:
        start = Factors(a=local[f"{name}.a"], b=local[f"{name}.b"])
        end = Factors(a=start.a + sent.lora.tensors[f"{name}.a"], b=start.b + sent.lora.tensors[f"{name}.b"])
        wanted = before[name] + scattered(end, keep, name) - scattered(start, keep, name)
        np.testing.assert_allclose(after[name], wanted, atol=1e-3)


@pytest.mark.parametrize("bound", ["auto", 3])
def test_the_rank_of_the_repair_adapter_has_the_bound_of_the_state(bound: Any) -> None:
    state = first(pruning=TWO, state_max_rank=bound)
    for seed in range(4):
        state = METHOD.aggregate(state, [of_view(state, name, seed) for name in EXAMPLES])
    most = 4 if bound == "auto" else 3  # twice the clients' rank
    assert 0 < max(factors.rank for factors in METHOD.second(state)[0].values()) <= most


def test_a_state_with_a_repair_adapter_comes_back_and_a_new_ranking_starts_it_anew() -> None:
    state = first(pruning=TWO)
    plain = states.digest(states.encode(state))
    state = METHOD.aggregate(state, [of_view(state, "ann")])
    data = b"".join(states.encode(state))
    again = states.decode(data, first(pruning=TWO))
    assert states.digest(states.encode(again)) == states.digest(states.encode(state)) != plain
    assert METHOD.second(again)[1] == METHOD.second(state)[1] != b""
    swapped = replace(state, order=worth(7))
    assert swapped.structure(0.5) != state.structure(0.5)
    assert METHOD.second(swapped)[0] == {}
    assert METHOD.global_model(swapped).at(swapped.structure(0.5)) == METHOD.adapter(swapped)
    assert all(factors.rank == 0 for factors in (low.factors for low in swapped.repair.broadcast.values()))
