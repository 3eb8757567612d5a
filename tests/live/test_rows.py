from __future__ import annotations

import json
import math
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from fedtune.live.rows import MOST_CHARACTERS, client_after, round_row, visible
from fedtune.rounds.record import ClientRecord, RoundRecord


@given(st.text(st.characters(), max_size=400))
def test_a_text_of_a_client_is_one_short_line_without_hidden_characters(text: str) -> None:
    shown = visible(text)
    assert len(shown) <= 10 * MOST_CHARACTERS + 3
    assert not [one for one in shown if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")]


def test_a_round_has_numbers_that_json_can_hold() -> None:
    row = round_row(RoundRecord(2, 1.5, loss_after=math.nan, loss_before=math.inf, test={"loss": None}, bytes_up=7))
    assert (row["n"], row["before"], row["after"], row["test"], row["up"]) == (2, None, None, None, 7)
    json.dumps(row, allow_nan=False)


def test_a_client_adds_up_its_bytes_and_keeps_its_last_losses() -> None:
    first = client_after(
        {"before": None, "after": None, "up": 0, "down": 0, "used": 0},
        1,
        ClientRecord("ok", loss_before=3.0, loss_after=2.0, bytes_up=5, bytes_down=7),
    )
    second = client_after(first, 2, ClientRecord("refused", reason="norm\n41", bytes_up=5))
    assert (first["state"], first["used"], first["problem"]) == ("used", 1, "")
    assert (second["state"], second["used"], second["after"], second["up"]) == ("refused", 1, 2.0, 10)
    assert second["problem"] == "norm\\n41"
