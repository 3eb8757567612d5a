from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from fedtune.terminal.protocols import protocol_tables
from tests.terminal.conftest import HOSTILE

LONG = "a-recipe-with-a-name-of-many-parts-that-goes-on-and-on-0001"


def value(mean: float | None, deviation: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "deviation": deviation}


CONTENT: dict[str, Any] = {
    "measure": "bits_per_character",
    "scored_on": "clients' held-out rows",
    "clock": "this machine",
    "targets": {"0": 3.5, "1": 3.612},
    "under_budget": [
        {"resource": "bytes", "budget": 123456.0, "quality": [value(3.5, 0.0123), value(None)]},
        {"resource": "seconds", "budget": 12345.0, "quality": [value(3.5, 0.0123), value(3.25)]},
        {"resource": "joules", "budget": 12345.0, "quality": [value(3.5, 0.0123), value(3.25)]},
    ],
    "to_target": [
        {
            "resource": "bytes",
            "mean": [value(2e9, 1e8), value(None)],
            "costs": [{"0": 1.9e9, "1": 2.1e9}, {"0": None, "1": 5.0}],
        },
        {"resource": "joules", "mean": [value(2e6), value(None)], "costs": [{"0": 2e6}, {"0": None}]},
    ],
    "robustness": [
        {"lost_updates": value(0.125, 0.01), "worst_tenth": value(4.0), "calm": "", "gain_kept": value(None)},
        {"lost_updates": value(None), "worst_tenth": value(None), "calm": HOSTILE, "gain_kept": value(0.75)},
    ],
}


def shown(content: dict[str, Any]) -> str:
    file = StringIO()
    console = Console(file=file, width=80, highlight=False)
    for table in protocol_tables([LONG, HOSTILE], content):
        console.print(table)
    return file.getvalue()


def test_the_three_protocols_fit_into_80_columns() -> None:
    text = shown(CONTENT)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "\x1b" not in text
    for part in (
        "in 123.5 kB",
        "in 3:25:45",
        "in 12.3 kJ",
        "± 0.01230",
        "2.0 GB",
        "1 of 2 seeds",
        "never",
        "2 MJ",
        "12.5 %",
        "75 %",
    ):
        assert part in text, part
    assert "this machine's clock" in " ".join(text.split())


def test_what_is_not_known_has_no_table() -> None:
    nothing = {"lost_updates": value(None), "worst_tenth": value(None), "calm": "", "gain_kept": value(None)}
    assert shown({**CONTENT, "under_budget": [], "to_target": [], "robustness": [nothing, nothing]}) == ""
