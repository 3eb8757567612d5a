"""A client's round on a pruned model, end to end over real messages: what it trains, sends, and leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest

from fedtune.client import perform as perform_module
from fedtune.data.encode import Example
from fedtune.errors import ClientError, ShapeError
from fedtune.messages import (
    OUT_OF_MEMORY,
    AdmittedUpdate,
    Assignment,
    Failure,
    Plan,
    PlannedClient,
    Training,
)
from fedtune.methods.flora import METHOD, FloraState
from fedtune.model import pruned_training
from fedtune.model import train as training_loop
from fedtune.model.base import Base, digest
from fedtune.model.lora import with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.repair import repair_of
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import cuts, from_bitmap, slice_adapter, sparsity
from fedtune.rounds.admission import admit
from fedtune.wire.codec import decode_assignment, decode_update, encode_assignment, encode_update
from tests.model.gating import with_gates

Loader = Callable[..., Base]
Rows = Callable[[int], list[Example]]

TRAINING = Training(batch=4, learning_rate=0.02, steps=6)
perform = partial(perform_module.perform, threads=1)


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, loaded: Loader) -> Base:
    return loaded(request.param, targets=["all-linear"])


def first(base: Base, **changes: Any) -> FloraState:
    settings = PruningSettings(**{"multiple": 8, "target": 0.5, "batches": 2} | changes)
    blueprint = replace(
        base.blueprint(max_rank=4, seed=0), anatomy=pruned_training.block_layout(base), pruning=settings
    )
    return METHOD.init(blueprint, METHOD.settings(wire_dtype="fp32"))


def asked(
    state: FloraState, base: Base, ratio: float, name: str = "ann", *, whole: bool = False, **training: Any
) -> Assignment:
    plan = Plan(name, rank=4, scale=2.0, training=replace(TRAINING, **training), ratio=ratio)
    return replace(METHOD.assign(state, 0, PlannedClient(plan, whole_requested=whole)), base=base.digest)


def answered(order: Assignment, base: Base, rows: list[Example], state: FloraState) -> AdmittedUpdate:
    """Go to the client and back as on a network, and through the admission."""
    sent = encode_assignment(order)
    update = perform(base, rows, decode_assignment(sent.header, sent.blobs))
    back = decode_update(encode_update(update), client=order.plan.client, limit_bytes=10**8)
    blueprint = replace(base.blueprint(max_rank=4, seed=0), anatomy=state.anatomy, pruning=state.pruning)
    outcome = admit(back, order, blueprint, num_examples=len(rows))
    assert isinstance(outcome, AdmittedUpdate), outcome
    return outcome


def test_a_pruned_round_follows_an_unpruned_one_and_leaves_the_base_as_it_was(base: Base, examples: Rows) -> None:
    rows, before = examples(12), digest(base.model)
    state = first(base)
    whole = answered(asked(state, base, 0.0), base, rows, state)
    assert whole.structure is None
    assert set(whole.lora.scores) == {"heads", "channels"}
    state = METHOD.aggregate(state, [whole])
    order = asked(state, base, 0.5)
    half = answered(order, base, rows, state)
    assert half.structure is not None
    assert state.anatomy is not None
    assert sparsity(half.structure, state.anatomy) == pytest.approx(0.5, abs=0.15)
    assert half.ratio == 0.5
    assert sum(t.size for t in half.lora.tensors.values()) < sum(t.size for t in whole.lora.tensors.values())
    measured = half.measured
    assert measured.importance is not None
    assert measured.importance > 0
    assert measured.side_tokens > 0
    assert measured.loss_before is not None
    assert measured.loss_after is not None
    after = METHOD.aggregate(state, [half])
    assert after.ratios == {"ann": 0.5}
    assert digest(base.model) == before


def test_pruned_training_goes_back_through_a_part_of_what_is_left(base: Base, examples: Rows) -> None:
    rows, state = examples(12), first(base, stages=2, steps_between=1)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    order = asked(state, base, 0.5)
    whole, part = (
        answered(replace(order, plan=replace(order.plan, back=back)), base, rows, state) for back in (0.0, 0.5)
    )
    assert part.structure == whole.structure
    assert part.measured.loss_before == whole.measured.loss_before
    # Measured after training, through the whole of what is left.
    assert {name: scores.shape for name, scores in part.lora.scores.items()} == {
        name: scores.shape for name, scores in whole.lora.scores.items()
    }
    differs = [name for name, t in part.lora.tensors.items() if not np.array_equal(t, whole.lora.tensors[name])]
    assert differs


def test_a_step_that_is_not_finite_is_left_out_of_pruned_training_and_of_its_importance(
    base: Base, examples: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, state = examples(12), first(base)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    backward, losses = training_loop.backward, list[float]()

    def overflowing(*args: Any) -> float:
        losses.append(backward(*args) * (math.nan if len(losses) == 1 else 1.0))
        return losses[-1]

    order = asked(state, base, 0.5)
    monkeypatch.setattr(training_loop, "backward", overflowing)
    measured = answered(order, base, rows, state).measured
    assert (len(losses), measured.skipped_steps) == (order.plan.training.steps, 1)
    assert measured.importance is not None
    assert math.isfinite(measured.importance)


def test_rows_that_overflow_are_left_out_of_the_losses_of_pruned_training(
    base: Base, examples: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in plain training: one text too many for a 16-bit base must not cost the client its round."""
    rows, state, real = examples(12), first(base), summed_loss
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    order, batches = asked(state, base, 0.5), list[Any]()

    def overflowing(model: Any, batch: Any, *, task: str) -> Any:
        batches.append(batch)
        return real(model, batch, task=task) * (math.inf if batch is batches[0] else 1.0)

    monkeypatch.setattr(pruned_training, "summed_loss", overflowing)
    measured = answered(order, base, rows, state).measured
    assert measured.loss_before is not None
    assert measured.loss_after is not None

    monkeypatch.setattr(pruned_training, "summed_loss", lambda *args, **named: real(*args, **named) * math.nan)
    with pytest.raises(ClientError, match="ann, before step 1: expected a finite loss; got nan"):
        perform(base, rows, order)


