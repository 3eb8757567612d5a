from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ShapeError
from fedtune.pruning.ranking import (
    PruningSettings,
    at_structure,
    counts,
    mean_of,
    multiple_of,
    normalise,
    pool_scores,
    rank_units,
    stage_ratios,
    structure_at,
    to_base_coordinates,
    unit_of,
    votes,
    with_hysteresis,
)
from fedtune.pruning.structure import Block, BlockLayout, BlockStructure, ModelStructure, check, full_block, sparsity
from fedtune.tensors import Tensors

MHA = BlockLayout("bert", tuple(Block(f"encoder.layer.{i}", 4, 4, 2, 32) for i in range(3)), width=8)
GQA = BlockLayout("qwen2", tuple(Block(f"model.layers.{i}", 6, 2, 2, 32) for i in range(3)), width=8)
SETTINGS = PruningSettings(multiple=4)
RATIOS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def drawn(anatomy: BlockLayout, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        "heads": rng.random(sum(block.heads for block in anatomy.blocks)).astype(np.float32),
        "channels": rng.random(sum(block.channels for block in anatomy.blocks)).astype(np.float32),
    }


@given(
    anatomy=st.sampled_from([MHA, GQA]),
    seed=st.integers(0, 99),
    allocation=st.sampled_from(["global", "uniform"]),
    unit=st.sampled_from(["auto", "kv_group", "even_q"]),
)
def test_a_larger_ratio_keeps_a_part_of_what_a_smaller_one_keeps(
    anatomy: BlockLayout, seed: int, allocation: Any, unit: Any
) -> None:
    settings = replace(SETTINGS, allocation=allocation, unit=unit)
    order = rank_units(drawn(anatomy, seed), anatomy, settings)
    keeps = [check(structure_at(order, anatomy, settings, ratio), anatomy) for ratio in RATIOS]
    for larger, smaller in pairwise(keeps):
        for one, other in zip(larger.blocks, smaller.blocks, strict=True):
            assert set(other.q) <= set(one.q)
            assert set(other.kv) <= set(one.kv)
            assert set(other.ff) <= set(one.ff)
    assert keeps[0] == full_block(anatomy)
    assert all(len(one.ff) >= 4 and one.q for keep in keeps for one in keep.blocks)


@given(st.sampled_from([MHA, GQA]), st.integers(0, 99), st.sampled_from(RATIOS))
def test_counts_say_what_is_kept_before_anybody_knows_which(anatomy: BlockLayout, seed: int, ratio: float) -> None:
    keep = structure_at(rank_units(drawn(anatomy, seed), anatomy, SETTINGS), anatomy, SETTINGS, ratio)
    count = counts(anatomy, SETTINGS, ratio)
    assert tuple(len(one.ff) for one in keep.blocks) == count.channels
    per = 1 if anatomy is MHA else 2  # query heads of a unit: a head of either group
    assert sum(len(one.q) for one in keep.blocks) == per * count.total


def test_a_half_by_hand() -> None:
    one = BlockLayout("bert", MHA.blocks[:2], width=8)
    scores = {
        "heads": np.array([4, 1, 3, 2, 9, 8, 7, 0.5]),
        "channels": np.concatenate([np.arange(32), np.arange(32)[::-1]]),
    }
    keep = structure_at(rank_units(scores, one, SETTINGS), one, SETTINGS, 0.5)
    # The best head of each block stays first; the other two of four go by worth over both blocks: 8 and 7.
    assert [block.q for block in keep.blocks] == [(0,), (0, 1, 2)]
    assert [block.ff for block in keep.blocks] == [tuple(range(16, 32)), tuple(range(16))]
    uniform = replace(SETTINGS, allocation="uniform")
    assert [b.q for b in structure_at(rank_units(scores, one, uniform), one, uniform, 0.5).blocks] == [(0, 2), (0, 1)]
    assert sparsity(keep, one) == pytest.approx(0.5)


def test_the_weakest_query_head_of_every_group_goes_together() -> None:
    one = BlockLayout("qwen2", GQA.blocks[:1], width=8)
    assert unit_of(SETTINGS, one.blocks[0]) == "even_q"
    scores = {"heads": np.array([3, 1, 2, 5, 9, 4.0]), "channels": np.arange(32.0)}
    keep = structure_at(rank_units(scores, one, SETTINGS), one, SETTINGS, 1 / 3)
    assert keep.blocks[0].q == (0, 2, 3, 4)
    assert keep.blocks[0].kv == (0, 1)


