"""TLS to a server as gRPC makes it: what each failure means, seen against scripted servers and boxes on the way."""

from __future__ import annotations

from pathlib import Path

from fedtune.link.client.handshake import Route, printable_names, route_of
from fedtune.link.client.route import diagnose
from fedtune.link.settings import JoinSettings
from tests.link.link_server import run_link_server
from tests.link.middlebox import ending_tls, hating_http2, listening, own_certificate, proxying, saying


def test_where_connections_lead() -> None:
    route = route_of(JoinSettings("[fd00::1]:443", proxy="http://anna:x@proxy:3128"))
    assert (route.address, route.server_name, route.first) == ("[fd00::1]:443", "fd00::1", ("proxy", 3128))
    assert route_of(JoinSettings("10.0.0.1:9000", server_name="fl.example.org")) == Route(
        "10.0.0.1", 9000, "fl.example.org", None
    )


def test_a_proxy_that_opens_tls_is_named_by_its_issuer(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running, listening(proxying()) as proxy:
        anna = running.identities["site-a"]
        with listening(ending_tls(*own_certificate(tmp_path, "Hospital Inspection CA"), protocols=("h2",))) as box:
            for way in ("", f"http://127.0.0.1:{proxy.port}"):
                diagnosis = diagnose(anna, JoinSettings(f"localhost:{box.port}", proxy=way))
                assert "got one by CN=Hospital Inspection CA" in diagnosis.reason
                assert f"exempt localhost:{box.port} from inspection" in diagnosis.reason
                assert diagnosis.permanent
    assert len(proxy.heads) == 2  # the second look goes the same way


def test_a_certificate_for_another_host_is_named(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running:
        diagnosis = diagnose(
            running.identities["site-a"], JoinSettings(f"localhost:{running.port}", server_name="elsewhere.example")
        )
    assert "for 'elsewhere.example'; got one for localhost, 127.0.0.1" in diagnosis.reason
    assert diagnosis.permanent


def test_a_server_of_another_federation_is_not_taken_for_a_proxy(tmp_path: Path) -> None:
    with run_link_server(tmp_path / "a") as running, run_link_server(tmp_path / "b") as other:
        diagnosis = diagnose(running.identities["site-a"], JoinSettings(f"localhost:{other.port}"))
    assert "got one of another federation, by CN=care CA (unable to get local issuer certificate)" in diagnosis.reason
    assert diagnosis.permanent


def test_a_box_that_cuts_tls_for_offering_http2_is_found_out(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running, listening(hating_http2(running.port)) as box:
        diagnosis = diagnose(running.identities["site-a"], JoinSettings(f"localhost:{box.port}"))
        assert "cuts TLS that offers HTTP/2" in diagnosis.reason
        assert "docs/how-to/superlink.md" in diagnosis.reason
        assert not diagnosis.permanent
        with listening(saying(b"")) as shut:
            reason = diagnose(running.identities["site-a"], JoinSettings(f"localhost:{shut.port}")).reason
    assert reason.startswith(f"TLS failed: the connection to localhost:{shut.port} is cut")


def test_a_server_that_speaks_no_tls_or_an_old_one_is_named(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running:
        anna, place = running.identities["site-a"], running.places["server"]
        with listening(saying(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as plain:
            diagnosis = diagnose(anna, JoinSettings(f"localhost:{plain.port}"))
        assert diagnosis.reason.startswith("TLS failed: ")
        assert "check link.address" in diagnosis.reason
        with listening(ending_tls(place / "tls.crt", place / "tls.key", old=True)) as old:
            diagnosis = diagnose(anna, JoinSettings(f"localhost:{old.port}"))
    assert "speaks none of version 1.3" in diagnosis.reason
    assert not diagnosis.permanent


def test_a_certificate_that_cannot_be_read_is_no_error() -> None:
    assert printable_names(b"").issuer == "an issuer that cannot be read"
