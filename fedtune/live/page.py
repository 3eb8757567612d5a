"""The live page as one document that asks for nothing but its own events, and the policy that keeps it so."""

from __future__ import annotations

import base64
import functools
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from fedtune.report.rendering import source


@dataclass(frozen=True)
class Page:
    """The document, and its Content-Security-Policy."""

    html: bytes
    policy: str


@functools.cache
def live_page() -> Page:
    """Return the page, whose style and script are inside it; the policy names both by their digests."""
    # The reports' style, so that a run looks alike while it goes on and when it is over.
    style = f"\n{source('style.css')}{template('page.css')}"
    script = f"\n{template('page.js')}"
    html = template("page.html").replace("<!-- style -->", style).replace("<!-- script -->", script)
    policy = {
        "default-src": "'none'",
        "script-src": digest_source(script),
        "style-src": digest_source(style),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, for which a browser would ask otherwise
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return Page(html.encode(), "; ".join(f"{name} {value}" for name, value in policy.items()))


def template(name: str) -> str:
    """Return a part of the page, from wherever the package is installed."""
    return (files("fedtune.live") / "templates" / name).read_text(encoding="utf-8")


def digest_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