def test_whole_groups_go_where_there_are_enough_of_them() -> None:
    assert unit_of(SETTINGS, Block("x", 8, 4, 8, 64)) == "kv_group"
    assert unit_of(SETTINGS, Block("x", 14, 2, 64, 64)) == "even_q"
    assert unit_of(SETTINGS, Block("x", 9, 3, 64, 64)) == "even_q"


def test_channels_come_in_multiples_that_hardware_likes() -> None:
    auto = PruningSettings()
    assert multiple_of(auto, Block("x", 1, 1, 1, 1536)) == 32
    assert multiple_of(auto, Block("x", 1, 1, 1, 172)) == 16
    assert multiple_of(auto, Block("x", 1, 1, 1, 4)) == 1
    assert counts(BlockLayout("bert", (Block("x", 12, 12, 32, 1536),), 384), auto, 0.5).channels == (768,)


def test_stages_rise_by_a_cubic_to_the_ratio() -> None:
    assert stage_ratios(0.5, 1) == [0.5]
    assert stage_ratios(0.5, 2) == [0.4375, 0.5]


def test_the_ramp_ends_at_the_target_and_stays() -> None:
    settings = PruningSettings(target=0.5, ramp=0.8)
    found = [settings.ratio(round, 10) for round in range(1, 11)]
    assert found == sorted(found)
    assert found[7:] == [0.5, 0.5, 0.5]
    assert found[0] == pytest.approx(0.5 * (1 - (1 - 1 / 8) ** 3))


@given(st.sampled_from([MHA, GQA]), st.integers(0, 99))
def test_spread_and_gather_are_inverse(anatomy: BlockLayout, seed: int) -> None:
    scores = drawn(anatomy, seed)
    keep = structure_at(rank_units(scores, anatomy, SETTINGS), anatomy, SETTINGS, 0.5)
    local = at_structure(scores, keep, anatomy)
    wide = to_base_coordinates(local, keep, anatomy)
    for name in ("heads", "channels"):
        np.testing.assert_array_equal(at_structure(wide, keep, anatomy)[name], local[name])
        assert np.isnan(wide[name]).sum() == wide[name].size - local[name].size
    with pytest.raises(ShapeError, match="expected heads of shape"):
        to_base_coordinates(scores, keep, anatomy)


def test_heads_are_scaled_over_all_blocks_and_channels_within_theirs() -> None:
    scores = {"heads": np.array([1.0] * 4 + [3.0] * 8), "channels": np.repeat([1.0, 5.0, 9.0], 32)}
    held = {name: np.ones(part.shape, bool) for name, part in scores.items()}
    found = normalise(scores, held, MHA)
    assert found["heads"][0] / found["heads"][4] == pytest.approx(1 / 3)  # which block matters stays visible
    np.testing.assert_allclose(found["channels"], 1.0)
    assert mean_of(np.zeros(3), np.ones(3, bool)) == 1.0


def test_what_nobody_holds_keeps_its_worth() -> None:
    full = drawn(MHA, 1)
    first = pool_scores([(to_base_coordinates(full, None, MHA), 1.0)], {}, MHA)
    keep = structure_at(rank_units(first, MHA, SETTINGS), MHA, SETTINGS, 0.5)
    again = pool_scores([(to_base_coordinates(at_structure(drawn(MHA, 2), keep, MHA), keep, MHA), 1.0)], first, MHA)
    gone = ~np.isin(np.arange(32), keep.blocks[0].ff)
    np.testing.assert_array_equal(again["channels"][:32][gone], first["channels"][:32][gone])
    assert (again["channels"][:32][~gone] != first["channels"][:32][~gone]).all()


