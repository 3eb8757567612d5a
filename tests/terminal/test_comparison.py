from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from fedtune.terminal.comparison import show_comparison
from tests.terminal.conftest import HOSTILE

LONG = "a-recipe-with-a-name-of-many-parts-that-goes-on-and-on-0001"


def row(name: str, **values: Any) -> dict[str, Any]:
    mean = {"mean": 3.142, "deviation": 0.012}
    losses = dict.fromkeys(("test_before", "test_after", "mean_client"), mean)
    others = {"bytes": {"mean": 1.5e9, "deviation": None}, "seconds": {"mean": 4000.0, "deviation": 12.0}}
    return {"name": name, "method": "flora", "seeds": [0, 1, 2], "finished": True, **losses, **others, **values}


NO_PROTOCOLS: dict[str, Any] = {"measure": "loss", "under_budget": [], "to_target": [], "robustness": []}
CONTENT: dict[str, Any] = {
    "recipes": [row(LONG), row(HOSTILE, finished=False, mean_client={"mean": None, "deviation": None})],
    "differences": [
        {
            "recipe": HOSTILE,
            "measure": "held-out loss",
            "paired_by": "client",
            "interval": {"mean": -0.25, "low": -0.5, "high": 0.001, "pairs": 8},
        },
        {
            "recipe": "one",
            "measure": "test loss",
            "paired_by": "seed",
            "interval": {"mean": 0.25, "low": None, "high": None, "pairs": 1},
        },
    ],
    "settings": {"method.name": ["flora", "fedit"], "data.fields": ["x" * 200, "-"]},
    "protocols": NO_PROTOCOLS,
    "warnings": ["a and b have other bases: losses do not compare"],
}


def test_a_comparison_fits_into_80_columns() -> None:
    file = StringIO()
    show_comparison(Console(file=file, width=120, highlight=False), CONTENT)
    text = file.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "\x1b" not in text
    for part in (
        "3.142",
        "± 0.01200",
        "1.5 GB",
        "1:06:40",
        "interrupted",
        "-0.2500",
        "-0.5000 to +0.0010",
        "8 clients",
    ):
        assert part in text, part
    assert "needs two pairs" in text
    assert "1 seed" in text
    assert "warning: a and b have other bases" in text


def test_one_recipe_has_neither_differences_nor_settings() -> None:
    file = StringIO()
    content = {"recipes": [row("a")], "differences": [], "settings": {}, "protocols": NO_PROTOCOLS, "warnings": []}
    show_comparison(Console(file=file, width=80), content)
    assert "interval" not in file.getvalue()
    assert "settings" not in file.getvalue()
