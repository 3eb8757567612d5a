from __future__ import annotations

from typing import Any

from fedtune.runs.model_card import model_card


def measured(*, loss: float | None, parameters: int) -> dict[str, Any]:
    return {
        "scores": {} if loss is None else {"loss": loss, "examples": 4},
        "parameters": parameters,
        "megabytes": 4e-6 * parameters,
        "latency_ms": {"prefill": 12.34, "decode": 1.0},
    }


def card(loss: float | None, base: str = "org/model") -> str:
    small = measured(loss=loss, parameters=1_000_000)
    return model_card(
        name="run",
        base=base,
        method="flora",
        rounds=3,
        clients=2,
        examples=1234,
        whole=measured(loss=loss, parameters=2_000_000),
        ratios={"0.5": {"folder": "ratio-0.5", "sparsity": 0.48, "measured": small}},
        machine="x86_64 CPU, 1 thread",
    )


def test_a_card_has_a_line_for_every_model() -> None:
    lines = card(3.25).splitlines()
    assert lines[1] == "base_model: org/model"
    assert "| model | blocks' weights removed | parameters | MB | loss | prefill, ms | decode, ms |" in lines
    assert "| whole | 0.0 % | 2,000,000 | 8.0 | 3.25 | 12.3 | 1 |" in lines
    assert "| ratio-0.5 | 48.0 % | 1,000,000 | 4.0 | 3.25 | 12.3 | 1 |" in lines


def test_without_test_data_there_is_no_score_and_of_a_path_only_its_last_part() -> None:
    text = card(None, base="/data/models/tiny")
    assert "base_model: tiny" in text
    assert "/data" not in text
    assert "| whole | 0.0 % | 2,000,000 | 8.0 | 12.3 | 1 |" in text