def test_no_copy_of_the_whole_model_is_held_beside_a_pruned_one(base: Base, examples: Rows) -> None:
    rows, state = examples(12), first(base)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    with with_adapters(base, frozen={name: np.ones(shape, np.float32) for name, shape in base.modules.items()}):
        pass
    pruning, layout = asked(state, base, 0.5).lora.pruning, state.anatomy
    assert pruning is not None
    assert layout is not None
    assert base.changed
    with pruned_training.with_pruned_model(base, from_bitmap(pruning.stages[-1], layout), layout):
        assert not base.changed


def test_the_loss_before_is_that_of_the_structure_of_the_last_participation(base: Base, examples: Rows) -> None:
    rows = examples(12)
    state = first(base)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    # Its last participation was with the whole model: pruning harder cannot make the loss before any higher.
    losses = {
        ratio: answered(asked(state, base, ratio), base, rows, state).measured.loss_before
        for ratio in (0.0, 0.25, 0.75)
    }
    assert losses[0.25] == losses[0.75] == losses[0.0]
    batch = pruned_training.evaluation_batches(rows, base, batch=4)
    with with_adapters(base, frozen=METHOD.adapter(state)) as model:
        assert losses[0.0] == pytest.approx(pruned_training.evaluation_loss(model, batch, base), rel=1e-4)


