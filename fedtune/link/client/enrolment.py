"""A site's half of an enrolment over the network: one call, repeated until a person has signed the request."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc

from fedtune.errors import ConfigError, Fault, FedtuneError, TemporaryError, WireError
from fedtune.link.client.channel import SPARED_HOSTS, TRANSIENT_STATUS
from fedtune.link.client.route import proxy_fault, walk
from fedtune.link.pki import enrollment
from fedtune.link.pki.certificates import csr_key, load_signing_key, load_tls_key, spiffe_parts
from fedtune.link.pki.identity import CERTIFICATE, SIGN_KEY, TLS_KEY, Identity, read_secret
from fedtune.link.pki.invitations import Code
from fedtune.link.pki.signing import fingerprint, public_bytes
from fedtune.link.rejections import describe, one_line
from fedtune.link.settings import KIB, JoinSettings
from fedtune.store.files import remove, write_bytes
from fedtune.wire.v1 import link_pb2 as pb

REQUEST = "request.json"
"""In the folder of the keys: the same request each time, so that its fingerprint stays the one that was read out."""
CALL_S = 20.0
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 600.0
UNREACHED_PAUSE_S = 10.0
ADVICE = {
    pb.INVITATION_UNKNOWN: "ask the coordinator for a new code: this one is not known there, or was replaced",
    pb.INVITATION_ENDED: "ask the coordinator for a new code",
    pb.INVITATION_USED: "if that was not this site, warn the coordinator; else use the folder of keys that asked first",
    pb.REQUEST_REJECTED: "ask the coordinator why, and then for a new code",
}


def own_request(folder: Path, *, name: str, org: str) -> bytes:
    """Return the request of a folder's keys, which are made if it has none; an earlier one stays the same.

    Raises:
        ConfigError: if a name is malformed, or a key cannot be used.
    """
    path = folder / REQUEST
    try:
        data = path.read_bytes()
        earlier = enrollment.read_request(data)
        key, tls = load_signing_key(read_secret(folder / SIGN_KEY)), load_tls_key(read_secret(folder / TLS_KEY))
        is_own = (public_bytes(key), tls.public_key()) == (earlier.key, csr_key(earlier.csr))
        if is_own and (earlier.name, earlier.org, earlier.role) == (name, org, "client"):
            return data
    except (OSError, ValueError, FedtuneError):
        pass
    data = enrollment.make_request(folder, name=name, org=org, role="client")
    write_bytes(path, data)
    return data


def enrolment_channel(code: Code, proxy: str = "") -> grpc.Channel:
    """Return a channel to the service of a code; it trusts servers of the code's own CA alone."""
    if proxy:
        # gRPC would go past it for the hosts of `no_proxy`, without a word.
        os.environ[SPARED_HOSTS] = ""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", enrollment.MAX_BUNDLE_BYTES + KIB),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http_proxy", proxy) if proxy else ("grpc.enable_http_proxy", 0),
    ]
    return grpc.secure_channel(code.address, grpc.ssl_channel_credentials(code.ca), options=options)


def call_once(code: Code, request: bytes, channel: grpc.Channel) -> pb.EnrolReply:
    """Hand in a request; see `enrol`."""
    enrol: grpc.UnaryUnaryMultiCallable[pb.EnrolRequest, pb.EnrolReply] = channel.unary_unary(
        "/fedtune.v1.Enrolment/Enrol", pb.EnrolRequest.SerializeToString, pb.EnrolReply.FromString
    )
    identifier, signature = code.prove(request)
    return enrol(pb.EnrolRequest(invitation=identifier, request=request, signature=signature), timeout=CALL_S)


