from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from fedtune.report.drawing import (
    COLOURS,
    DASHES,
    INK,
    MOST_TIPS,
    label,
    line_style,
    new_figure,
    png,
    svg,
    tips,
    with_style,
)


@with_style
def small() -> Figure:
    figure = new_figure(2, 2)
    figure.subplots().plot([1, 2], [1, 2], **line_style(0, 2))
    return figure


def test_a_figure_is_drawn_to_the_same_bytes_twice() -> None:
    assert png(small()) == png(small())
    assert svg(small(), name="a", title="t") == svg(small(), name="a", title="t")


def test_svg_is_well_formed_and_its_ids_carry_the_name_of_the_figure() -> None:
    text = svg(small(), name="spectrum", title="a title")
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == "a title"
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    assert all(each.startswith("spectrum-") for each in ids)
    assert set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text)) <= ids


def test_drawing_leaves_the_process_wide_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    png(small())
    assert dict(matplotlib.rcParams) == before


def test_labels_hold_only_what_the_font_can_draw_and_fit() -> None:
    assert label("client-1") == "client-1"
    assert label("病\n$x$") == "□□$x$"
    assert label("hospital-of-the-very-long-name-17") == "hospital-of-th…name-17"


def test_lines_are_told_apart_without_colour() -> None:
    styles = [line_style(index, 10) for index in range(len(COLOURS) * len(DASHES))]
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == len(styles)
    assert len({style["marker"] for style in styles[: len(COLOURS)]}) == len(COLOURS)


def test_a_page_gives_its_own_colours_to_a_figure_without_a_ground() -> None:
    text = svg(small(), name="a", title="t")
    assert not re.findall(r"#(?:ffffff|1d2b33|55656f|e1e7ea|0072b2)", text)
    for variable in ("--ink", "--soft", "--grid", "--line-0"):
        assert f"var({variable})" in text
    assert INK not in text


def test_points_have_texts_that_are_no_markup() -> None:
    figure = new_figure(2, 2)
    axes = figure.subplots()
    names = ["<script>&", "b\x00\x1b"]
    tips(axes, np.array([1.0, 2.0]), np.array([1.0, 2.0]), names)
    root = ElementTree.fromstring(svg(figure, name="a", title="t"))
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert titles == ["<script>&", "b□□"]


@pytest.mark.parametrize(("points", "shown"), [(MOST_TIPS, MOST_TIPS), (MOST_TIPS + 1, 0)])
def test_a_line_of_many_points_has_none(points: int, shown: int) -> None:
    axes = new_figure(2, 2).subplots()
    tips(axes, np.arange(points), np.arange(points), ["x"] * points)
    assert len(axes.lines) == shown