def test_a_pruned_client_trains_the_slice_of_the_global_model(base: Base, examples: Rows) -> None:
    """Nothing is learned at a learning rate of almost zero: before and after are the sliced model's loss."""
    rows = examples(12)
    state = first(base)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    state = replace(state, ratios={"ann": 0.5})
    update = answered(asked(state, base, 0.5, learning_rate=1e-12), base, rows, state)
    assert update.measured.loss_after == pytest.approx(update.measured.loss_before, rel=1e-5)
    keep, anatomy = update.structure, pruned_training.block_layout(base)
    assert keep is not None
    batch = pruned_training.evaluation_batches(rows, base, batch=4)
    with with_adapters(base, frozen=METHOD.adapter(state)) as model, with_gates(model, keep, anatomy):
        gated_loss = pruned_training.evaluation_loss(model, batch, base)
    assert update.measured.loss_before == pytest.approx(gated_loss, rel=1e-4)
    with pruned_training.with_pruned_model(base, keep, anatomy) as small:
        sliced = slice_adapter(METHOD.adapter(state), cuts(keep, anatomy))
        with with_adapters(small, frozen=sliced) as model:
            assert update.measured.loss_before == pytest.approx(
                pruned_training.evaluation_loss(model, batch, base), rel=1e-4
            )


def test_stages_end_in_the_structure_that_was_asked(base: Base, examples: Rows) -> None:
    rows = examples(12)
    state = first(base, stages=3, steps_between=2)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    order = asked(state, base, 0.5)
    assert order.lora.pruning is not None
    assert len(order.lora.pruning.stages) > 1
    update = answered(order, base, rows, state)
    assert state.anatomy is not None
    assert update.structure == from_bitmap(order.lora.pruning.stages[-1], state.anatomy)
    still = answered(asked(state, base, 0.5, learning_rate=1e-12), base, rows, state)
    largest = max(float(np.abs(t).max()) for t in still.lora.tensors.values())
    assert largest < 1e-8  # start and end are compared in the last structure's coordinates


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_short_round_reaches_its_last_stage_all_the_same(steps: int, base: Base, examples: Rows) -> None:
    rows = examples(12)
    state = first(base, stages=3, steps_between=20, multiple=1)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    order = asked(state, base, 0.5, steps=steps)
    assert order.lora.pruning is not None
    assert len(order.lora.pruning.stages) == 3
    update = answered(order, base, rows, state)
    assert state.anatomy is not None
    assert update.structure == from_bitmap(order.lora.pruning.stages[-1], state.anatomy)


@pytest.mark.parametrize("where", ["score_units", "evaluation_loss"])
def test_memory_that_runs_out_beside_training_is_told_as_such(
    where: str, loaded: Loader, examples: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    base = loaded("llama", targets=["all-linear"])
    order = asked(first(base), base, 0.0)
    monkeypatch.setattr(f"fedtune.model.pruned_training.{where}", full)
    with pytest.raises(ClientError, match=f"ann: expected its batch of 4 to fit; {OUT_OF_MEMORY}"):
        perform(base, examples(8), order)


def test_losses_are_taken_in_batches_that_training_has_room_for(loaded: Loader, examples: Rows) -> None:
    base = loaded("llama", targets=["all-linear"])
    rows = examples(20)
    small, large = (pruned_training.evaluation_batches(rows, base, batch=batch) for batch in (3, 20))
    assert [len(each.input_ids) for each in small] == [3, 3, 3, 3, 3, 3, 2]
    with with_adapters(base, frozen={}) as model:
        assert pruned_training.evaluation_loss(model, small, base) == pytest.approx(
            pruned_training.evaluation_loss(model, large, base)
        )


@pytest.mark.parametrize("score", ["wanda", "lora", "gate", "magnitude", "random"])
def test_every_criterion_scores_a_round(score: str, loaded: Loader, examples: Rows) -> None:
    base = loaded("llama", targets=["all-linear"])
    state = first(base, score=score)
    update = answered(asked(state, base, 0.0), base, examples(8), state)
    assert update.lora.scores["heads"].dtype == np.float16
    assert np.mean(update.lora.scores["heads"].astype(np.float64)) == pytest.approx(1.0, rel=1e-2)


def test_a_client_ranks_by_its_own_data(base: Base, examples: Rows) -> None:
    state = first(base, policy="local")
    update = answered(asked(state, base, 0.5), base, examples(12), state)
    assert update.structure is not None
    assert update.lora.mask
    assert not update.lora.scores
    assert METHOD.aggregate(state, [update]).ratios == {"ann": 0.5}


def test_a_vote_is_a_mask_at_the_target(base: Base, examples: Rows) -> None:
    state = first(base, policy="vote")
    update = answered(asked(state, base, 0.0), base, examples(12), state)
    assert update.structure is None
    assert update.lora.mask
    after = METHOD.aggregate(state, [update])
    anatomy = pruned_training.block_layout(base)
    assert after.structure(0.5) == from_bitmap(update.lora.mask, anatomy)


def test_bitmaps_of_another_base_and_empty_clients_are_refused(loaded: Loader, examples: Rows) -> None:
    base = loaded("llama", targets=["all-linear"])
    state = first(base)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, examples(8), state)])
    order = asked(state, base, 0.5)
    assert order.lora.pruning is not None
    bad = replace(order, task=replace(order.lora, pruning=replace(order.lora.pruning, stages=(b"\xff",))))
    with pytest.raises(ShapeError, match="structure: expected"):
        perform(base, examples(8), bad)
    with pytest.raises(ClientError, match="at least one training example"):
        perform(base, [], order)


