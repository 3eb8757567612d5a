from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.tracking.sending import Sender, replay
from fedtune.tracking.tracker import Ending
from tests.report.conftest import WriteRun

pytestmark = pytest.mark.filterwarnings("ignore")  # of another package


@pytest.fixture
def client(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow, which no extra of fedtune brings")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{alone}/mlflow.db")
    return mlflow.MlflowClient()


def only_run(client: Any) -> Any:
    experiment = client.get_experiment_by_name("fedtune")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_a_run_is_in_a_local_store_with_its_rounds_settings_and_result(client: Any, write_run: WriteRun) -> None:
    run = write_run(clients=3, rounds=4)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    new, place = replay("mlflow", run, title="ward", result=run / "adapter")
    shown = only_run(client)
    assert (new, shown.info.status, shown.info.run_name) == (5, "FINISHED", "ward")
    assert shown.info.run_id[:8] in place
    assert shown.data.params["method.name"] == "flora"
    assert shown.data.tags["fedtune.base_digest"].startswith("9f3c")
    assert not [name for name in (*shown.data.tags, *shown.data.metrics) if "client-" in name or "user" in name]
    history = client.get_metric_history(shown.info.run_id, "test/loss")
    assert [metric.step for metric in history] == [0, 1, 2, 3, 4]
    assert [one.path for one in client.list_artifacts(shown.info.run_id, "adapter")] == ["adapter/adapter_config.json"]


def test_a_resumed_run_goes_on_in_the_same_run_and_a_deleted_one_begins_again(client: Any, write_run: WriteRun) -> None:
    run = write_run(rounds=2)
    first = Sender("mlflow", run)
    first.end(Ending("interrupted"))
    assert only_run(client).info.status == "KILLED"
    assert replay("mlflow", run)[0] == 3
    assert only_run(client).info.status == "FINISHED"
    client.delete_run(only_run(client).info.run_id)
    assert replay("mlflow", run)[0] == 3
    assert only_run(client).info.status == "FINISHED"


def test_a_store_that_is_a_folder_of_files_works_where_mlflow_still_allows_it(
    alone: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow, which no extra of fedtune brings")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (alone / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert replay("mlflow", write_run(rounds=2))[0] == 3
    assert only_run(mlflow.MlflowClient()).info.status == "FINISHED"


def test_a_server_that_is_away_is_an_error_that_says_so(
    client: Any, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        replay("mlflow", write_run())
