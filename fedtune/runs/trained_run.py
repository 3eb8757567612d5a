"""A finished run loaded again: its base, its last state, and the pruning ratios that its clients trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.recipe import method_of
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.methods import serialization as states
from fedtune.methods.method import GlobalModel
from fedtune.pruning.structure import ModelStructure
from fedtune.runs.base_checks import check_base
from fedtune.runs.context import bind_to_score, first_state
from fedtune.store import result
from fedtune.store.blobs import Blobs
from fedtune.store.history import replay_journal
from fedtune.store.round_records import read_rounds
from fedtune.store.run_directory import SUMMARY_ADVICE, check_run, read_summary

if TYPE_CHECKING:
    from fedtune.runs.local import Experiment

# torch and transformers take seconds to import, so `runs.local` and `model` are imported where they are needed.

MOST_KINDS = 8
"""Kinds of devices with a model of their own; with more kinds than that all devices get one model."""


@dataclass(frozen=True)
class TrainedRun:
    """A run with its base and its last state loaded."""

    path: Path
    experiment: Experiment
    state: Any
    tuned: GlobalModel

    def structure(self, ratio: float) -> ModelStructure | None:
        """Return the structure that the run's ranking gives at a ratio; None for the whole model.

        Raises:
            ConfigError: if the run has no ranking for all clients.
        """
        if ratio == 0:
            return None
        structure = method_of(self.experiment.recipe).structure(self.state, ratio)
        if structure is None:
            expected = "a run that pruned by one ranking for all (pruning.policy nested or vote)"
            pruning = self.experiment.recipe.pruning
            got = f"the policy {pruning.policy} in {self.path}" if pruning else f"no [pruning] in {self.path}"
            raise ConfigError(Fault("ratio", expected, got, 'run it with pruning.policy = "nested"'))
        return structure


def load_run(run: Path, *, last: bool = False) -> TrainedRun:
    """Load a run's base and the state that is its result: its last committed one, or the best one where that is kept.

    Args:
        run: the run directory.
        last: load the last state in any case.

    Raises:
        StoreError: if the folder holds no run, or no round of it is committed.
        ConfigError: if the base is another than the one that was trained on.
    """
    check_run(run)
    bound = bind_to_score(run)
    history = replay_journal(run)[0]
    digests = history.digests
    if not digests:
        raise StoreError(f"{run}: expected a run with a committed round; got none yet")
    from fedtune.runs.local import prepare

    experiment = prepare(bound)
    _, origin = result.read(run)
    check_base(experiment.base.digest, origin, run)
    number = history.committed if last or not history.kept_round else history.kept_round
    body = Blobs(run / "blobs").get(digests[number - 1], f"the state of round {number}")
    state = states.decode(body, first_state(bound, experiment.blueprint))
    return TrainedRun(run, experiment, state, method_of(bound).global_model(state))


def trained_ratios(run: Path) -> Mapping[str, float]:
    """Return the pruning ratio of every client's last participation."""
    ratios: dict[str, float] = {}
    for record in read_rounds(run):
        for name, client in record.clients.items():
            if client.status == "ok" and client.ratio is not None:
                if not 0 <= client.ratio <= 0.875:
                    raise StoreError(
                        f"{run / 'rounds.jsonl'}: round {record.round}, {name}: expected a ratio from 0 to 0.875; "
                        f"got {client.ratio!r}; the line was changed after the run"
                    )
                ratios[name] = client.ratio
    return ratios


def classes(run: Path) -> Mapping[str, Sequence[str]]:
    """Return the clients that trained, by kind of device; by pruning ratio where devices are not known."""
    devices = device_kinds(run)
    kinds: dict[str, list[str]] = {}
    for name, ratio in sorted(trained_ratios(run).items()):
        kinds.setdefault(devices.get(name, f"ratio-{ratio:g}"), []).append(name)
    if len(kinds) > MOST_KINDS:  # nearly every client is a kind of its own
        return {"every-device": [name for names in kinds.values() for name in names]}
    return kinds


def device_kinds(run: Path) -> Mapping[str, str]:
    """Return each client's kind of device by summary.json; none where that is not known.

    Raises:
        StoreError: if the file is damaged.
    """
    known = (read_summary(run) or {}).get("devices", {})
    clients = known.get("clients", {}) if isinstance(known, dict) else None
    if not isinstance(clients, dict) or not all(isinstance(kind, str) for kind in clients.values()):
        raise StoreError(f"{run / 'summary.json'}: expected kinds of devices by client; got others; {SUMMARY_ADVICE}")
    return clients


def has_shared_ranking(run: Path) -> bool:
    """Return whether a run pruned all its clients by the same ranking of heads and channels.

    Raises:
        StoreError: if the folder holds no run.
    """
    check_run(run)
    pruning = bind_to_score(run).pruning
    return pruning is not None and pruning.policy != "local"


def deployed_ratios(run: Path, target: float) -> Mapping[str, float]:
    """Return each kind of device's ratio: the recipe's target, or what most of its clients trained with last."""
    ratios, deployed = trained_ratios(run), {}
    for kind, names in classes(run).items():
        own = sorted(ratios[name] for name in names)
        deployed[kind] = target or max(own, key=lambda ratio: (own.count(ratio), -ratio))
    return deployed


def checked_ratios(ratios: Sequence[float]) -> Sequence[float]:
    """Return ratios in order without repeats: two that print alike would be written to the same folder.

    Raises:
        ConfigError: naming those that no model can be pruned by.
    """
    faults = [Fault("ratio", "numbers from 0 to 0.875", f"{ratio:g}") for ratio in ratios if not 0 <= ratio <= 0.875]
    if faults:
        raise ConfigError(faults)
    return list({f"{ratio:g}": ratio for ratio in sorted(set(ratios), reverse=True)}.values())[::-1]
