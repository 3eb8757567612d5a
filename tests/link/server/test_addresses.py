from __future__ import annotations

import socket

import pytest

from fedtune.errors import ConfigError
from fedtune.link.server.addresses import check_addresses
from fedtune.link.settings import LinkSettings


def check(listen: str, health: str = "") -> None:
    check_addresses(LinkSettings(listen=listen, health=health))


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "0.0.0.0:0"])
def test_a_free_address_stays_free(address: str) -> None:
    check(address, health="127.0.0.1:0")
    check(address)


def test_a_port_that_is_taken_is_refused_for_link_and_health() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"link\.listen: expected an address that is free.*--listen"):
            check(address)
        with pytest.raises(ConfigError, match=r"link\.health: expected an address that is free.*for none"):
            check("127.0.0.1:0", health=address)
    check(address)


@pytest.mark.parametrize("address", ["9000", "127.0.0.1:65536", "127.0.0.1:http", "192.0.2.1:0", "no such host:1"])
def test_what_no_server_can_listen_on_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"link\.listen"):
        check(address)


def test_a_port_that_a_process_may_not_use_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ConfigError, match=r"may use; got '0\.0\.0\.0:443' .*CAP_NET_BIND_SERVICE"):
        check("0.0.0.0:443")
