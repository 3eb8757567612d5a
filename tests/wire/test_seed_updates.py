from __future__ import annotations

import pytest

from fedtune.errors import WireError
from fedtune.wire import seed_updates
from tests.wire.test_descend import RESULT
from tests.wire.test_descend import UPDATE as MOVED
from tests.wire.test_probe import PROBED, UPDATE


def test_scalars_are_read_where_they_lie() -> None:
    message = seed_updates.to_message(UPDATE, PROBED)
    scalars = seed_updates.from_message(message, client="bank-1").probe.scalars
    assert (scalars.tolist(), scalars.flags.writeable) == (PROBED.scalars.tolist(), False)


def test_an_update_of_scalars_has_no_field_of_numbers() -> None:
    message = seed_updates.to_message(UPDATE, PROBED)
    assert not {field.name for field, _ in message.ListFields()} & {"numbers", "shift", "bits", "count"}


def test_numbers_and_what_is_said_beside_them_arrive_together() -> None:
    update = seed_updates.from_message(seed_updates.to_message(MOVED, RESULT), client="bank-1")
    assert (update.descend.numbers.tolist(), update.measured) == (RESULT.numbers.tolist(), MOVED.measured)
    assert (update.num_examples, update.round, update.seeds.skipped) == (120, 3, 1)


def test_a_time_that_is_none_is_refused() -> None:
    message = seed_updates.to_message(MOVED, RESULT)
    message.seconds = float("nan")
    with pytest.raises(WireError, match="a time of at least 0 s"):
        seed_updates.from_message(message, client="bank-1")