def test_updates_in_another_structure_are_refused_alone_with_the_reason(loaded: Loader, examples: Rows) -> None:
    base = loaded("llama", targets=["all-linear"])
    state = first(base)
    rows = examples(8)
    blueprint = replace(base.blueprint(max_rank=4, seed=0), anatomy=state.anatomy, pruning=state.pruning)
    whole = perform(base, rows, asked(state, base, 0.0))
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    order = asked(state, base, 0.5)
    half = perform(base, rows, order)
    for update, said in (
        (replace(whole, round=2), "expected an update of a model pruned by 0.5"),
        (replace(half, result=replace(half.lora, structure_digest=bytes(32))), "to have the digest"),
        (replace(half, result=replace(half.lora, mask=b"\x01")), "expected no mask"),
        (replace(half, result=replace(half.lora, scores=whole.lora.scores)), "expected no scores"),
        (replace(half, result=replace(half.lora, tensors=whole.lora.tensors)), "expected shape"),
        (
            replace(
                half, result=replace(half.lora, tensors={**half.lora.tensors, "x.a": np.zeros((1, 1), np.float32)})
            ),
            "was not asked for",
        ),
    ):
        outcome = admit(update, order, blueprint, num_examples=len(rows))
        assert isinstance(outcome, Failure), said
        assert said in outcome.reason
    first_order = asked(first(base), base, 0.0)
    for scores, said in (
        ({**whole.lora.scores, "heads": whole.lora.scores["heads"][1:]}, "as kept"),
        ({"heads": whole.lora.scores["heads"]}, "is missing"),
        ({**whole.lora.scores, "heads": np.full_like(whole.lora.scores["heads"], np.nan)}, "finite numbers"),
        ({**whole.lora.scores, "heads": -whole.lora.scores["heads"]}, "none below 0"),
        ({name: part.astype(np.float32) for name, part in whole.lora.scores.items()}, "format fp16"),
        ({}, "expected scores; got none"),
    ):
        outcome = admit(
            replace(whole, result=replace(whole.lora, scores=scores)), first_order, blueprint, num_examples=len(rows)
        )
        assert isinstance(outcome, Failure), said
        assert said in outcome.reason


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("repair", ["least-squares", "bias"])
@pytest.mark.parametrize("stages", [1, 3])
def test_moments_go_up_with_the_scores_and_come_down_to_pruned_clients_alone(
    base: Base, examples: Rows, repair: Literal["least-squares", "bias"], stages: int
) -> None:
    """Over real messages and the admission; the base is as before, and a repaired start is nearer to the whole one."""
    rows, before = examples(12), digest(base.model)
    plain, state = first(base, stages=stages, steps_between=2), first(base, stages=stages, steps_between=2)
    assert state.pruning is not None
    state = replace(state, pruning=replace(state.pruning, repair=repair, repair_rank=64))
    order = asked(state, base, 0.0)
    assert order.lora.pruning is not None
    assert order.lora.pruning.moments_requested
    whole = answered(order, base, rows, state)
    state = METHOD.aggregate(state, [whole])
    plain = METHOD.aggregate(plain, [answered(asked(plain, base, 0.0), base, rows, plain)])
    assert plain.order.keys() == state.order.keys()
    assert state.moments.keys() == whole.lora.moments.keys()
    again = asked(state, base, 0.0)
    assert "moments" not in again.lora.blobs
    assert again.lora.pruning is not None
    assert not again.lora.pruning.moments_requested
    order = asked(replace(state, ratios={"ann": 0.5}), base, 0.5)
    assert order.lora.blobs["moments"].keys() == state.moments.keys()
    half = answered(order, base, rows, state)
    unrepaired = answered(asked(replace(plain, ratios={"ann": 0.5}), base, 0.5), base, rows, plain)
    losses = half.measured.loss_before, unrepaired.measured.loss_before
    assert losses[0] != losses[1]
    assert not half.lora.moments
    assert digest(base.model) == before


