"""How every figure looks, and how it becomes SVG for a page or PNG for a file: the same bytes every time."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

INK, MUTED, GRID, PAPER, FAINT = "#1d2b33", "#55656f", "#e1e7ea", "#ffffff", "#9db4c4"
CELL_INK, CELL_PAPER = "#1d2b32", "#fffffe"
"""Of numbers in coloured cells, whose ground is the same in a dark page."""

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#aa4488", "#b07d00", "#3f9fd6", "#1d2b33")
"""After Okabe and Ito: apart from each other under the common colour blindnesses; yellow tones darkened for paper."""
THEMED = {
    **{colour: f"var(--line-{index})" for index, colour in enumerate(COLOURS)},
    INK: "var(--ink)",
    MUTED: "var(--soft)",
    GRID: "var(--grid)",
    PAPER: "var(--card)",
    FAINT: "var(--faint)",
}
"""The page's own colours, light or dark, in place of those that a PNG has."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_TIPS = 120
"""Points of a line, or cells of a map by columns, that get a text of their own."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib, so every machine draws the same glyphs
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a client's name may hold a dollar sign
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.8,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "fedtune",
    "savefig.dpi": 160,
}


WITHOUT_PICTURES = (
    'no pictures: they need the package matplotlib; run pip install "fedtune[report]", then fedtune report RUN'
)
"""Said where a page is written without them: its numbers stand in tables."""


def can_draw() -> bool:
    """Return whether matplotlib is installed: a site needs none, and its pages are tables."""
    return find_spec("matplotlib") is not None


def with_style(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that draws: the style holds inside it and nowhere else."""

    @functools.wraps(draw)
    def draw_with_style(*args: P.args, **kwargs: P.kwargs) -> T:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_with_style


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, whose layout keeps labels from overlapping."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def whole_rounds(axes: Axes) -> None:
    """Mark the horizontal axis in whole rounds."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")


def line_style(index: int, points: int) -> dict[str, Any]:
    """Return colour, dash and marker of the index-th line; no two of the first 28 share colour and dash."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markevery": max(1, points // 12),
    }


def label(name: str, width: int = 22) -> str:
    """Return a name fit for a plot: at most `width` characters, each of which the font can draw."""
    short = name if len(name) <= width else name[: width - 8] + "…" + name[-7:]
    return "".join(char if _drawable(char) else "□" for char in short)


@functools.cache
def _drawable(char: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return char.isprintable() and get_font(findfont("DejaVu Sans")).get_char_index(ord(char)) != 0


def _fix_layout(figure: Figure) -> None:
    """Lay a figure out once, so that its PNG and its SVG agree and the second one costs no layout."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


@with_style
def png(figure: Figure) -> bytes:
    _fix_layout(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def tip(artist: Artist, text: str) -> None:
    """Have a page show a text when the pointer rests on a part of a figure."""
    artist.set_gid(f"tip{text.encode().hex()}")


def tip_text(hexadecimal: str) -> str:
    """Return the text of a tip, as markup may hold it."""
    return escape(printable_text(bytes.fromhex(hexadecimal).decode()))


def printable_text(text: str) -> str:
    """Return a text without control characters, which no XML may hold."""
    return "".join(char if char.isprintable() else "□" for char in text)


def tips(axes: Axes, x: NDArray[Any], y: NDArray[Any], texts: Sequence[str]) -> None:
    """Have a page show a text at each point: marks that are not seen carry them, as many as a page can bear."""
    if len(texts) <= MOST_TIPS:
        for across, up, text in zip(x, y, texts, strict=True):
            tip(axes.plot([across], [up], color=INK, marker="o", markersize=9, alpha=0.0, linestyle="")[0], text)


@with_style
def svg(figure: Figure, *, name: str, title: str) -> str:
    """Return the figure as an <svg> element for a page; `name` sets its ids apart from those of other figures.

    Its texts are outlines (`svg.fonttype`), and those of `tip` are escaped: no name of a client becomes markup.
    Colours are the page's variables, and the ground is transparent: light and dark pages have one figure.
    """
    _fix_layout(figure)
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda match: THEMED.get(match[0], match[0]), text)
    text = re.sub(r'<g id="tip([0-9a-f]*)">', lambda match: f"<g><title>{tip_text(match[1])}</title>", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    # The page sets the width; the view box keeps the proportions. Only the root has sizes in points.
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()
