"""From a client to its server: the channel, and the calls on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields

import grpc

from fedtune.link.pki.identity import Identity
from fedtune.link.settings import KIB, MIB, JoinSettings
from fedtune.wire.v1 import link_pb2 as pb

SERVICE = "/fedtune.v1.Link"
SPARED_HOSTS = "no_grpc_proxy"
"""Variable with the hosts for which gRPC uses no proxy; it counts before `no_proxy`."""

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
    renew: grpc.UnaryUnaryMultiCallable[pb.RenewRequest, pb.EnrolReply]
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
        renew=channel.unary_unary(f"{SERVICE}/Renew", pb.RenewRequest.SerializeToString, pb.EnrolReply.FromString),
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
    if settings.proxy:
        # gRPC would go past it for the hosts of `no_proxy`, without a word.
        os.environ[SPARED_HOSTS] = ""
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.tls_key, identity.certificate)
    return link_stub(grpc.secure_channel(settings.address, credentials, options=options))
