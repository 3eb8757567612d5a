"""From a site to its server: the channel, the calls on it, and in words why no connection comes about."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from fedtune.link.pki.identity import Identity
from fedtune.link.settings import MIB, JoinSettings
from fedtune.wire.v1 import link_pb2 as pb

CONNECT_S = 10.0

PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,  # a server with too many calls at once says so, too
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
    }
)
"""After these the same call may succeed; after any other something must be changed."""


@dataclass(frozen=True)
class Calls:
    """The calls of the link on one channel."""

    hello: Callable[..., pb.HelloReply]
    next: Callable[..., pb.NextReply]
    fetch: Callable[..., Iterator[pb.Chunk]]
    submit: Callable[..., pb.SubmitReply]
    push: Callable[..., Iterator[pb.PushAck]]
    close: Callable[[], None]


def host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def dial(identity: Identity, settings: JoinSettings) -> Calls:
    """Return the calls of the server at an address; nothing is connected before the first."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", 2 * MIB),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", int(1000 * settings.backoff_cap_s)),
        ("grpc.enable_retries", 0),  # we try again ourselves, knowing what for
        ("grpc.http2.lookahead_bytes", 4 * MIB),
        ("grpc.use_local_subchannel_pool", 1),  # two clients in one process share no connection
        ("grpc.enable_http_proxy", 0),
    ]
    if settings.server_name:
        options.append(("grpc.ssl_target_name_override", settings.server_name))
    if settings.proxy:
        options = [one for one in options if one[0] != "grpc.enable_http_proxy"]
        options.append(("grpc.http_proxy", settings.proxy))
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.tls_key, identity.certificate)
    channel = grpc.secure_channel(settings.address, credentials, options=options)
    made: dict[str, Any] = {}
    for method in pb.DESCRIPTOR.services_by_name["Link"].methods:
        make = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, True): channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        made[method.name.lower()] = make(
            f"/fedtune.v1.Link/{method.name}",
            request_serializer=getattr(pb, method.input_type.name).SerializeToString,
            response_deserializer=getattr(pb, method.output_type.name).FromString,
        )
    return Calls(**made, close=channel.close)


@dataclass(frozen=True)
class Diagnosis:
    """Why there is no connection."""

    reason: str
    permanent: bool
    """Whether trying again cannot help."""


def diagnose(identity: Identity, settings: JoinSettings) -> Diagnosis:
    """Return which step to the server fails: its name, its port, or TLS in either direction.

    gRPC answers a dead port and a refused certificate alike; this looks for itself.
    """
    host, port = host_of(settings.address), settings.address.rpartition(":")[2]
    if settings.proxy:
        return Diagnosis(f"no connection to {settings.address} through {settings.proxy}", permanent=False)
    try:
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        reason = f"expected a host that is known; got {host!r} ({error.strerror or error}); check link.address"
        return Diagnosis(reason, permanent=False)
    try:
        plain = socket.create_connection((str(address[0]), int(port)), timeout=CONNECT_S)
    except OSError as error:
        reason = f"nobody listens on {settings.address} ({error.strerror or error})"
        return Diagnosis(reason, permanent=False)
    with plain:
        return handshake(plain, identity, settings.server_name or host)


def handshake(plain: socket.socket, identity: Identity, name: str) -> Diagnosis:
    """Return what comes of a TLS handshake."""
    context = ssl.create_default_context(cadata=identity.ca.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.folder / "tls.crt", identity.folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(plain, server_hostname=name) as tls:
            tls.settimeout(1.0)
            try:
                if not tls.recv(
                    1
                ):  # in TLS 1.3 the server judges our certificate after the handshake, and says nothing
                    reason = (
                        "the server closed the connection: it does not take this site's certificate, or has too many "
                        "connections; check that both were enrolled by the same CA"
                    )
                    return Diagnosis(reason, permanent=False)  # a network may cut here too
            except TimeoutError:
                pass
    except ssl.SSLCertVerificationError as error:
        reason = (
            f"expected a server certificate of this federation for {name!r}; got another ({error.verify_message}); "
            "check link.address, or set link.server_name to a name in the certificate"
        )
        return Diagnosis(reason, permanent=True)
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or "") or "CERTIFICATE" in (error.reason or ""):
            reason = (
                f"the server does not take this site's certificate ({(error.reason or '').lower().replace('_', ' ')}); "
                "check that both were enrolled by the same CA and that the dates are right"
            )
            return Diagnosis(reason, permanent=True)
        return Diagnosis(f"TLS failed ({error.reason or error})", permanent=False)
    except OSError as error:
        return Diagnosis(f"the connection broke off ({error.strerror or error})", permanent=False)
    return Diagnosis("TLS succeeds, but the server does not answer calls", permanent=False)
