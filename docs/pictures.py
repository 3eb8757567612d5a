"""Draws pictures of README and site: the terminal of `fedtune demo`, the report that it writes, and its live page.

Run from the repository's root, with Chromium (or CHROMIUM) installed: python -m docs.pictures
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from fedtune.live.directory import open_directory
from fedtune.live.server import serve_live
from tests.live.chromium import browse

IMAGES = Path(__file__).parent / "images"
COLUMNS, PAGE = 100, (1100, 1040)


def record(command: list[str], folder: Path) -> str:
    """Run a command on a terminal of its own, and return everything that it wrote."""
    main, side = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    with subprocess.Popen(command, cwd=folder, stdin=side, stdout=side, stderr=side, env=environment):
        os.close(side)
        parts = []
        try:
            while part := os.read(main, 65536):
                parts.append(part)
        except OSError:  # Linux reports the end of a terminal as an error
            pass
    os.close(main)
    return b"".join(parts).decode()


def screen(written: str) -> str:
    """Return what is left on a terminal: the live display moves up and erases lines, which nothing else here does."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token == "\x1b[1A":
            row = max(0, row - 1)
        elif (token != "\r" and not token.endswith(("l", "h"))) or token.isprintable():
            lines[row] += token
    return "\n".join(line.rstrip() for line in lines).rstrip()


def draw_terminal(text: str, path: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(text))
        svg = console.export_svg(title="fedtune demo", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # would ask a font server
    path.write_text(svg.replace("Fira Code", "DejaVu Sans Mono, Consolas, Menlo"))


def draw_page(url: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "report.png"
        subprocess.run(
            [
                os.environ.get("CHROMIUM", "chromium"),
                *(
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-quic",
                    "--no-first-run",
                    "--hide-scrollbars",
                ),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                f"--user-data-dir={folder}/profile",
                f"--window-size={PAGE[0]},{PAGE[1]}",
                f"--screenshot={shot}",
                url,
            ],
            check=True,
            capture_output=True,
        )
        save_small(shot, path)


def draw_live_page(run: Path, path: Path) -> None:
    """Draw the live page of a run once it is filled, which is after it was loaded."""
    with tempfile.TemporaryDirectory() as name, serve_live(open_directory(run), port=0) as address:
        with browse(Path(name)) as browser:
            browser.call("Emulation.setScrollbarsHidden", hidden=True)
            browser.open(address.url, width=PAGE[0], height=PAGE[1])
            browser.until("document.getElementById('state').textContent.includes('finished')")
            browser.screenshot(Path(name) / "live.png", whole=False)
        save_small(Path(name) / "live.png", path)


def save_small(shot: Path, path: Path) -> None:
    with Image.open(shot) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = record([str(Path(sys.executable).parent / "fedtune"), "demo"], folder)
        lines = screen(written).splitlines()
        draw_terminal("\n".join(["$ fedtune demo", *lines]), IMAGES / "demo.svg")
        run = folder / "runs" / "demo"
        draw_page((run / "report.html").as_uri(), IMAGES / "report.png")
        draw_live_page(run, IMAGES / "live.png")


if __name__ == "__main__":
    main()