def enrol(
    code: Code,
    folder: Path,
    *,
    proxy: str = "",
    wait: Callable[[float], bool],
    say: Callable[[str], None] = lambda text: None,
    now: Callable[[], float],
) -> Identity | None:
    """Ask for an enrolment until it is signed, and install what comes back; None if `wait` gives up before.

    Args:
        code: of the invitation.
        folder: of this site's keys.
        proxy: HTTP proxy through which the site dials; empty: none.
        wait: waits so many seconds, and returns whether to ask again.
        say: receives a sentence when something has changed.
        now: seconds since 1970.

    Raises:
        ConfigError: if the code cannot be used, with the reason.
        TemporaryError: if the service cannot be reached.
        WireError: if what comes back is not what it must be.
    """
    check_vacant(folder, code)
    request = own_request(folder, name=code.name, org=code.org)
    said, waiting = "", False

    def say_once(text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            say(text)

    # Before gRPC meets it, which would try a wrong password several times.
    if (fault := proxy_fault(JoinSettings(code.address, proxy=proxy))) is not None:
        raise no_answer(code, fault.reason, permanent=fault.permanent)
    with enrolment_channel(code, proxy) as channel:
        while True:
            try:
                reply = call_once(code, request, channel)
            except grpc.RpcError as error:
                reason = describe_failure(code, error, proxy)
                # A service that has answered before is restarted, and the request is safe in its queue.
                if not waiting:
                    raise reason from None
                say_once(f"{reason.faults[0].got}; trying again")
                if not wait(UNREACHED_PAUSE_S):
                    return None
                continue
            match reply.WhichOneof("what"):
                case "bundle":
                    return install(code, folder, reply.bundle, now=int(now()))
                case "refusal" if not reply.refusal.passing:
                    if reply.refusal.reason == pb.REQUEST_REJECTED:
                        # That one has its answer: with a new code these keys ask with another one.
                        remove(folder / REQUEST)
                    hint = ADVICE.get(reply.refusal.reason, "ask the coordinator")
                    raise ConfigError(Fault("code", "one that enrols this site", describe(reply.refusal), hint))
                case "refusal":
                    say_once(f"put off: {describe(reply.refusal)}")
                case _:
                    waiting = True
                    say_once("the request lies in the coordinator's queue; waiting until it is signed")
            pause = max(MIN_PAUSE_S, min(MAX_PAUSE_S, reply.pending.retry_after_ms / 1000 or UNREACHED_PAUSE_S))
            if not wait(pause):
                return None


def check_vacant(folder: Path, code: Code) -> None:
    """Refuse a code for another federation or name than the one that a folder is enrolled under.

    Raises:
        ConfigError: if it is for another.
    """
    ca, root = (folder / name for name in ("ca.crt", "root.pub"))
    if ca.exists() and root.exists() and fingerprint(ca.read_bytes() + root.read_bytes()) != code.anchors:
        hint = "give a new folder with --identity, or compare fingerprints and remove ca.crt and root.pub there"
        raise ConfigError(Fault("code", f"the federation that {folder} is enrolled in", "a code of another", hint))
    with suppress(OSError, ValueError):
        _, org, name = spiffe_parts((folder / CERTIFICATE).read_bytes())
        # The CA would refuse a key that has another name already, and this site wait for ever.
        if (name, org) != (code.name, code.org):
            got = f"one for {code.name} of {code.org}"
            raise ConfigError(Fault("code", f"one for {name} of {org}", got, "give a new folder with --identity"))


def describe_failure(code: Code, error: grpc.RpcError, proxy: str) -> ConfigError:
    """Return why a call has failed, in words."""
    status, details = error.code(), one_line(error.details() or "")
    if status not in TRANSIENT_STATUS:
        got = f"{code.address}: {status.name}: {details}"
        return ConfigError(Fault("code", "an enrolment service", got, "ask the coordinator for a new code"))
    if "CERTIFICATE_VERIFY_FAILED" in details:
        got, hint = f"{code.address} shows another certificate", "something between may open TLS: ask the network team"
        return ConfigError(Fault("code", "the server of this code's federation", got, hint))
    steps = walk(None, JoinSettings(code.address, proxy=proxy))
    reason = next((step.text for step in steps if not step.ok), details)
    return no_answer(code, reason, permanent=False)


def no_answer(code: Code, reason: str, *, permanent: bool) -> ConfigError:
    """Return the error of a service that gives no answer."""
    got, hint = f"no answer from {code.address}: {reason}", "then run the same command again"
    kind = ConfigError if permanent else TemporaryError
    return kind(Fault("code", "the coordinator's enrolment service", got, hint))


def install(code: Code, folder: Path, bundle: bytes, *, now: int) -> Identity:
    """Install a bundle of the code's own federation.

    Raises:
        WireError: if it is malformed, or of another federation.
        ConfigError: if it is for other keys.
    """
    _, ca, root, _ = enrollment.unpack_bundle(bundle)
    if fingerprint(ca + root) != code.anchors:
        raise WireError("bundle: expected the anchors of the code's federation; got others; ask the coordinator")
    return enrollment.accept_bundle(folder, bundle, now=now)