def test_pooling_is_half_of_what_was_and_half_of_the_weighted_mean() -> None:
    """Two clients of shares 3/4 and 1/4 whose scores are in means of their own; old scores count as much as both."""
    small = BlockLayout("bert", (Block("x", 2, 2, 1, 2),), width=2)
    ann = {"heads": np.array([2.0, 6.0]), "channels": np.array([1.0, 1.0])}  # in means: .5, 1.5
    bob = {"heads": np.array([3.0, 1.0]), "channels": np.array([1.0, 3.0])}  # 1.5, .5
    fresh = pool_scores([(ann, 0.75), (bob, 0.25)], {}, small)
    np.testing.assert_allclose(fresh["heads"], [0.75, 1.25])
    np.testing.assert_allclose(fresh["channels"], [0.875, 1.125])
    old = {"heads": np.array([2.0, 0.0], np.float32), "channels": np.array([1.0, 1.0], np.float32)}
    np.testing.assert_allclose(pool_scores([(ann, 0.75), (bob, 0.25)], old, small)["heads"], [1.375, 0.625])


def test_one_client_cannot_lift_a_head_without_bound() -> None:
    """Next to nothing on what all hold, and as much as the format holds on the rest."""
    small = BlockLayout("bert", (Block("x", 4, 4, 1, 4),), width=2)
    honest = {"heads": np.array([1.0, 1.0, np.nan, np.nan]), "channels": np.ones(4)}
    hostile = {"heads": np.array([6e-8, 6e-8, 65504.0, 65504.0]), "channels": np.ones(4)}
    found = pool_scores([(honest, 0.8), (hostile, 0.2)], {}, small)
    assert found["heads"].max() <= 2.0


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("honest", [2, 4, 9])
def test_a_client_that_puts_all_worth_on_one_unit_is_counted_in_multiples_of_the_cohorts(honest: int) -> None:
    """Without the bound it lifts one of a thousand channels to a thousand times the mean, over its share."""
    wide = BlockLayout("bert", (Block("x", 4, 4, 1, 1000),), width=2)
    rng, share = np.random.default_rng(honest), 1 / (honest + 1)
    fair = [{"heads": np.ones(4), "channels": rng.uniform(0.5, 1.5, 1000)} for _ in range(honest)]
    one = {"heads": np.ones(4), "channels": np.eye(1000)[7]}
    found = pool_scores([(own, share) for own in (*fair, one)], {}, wide)["channels"]
    assert found[7] <= 1.5 * (1 - share) + 10 * 1.5 * share
    # The others are what the honest clients say of them; the liar said that they are worth nothing.
    alone = pool_scores([(own, share) for own in fair], {}, wide)["channels"]
    np.testing.assert_allclose(np.delete(found, 7), np.delete((1 - share) * alone, 7), rtol=1e-5)


def test_scores_that_clients_agree_on_are_not_bounded() -> None:
    wide = BlockLayout("bert", (Block("x", 4, 4, 1, 1000),), width=2)
    own = {"heads": np.ones(4), "channels": np.eye(1000)[7] * 99 + 0.01}
    found = pool_scores([(own, 0.25)] * 4, {}, wide)["channels"]
    np.testing.assert_allclose(found, own["channels"] / own["channels"].mean(), rtol=1e-5)


def test_the_order_does_not_flap_over_small_changes() -> None:
    old = {"heads": np.array([1.0, 2.0], np.float32), "channels": np.array([1.0], np.float32)}
    new = {"heads": np.array([1.05, 1.0], np.float32), "channels": np.array([1.2], np.float32)}
    found = with_hysteresis(old, new)
    assert found["heads"].tolist() == [1.0, 1.0]
    assert found["channels"][0] == np.float32(1.2)
    assert with_hysteresis({}, new) is new


def test_votes_are_counted_and_ties_go_to_the_lower_index() -> None:
    one = BlockLayout("bert", (Block("x", 2, 2, 2, 8),), width=4)
    first = votes(ModelStructure((BlockStructure((0,), (0,), (0, 1, 2, 3)),)), one)
    second = votes(ModelStructure((BlockStructure((1,), (1,), (2, 3, 4, 5)),)), one)
    total = {name: 0.5 * first[name] + 0.5 * second[name] for name in first}
    keep = structure_at(rank_units(total, one, replace(SETTINGS, multiple=1)), one, replace(SETTINGS, multiple=1), 0.5)
    assert keep.blocks[0].q == (0,)
    assert keep.blocks[0].ff == (0, 1, 2, 3)
