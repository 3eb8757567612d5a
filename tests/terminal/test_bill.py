from __future__ import annotations

from typing import Any

import pytest

from fedtune.terminal.bill import lines


def client(name: str, device: str = "tx2", **more: Any) -> dict[str, Any]:
    parts = ("weights", "frozen_change", "adapters", "optimizer", "activations", "logits", "runtime")
    usual: dict[str, Any] = {
        "device": device,
        "examples": 10,
        "rank": 8,
        "ratio": 0.0,
        "batch": 4,
        "longest_tokens": 128,
        "memory_bytes": {**dict.fromkeys(parts, 1e8), "total": 7e8},
        "has_bytes": 5.2e9,
        "fits": True,
        "nearest": "",
        "compute_s": 1.5,
        "down_s": 100.0,
        "up_s": 4000.0,
        "bytes_down": 1000,
        "bytes_up": 1000,
    }
    return {**usual, **more}


def bill(clients: dict[str, Any], **more: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "clients": clients,
        "rounds": 20,
        "cohort": 8,
        "bytes_by_round": [{"down": 10**9, "up": 10**8}],
        "bytes": {"down": 2 * 10**10, "up": 2 * 10**9},
        "bytes_are": "exact",
        "round_s": 61.0,
        "seconds": 1220.0,
    }
    return {**usual, **more}


def test_lines_keep_to_eighty_columns_whatever_clients_are_called() -> None:
    names = {f"client-{'x' * i}\x1b[2J": client("", "d" * 40, rank=1000 + i, has_bytes=None) for i in range(40)}
    no_time = bill(names, round_s=None, seconds=None)
    printed = list(lines(no_time))
    assert max(map(len, printed)) <= 80
    assert not any("\x1b" in line for line in printed)
    assert "and 28 kinds more; --json lists every client" in printed


def test_an_asynchronous_run_says_what_ends_its_rounds() -> None:
    printed = "\n".join(lines(bill({"a": client("a")}, buffer=5)))
    assert "1 clients, 8 at work; 5 updates end each of 20 rounds" in printed
    assert "until its buffer is full" in printed
    assert "slowest client" not in printed


def test_who_does_not_fit_is_named_with_what_would() -> None:
    small = client("b", fits=False, has_bytes=5e8, nearest="client.batch = 2 with client.accumulation = 2 (0.49 GB)")
    printed = "\n".join(lines(bill({"a": client("a"), "b": small})))
    assert "1 of 2 clients do not fit:\n  b: needs 700.0 MB, has 500.0 MB; nearest:\n    client.batch = 2" in printed


@pytest.mark.parametrize(("kind", "words"), [("exact", "counted"), ("at most", "at most"), ("estimated", "estimated")])
def test_bytes_say_what_they_are(kind: str, words: str) -> None:
    printed = "\n".join(lines(bill({"a": client("a")}, bytes_are=kind)))
    assert f"traffic: 20.0 GB down, 2.0 GB up; {words}" in printed


def test_measured_stands_beside_predicted() -> None:
    step = {"rows": 4.0, "seconds": 0.5, "peak_bytes": 4e8, "predicted_bytes": 4.4e8}
    measured = {"client": "a", "steps": [step], "s_per_tflop": 30.0, "product_s_per_tflop": 12.0}
    printed = list(lines(bill({"a": client("a")}, measured=measured)))
    assert printed[-2].split() == ["4", "0.5", "400", "440", "1.10"]


def test_where_some_clients_descend_the_verb_and_its_bytes_are_shown() -> None:
    phone, gpu = client("phone-0", verb="probe", bytes_up=120), client("gpu-0", verb="descend", bytes_up=4_190)
    printed = list(lines(bill({"phone-0": phone, "phone-1": phone, "gpu-0": gpu})))
    [head] = [line for line in printed if "kB up" in line]
    assert "ratio" not in head
    assert max(map(len, printed)) <= 80
    [row] = [line.split() for line in printed if "descend" in line]
    assert (row[1], row[3], row[-3:]) == ("gpu-0", "descend", ["1.0", "4.2", "1"])
    assert any("probe" in line and line.split()[2] == "2" for line in printed)
    alike = "\n".join(lines(bill({"phone-0": phone})))
    assert "ratio" in alike
    assert "probe" not in alike
