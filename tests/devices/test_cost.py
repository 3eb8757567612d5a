from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.devices.cost import (
    PROXIES,
    Work,
    adapter_sides,
    block_parameters,
    flops_per_token,
    forward_flops_per_token,
    roberta_base,
    round_bytes,
    round_flops,
    sizes,
    trained_modules,
)
from fedtune.devices.profiles import PROFILES
from fedtune.pruning.ranking import PruningSettings

ROBERTA = roberta_base()
PRUNING = PruningSettings()
WORK = Work(steps=10, rows=32, passes=1, tokens=128, longest=128)


def test_roberta_base_on_paper() -> None:
    """12 layers of 768, heads of 64, 3072 channels, rank 16 on all six matrices, 128 tokens, no global adapter.

    The number leaves the classifier's head out: it sees one row per example.
    """
    whole = sizes(ROBERTA.layout, None, 0.0)
    assert block_parameters(ROBERTA.layout, whole) == 84_934_656
    assert adapter_sides(ROBERTA, whole) == 165_888
    assert flops_per_token(ROBERTA, whole, 16, WORK) == 369_819_648
    flops = round_flops(ROBERTA, None, 0.0, 16, WORK)
    assert WORK.trained_tokens == 40_960
    assert flops == pytest.approx(15.15e12, rel=1e-3)
    seconds = {name: flops / 1e12 / PROFILES[name].tflops for name in ("tx2", "xavier-nx", "agx-xavier")}
    assert seconds == pytest.approx({"tx2": 56.1, "xavier-nx": 15.1, "agx-xavier": 3.79}, rel=5e-3)


def test_half_of_roberta_base() -> None:
    half = sizes(ROBERTA.layout, PRUNING, 0.5)
    assert block_parameters(ROBERTA.layout, half) == 84_934_656 / 2
    assert adapter_sides(ROBERTA, half) == 110_592
    _, up = round_bytes(replace(ROBERTA, saved=0), PRUNING, 0.5, 8, global_rank=32, wire_dtype="bf16")
    assert up == pytest.approx(1.77e6, rel=2e-3)
    down, _ = round_bytes(replace(ROBERTA, saved=0), None, 0.5, 8, global_rank=0, wire_dtype="bf16")
    assert down == 0


def test_upload_of_the_whole_in_two_formats() -> None:
    body = replace(ROBERTA, saved=0)
    sent = {d: round_bytes(body, None, 0.0, 16, global_rank=32, wire_dtype=d)[1] for d in ("fp32", "bf16")}
    assert sent == pytest.approx({"fp32": 10.6e6, "bf16": 5.3e6}, rel=5e-3)


@given(
    ratio=st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]),
    more=st.sampled_from([0.0, 0.125, 0.25]),
    rank=st.integers(1, 64),
    name=st.sampled_from(["roberta-base", "llama-7b"]),
)
def test_pruning_harder_never_costs_more_and_rank_never_less(ratio: float, more: float, rank: int, name: str) -> None:
    body = PROXIES[name]()
    costs: list[Callable[[float, int], float]] = [
        lambda p, r: round_flops(body, PRUNING, p, r, WORK),
        lambda p, r: sum(round_bytes(body, PRUNING, p, r, global_rank=32, wire_dtype="bf16")),
    ]
    for cost in costs:
        assert cost(min(0.875, ratio + more), rank) <= cost(ratio, rank) * (1 + 1e-12)
        assert cost(ratio, rank + 1) > cost(ratio, rank)


def test_checkpointing_computes_activations_twice() -> None:
    again = replace(WORK, checkpointing=True)
    assert round_flops(ROBERTA, None, 0.0, 8, again) > round_flops(ROBERTA, None, 0.0, 8, WORK)


def test_side_tokens_cost_half() -> None:
    side = replace(WORK, steps=0, side_tokens=100.0, longest=100.0)
    each = flops_per_token(ROBERTA, sizes(ROBERTA.layout, None, 0.0), 8, side)
    assert round_flops(ROBERTA, None, 0.0, 8, side) == pytest.approx(50 * each)


BARE = replace(ROBERTA, saved=0, layout=replace(ROBERTA.layout, head=0))
SHORT = replace(WORK, tokens=0.0)
"""Without attention, whose operations grow with the square of the text."""


