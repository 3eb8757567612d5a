from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest

from fedtune.devices.profiles import FLEETS, POWERS, PROFILES, DeviceProfile, check
from fedtune.errors import ConfigError

EFFECTIVE = {
    "nano": 0.09,
    "tx2": 0.27,
    "xavier-nx": 1.0,
    "agx-xavier": 4.0,
    "orin-nano-8": 3.0,
    "orin-nx-16": 5.0,
    "agx-orin-64": 8.5,
}
"""Training throughput in TFLOP/s that the profiles assume."""


@pytest.mark.parametrize("name", EFFECTIVE)
def test_known_devices_are_possible_and_train_as_fast_as_is_assumed(name: str) -> None:
    profile = check(PROFILES[name])
    assert profile.tflops == pytest.approx(EFFECTIVE[name])
    told = profile.as_table()
    assert told.keys() == {each.name for each in fields(DeviceProfile)} - {"name", "provenance", *POWERS}
    assert told["memory_gbps"]["provenance"] == "datasheet"
    assert told["utilisation"]["provenance"] == "assumed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory_gb": 0.0}, "memory_gb: expected a finite number above 0"),
        ({"peak_tflops": -1.0}, "peak_tflops"),
        ({"memory_gbps": float("inf")}, "memory_gbps"),
        ({"up_mbps": float("nan")}, "up_mbps"),
        ({"down_mbps": 0.0}, "e.g. 10, a TX2's"),
        ({"utilisation": 1.5}, "a share above 0, at most 1"),
        ({"availability": -0.1}, "a share from 0 to 1"),
        ({"modes": ()}, "at least one share"),
        ({"modes": (1.0, 0.0)}, "at least one share"),
        ({"modes": (2.0,)}, "none above 1"),
        ({"latency_s": -1.0}, "latency_s"),
        ({"provenance": {"colour": "assumed"}}, "names of fields"),
        ({"compute_w": 0.0, "send_w": 1.0, "receive_w": 1.0}, "compute_w: expected a finite number above 0"),
        ({"compute_w": 1.0, "send_w": float("inf"), "receive_w": 1.0}, "e.g. 2.96, a phone's"),
        ({"compute_w": 1.0, "send_w": 1.0}, "receive_w: expected all of compute_w, send_w, receive_w, or none"),
    ],
)
def test_an_impossible_device_is_refused_with_what_would_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check(replace(PROFILES["tx2"], name="mine", **changes))
    assert "device mine" in str(caught.value)


def test_all_impossible_numbers_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check(replace(PROFILES["tx2"], memory_gb=-1.0, utilisation=0.0, modes=()))
    assert len(caught.value.faults) == 3


def test_eighty_clients_are_the_fleet_of_the_paper_whatever_their_order() -> None:
    names = [f"client-{i:02}" for i in range(80)]
    found = FLEETS["fedspine80"](names, 3)
    assert Counter(profile.name for profile in found.values()) == {"tx2": 30, "xavier-nx": 40, "agx-xavier": 10}
    assert found == FLEETS["fedspine80"](names[::-1], 3)
    assert found != FLEETS["fedspine80"](names, 4)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 12, 100])
@pytest.mark.parametrize("fleet", FLEETS)
def test_any_number_of_clients_gets_devices_in_proportion(fleet: str, count: int) -> None:
    found = FLEETS[fleet]([f"client-{i:03}" for i in range(count)], 0)
    assert len(found) == count
    assert all(check(profile) for profile in found.values())
    if fleet == "fedspine80" and count == 8:
        assert Counter(each.name for each in found.values()) == {"tx2": 3, "xavier-nx": 4, "agx-xavier": 1}


def test_by_hand_the_energy_of_a_phone() -> None:
    phone = PROFILES["phone-mid"]
    assert phone.joules(work_s=10.0, down_s=2.0, up_s=1.0) == pytest.approx(54.4 + 3.0 + 2.96)
    assert PROFILES["tx2"].joules(work_s=10.0, down_s=2.0, up_s=1.0) is None  # its power is not known: no guess
    assert {name: row["provenance"] for name, row in phone.as_table().items() if name in POWERS} == dict.fromkeys(
        POWERS, "published"
    )


def test_a_phone_trains_gemma_270m_as_fast_as_was_published() -> None:
    # 18 blocks of width 640 (4 heads and 1 of 256, 2048 channels) and a head of 262,144 rows; 8 rows of 64 tokens.
    blocks = 18 * (2 * 640 * 1024 + 2 * 640 * 256 + 3 * 640 * 2048)
    flops = 4 * (blocks + 640 * 262_144) * 8 * 64
    assert flops / 1e12 / PROFILES["phone-mid"].tflops == pytest.approx(170.4, rel=0.02)
