from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.pruning.depth import backward_blocks, block_of, module_ranks
from fedtune.pruning.structure import Block, BlockLayout

FIVE = BlockLayout("llama", tuple(Block(f"model.layers.{at}", 2, 2, 4, 8) for at in range(5)), width=8)
MODULES = [f"model.layers.{at}.self_attn.{side}_proj" for at in range(5) for side in "qv"]


def test_the_upper_blocks_are_trained_and_those_below_have_no_rank() -> None:
    assert module_ranks(MODULES, FIVE, 4, 0.6) == (0, 0, 0, 0, 4, 4, 4, 4, 4, 4)
    assert module_ranks(reversed(MODULES), FIVE, 4, 0.4) == (0, 0, 0, 0, 0, 0, 4, 4, 4, 4)  # type: ignore[arg-type]


def test_where_all_blocks_are_trained_there_is_nothing_to_say() -> None:
    assert module_ranks(MODULES, FIVE, 4, 1.0) == ()
    assert module_ranks(MODULES, FIVE, 4, 0.95) == ()
    assert module_ranks(["lm_head"], FIVE, 4, 0.2) == ()


def test_however_small_the_share_one_block_is_trained() -> None:
    assert module_ranks(MODULES, FIVE, 4, 1e-9) == (0,) * 8 + (4, 4)


def test_the_share_is_of_the_blocks_that_have_target_modules() -> None:
    """Or a recipe that adapts the lower blocks alone would have an arm that trains nothing."""
    assert module_ranks(MODULES[:4], FIVE, 4, 0.2) == (0, 0, 4, 4)


def test_modules_outside_of_the_blocks_are_trained() -> None:
    assert module_ranks([*MODULES, "lm_head", "z.score"], FIVE, 4, 0.2) == (4, *(0,) * 8, 4, 4, 4)


def test_eleven_blocks_are_counted_by_number_and_not_by_name() -> None:
    """By name, layers.10 comes before layers.9."""
    layout = BlockLayout("llama", tuple(Block(f"layers.{at}", 1, 1, 1, 1) for at in range(11)), width=1)
    modules = [f"layers.{at}.mlp.up_proj" for at in range(11)]
    ranks = dict(zip(sorted(modules), module_ranks(modules, layout, 2, 0.2), strict=True))
    assert [name for name, rank in ranks.items() if rank] == ["layers.10.mlp.up_proj", "layers.9.mlp.up_proj"]
    assert block_of("layers.10.mlp.up_proj", layout) == 10
    assert block_of("layers.1.mlp.up_proj", layout) == 1


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_a_larger_share_trains_what_a_smaller_one_does(one: float, other: float) -> None:
    few, many = (module_ranks(MODULES, FIVE, 4, share) or (4,) * 10 for share in sorted((one, other)))
    assert all(a <= b for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize(("top", "blocks"), [(1.0, 5), (0.6, 3), (0.4, 2), (0.2, 1)])
def test_the_backward_pass_goes_down_to_the_lowest_block_that_is_trained(top: float, blocks: int) -> None:
    assert backward_blocks(MODULES, FIVE, module_ranks(MODULES, FIVE, 4, top)) == blocks


def test_a_trained_module_outside_of_the_blocks_may_lie_below_them() -> None:
    modules = ["model.embed", *MODULES]
    assert backward_blocks(modules, FIVE, module_ranks(modules, FIVE, 4, 0.2)) == 5
