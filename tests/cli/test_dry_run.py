from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedtune.cli.dry_run import show
from fedtune.deployment.join import compare_with_policy, load_join_setup
from tests.deployment.test_coordinator import RECIPE
from tests.deployment.test_join import greeting, site

__all__ = ["site"]  # a fixture


def shown(place: Path, recipe: str) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200)
    show(lambda line: console.print(line, markup=False), compare_with_policy(load_join_setup(place), greeting(recipe)))
    return out.getvalue()


def test_what_a_run_would_ask_is_shown_with_the_recipe_and_the_verdict(site: Path) -> None:
    text = shown(site, RECIPE)
    for line in (
        "method       flora",
        "  work       1 steps of 1 examples, at the rate",
        "  ranks      2",
        "instruction from question",
        "LoRA factors",
        'name = "flora"',
    ):
        assert line in text
    assert text.rstrip().endswith("allowed by this site's policy")


def test_what_the_policy_forbids_is_named(site: Path) -> None:
    text = shown(site, RECIPE.replace("rank = 2", "rank = 8"))
    assert "x policy.max_rank: allowed 4; got 8" in text
    assert text.rstrip().endswith("this site would decline")
