from __future__ import annotations

from fedtune.link.settings import MIB, JoinSettings, LinkSettings


def test_defaults_bound_what_a_client_can_make_the_server_hold() -> None:
    settings = LinkSettings()
    assert settings.max_concurrent_uploads * settings.window_mib <= 64
    assert settings.inline_kib * 1024 < MIB  # the largest message
    assert settings.part_kib * 1024 < MIB
    assert settings.hold_s < settings.lease_s < settings.lost_s
    assert settings.health.startswith("127.0.0.1:")


def test_pauses_of_a_client_have_an_end() -> None:
    assert 0 < JoinSettings("host:1").backoff_s < JoinSettings("host:1").backoff_cap_s <= 60
