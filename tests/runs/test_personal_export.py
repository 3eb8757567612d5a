"""Clients' own models as others load them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune
from fedtune.api import Run
from fedtune.client.personal_state import client_folder
from fedtune.errors import ConfigError, StoreError
from fedtune.runs.personal_export import folder_name
from fedtune.store import peft
from tests.runs.test_personal_runs import KINDS, with_personal

Tables = dict[str, Any]


def test_a_client_s_own_model_is_what_it_has_stored_beside_the_server_s(tables: Tables, tmp_path: Path) -> None:
    run = fedtune.simulate(with_personal(tables, **KINDS["share-a"]), out=tmp_path / "run").path
    folder = fedtune.export(run, client="client-1")
    assert folder == run / "peft-client-1"
    adapter, saved, origin = peft.read(folder)
    stored = client_folder(run / "personal", "client-1").load("client-1", 99)
    assert stored is not None
    state = stored.state
    for module, factors in adapter.items():
        np.testing.assert_allclose(factors.b, state.factors[f"{module}.b"] * state.scale, rtol=1e-6)
        assert factors.b.any()
    assert list(saved)
    assert (origin["client"], origin["personal"]) == ("client-1", "share-a")
    assert origin["personal_state"] == stored.digest.hex()

    # A second one lies beside it, and the global result is untouched.
    assert fedtune.export(run, client="client-0") == run / "peft-client-0"
    with pytest.raises(
        ConfigError, match=r"client: expected a client of the run .*; got 'client-l'.*did you mean client-"
    ):
        fedtune.export(run, client="client-l")
    with pytest.raises(ConfigError, match="round: expected 'last'"):
        fedtune.export(run, client="client-0", round="best", out=tmp_path / "best")
    shutil.rmtree(run / "personal")
    with pytest.raises(StoreError, match="expected a model that client-2 has stored; got none"):
        fedtune.export(run, client="client-2")


def test_a_run_without_models_of_its_clients_says_so(ran: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="client: expected a run with the table personal; got one without"):
        fedtune.export(ran.path, client="client-0", out=tmp_path / "out")


def test_a_name_that_is_no_folder_asks_for_one() -> None:
    assert folder_name("peft", "site-a") == "peft-site-a"
    for name in ("../up", "a/b", "", ".hidden", "a b"):
        with pytest.raises(ConfigError, match="give --out"):
            folder_name("peft", name)
