from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.client.server_limits import RANGES, within_ranges
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.link_server import LinkServer
from tests.link.site import run_site, until

NUMBERS = st.integers(0, 2**32 - 1)


@given(st.fixed_dictionaries(dict.fromkeys(RANGES, NUMBERS)))
def test_whatever_a_server_says_a_site_takes_what_a_server_could_be_set_to(said: dict[str, int]) -> None:
    taken = within_ranges(pb.Limits(**said))
    for name, (least, most) in RANGES.items():
        assert least <= getattr(taken, name) <= most
        if least <= said[name] <= most:
            assert getattr(taken, name) == said[name]
    assert within_ranges(taken) == taken


def test_every_limit_of_the_schema_has_a_range() -> None:
    assert RANGES.keys() == {field.name for field in pb.Limits.DESCRIPTOR.fields}


def test_the_ranges_are_those_of_a_servers_settings() -> None:
    own = LinkSettings()
    plain = pb.Limits(
        part_bytes=own.part_kib * 1024,
        window_bytes=own.window_mib * 2**20,
        inline_bytes=own.inline_kib * 1024,
        hold_ms=int(1000 * own.hold_s),
        stall_ms=int(1000 * own.stall_s),
    )
    assert within_ranges(plain) == plain


@pytest.mark.guarantee("G2")
def test_a_client_holds_to_its_own_ranges(link: LinkServer) -> None:
    with run_site(link) as running:
        until(link, lambda: running.client._session.greeting)
        greeting = running.client._session.greeting
        assert greeting is not None
        assert greeting.limits == within_ranges(greeting.limits)
        assert greeting.limits.part_bytes == 16 * 1024
