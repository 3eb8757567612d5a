from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError
from fedtune.report.compare import compare, write_comparison
from fedtune.report.spread import Spread, mean_and_spread
from tests.report.conftest import WriteRun


def test_seeds_of_one_recipe_become_mean_and_spread(write_run: WriteRun) -> None:
    def after(loss: float, seconds: float) -> Any:
        def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
            summary["after"]["test"]["loss"] = loss
            summary["seconds"] = seconds

        return edit

    paths = [
        write_run("a0", name="a", seed=0, clients=2, rounds=2, edit=after(1.0, 10)),
        write_run("b0", name="b", seed=0, clients=2, rounds=1, method="fedit", edit=after(5.0, 1)),
        write_run("a1", name="a", seed=1, clients=2, rounds=3, edit=after(3.0, 30)),
    ]
    first, second = compare(paths).rows
    assert (first.name, first.method, first.seeds, first.rounds) == ("a", "flora", (0, 1), 2)
    assert first.test_after == Spread(2.0, math.sqrt(2))
    assert first.seconds == mean_and_spread([10, 30])
    assert first.bytes_up == mean_and_spread([4000, 6000])
    assert first.test_before.mean == pytest.approx((3.05 + 3.06) / 2)
    assert (second.name, second.method, second.seeds) == ("b", "fedit", (0,))
    assert second.test_after == Spread(5.0, None)
    assert second.worst_client.mean == pytest.approx(2.9)
    assert second.mean_client.mean == pytest.approx(2.85)


def test_a_seed_given_twice_is_refused(write_run: WriteRun) -> None:
    paths = [write_run("a"), write_run("b")]
    with pytest.raises(ConfigError, match=r"dolly-4: expected each seed once; got seed 0 twice"):
        compare(paths)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one run directory"):
        compare([])


def test_the_page_holds_table_picture_and_escaped_names(write_run: WriteRun, tmp_path: Path) -> None:
    paths = [write_run(f"{name}{seed}", name=name, seed=seed) for name in ("plain", "<b>bold</b>") for seed in (0, 1)]
    page = write_comparison(paths, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "out" / "comparison.html"
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "2 recipes, 4 runs" in text
    assert "2.667 ± 0.0071" in text
    assert "&lt;b&gt;bold" in text
    assert "<b>bold" not in text
    assert "<script" not in text


def test_runs_that_share_no_loss_have_a_table_only(write_run: WriteRun, tmp_path: Path) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line |= {"test": None, "held_out": {}, "loss_after": None}

    page = write_comparison([write_run("a", edit=edit), write_run("b", name="b")], tmp_path / "out")
    assert "<svg" not in page.read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "comparison.png").exists()


def test_runs_with_a_clock_are_told_by_it(write_run: WriteRun, tmp_path: Path) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines[1:]:
            line["deployed"] = {"loss": 5.0 - line["round"] / 10}

    paths = [write_run(f"{name}{seed}", name=name, seed=seed, edit=edit) for name in "ab" for seed in (0, 1)]
    row = compare(paths).rows[0]
    rounds = row.rounds
    assert row.clock == Spread(6.0 * rounds, 0.0)
    assert row.deployed.mean == pytest.approx(5.0 - rounds / 10)
    assert 0 < row.idle.mean < 1
    text = write_comparison(paths, tmp_path / "out").read_text(encoding="utf-8")
    assert "Time on the devices" in text
    assert "until deployed loss" in text
    assert "1.00 (1.00 to 1.00)" in text
    assert "Deployed model&#x27;s test loss by round, traffic and time" in text
    assert (tmp_path / "out" / "deployed.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_clock_are_not(write_run: WriteRun, tmp_path: Path) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line["clock_s"] = 0.0

    page = write_comparison([write_run("a", name="a"), write_run("b", name="b", edit=edit)], tmp_path / "out")
    assert "Time on the devices" not in page.read_text(encoding="utf-8")


def test_the_numbers_are_written_for_programs(write_run: WriteRun, tmp_path: Path) -> None:
    paths = [write_run(f"{name}{seed}", name=name, seed=seed) for name in ("a", "b") for seed in (0, 1)]
    page = write_comparison(paths, tmp_path / "out")
    content = json.loads(page.with_name("comparison.json").read_text())
    assert [row["name"] for row in content["recipes"]] == ["a", "b"]
    assert content["recipes"][0]["test_after"]["mean"] == compare(paths).rows[0].test_after.mean
    assert content["recipes"][0]["bytes"]["mean"] > 0
    (spent, time) = content["protocols"]["under_budget"]
    assert (spent["resource"], time["resource"], content["protocols"]["clock"]) == ("bytes", "seconds", "devices")
    assert "Cost per client until the loss is" in page.read_text()
    (difference,) = content["differences"]
    assert difference["interval"]["mean"] == 0.0
    assert "Differences" in page.read_text()
