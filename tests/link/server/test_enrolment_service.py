from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fedtune.errors import ConfigError
from fedtune.link.client.enrolment import call_once, enrolment_channel, own_request
from fedtune.link.pki.invitations import Code
from fedtune.link.server import enrolment_service
from fedtune.link.settings import EnrolmentSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.enrolment_office import Office, enrolment_office


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    monkeypatch.setattr(enrolment_service, "PENALTY_S", 0.0)
    with enrolment_office(tmp_path) as office:
        yield office


def call(code: Code, channel: grpc.Channel, **changes: bytes) -> pb.EnrolReply:
    enrol: grpc.UnaryUnaryMultiCallable[pb.EnrolRequest, pb.EnrolReply] = channel.unary_unary(
        "/fedtune.v1.Enrolment/Enrol", pb.EnrolRequest.SerializeToString, pb.EnrolReply.FromString
    )
    given = {"invitation": bytes(16), "request": b"r", "signature": bytes(64), **changes}
    return enrol(pb.EnrolRequest(**given), timeout=20)


@pytest.mark.guarantee("G2")
def test_a_flood_of_guesses_is_cut_off_and_a_huge_request_is_not_taken(office: Office) -> None:
    code = office.invite()
    with enrolment_channel(code) as channel:
        reasons = [call(code, channel).refusal.reason for _ in range(40)]
        with pytest.raises(grpc.RpcError) as caught:
            call(code, channel, request=bytes(200_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reasons[:29] == [pb.INVITATION_UNKNOWN] * 29
    assert set(reasons[31:]) == {pb.TOO_MANY_CALLS}
    # A code is no guess, but of one source the minute is over for all: the site asks again later.
    with enrolment_channel(code) as channel:
        reply = call_once(code, own_request(office.folder / "a", name="anna", org="a"), channel)
    assert reply.refusal.passing


def test_the_service_has_the_call_of_the_schema_alone_and_no_call_of_the_link(office: Office) -> None:
    (method,) = pb.DESCRIPTOR.services_by_name["Enrolment"].methods
    assert (method.name, method.client_streaming, method.server_streaming) == ("Enrol", False, False)
    with enrolment_channel(office.invite()) as channel:
        hello: grpc.UnaryUnaryMultiCallable[pb.HelloRequest, pb.HelloReply] = channel.unary_unary(
            "/fedtune.v1.Link/Hello", pb.HelloRequest.SerializeToString, pb.HelloReply.FromString
        )
        with pytest.raises(grpc.RpcError) as caught:
            hello(pb.HelloRequest(), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_address_that_is_taken_is_said(office: Office, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = EnrolmentSettings(listen=f"127.0.0.1:{taken.getsockname()[1]}")
        second = enrolment_office(tmp_path / "second", settings)
        with pytest.raises(ConfigError, match=r"enrolment\.listen: expected an address that is free"), second:
            pass
