from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from fedtune.report.rendering import Card, Table, environment, render, replace_text, source

HOSTILE = '<script>"&'
ESCAPED = "&lt;script&gt;&#34;&amp;"


def test_the_frame_forbids_scripts_and_requests_and_escapes_the_title() -> None:
    text = render("base.html.j2", title=HOSTILE)
    assert text.startswith("<!doctype html>")
    assert f"<title>{ESCAPED}</title>" in text
    assert "default-src 'none'" in text


def test_cells_are_escaped_and_numbers_are_aligned() -> None:
    macro = environment().get_template("parts.html.j2").module
    text = macro.table(Table([HOSTILE, "b"], [[HOSTILE, "1"]]))  # type: ignore[attr-defined]
    assert f'<th>{ESCAPED}</th><th class="n">b</th>' in text
    assert f'<td>{ESCAPED}</td><td class="n">1</td>' in text
    assert macro.table(None).strip() == ""  # type: ignore[attr-defined]


def test_captions_are_escaped_and_a_drawing_is_not() -> None:
    macro = environment().get_template("parts.html.j2").module
    text = macro.figure(Card("name", HOSTILE, HOSTILE, "<svg></svg>", None))  # type: ignore[attr-defined]
    assert f"<b>{ESCAPED}</b> {ESCAPED}<" in text
    assert "<svg></svg>" in text
    assert "<details>" not in text


def test_a_value_that_a_page_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("base.html.j2")


def test_a_page_is_replaced_in_one_step(tmp_path: Path) -> None:
    replace_text(tmp_path / "page.html", "old")
    replace_text(tmp_path / "page.html", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "new"}


def test_the_sheet_has_dark_narrow_and_paper_rules_and_balances_its_braces() -> None:
    css = source("style.css")
    for rule in ("prefers-color-scheme: dark", "max-width: 44rem", "@media print"):
        assert rule in css
    assert css.count("{") == css.count("}")