def relative(top: float, back: float, *, rank: int = 1, work: Work = SHORT) -> float:
    """Return the operations of an arm relative to a step that trains everything."""
    whole = sizes(BARE.layout, None, 0.0)
    trained = trained_modules(BARE, rank, top=top, back=back)
    return flops_per_token(BARE, whole, rank, work, trained) / flops_per_token(BARE, whole, rank, work)


@pytest.mark.parametrize(
    ("top", "back", "share"),
    [(1.0, 0.0, 1.0), (1.0, 0.5, 0.75), (0.5, 0.0, 0.75), (0.5, 0.5, 0.625), (0.25, 0.0, 0.625)],
)
def test_a_backward_pass_costs_as_much_as_it_goes_through_by_hand(top: float, back: float, share: float) -> None:
    """2 P forward and 2 P top (1 - back) backward, and next to nothing for factors of rank 1."""
    assert relative(top, back) == pytest.approx(share, rel=0.01)


def test_what_trains_everything_costs_what_it_costs_without_saying_so() -> None:
    whole = sizes(ROBERTA.layout, None, 0.0)
    work = replace(WORK, checkpointing=True, global_rank=8.0, side_tokens=9.0)
    trained = trained_modules(ROBERTA, 16)
    assert flops_per_token(ROBERTA, whole, 16, work, trained) == pytest.approx(
        flops_per_token(ROBERTA, whole, 16, work)
    )
    assert round_flops(ROBERTA, None, 0.0, 16, work, trained) == pytest.approx(
        round_flops(ROBERTA, None, 0.0, 16, work), rel=1e-9
    )


def test_activations_are_computed_again_in_the_blocks_of_the_backward_pass_alone() -> None:
    """2 forward, 2 again and 2 backward in half of the blocks: 4 of 6."""
    assert relative(0.5, 0.0, work=replace(SHORT, checkpointing=True)) == pytest.approx(4 / 6, rel=0.01)


def test_what_is_not_trained_is_not_sent_and_what_is_planned_to_come_down_does() -> None:
    whole = round_bytes(BARE, None, 0.0, 8, global_rank=16, wire_dtype="bf16")
    half = round_bytes(BARE, None, 0.0, 8, global_rank=4, wire_dtype="bf16", trained=trained_modules(BARE, 8, top=0.5))
    assert half[1] == whole[1] / 2
    assert half[0] == whole[0] / 4


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from([0.0, 0.25, 0.5, 0.875]), st.integers(1, 32))
def test_an_arm_that_does_less_never_costs_more(top: float, back: float, rank: int) -> None:
    assert relative(top, back, rank=rank) < relative(1.0, back, rank=rank) + 1e-9
    assert relative(top, back, rank=rank) <= relative(top, 0.0, rank=rank) + 1e-9


def test_what_mends_a_pruned_model_comes_down_in_every_round_of_it() -> None:
    body, usual = roberta_base(), {"global_rank": 8.0, "wire_dtype": "bf16"}
    plain, mended = PruningSettings(), PruningSettings(repair="least-squares", repair_rank=16)
    down, up = round_bytes(body, plain, 0.5, 8, **usual)  # type: ignore[arg-type]
    # Of o_proj (768 inputs) and down_proj (3072), 12 blocks: 16 columns, deviation and mean, two bytes each.
    expected = 2 * 12 * (768 + 3072) * (16 + 2)
    assert round_bytes(body, mended, 0.5, 8, **usual) == (down + expected, up)  # type: ignore[arg-type]
    assert round_bytes(body, mended, 0.0, 8, **usual) == round_bytes(body, plain, 0.0, 8, **usual)  # type: ignore[arg-type]


def test_a_forward_pass_of_smollm2_on_paper() -> None:
    body = PROXIES["smollm2-135m"]()
    blocks = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert block_parameters(body.layout, sizes(body.layout, None, 0.0)) == blocks
    attention = 4 * 100 * 30 * 576
    assert forward_flops_per_token(body, 100) == 2 * (blocks + 49_152 * 576) + attention
    # p = 64: V x, M, U of each of 7 matrices in 30 blocks.
    both = 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    more = 2 * 64 * both + 2 * 64 * 64 * 210
    assert forward_flops_per_token(body, 100, 64) - forward_flops_per_token(body, 100) == more
    # Two forward passes are one forward and one backward over a frozen base, but for attention and adapters.
    whole = flops_per_token(body, sizes(body.layout, None, 0.0), 0, replace(WORK, tokens=0))
    assert 2 * forward_flops_per_token(body, 0) == whole
