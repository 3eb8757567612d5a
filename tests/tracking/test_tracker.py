from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from fedtune.tracking.tracker import metric_name, without_password


@given(st.text(max_size=40))
def test_a_metric_has_a_name_that_is_no_path_out_of_its_folder(client: str) -> None:
    name = metric_name(f"training/{client}/after")
    assert re.fullmatch(r"[A-Za-z0-9_./ -]+", name)
    assert not set(name.split("/")) & {"", ".", ".."}
    assert metric_name(name) == name


def test_addresses_are_shown_without_their_passwords() -> None:
    assert without_password("https://u:p@h.example:5000/mlflow") == "https://h.example:5000/mlflow"
    assert without_password("sqlite:////data/x@y.db") == "sqlite:////data/x@y.db"
