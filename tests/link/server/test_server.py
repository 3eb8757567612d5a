from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.link.pki import authority, enrollment
from fedtune.link.pki.certificates import serial_number
from fedtune.link.server.connections import connection_limit
from fedtune.link.server.server import server_options
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster
from tests.link.link_server import SETTINGS, greeting, run_link_server


def test_a_port_in_use_is_reported_before_anything_starts(tmp_path: Path) -> None:
    with run_link_server(tmp_path / "one") as first:
        before = threading.active_count()
        with (
            pytest.raises(ConfigError, match="--listen"),
            run_link_server(tmp_path / "two", replace(SETTINGS, listen=f"127.0.0.1:{first.port}")),
        ):
            pass
        assert threading.active_count() <= before + 1


def test_no_thread_and_no_port_is_left_when_a_server_ends(tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with run_link_server(tmp_path) as running:
        assert greeting(running.calls()).epoch
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("fedtune")}
    assert left <= before


def test_waiting_clients_hear_that_the_server_goes_down(tmp_path: Path) -> None:
    result: list[pb.NextReply] = []
    with run_link_server(tmp_path, replace(SETTINGS, hold_s=30, drain_s=5)) as running:
        calls = running.calls()
        epoch = greeting(calls).epoch
        waiter = threading.Thread(target=lambda: result.append(calls.next(pb.NextRequest(epoch=epoch), timeout=40)))
        waiter.start()
        while not any(running.dispatcher.status()[name].seen_s == 0.0 for name in running.dispatcher.status()):
            running.dispatcher.wait(0.01)
        running.dispatcher.stop(pb.Stop.DRAINING, retry_after_s=2)
        waiter.join()
    assert (result[0].stop.why, result[0].stop.retry_after_ms) == (pb.Stop.DRAINING, 2000)


def test_a_renewed_certificate_serves_the_next_connection(tmp_path: Path) -> None:
    import ssl

    with run_link_server(tmp_path) as running:
        now, place = int(time.time()), running.places["server"]
        old = ssl.get_server_certificate(("127.0.0.1", running.port)).encode()
        request = enrollment.make_request(
            place, name="server", org="org-server", role="coordinator", hosts=("localhost",)
        )
        enrollment.accept_bundle(place, authority.sign_request(running.places["ca"], request, now=now + 1), now=now + 1)
        copy_roster(running.places["ca"], running.places)
        new = ssl.get_server_certificate(("127.0.0.1", running.port)).encode()
        assert serial_number(old) == running.identities["server"].serial
        assert serial_number(new) == serial_number((place / "tls.crt").read_bytes()) != serial_number(old)
        assert greeting(running.calls()).epoch


def test_grpc_itself_bounds_what_a_stranger_can_make_the_server_hold() -> None:
    result = dict(server_options(LinkSettings(), parties=3))
    assert result["grpc.max_receive_message_length"] == 2**20
    assert result["grpc.max_metadata_size"] == 8192
    assert result["grpc.max_allowed_incoming_connections"] == connection_limit(3) > 400
    assert result["grpc.compression_enabled_algorithms_bitset"] == 1


@pytest.mark.parametrize("address", ["nowhere.invalid:0", "127.0.0.1:x"])
def test_an_address_that_cannot_be_listened_on_is_named(tmp_path: Path, address: str) -> None:
    with (
        pytest.raises(ConfigError, match=address),
        run_link_server(tmp_path, replace(SETTINGS, listen=address)),
    ):
        pass


def test_no_server_starts_where_grpc_may_speak_an_older_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.link.server.server.SET_IN_TIME", False)
    with pytest.raises(ConfigError, match=r"expected TLS 1\.3 alone"), run_link_server(tmp_path):
        pass


def test_a_server_that_goes_down_of_itself_says_that_it_comes_back_and_one_that_has_finished_does_not(
    tmp_path: Path,
) -> None:
    for folder, finished in (("one", False), ("two", True)):
        with run_link_server(tmp_path / folder, replace(SETTINGS, drain_s=5)) as running:
            calls = running.calls()
            epoch = greeting(calls).epoch
            if finished:
                running.dispatcher.stop(pb.Stop.FINISHED)
                assert calls.next(pb.NextRequest(epoch=epoch), timeout=10).stop.why == pb.Stop.FINISHED
        assert running.dispatcher.stopping is not None
        assert running.dispatcher.stopping.why == (pb.Stop.FINISHED if finished else pb.Stop.DRAINING)
        assert bool(running.dispatcher.stopping.retry_after_ms) == (not finished)


def test_each_process_has_its_own_epoch(tmp_path: Path) -> None:
    epochs = set[int]()
    for folder in ("one", "two"):
        with run_link_server(tmp_path / folder) as running:
            epochs.add(greeting(running.calls()).epoch)
    assert len(epochs) == 2
    assert 0 not in epochs


def test_a_certificate_that_is_half_written_leaves_the_one_before_in_place(tmp_path: Path) -> None:
    import ssl

    with run_link_server(tmp_path) as running:
        place = running.places["server"]
        whole = (place / "tls.crt").read_bytes()
        (place / "tls.crt").unlink()
        assert serial_number(ssl.get_server_certificate(("127.0.0.1", running.port)).encode()) == serial_number(whole)
        (place / "tls.crt").write_bytes(whole)
        assert greeting(running.calls()).epoch


@pytest.mark.parametrize("port", [99999, -1])
def test_a_port_that_does_not_exist_is_refused_and_no_other_is_taken_in_its_place(tmp_path: Path, port: int) -> None:
    """Found wrong: gRPC takes the number modulo 2^16, and the server listens on 34463, or on any port."""
    with (
        pytest.raises(ConfigError, match=str(port)),
        run_link_server(tmp_path, replace(SETTINGS, listen=f"127.0.0.1:{port}")),
    ):
        pass
