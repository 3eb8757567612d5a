from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.link.client.channel import diagnose, dial, host_of, link_stub
from fedtune.link.pki.identity import load_identity
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.federation import free_port
from tests.link.link_server import greeting, run_link_server


@pytest.mark.parametrize(
    ("address", "host"), [("a.example:9000", "a.example"), ("[::1]:9000", "::1"), ("1.2.3.4:1", "1.2.3.4")]
)
def test_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host


def test_each_step_to_a_server_that_fails_is_named(tmp_path: Path) -> None:
    with run_link_server(tmp_path / "care") as running:
        anna = running.identities["site-a"]

        def diagnosis_of(address: str, **changes: str) -> tuple[str, bool]:
            diagnosis = diagnose(anna, JoinSettings(address, **changes))  # type: ignore[arg-type]
            return diagnosis.reason, diagnosis.permanent

        reason, permanent = diagnosis_of(f"localhost:{free_port()}")
        assert reason.startswith("no server listens on localhost")
        assert not permanent
        reason, permanent = diagnosis_of("no-such-host.invalid:9000")
        assert "expected a host that is known" in reason
        assert not permanent
        reason, permanent = diagnosis_of(f"127.0.0.1:{running.port}", server_name="elsewhere.example")
        assert "expected a server certificate of this federation" in reason
        assert permanent
        other = enroll_parties(tmp_path / "other", clients=("site-a",))
        stranger = load_identity(other["site-a"], role="client", now=int(running.time.now))
        diagnosis = diagnose(stranger, JoinSettings(f"localhost:{running.port}"))
        assert "expected a server certificate" in diagnosis.reason
        assert diagnosis.permanent
        diagnosis = diagnose(replace(stranger, ca=anna.ca), JoinSettings(f"localhost:{running.port}"))
        assert "rejects this site's certificate" in diagnosis.reason
        assert not diagnosis.permanent
        reason, permanent = diagnosis_of(f"localhost:{running.port}")
        assert reason == "TLS succeeds, but the server does not answer calls"
        assert not permanent
        reason, _ = diagnosis_of("localhost:1", proxy="http://proxy.example:3128")
        assert "through http://proxy.example:3128" in reason


def test_a_server_without_tls_is_diagnosed(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path)
    import time

    anna = load_identity(places["site-a"], role="client", now=int(time.time()))
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        diagnosis = diagnose(anna, JoinSettings(f"localhost:{plain.getsockname()[1]}"))
        thread.join()
    assert diagnosis.reason.startswith("TLS failed")
    assert not diagnosis.permanent


def test_a_server_name_may_differ_from_the_address(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running:
        calls = dial(running.identities["site-a"], JoinSettings(f"127.0.0.1:{running.port}", server_name="localhost"))
        assert greeting(calls).epoch
        calls.close()


def test_the_stub_has_the_calls_of_the_schema() -> None:
    calls = dict[str, tuple[str, str]]()

    class Channel:
        """Notes the shape of each call, and the type of its responses."""

        def __getattr__(self, shape: str) -> Any:
            def call(path: str, request_serializer: Any, response_deserializer: Any) -> None:
                assert callable(request_serializer)
                calls[path] = shape, type(response_deserializer(b"")).__name__

            return call

        def close(self) -> None: ...

    channel: Any = Channel()
    link_stub(channel)
    words = {False: "unary", True: "stream"}
    assert calls == {
        f"/fedtune.v1.Link/{method.name}": (
            f"{words[method.client_streaming]}_{words[method.server_streaming]}",
            method.output_type.name,
        )
        for method in pb.DESCRIPTOR.services_by_name["Link"].methods
    }
