from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.link.client.channel import dial, host_of, link_stub
from fedtune.link.client.http_proxy import HttpProxy
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.link_server import greeting, run_link_server
from tests.link.middlebox import listening, proxying


@pytest.mark.parametrize(
    ("address", "host"), [("a.example:9000", "a.example"), ("[::1]:9000", "::1"), ("1.2.3.4:1", "1.2.3.4")]
)
def test_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host


def test_a_server_name_may_differ_from_the_address(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running:
        calls = dial(running.identities["site-a"], JoinSettings(f"127.0.0.1:{running.port}", server_name="localhost"))
        assert greeting(calls).epoch
        calls.close()


def test_calls_go_through_a_proxy_with_a_password_and_tls_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_grpc_proxy", "")  # restored afterwards: `dial` sets it
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    login = "anna:p@ss/w:rd é"
    with run_link_server(tmp_path) as running, listening(proxying(login)) as box:
        proxy = HttpProxy("127.0.0.1", box.port, *login.split(":", 1)).url
        calls = dial(running.identities["site-a"], JoinSettings(f"localhost:{running.port}", proxy=proxy))
        assert greeting(calls).epoch  # and the server has seen the certificate of site-a
        calls.close()
        # What the environment says of this host counts only where the site's file says "environment".
        assert [head.split()[1] for head in box.heads] == [f"localhost:{running.port}".encode()]
        wrong = HttpProxy("127.0.0.1", box.port, "anna", "geheim").url
        calls = dial(running.identities["site-a"], JoinSettings(f"localhost:{running.port}", proxy=wrong))
        with pytest.raises(grpc.RpcError) as caught:
            greeting(calls)
        calls.close()
    assert "407" in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_without_a_proxy_the_environment_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with run_link_server(tmp_path) as running:
        assert greeting(running.calls()).epoch


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
