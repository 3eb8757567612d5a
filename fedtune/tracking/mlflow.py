"""A run in MLflow, through its client: no global state of MLflow's, and nothing of this machine but what is logged."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from fedtune.tracking.tracker import PROJECT, Ending, Rows, TrackedRun, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

MOST_METRICS, MOST_PARAMETERS = 1000, 100
"""In one request, as MLflow's REST interface allows."""
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is away is waited for by this tracker's thread alone, and not for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
"""Environment of MLflow where the user's says nothing else."""


class MlflowRun:
    """One run of an MLflow experiment."""

    def __init__(self, client: MlflowClient, id: str) -> None:
        self._client, self.id = client, id
        self.place = f"run {id[:8]} in {without_password(str(client.tracking_uri))}"

    def log(self, rows: Rows) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, round) for round, values in rows for name, value in values.items()]
        for part in batches(metrics, MOST_METRICS):
            self._client.log_batch(self.id, metrics=part)

    def end(self, ending: Ending) -> None:
        if ending.result is not None:
            self._client.log_artifacts(self.id, str(ending.result), ending.result.name)
        self._client.set_terminated(self.id, "FINISHED" if ending.state == "finished" else "KILLED")


def start(run: TrackedRun) -> MlflowRun:
    """Begin a run, or go on with the one of its id, in the store that MLFLOW_TRACKING_URI names; see `Tracker`."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    # Else each table of a new database is a line between those of the run.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = MlflowClient()
    tags = [RunTag(name, text) for name, text in run.tags.items()]
    if run.id:
        try:
            client.update_run(run.id, status="RUNNING")
        except MlflowException:
            pass  # deleted, or of another store: it is sent from its first round on as a new run
        else:
            client.log_batch(run.id, tags=tags)
            return MlflowRun(client, run.id)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    there = client.get_experiment_by_name(experiment)
    number = there.experiment_id if there is not None else client.create_experiment(experiment)
    id = client.create_run(number, run_name=run.name).info.run_id
    client.log_batch(id, tags=tags)
    for part in batches([Param(key, str(value)) for key, value in run.parameters.items()], MOST_PARAMETERS):
        client.log_batch(id, params=part)
    return MlflowRun(client, id)


def batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[begin : begin + size] for begin in range(0, len(values), size))
