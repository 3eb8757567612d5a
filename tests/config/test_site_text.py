"""A site's file as it is written for those who are asked: it binds, whatever the answers hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.site import bind_site_text
from fedtune.config.site_text import SiteAnswers, device_text, site_text, toml_string, with_port

PLAIN = SiteAnswers("site-a", "fl.example.org:443", "identity", "base", "train.jsonl")


def test_a_file_with_nothing_but_what_is_needed_binds() -> None:
    site = bind_site_text(site_text(PLAIN), Path("site.toml"))
    assert site.link is not None
    assert (site.name, site.link.address, site.link.proxy, site.policy.max_rounds) == (
        *("site-a", "fl.example.org:443", "", None),
    )
    assert site.adapter is not None
    assert site.adapter.targets == ("all-linear",)


def test_every_answer_is_in_the_file() -> None:
    answers = SiteAnswers(
        *("site-a", "a:1", "/etc/id", "org/model", "rows/*.csv"),
        targets=["q_proj", "v_proj"],
        proxy="http://proxy:3128",
        proxy_credentials="proxy.secret",
        task="classification",
        fields={"text": "note", "label": "code"},
        max_rounds=7,
        hours="20:00-06:00",
        max_memory_gib=1.5,
        ask=True,
        scores="keep",
    )
    site = bind_site_text(site_text(answers), Path("site.toml"))
    assert site.link is not None
    assert (site.link.proxy, site.link.proxy_credentials) == ("http://proxy:3128", "proxy.secret")
    assert (site.model.task, dict(site.data.fields), site.policy.columns) == (
        *("classification", {"text": "note", "label": "code"}, ("note", "code")),
    )
    assert (site.policy.max_rounds, site.policy.hours, site.policy.max_memory_gib) == (7, "20:00-06:00", 1.5)
    assert (site.policy.ask, site.policy.scores) == (True, "keep")


def test_every_line_fits_a_screen() -> None:
    assert max(map(len, site_text(PLAIN).splitlines())) <= 120


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_no_text_breaks_out_of_its_string(text: str) -> None:
    answers = SiteAnswers("site-a", "a:1", text, text, text, fields={"text": text} if text else {})
    site = bind_site_text(site_text(answers), Path("site.toml"))
    assert site.link is not None
    assert (site.model.base, site.data.source, site.link.identity) == (text, text, text)


@pytest.mark.parametrize(("given", "address"), [("a", "a:9000"), ("a:1", "a:1"), ("", ""), ("[::1]", "[::1]:9000")])
def test_an_address_without_a_port_has_the_usual_one(given: str, address: str) -> None:
    assert with_port(given) == address


def test_a_device_and_a_site_quote_alike() -> None:
    assert toml_string('a"\x7f') == '"a\\"\\u007f"'
    assert 'base = "model"' in device_text("a", address="", model="model", data="data", identity="identity")
