"""A finished run with pruning, loaded again: the ratios and kinds of devices in its round lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fedtune
from fedtune import api
from fedtune.errors import ConfigError, StoreError
from fedtune.runs import trained_run
from tests.runs.conftest import Tables, spine

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_where_every_client_is_a_kind_of_its_own_all_get_one_model(tables: Tables, tmp_path: Path) -> None:
    lonely = {"kind": "iid", "clients": 9}
    many = spine(tables, fleet={"name": "lognormal"}, data={"split": lonely}, rounds={"count": 2})
    ran = fedtune.simulate(many, out=tmp_path / "run")
    assert set(trained_run.classes(ran.path)) == {"every-device"}
    out = fedtune.deploy(ran.path, out=tmp_path / "out")
    assert json.loads((out / "deploy.json").read_text())["devices"] == {"every-device": "ratio-0.5"}


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ('"x"', r"rounds\.jsonl, line .: clients\.client-.\.ratio: expected float; got 'x'"),
        ("0.9", r"round ., client-.: expected a ratio from 0 to 0\.875; got 0\.9; the line was changed"),
    ],
)
def test_a_line_that_was_changed_after_the_run_is_refused(
    ratio: str, message: str, shrunk: api.Run, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shrunk.path, copy)
    lines = (copy / "rounds.jsonl").read_text()
    (copy / "rounds.jsonl").write_text(lines.replace('"ratio": 0.5', f'"ratio": {ratio}'))
    with pytest.raises(StoreError, match=message):
        fedtune.deploy(copy, out=tmp_path / "out")


def test_ratios_that_print_alike_are_one_and_devices_find_theirs(shrunk: api.Run, tmp_path: Path) -> None:
    out = fedtune.deploy(shrunk.path, out=tmp_path / "out", ratios=[0.5, 0.25, 0.25000001])
    told = json.loads((out / "deploy.json").read_text())
    assert list(told["ratios"]) == ["0.25", "0.5"]
    assert set(told["devices"].values()) == {"ratio-0.5"}
    with pytest.raises(ConfigError, match=r"a folder with a config.json.*load .*ratio-0\.25/model"):
        fedtune.load_pruned(out)
