from __future__ import annotations

from fedtune.directions.banks import BANKS, CODES


def test_every_bank_stands_under_its_own_name_and_byte() -> None:
    assert {code: BANKS[name](16, 5).code for code, name in CODES.items()} == {1: 1, 2: 2, 3: 3}
    assert {name: BANKS[name](16, 5).name for name in BANKS} == {name: name for name in BANKS}
    assert all((bank.size, bank.key) == (16, 5) for bank in (make(16, 5) for make in BANKS.values()))
