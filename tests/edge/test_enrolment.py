from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.reading import read
from fedtune.config.site import bind_site
from fedtune.config.site_text import device_text, with_port
from fedtune.edge.enrolment import (
    accept,
    anchors_fingerprint,
    check_ready,
    earlier_request,
    known_name,
    missing,
    own_anchors,
    places,
    proposed_name,
    request,
    write_site,
)
from fedtune.errors import ConfigError
from fedtune.link.pki import authority
from fedtune.link.pki.roster import NAME
from tests.edge.bundles import write_bundle
from tests.link.ceremony import enroll_parties

NOW = int(time.time())


def wanting(site: Path, **options: str) -> list[str]:
    return [fault.path or fault.expected.partition(" in ")[0] for fault in missing(site, **options)]


def test_a_request_that_is_asked_for_again_keeps_its_fingerprint(tmp_path: Path) -> None:
    """The operator compares the one that was sent first with what the owner reads out now."""
    where = places(tmp_path / "site.toml")
    first = request(where, name="kitchen", org="kitchen")
    assert request(where, name="kitchen", org="kitchen") == first
    assert request(where, name="kitchen", org="home").fingerprint != first.fingerprint
    for key in ("tls.key", "sign.key"):
        before = request(where, name="kitchen", org="home")
        (where.identity / key).unlink()
        after = request(where, name="kitchen", org="home")
        assert after.fingerprint != before.fingerprint
        assert earlier_request(where, "kitchen") == after
    other = tmp_path / "kitchen.request.json"
    other.rename(tmp_path / "hall.request.json")
    assert earlier_request(where, "hall") is None


def test_a_device_is_enrolled_and_each_step_removes_what_is_missing(tmp_path: Path) -> None:
    site, ca = tmp_path / "device" / "site.toml", tmp_path / "ca"
    authority.create_authority(ca, "care", now=NOW)
    where = places(site)
    file = f"this device's file {site}"
    assert wanting(site) == ["keys of this device", "a certificate of this device", file]
    asked = request(where, name="kitchen", org="kitchen")
    assert known_name(where) == "kitchen"
    again = earlier_request(where, "kitchen")
    assert again is not None
    assert again.fingerprint == asked.fingerprint
    assert wanting(site) == ["a certificate of this device", file]
    bundle = authority.sign_request(ca, asked.data, now=NOW)
    accepted = accept(where, bundle, now=NOW)
    assert (accepted.name, accepted.federation) == ("kitchen", "care")
    assert own_anchors(where) == anchors_fingerprint(bundle)
    assert wanting(site) == [file]
    assert write_site(where, "kitchen", address="")
    assert not write_site(where, "other", address="elsewhere")  # what is there stays
    assert wanting(site) == ["link.address", "model.base", "data.source"]
    assert wanting(site, address="here:1") == ["model.base", "data.source"]
    (site.parent / "data").mkdir()
    assert wanting(site, address="here:1") == ["model.base"]
    write_bundle(site.parent / "model")
    site.write_text(site.read_text().replace('address = ""', 'address = "here:1"'))
    assert wanting(site) == []
    check_ready(site)
    settings = bind_site(site)
    assert (settings.name, settings.root) == ("kitchen", site.parent)


def test_what_is_missing_first_is_one_line_with_the_rest_in_short(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ready(tmp_path / "site.toml")
    text = str(caught.value)
    assert text.startswith(
        f"expected keys of this device in {tmp_path}/identity; got none; fedtune-edge enroll (then 2"
    )
    assert "\n" not in text


def test_the_bundle_of_another_device_and_of_another_federation_change_nothing(tmp_path: Path) -> None:
    parties = enroll_parties(tmp_path / "one")
    other = tmp_path / "two" / "ca"
    authority.create_authority(other, "other", now=NOW)
    where = places(tmp_path / "device" / "site.toml")
    with pytest.raises(ConfigError, match=r"fedtune-edge enroll first"):
        accept(where, b"", now=NOW)
    asked = request(where, name="kitchen", org="o")
    foreign = request(places(tmp_path / "x" / "site.toml"), name="garden", org="o")
    with pytest.raises(ConfigError, match="one of another, 'garden'; accept the one that was made from this folder"):
        accept(where, authority.sign_request(parties["ca"], foreign.data, now=NOW), now=NOW)
    accept(where, authority.sign_request(parties["ca"], asked.data, now=NOW), now=NOW)
    before = {path.name: path.read_bytes() for path in where.identity.iterdir()}
    with pytest.raises(ConfigError, match="the CA that is pinned in"):
        accept(where, authority.sign_request(other, asked.data, now=NOW), now=NOW)
    assert {path.name: path.read_bytes() for path in where.identity.iterdir()} == before


def test_keys_may_lie_elsewhere_and_a_file_that_is_wrong_is_left_to_its_reader(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('[link]\nidentity = "keys"\n')
    assert places(site).identity == tmp_path / "keys"
    assert places(site, Path("/k")).identity == Path("/k")
    site.write_text("[link\n")
    assert places(site).identity == tmp_path / "identity"
    assert wanting(site) == ["keys of this device", "a certificate of this device"]
    site.write_text("link = 3\nmodel = 4\n")
    assert wanting(site) == ["keys of this device", "a certificate of this device"]


def test_globs_and_paths_that_are_there_are_not_missing(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('[model]\nbase = "b"\n[data]\nsource = "d/*.txt"\n')
    assert wanting(site)[2:] == ["model.base"]


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_a_file_is_read_as_it_was_meant(
    tmp_path_factory: pytest.TempPathFactory, model: str, data: str, host: str
) -> None:
    clean = [text.encode("utf-8", "ignore").decode() for text in (model, data, host)]
    path = tmp_path_factory.mktemp("site") / "site.toml"
    text = device_text("kitchen", address=clean[2], model=clean[0], data=clean[1], identity="identity")
    path.write_text(text, newline="")
    table = read(path)[3]
    assert (table["model"]["base"], table["data"]["source"], table["link"]["address"]) == tuple(clean)


def test_names_and_addresses_have_defaults() -> None:
    assert NAME.fullmatch(proposed_name())
    assert proposed_name() != proposed_name()
    assert [with_port(text) for text in ("h", "h:1", "", "h:")] == ["h:9000", "h:1", "", "h::9000"]
