"""Addresses that a server listens on: their form, and whether they are free, before a run begins."""

from __future__ import annotations

import socket

from fedtune.errors import ConfigError, Fault
from fedtune.link.settings import LinkSettings

LARGEST_PORT = 65_535
LISTEN_HINT = "choose another port with --listen, or stop the server that uses it"
BELOW_1024 = (
    "ports below 1024 need AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit, or a TCP proxy in front "
    "(server/link/README.md)"
)
HEALTH_HINT = 'choose another one, or link.health = "" for none'


def check_addresses(settings: LinkSettings) -> None:
    """Check the addresses of the link and of its health.

    Raises:
        ConfigError: if one cannot be listened on.
    """
    check_address(settings.listen)
    check_free("link.listen", settings.listen, LISTEN_HINT)
    if settings.health:
        check_free("link.health", settings.health, HEALTH_HINT)


def check_address(address: str, *, key: str = "link.listen") -> None:
    """Check the form of an address: of a port above 65535 gRPC takes the lowest 16 bits.

    Raises:
        ConfigError: if host or port are missing, or the port does not exist.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > LARGEST_PORT:
        raise ConfigError(Fault(key, f"HOST:PORT, a port of at most {LARGEST_PORT}", repr(address)))


def check_free(key: str, address: str, hint: str) -> None:
    """Listen on an address for a moment.

    Raises:
        ConfigError: if it is taken, or not one of this machine.
    """
    host, _, port = address.rpartition(":")
    try:
        wanted = (host.strip("[]"), int(port))
        family, kind, protocol, _, own = socket.getaddrinfo(*wanted, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: connections that ended a minute ago do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(own)
            # Two sockets may be bound to one address with the option above, and one alone listens.
            probe.listen()
    except PermissionError as error:
        raise ConfigError(
            Fault(key, "an address that this process may use", f"{address!r} ({error})", BELOW_1024)
        ) from None
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(Fault(key, "an address that is free", f"{address!r} ({error})", hint)) from None
