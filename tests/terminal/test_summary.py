from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.terminal.summary import MOST_METRICS, clients, comparison, selection, show_paths, show_summary, views
from tests.terminal.conftest import metrics


def printed(summary: Mapping[str, Any], folder: Path, width: int = 120) -> str:
    file = StringIO()
    console = Console(file=file, width=width, highlight=False)
    show_summary(console, summary)
    report = folder / "report.html"
    show_paths(console, adapter=folder / "adapter", report=report if report.exists() else None)
    return file.getvalue()


def row(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return " ".join(found.split())


def test_scores_are_shown_before_and_after(summary: Mapping[str, Any], tmp_path: Path) -> None:
    text = printed(summary, tmp_path)
    assert row(text, "tiny") == "tiny: flora, 3 rounds, seed 3; up 4.5 kB, down 6.0 MB, 1:15"
    assert row(text, "test data") == "test data 2.800 -> 2.300 16.44 -> 9.974"
    assert row(text, "mean of clients") == "mean of clients 2.750 -> 2.450"
    assert "3.000 -> 2.900" in row(text, "worst client")  # this client's own way, not two clients' maxima


def test_the_worst_tenth_is_shown_with_its_clients(summary: Mapping[str, Any], tmp_path: Path) -> None:
    before, after = ({"loss": loss, "clients": 2, "examples": 9} for loss in (3.25, 2.75))
    text = printed(
        {
            **summary,
            "before": {**summary["before"], "worst_tenth": before},
            "after": {**summary["after"], "worst_tenth": after},
        },
        tmp_path,
    )
    assert row(text, "worst tenth") == "worst tenth (2 clients) 3.250 -> 2.750"
    assert "worst tenth" not in printed(summary, tmp_path)  # of few clients it is the worst one


def test_each_client_has_a_row(summary: Mapping[str, Any], tmp_path: Path) -> None:
    text = printed(summary, tmp_path)
    assert row(text, "client-1") == "client-1 312 16 2.500 -> 2.000 1.5 kB 2.0 MB 7.5 1"
    assert row(text, "never") == "never 312 - 1.5 kB 2.0 MB 7.5"


def test_names_and_texts_of_others_neither_colour_nor_move(summary: Mapping[str, Any], tmp_path: Path) -> None:
    text = printed(summary, tmp_path)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]evil[/]" in text
    assert "one\\x1b[31m" in text


def test_the_sample_keeps_its_lines(summary: Mapping[str, Any], tmp_path: Path) -> None:
    assert row(printed(summary, tmp_path), "a time") == "a time"


def test_the_report_is_named_only_if_it_is_there(summary: Mapping[str, Any], tmp_path: Path) -> None:
    assert "report.html" not in printed(summary, tmp_path)
    (tmp_path / "report.html").write_text("")
    assert str(tmp_path / "report.html") in printed(summary, tmp_path)
    assert str(tmp_path / "adapter") in printed(summary, tmp_path)


def test_a_run_without_held_out_data_or_sample_is_shown(summary: Mapping[str, Any], tmp_path: Path) -> None:
    nothing: Mapping[str, Any] = {"test": metrics(1.0), "held_out": {}, "mean": {}, "worst": {}}
    text = printed({**summary, "before": nothing, "after": nothing, "sample": None}, tmp_path)
    assert "worst" not in text
    assert "prompt" not in text
    assert row(text, "client-1") == "client-1 312 16 1.5 kB 2.0 MB 7.5 1"


def test_clients_beyond_the_first_are_counted(summary: Mapping[str, Any]) -> None:
    total = summary["clients"]["client-1"]
    table = clients({**summary, "clients": {f"c{number:03}": total for number in range(100)}})
    assert table.row_count == 31
    assert list(table.columns[0].cells)[-1] == "and 70 more"


def test_a_comparison_has_a_row_per_score_and_none_per_count() -> None:
    table = comparison({"loss": 2.0, "examples": 4}, {"loss": 1.0, "accuracy": 0.5, "examples": 4})
    assert list(table.columns[0].cells) == ["loss", "accuracy"]
    assert list(table.columns[1].cells) == ["2.000", "-"]


def test_one_round_is_not_called_rounds(summary: Mapping[str, Any], tmp_path: Path) -> None:
    assert "flora, 1 round, seed 3" in printed({**summary, "rounds": 1}, tmp_path)


