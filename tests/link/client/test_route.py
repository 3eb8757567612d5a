"""The steps from a client to its server: each that fails is named, and none shows a password."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedtune.link.client.route import diagnose, walk
from fedtune.link.pki.identity import load_identity
from fedtune.link.settings import JoinSettings
from tests.link.ceremony import enroll_parties
from tests.link.federation import free_port
from tests.link.link_server import run_link_server
from tests.link.middlebox import ending_tls, listening, own_certificate, proxying


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
        assert reason == "TLS and HTTP/2 succeed, but the server does not answer calls"
        assert not permanent
        reason, _ = diagnosis_of("localhost:1", proxy=f"http://anna:geheim@127.0.0.1:{free_port()}")
        assert reason.startswith("no proxy listens on http://127.0.0.1:")
        assert "geheim" not in reason


def test_the_steps_through_a_proxy(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running, listening(proxying("anna:geheim")) as box:
        settings = JoinSettings(f"localhost:{running.port}", proxy=f"http://anna:geheim@127.0.0.1:{box.port}")
        steps = list(walk(running.identities["site-a"], settings))
        assert [step.name for step in steps if step.ok] == ["name", "port", "proxy", "TLS", "HTTP/2"]
        assert f"connects to localhost:{running.port} for 'anna'" in steps[2].text
        assert "certificate for localhost, 127.0.0.1 by CN=care CA, verified" in steps[3].text
        shut = replace(settings, address=f"localhost:{free_port()}")
        last = list(walk(running.identities["site-a"], shut))[-1]
        assert (last.name, last.ok) == ("proxy", False)
    assert not [step for step in (*steps, last) if "geheim" in repr(step)]


def test_the_steps_before_a_site_is_enrolled(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running:
        steps = list(walk(None, JoinSettings(f"localhost:{running.port}")))
    assert [step.name for step in steps if step.ok] == ["name", "port", "TLS", "HTTP/2"]
    assert "by CN=care CA, not verified" in steps[2].text
    with listening(ending_tls(*own_certificate(tmp_path, "Inspection CA"), protocols=("h2",))) as box:
        last = list(walk(None, JoinSettings(f"localhost:{box.port}")))[-1]
    assert (last.name, last.ok) == ("TLS", False)
    assert "got one by CN=Inspection CA; a proxy on the way opens TLS" in last.text
