from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.report.conftest import WriteRun

RESUMED = """
import json, sys
from pathlib import Path
from fedtune.store.round_records import read_rounds
from fedtune.tracking.sending import Sender
from fedtune.tracking.tracker import Ending
run = Path(sys.argv[1])
for records in (read_rounds(run)[:2], read_rounds(run)):
    sender = Sender("trackio", run, title="ward")
    sender.send(records)
    sender.end(Ending("finished"))
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("fedtune")
logs = SQLiteStorage.get_logs("fedtune", name)
print(json.dumps([name, sender.place, logs, SQLiteStorage.get_run_config("fedtune", name)]))
"""


def test_a_run_and_its_resumed_rest_are_one_run_of_the_local_database(alone: Path, write_run: WriteRun) -> None:
    if find_spec("trackio") is None:
        pytest.skip("needs trackio, which no extra of fedtune brings")
    run = write_run(clients=3, rounds=4)
    # A process of its own: trackio reads where its database lies when it is imported.
    done = subprocess.run([sys.executable, "-c", RESUMED, str(run)], capture_output=True, text=True, check=True)
    name, place, logs, config = json.loads(done.stdout)  # and it prints nothing else there
    assert name in place
    assert name.startswith("ward-")
    assert [log["step"] for log in logs] == [0, 1, 2, 3, 4]
    assert logs[1]["test/loss"] == pytest.approx(2.9)
    assert "client-" not in json.dumps([logs, config])
    assert config["method.name"] == "flora"
