"""The way from a site to its server: every step is taken that can be, and each that fails says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fedtune.deployment.site_check import STEPS, Check, check_site
from tests.deployment.test_join import SITE
from tests.link.ceremony import enroll_parties
from tests.link.federation import free_port
from tests.link.link_server import run_link_server
from tests.link.middlebox import listening, proxying, saying

NETWORK = ["name", "port", "TLS", "HTTP/2"]


def checks(
    site: Path | None,
    *,
    server: str | None = None,
    proxy: str | None = None,
    identity: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Check]:
    result = check_site(site, server=server, proxy=proxy, identity=identity, environment=environment or {})
    return {one.step: one for one in result}


def states(steps: Mapping[str, Check]) -> str:
    return " ".join(f"{name}={one.state}" for name, one in steps.items())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    enroll_parties(tmp_path)
    path = tmp_path / "site-a" / "site.toml"
    path.write_text(SITE)
    return path


def test_every_step_of_a_site_that_may_take_part(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running, listening(proxying("anna:geheim")) as box:
        path = tmp_path / "site-a" / "site.toml"
        path.write_text(SITE)
        address = f"localhost:{running.port}"
        straight = checks(path, server=address)
        assert [one.state for one in straight.values()] == ["ok"] * (len(STEPS) - 1)
        assert "server takes site-a: run 0123456789abcdef" in straight["server"].text
        assert "are valid until" in straight["clock"].text
        through = checks(path, server=address, proxy=f"http://anna:geheim@127.0.0.1:{box.port}")
        assert list(through) == list(STEPS)
        assert {one.state for one in through.values()} == {"ok"}
        assert "geheim" not in str(through)
        assert len(box.heads) == 3  # the walk, the question before a call, and the call
        # A revoked site passes every step but the last two.
        (tmp_path / "barred").write_text("site-a for the test\n")
        running.clock.now += 60
        barred = checks(path, server=address)
        assert (barred["HTTP/2"].state, barred["server"].state, barred["clock"].state) == ("ok", "failed", "skipped")
        assert "for the test" in barred["server"].text
    assert not (tmp_path / "site-a" / "state").exists()


def test_the_network_is_walked_before_a_site_is_enrolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_link_server(tmp_path / "care") as running:
        found = checks(None, server=f"localhost:{running.port}")
        named = checks(None, server=f"localhost:{running.port}", identity=running.places["site-a"])
    assert states(found) == (
        "settings=skipped identity=skipped name=ok port=ok TLS=ok HTTP/2=ok server=skipped clock=skipped"
    )
    assert named["server"].state == "ok"


def test_the_network_is_walked_with_an_identity_that_is_not_whole(site: Path) -> None:
    (site.parent / "identity" / "tls.key").unlink()
    with listening(saying(b"")) as box:
        found = checks(site, server=f"localhost:{box.port}")
    assert (found["identity"].state, found["port"].state, found["TLS"].state) == ("failed", "ok", "failed")
    assert "fedtune enroll request" in found["identity"].text
    site.write_text(SITE.replace('name = "site-a"', 'name = "site-x"'))
    assert found["server"].state == "skipped"


def test_a_name_other_than_the_enrolled_one_is_named(site: Path) -> None:
    site.write_text(SITE.replace('name = "site-a"', 'name = "site-x"'))
    assert "'site-a', as this site is enrolled; got 'site-x'" in checks(site)["identity"].text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_rank = 4", "max_rnk = 4", "policy.max_rnk"),
        ('address = "localhost:1"', 'address = "localhost"', "link.address: expected HOST:PORT"),
        ('[link]\naddress = "localhost:1"\n', "", "--server"),
        ("max_rank = 4", 'max_rnk = 4\nhours = "x"', "; and policy.hours"),
    ],
)
def test_settings_that_are_wrong_are_one_sentence(site: Path, old: str, new: str, words: str) -> None:
    site.write_text(SITE.replace(old, new))
    found = checks(site)
    assert (found["settings"].state, found["clock"].state) == ("failed", "skipped")
    assert words in found["settings"].text
    assert "\n" not in found["settings"].text


def test_a_proxy_of_the_environment_that_is_not_used_is_named(site: Path) -> None:
    shut = f"localhost:{free_port()}"
    found = checks(site, server=shut, environment={"HTTPS_PROXY": "http://anna:geheim@proxy:1"})
    assert 'link.proxy = "environment" would use' in found["port"].text
    assert "geheim" not in str(found)
    assert "HTTPS_PROXY" not in checks(site, server=shut)["port"].text
    with listening(saying(b"HTTP/1.1 403 Forbidden\r\n\r\n")) as box:
        found = checks(site, proxy="environment", environment={"HTTPS_PROXY": f"127.0.0.1:{box.port}"})
    assert "does not allow CONNECT to localhost:1" in found["proxy"].text
    assert "proxy" in states(found)
