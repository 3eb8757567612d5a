"""From a client to its server: the channel, the calls on it, and a diagnosis in words when there is no connection."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, fields

import grpc

from fedtune.link.pki.identity import Identity
from fedtune.link.settings import KIB, MIB, JoinSettings
from fedtune.wire.v1 import link_pb2 as pb

CONNECT_S = 10.0
SILENCE_S = 1.0
"""After a TLS handshake, within which a server that rejects the client's certificate closes the connection."""
OUTDATED = frozenset({9, 10})
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED: what a renewal at the server mends."""
SERVICE = "/fedtune.v1.Link"

TRANSIENT_STATUS = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        # Also what a server with too many calls at once answers.
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
    }
)
"""After these the same call may succeed; after any other something must be changed."""


@dataclass
class LinkStub:
    """The calls of the link on one channel, which `redial` replaces."""

    hello: grpc.UnaryUnaryMultiCallable[pb.HelloRequest, pb.HelloReply]
    next: grpc.UnaryUnaryMultiCallable[pb.NextRequest, pb.NextReply]
    fetch: grpc.UnaryStreamMultiCallable[pb.FetchRequest, pb.Chunk]
    submit: grpc.UnaryUnaryMultiCallable[pb.SubmitRequest, pb.SubmitReply]
    push: grpc.StreamStreamMultiCallable[pb.PushPart, pb.PushAck]
    close: Callable[[], None]

    def redial(self, newer: LinkStub) -> None:
        """Use the channel of another stub from now on; calls under way on this one's end as if the network had cut."""
        close = self.close
        for field in fields(self):
            setattr(self, field.name, getattr(newer, field.name))
        close()


def link_stub(channel: grpc.Channel) -> LinkStub:
    """Return the calls of the schema's service `Link`, which a test compares with the schema.

    Not generated with the messages: what grpcio-tools writes is untyped, and would have `wire` import gRPC.
    """
    return LinkStub(
        hello=channel.unary_unary(f"{SERVICE}/Hello", pb.HelloRequest.SerializeToString, pb.HelloReply.FromString),
        next=channel.unary_unary(f"{SERVICE}/Next", pb.NextRequest.SerializeToString, pb.NextReply.FromString),
        fetch=channel.unary_stream(f"{SERVICE}/Fetch", pb.FetchRequest.SerializeToString, pb.Chunk.FromString),
        submit=channel.unary_unary(f"{SERVICE}/Submit", pb.SubmitRequest.SerializeToString, pb.SubmitReply.FromString),
        push=channel.stream_stream(f"{SERVICE}/Push", pb.PushPart.SerializeToString, pb.PushAck.FromString),
        close=channel.close,
    )


def host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def lookahead_bytes(max_down_kib_s: float | None) -> int:
    """Return how many bytes of a download may be on their way before they are read."""
    # 4 MiB in each round trip of 100 ms are 40 MB/s: the receive window must not be what limits a download.
    unlimited = 4 * MIB
    # What is not read yet has been received all the same: a second's worth, but no less than HTTP/2 begins with.
    return unlimited if max_down_kib_s is None else min(unlimited, max(64 * KIB, int(max_down_kib_s * KIB)))


def dial(identity: Identity, settings: JoinSettings) -> LinkStub:
    """Return the calls of the server at an address; nothing is connected before the first."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", 2 * MIB),
        # Below the idle limits of common proxies and NATs.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        # gRPC's own cap of two minutes would hide a server that is back.
        ("grpc.max_reconnect_backoff_ms", int(1000 * settings.backoff_cap_s)),
        # gRPC would repeat a call blindly; `Backoff` knows where a transfer goes on.
        ("grpc.enable_retries", 0),
        ("grpc.http2.lookahead_bytes", lookahead_bytes(settings.max_down_kib_s)),
        # Its estimate of the line would open the window further than a limit allows.
        ("grpc.http2.bdp_probe", int(settings.max_down_kib_s is None)),
        ("grpc.use_local_subchannel_pool", 1),  # two clients in one process share no connection
    ]
    if settings.server_name:
        options.append(("grpc.ssl_target_name_override", settings.server_name))
    # Without a setting, proxies of the environment are ignored: the site's own file says where its data go.
    options.append(("grpc.http_proxy", settings.proxy) if settings.proxy else ("grpc.enable_http_proxy", 0))
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.tls_key, identity.certificate)
    return link_stub(grpc.secure_channel(settings.address, credentials, options=options))


@dataclass(frozen=True)
class Diagnosis:
    """Why there is no connection."""

    reason: str
    permanent: bool
    """Whether trying again cannot help."""


def diagnose(identity: Identity, settings: JoinSettings) -> Diagnosis:
    """Return which step to the server fails: its name, its port, or TLS in either direction.

    gRPC reports a closed port and a rejected certificate with the same status, so this opens a connection of its own.
    """
    host, port = host_of(settings.address), settings.address.rpartition(":")[2]
    # A connection of our own would show the way to the proxy alone.
    if settings.proxy:
        return Diagnosis(f"no connection to {settings.address} through {settings.proxy}", permanent=False)
    try:
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        reason = f"expected a host that is known; got {host!r} ({error.strerror or error}); check link.address"
        return Diagnosis(reason, permanent=False)
    try:
        connection = socket.create_connection((str(address[0]), int(port)), timeout=CONNECT_S)
    except OSError as error:
        reason = f"no server listens on {settings.address} ({error.strerror or error})"
        return Diagnosis(reason, permanent=False)
    with connection:
        return diagnose_tls(connection, identity, settings.server_name or host)


def diagnose_tls(connection: socket.socket, identity: Identity, name: str) -> Diagnosis:
    """Return how a TLS handshake on a connection ends."""
    context = ssl.create_default_context(cadata=identity.ca.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.folder / "tls.crt", identity.folder / "tls.key")
    # gRPC refuses a handshake that does not offer HTTP/2, and this one would fail where a real call succeeds.
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=name) as tls:
            tls.settimeout(SILENCE_S)
            try:
                # In TLS 1.3 the server verifies our certificate after the handshake has succeeded here: the end of the
                # connection is all that a rejected client sees.
                if not tls.recv(1):
                    reason = (
                        "the server closed the connection: it rejects this site's certificate, or has too many "
                        "connections; check that both were enrolled by the same CA"
                    )
                    return Diagnosis(reason, permanent=False)  # a network may cut here too
            except TimeoutError:
                pass
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in OUTDATED:
            reason = (
                f"the server's certificate is not valid now ({error.verify_message}); its coordinator must renew it"
            )
            return Diagnosis(f"{reason}, or check this clock", permanent=False)
        reason = (
            f"expected a server certificate of this federation for {name!r}; got another ({error.verify_message}); "
            "check link.address, or set link.server_name to a name in the certificate"
        )
        return Diagnosis(reason, permanent=True)
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or "") or "CERTIFICATE" in (error.reason or ""):
            reason = (
                f"the server rejects this site's certificate ({(error.reason or '').lower().replace('_', ' ')}); "
                "check that both were enrolled by the same CA and that the dates are right"
            )
            return Diagnosis(reason, permanent=True)
        return Diagnosis(f"TLS failed ({error.reason or error})", permanent=False)
    except OSError as error:
        return Diagnosis(f"the connection broke off ({error.strerror or error})", permanent=False)
    return Diagnosis("TLS succeeds, but the server does not answer calls", permanent=False)
