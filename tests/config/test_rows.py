"""The tables `override` and `device`: every row is checked like the rest of a recipe, and named by its place."""

from __future__ import annotations

import pytest

from fedtune.config import bind
from tests.config.conftest import SHORTEST, Faulty


def test_overrides_of_clients_are_checked_like_the_rest(faulty: Faulty) -> None:
    rows = ['clients = "client-["\nrank = 4', "rank = 4", 'clients = "a"', "clients = []\nbatch = 0\nlerning_rate = 1"]
    rows += ['clients = ["a"]\nsteps = 1\nepochs = 1']
    found = faulty(more="".join(f"[[override]]\n{row}\n" for row in rows))
    assert "every [ closed" in found["override.0.clients"]
    assert "the name or glob" in found["override.1.clients"]
    assert "something that changes" in found["override.2"]
    assert found["override.3.lerning_rate"].endswith("did you mean override.3.learning_rate?")
    assert "at least 1; got 0" in found["override.3.batch"]
    assert "the name or glob" in found["override.3.clients"]
    assert "one of steps and epochs; got steps = 1 and epochs = 1.0" in found["override.4"]


def test_an_override_may_not_leave_a_client_without_steps(faulty: Faulty) -> None:
    row = '[[override]]\nclients = "a"\nsteps = "none"\n'
    assert faulty(more=row)["override.0"].startswith(
        "override.0: expected exactly one of steps and epochs; got neither"
    )
    training = bind(SHORTEST + row + "epochs = 2\n").override[0].training
    assert training == {"steps": None, "epochs": 2.0}


def test_a_row_of_overrides_that_is_no_table_is_told(faulty: Faulty) -> None:
    assert faulty("override=[3]") == {"override.0": "override.0: expected a table; got 3"}


def test_one_table_in_place_of_a_list_of_overrides_is_told(faulty: Faulty) -> None:
    assert "each [[override]]" in faulty(more='[override]\nclients = "a"\n')["override"]


FLEET = 'fleet = "fedspine80"'


@pytest.mark.parametrize(
    ("row", "path", "words"),
    [
        ('clients = "["\nmemory_gb = 4.0', "device.0.clients", "expected a glob with every [ closed; got '['"),
        ("memory_gb = 4.0", "device.0.clients", "expected the name or glob of a client"),
        (
            'clients = "a"',
            "device.0",
            "expected something that changes, such as profile or memory_gb; got only clients",
        ),
        ('clients = "a"\nprofile = "tx3"', "device.0.profile", "got 'tx3'; did you mean \"tx2\"?"),
        ('clients = "a"\nprofile = 3', "device.0.profile", "expected text; got 3"),
        ('clients = "a"\nmemory = 4', "device.0.memory", "unknown key; did you mean device.0.memory_gb?"),
        ('clients = "a"\nmemory_gb = -1.0', "device.0.memory_gb", "expected a finite number"),
        ('clients = "a"\nmemory_gb = "x"', "device.0.memory_gb", "expected a number; got 'x'"),
    ],
)
def test_the_fault_of_a_device_names_its_key(faulty: Faulty, row: str, path: str, words: str) -> None:
    messages = faulty(FLEET, more=f"[[device]]\n{row}\n")
    assert set(messages) == {path}
    assert words in messages[path]


def test_a_device_that_is_no_table_is_refused(faulty: Faulty) -> None:
    assert faulty(FLEET, "device=[3]") == {"device.0": "device.0: expected a table; got 3"}
    assert "each [[device]]" in faulty(FLEET, "device=3")["device"]


def test_a_device_keeps_what_it_changes() -> None:
    more = '[[device]]\nclients = ["a", "b"]\nprofile = "tx2"\nmemory_gb = 4.0\n'
    (device,) = bind(SHORTEST + more, overrides=[FLEET]).device
    assert (device.clients, device.profile, device.fields) == (("a", "b"), "tx2", {"memory_gb": 4.0})


def test_a_fault_in_one_row_leaves_out_the_rules_that_read_all_rows(faulty: Faulty) -> None:
    rows = 'override=[{clients = "a", rank = "4"}, {clients = "b", rank = 2}]'
    assert set(faulty("method=fedit", rows)) == {"override.0.rank"}
