"""A run in Weights & Biases: offline without a key, and without what its package else sends of the machine."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from fedtune.tracking.tracker import PROJECT, Ending, Rows, TrackedRun

PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "init_timeout": 30.0,
    "finish_timeout": 30.0,
}
"""Settings by which it sends neither the machine's name, hardware and packages, nor code, nor what the terminal shows;
those that an installed release does not know are left out."""


class WandbRun:
    """One run of a project."""

    def __init__(self, run: Any, *, offline: bool) -> None:
        self._run, self.id = run, str(run.id)
        # Each process of a run leaves a folder of its own.
        folders = Path(run.settings.sync_dir).parent / f"offline-run-*-{run.id}"
        self.place = f"offline; upload: wandb sync --id {run.id} {folders}" if offline else f"run {run.url}"

    def log(self, rows: Rows) -> None:
        for round, values in rows:
            self._run.log(dict(values), step=round)

    def end(self, ending: Ending) -> None:
        if ending.result is not None:
            import wandb

            artifact = wandb.Artifact(f"{self.id}-{ending.result.name}", type="model")
            artifact.add_dir(str(ending.result))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if ending.state == "finished" else 1)


def start(run: TrackedRun) -> WandbRun:
    """Begin a run, or go on with the one of its id; see `Tracker`. It lies in `wandb/` inside the run directory."""
    # Its own crash reports go to another company.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    mode = os.environ.get("WANDB_MODE") or online_or_offline()
    known = type(wandb.Settings()).model_fields
    settings = wandb.Settings(**{name: value for name, value in PRIVATE.items() if name in known})
    created = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=run.name,
        id=run.id or secrets.token_hex(4),
        resume="allow",
        dir=str(run.folder),
        mode=mode,
        config={**run.parameters, **run.tags},
        settings=settings,
        reinit="create_new",
    )
    return WandbRun(created, offline=mode == "offline")


def online_or_offline() -> str:
    """Return `offline` where no key is configured: `wandb.init` would ask for one on the terminal, in mid-run."""
    import wandb

    return "online" if wandb.login(prompt=False, verify=False) else "offline"
