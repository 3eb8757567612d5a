from __future__ import annotations

from fedtune.report.style import CSS, page


def test_the_title_is_escaped_and_scripts_and_requests_are_forbidden() -> None:
    text = page("<i>", "<p>body</p>")
    assert "<title>&lt;i&gt;</title>" in text
    assert "<main><p>body</p></main>" in text
    assert "default-src 'none'" in text


def test_the_sheet_knows_dark_narrow_and_paper_and_balances_its_braces() -> None:
    for rule in ("prefers-color-scheme: dark", "max-width: 44rem", "@media print"):
        assert rule in CSS
    assert CSS.count("{") == CSS.count("}")