def test_moments_that_do_not_fit_end_the_round_of_a_client_with_a_reason(base: Base, examples: Rows) -> None:
    rows, state = examples(12), first(base, repair="least-squares", repair_rank=64)
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    order = asked(state, base, 0.5)
    name = sorted(order.lora.blobs["moments"])[0]
    moments = {**order.lora.blobs["moments"], name: order.lora.blobs["moments"][name][:3]}
    task = replace(order.lora, blobs={**order.lora.blobs, "moments": moments})
    with pytest.raises(ShapeError, match=r"moments, .*: expected .*, as this base is wide"):
        perform(base, rows, replace(order, task=task))


def test_the_repair_adapter_is_learned_in_the_deployed_model_and_the_whole_one_stays(
    base: Base, examples: Rows
) -> None:
    rows, before = examples(12), digest(base.model)
    state = first(base, repair="least-squares", repair_rank=64, adapters="two")
    state = METHOD.aggregate(state, [answered(asked(state, base, 0.0), base, rows, state)])
    batch, whole = pruned_training.evaluation_batches(rows, base, batch=4), METHOD.adapter(state)
    losses = []
    for _ in range(2):
        order = asked(state, base, 0.5)
        order = METHOD.assign(state, 0, PlannedClient(replace(order.plan, view="deployed")))
        update = answered(replace(order, base=base.digest), base, rows, state)
        assert update.view == "deployed"
        losses.append((update.measured.loss_before or math.nan, update.measured.loss_after or math.nan))
        state = METHOD.aggregate(state, [update])
    assert losses[1][0] == pytest.approx(losses[0][1], rel=2e-3)  # it goes on where it was
    assert losses[1][1] < losses[0][0]
    for name, factors in METHOD.adapter(state).items():
        np.testing.assert_array_equal(factors.a, whole[name].a)
        np.testing.assert_array_equal(factors.b, whole[name].b)
    model, keep, anatomy = METHOD.global_model(state), state.structure(0.5), state.anatomy
    assert keep is not None
    assert anatomy is not None
    assert state.pruning is not None
    repair = repair_of(base.model, model.moments, state.pruning, anatomy)
    with pruned_training.with_pruned_model(base, keep, anatomy, repair) as small:
        for adapter, close in ((model.at(keep), True), (model.adapter, False)):
            with with_adapters(small, frozen=slice_adapter(adapter, cuts(keep, anatomy))) as live:
                loss = pruned_training.evaluation_loss(live, batch, base)
            assert (loss == pytest.approx(losses[1][1], rel=2e-3)) == close
    assert digest(base.model) == before