QUESTION = {
    "prompt": "Who guards\x1b[31m?",
    "before": "No one  \n",
    "after": "The dog, all night, since it has slept the whole day beside the door.",
    "reference": "The dog.",
    "scores": {"before": {"rouge_l": 0.0, "loss": 3.25}, "after": {"rouge_l": 0.5, "loss": 1.5}},
}


def test_answers_stand_side_by_side_with_their_scores(summary: Mapping[str, Any], tmp_path: Path) -> None:
    text = printed({**summary, "samples": [QUESTION]}, tmp_path, width=80)
    assert "Who guards\\x1b[31m?" in text
    assert row(text, "No one").startswith("No one The dog, all night, since")
    assert "Rouge-L 0.000, reference loss 3.250" in text
    assert "reference  The dog." in text
    # Paths stay whole, to be copied.
    assert all(len(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)


def test_answers_without_a_reference_have_no_scores(summary: Mapping[str, Any], tmp_path: Path) -> None:
    plain = {"prompt": "Who?", "before": "", "after": "I"}
    text = printed({**summary, "samples": [plain]}, tmp_path)
    assert row(text, "(nothing)") == "(nothing) I"
    assert "Rouge" not in text
    assert "reference" not in text


LONG = "a-hospital-with-a-name-of-many-parts-department-of-radiology-0001"


@pytest.mark.parametrize("count", [1, MOST_METRICS, 5])
def test_everything_fits_into_80_columns_and_no_number_is_cut(
    count: int, summary: Mapping[str, Any], tmp_path: Path
) -> None:
    names = ("loss", "perplexity", "bits_per_character", "rouge_l", "exact_match")
    scored = {name: 1.2345 + place for place, name in enumerate(names[:count])}
    after = {"test": scored, "held_out": {LONG: scored}, "mean": scored, "worst": {"client": LONG, **scored}}
    totals = {"examples": 31_200, "rank": 128, "bytes_down": 10**11, "bytes_up": 123_456_789, "seconds": 12_345.6}
    wide = {
        **summary,
        "before": after,
        "after": after,
        "clients": {LONG: {**totals, "failures": 12}},
        "clock_s": 3000.0,
    }
    text = printed(wide, tmp_path / "x")  # a file of 120 columns
    tables = text[: text.index("adapter ")]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    for value in (*scored.values(), 31_200, 128, "100.0 GB", "123.5 MB", "12345.6", 12):
        assert (f"{value:.3f}"[:5] if isinstance(value, float) else str(value)) in tables


def test_the_pruned_models_fit_into_80_columns() -> None:
    row = {"loss": 2.0, "perplexity": 7.389, "bits_per_character": 0.75, "sparsity": 0.33, "parameters": 1_988_288}
    row |= {"megabytes": 1234.5, "forward_ms": 234.5}
    file = StringIO()
    Console(file=file, width=80).print(views({"whole": row, "deployed": {"0.25": row}}))
    assert max(len(line.rstrip()) for line in file.getvalue().splitlines()) <= 80
    assert file.getvalue().count("234.5") == 4


def test_the_round_that_is_the_result_is_named_where_it_is_not_simply_the_last() -> None:
    best, last = {"round": 2, "score": 2.0, "state_digest": "a"}, {"round": 4, "score": 2.25, "state_digest": "b"}
    chosen = {"keep": "best", "metric": "loss", "round": 2, "best": best, "last": last, "ended": "no better loss"}
    line = selection({"selection": chosen})
    assert line.startswith("the result is round 2 of 4: loss 2.000 in round 2 (best), 2.250 in round 4 (last)")
    assert line.endswith("; ended early: no better loss")
    assert selection({"selection": {**chosen, "keep": "last", "ended": ""}}) == ""
    assert selection({}) == ""


def test_where_some_clients_descend_the_table_says_who(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"examples": 3, "rank": None, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0, "failures": 0}
    rows = {"gpu": {**usual, "verb": "descend"}, "phone": {**usual, "verb": "probe"}}
    table = clients({"clients": rows, "before": {}, "after": {}})
    assert [str(column.header) for column in table.columns][2] == "verb"
    assert [str(cell) for cell in table.columns[2].cells] == ["descend", "probe"]
