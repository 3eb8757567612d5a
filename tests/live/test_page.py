from __future__ import annotations

import base64
import re
from hashlib import sha256

from fedtune.live.page import live_page, template


def test_the_page_is_whole_and_asks_for_nothing_elsewhere() -> None:
    html = live_page().html.decode()
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!data:,)|@import|url\(""", html)
    # The one address in it names the language of its picture.
    assert set(re.findall(r"https?://[^\"' )]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "<!-- s" not in html


def test_the_policy_allows_this_style_and_script_alone() -> None:
    page = live_page()
    html = page.html.decode()
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert "unsafe" not in page.policy
    assert " style=" not in html  # which the policy would ignore


def test_the_script_puts_texts_into_the_page_as_texts() -> None:
    script = template("page.js")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc", script)


def test_everything_the_script_looks_for_is_in_the_page() -> None:
    html, script = template("page.html"), template("page.js")
    ids = set(re.findall(r'id="([\w-]+)"', html))
    assert set(re.findall(r'at\("([\w-]+)"\)', script)) <= ids


def test_a_screen_reader_is_given_names_for_what_it_cannot_see() -> None:
    html = template("page.html")
    assert 'role="img" aria-labelledby="chart-text"' in html
    assert html.count('role="region" aria-label=') == html.count('class="scroll"')
    assert 'id="state" role="status"' in html
