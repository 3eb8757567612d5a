from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.runs.bill import bill_of
from fedtune.runs.local import prepare
from tests.conftest import Simulated, kseed

FORMATS = [
    ("flora", {"wire_dtype": "bf16"}),
    ("fedit", {}),
    ("ffa", {}),
    ("zeropad", {}),
    ("flexlora", {}),
    ("hetlora", {}),
    ("fedex", {}),
]


def rounds_of(tables: dict[str, Any]) -> tuple[list[tuple[int, int]], Any]:
    experiment = prepare(bind(tables), sizes_alone=True)
    bill = bill_of(experiment.devices, experiment.blueprint, experiment.fleet)
    return list(bill.by_round), bill


def counted(simulated: Simulated, tables: dict[str, Any], out: Path) -> list[tuple[int, int]]:
    run = simulated(tables, out)
    return [(record["bytes_down"], record["bytes_up"]) for record in run.rounds if record["round"]]


def test_bytes_of_flora_are_those_of_its_real_rounds(
    simulated: Simulated, tables: dict[str, Any], tmp_path: Path
) -> None:
    tables["method"]["wire_dtype"] = "bf16"
    planned, bill = rounds_of(tables)
    assert bill.exact
    assert not bill.at_most
    for mine, real in zip(planned, counted(simulated, tables, tmp_path / "run"), strict=True):
        # Tokens and seconds are numbers of other lengths; tensors are the same to the byte.
        assert mine == pytest.approx(real, abs=60)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "more"), FORMATS)
def test_bytes_of_every_method_are_those_of_its_real_rounds(
    method: str, more: dict[str, Any], simulated: Simulated, tables: dict[str, Any], tmp_path: Path
) -> None:
    tables["method"] = {"name": method, **more}
    if method in ("fedit", "fedex"):
        del tables["override"]
    planned, bill = rounds_of(tables)
    assert bill.at_most == (method in ("hetlora", "fedex"))
    for mine, real in zip(planned, counted(simulated, tables, tmp_path / "run"), strict=True):
        assert mine == pytest.approx(real, abs=60, rel=0.25 if method == "fedex" else 0)


@pytest.mark.parametrize("number", ["int8"])
def test_codes_are_at_most_so_many_bytes(
    number: str, simulated: Simulated, tables: dict[str, Any], tmp_path: Path
) -> None:
    tables["method"]["wire_dtype"] = number
    planned, bill = rounds_of(tables)
    assert bill.at_most
    for mine, real in zip(planned, counted(simulated, tables, tmp_path / "run"), strict=True):
        assert 0.8 * mine[1] <= real[1] <= 1.02 * mine[1]


def test_a_global_change_that_grows_is_rehearsed_until_it_does_no_more(tables: dict[str, Any]) -> None:
    tables["method"] |= {"wire_dtype": "bf16", "state_max_rank": "exact"}
    tables["adapter"]["rank"] = 1
    tables["rounds"] = {"count": 6}
    del tables["override"]
    planned, bill = rounds_of(tables)
    down = [each for each, _ in planned]
    assert len(planned) == 6  # three ranks more in every round, of 16 and 32
    assert down == sorted(set(down))
    assert bill.exact


def test_a_growing_change_that_is_not_rehearsed_to_the_end_is_not_called_exact(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.runs.bill.GROWING", 5)
    tables["method"] |= {"wire_dtype": "bf16", "state_max_rank": "exact"}
    tables["adapter"]["rank"] = 1
    tables["rounds"] = {"count": 8}
    del tables["override"]
    planned, bill = rounds_of(tables)
    assert len(planned) == 5
    assert bill.as_json()["bytes_are"] == "estimated"


def test_seeds_of_epochs_are_billed_by_their_steps(tables: dict[str, Any]) -> None:
    tables = kseed(tables)
    tables["client"] = {"batch": 1, "learning_rate": 2e-3, "epochs": 50}
    _, bill = rounds_of(tables)
    assert bill.at_most
    assert all(each.bytes_up >= 50 * each.examples for each in bill.clients)  # a byte for each step


def test_what_stays_with_clients_is_in_no_bill(simulated: Simulated, tables: dict[str, Any], tmp_path: Path) -> None:
    tables |= {"method": {"name": "zeropad", "wire_dtype": "bf16"}, "evaluate": {"batch": 8, "clients": False}}
    whole, _ = rounds_of(tables)
    tables["personal"] = {"kind": "share-a"}
    planned, _ = rounds_of(tables)
    for mine, real in zip(planned, counted(simulated, tables, tmp_path / "run"), strict=True):
        # Headers are padded to a multiple of 64 bytes, for each of three clients.
        assert mine == pytest.approx(real, abs=3 * 64)
    assert all(mine[1] < 0.75 * other[1] for mine, other in zip(planned, whole, strict=True))


def test_asynchronous_rounds_are_billed_by_their_buffers_and_their_clock(
    simulated: Simulated, tables: dict[str, Any], tmp_path: Path
) -> None:
    tables["method"] = {"name": "fedit"}
    tables["rounds"] = {"count": 4}
    tables["fleet"] = {"name": "phones"}
    slow = {"clients": ["client-0"], "peak_tflops": 0.00032, "memory_gbps": 2.56}
    tables["device"] = [{"clients": ["*"], "profile": "phone-mid", "net_sigma": 0.0}, slow]
    tables["asynchronous"] = {"buffer": 2}
    del tables["override"]
    planned, bill = rounds_of(tables)
    run = simulated(tables, tmp_path / "run")
    assert bill.exact
    assert (bill.buffer, bill.cohort) == (2, len(bill.clients))
    assert len(planned) == 4
    for mine, record in zip(planned, (one for one in run.rounds if one["round"]), strict=True):
        assert mine == pytest.approx((record["bytes_down"], record["bytes_up"]), abs=60)
    assert bill.seconds == pytest.approx(run.summary["clock_s"], rel=0.01)


def test_an_asynchronous_recipe_of_sites_is_billed_by_buffers_and_not_by_cohorts(tables: dict[str, Any]) -> None:
    tables["method"] = {"name": "fedit"}
    del tables["override"]
    experiment = prepare(bind(tables), sizes_alone=True)
    ups = []
    for buffer in (1, 2):
        recipe = replace(experiment.recipe, asynchronous=AsyncSettings(buffer=buffer))
        bill = bill_of(replace(experiment.devices, recipe=recipe), experiment.blueprint, experiment.fleet)
        assert bill.kind_of_bytes == "estimated"
        ups.append(bill.by_round[-1][1])
    assert ups[0] > 0
    assert ups[1] == pytest.approx(2 * ups[0], rel=0.01)
