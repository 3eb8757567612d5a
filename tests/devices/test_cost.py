from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.devices.cost import (
    PROXIES,
    Work,
    adapter_sides,
    block_parameters,
    flops_per_token,
    roberta_base,
    round_bytes,
    round_flops,
    sizes,
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
