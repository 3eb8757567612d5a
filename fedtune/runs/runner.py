"""One run from its first round to its summary, every step recorded: in a simulation and on a server without a model."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedtune.config import Recipe, bind, changes, digest, render
from fedtune.errors import ConfigError, Fault, FedtuneError, RoundError, StoreError
from fedtune.messages import Blueprint, ProbeSeeds
from fedtune.methods import METHODS
from fedtune.methods import serialization as states
from fedtune.methods.method import GlobalModel
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.planner import Planner
from fedtune.pruning.structure import ModelStructure
from fedtune.rounds.clock import Clock
from fedtune.rounds.loop import Note, RoundFinished, RoundJournal, RoundResult, Watch
from fedtune.rounds.loop import run as run_rounds
from fedtune.rounds.transport import Transport
from fedtune.store import peft, result, round_records
from fedtune.store.blobs import Blobs
from fedtune.store.history import has_begun, replay_journal
from fedtune.store.run_directory import append_round, read_rounds, write_recipe, write_summary
from fedtune.store.run_journal import GROUP_S, RunJournal

Door: TypeAlias = Literal["simulate", "flower", "link"]
RESTORE_ADVICE = "put back a copy of the run directory, or start the run again"
REWRITE_ADVICE = "write it again with fedtune simulate --resume"
FEW_ROUNDS_LEFT = 20
"""Rounds left from which on they are told."""
VERSIONS = ("fedtune", "numpy", "torch", "transformers", "peft", "flwr")
"""Packages whose versions a run notes: another one may change the last bits."""


@dataclass(frozen=True)
class ModelScores:
    """Scores of one global model; none where there is no model or nothing to score."""

    test: Mapping[str, float] | None = None
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deployed: Mapping[str, float] | None = None
    """Of the same model pruned to what is deployed, on the test data."""


def no_scores(tuned: GlobalModel, *, test: bool, clients: bool, keep: ModelStructure | None = None) -> ModelScores:
    """Score nothing: a server holds neither model nor data."""
    return ModelScores()


@dataclass(frozen=True)
class RunContext:
    """What a run is conducted over: the recipe, and what is known of base, fleet and machine."""

    recipe: Recipe
    blueprint: Blueprint
    planner: Planner
    base: Mapping[str, Any]
    """`name`, `digest` and, where the model is loaded, `parameters`."""
    target: peft.Target
    fleet: Mapping[str, int]
    """Training examples by client, as known at the start."""
    machine: Mapping[str, Any]
    data: str = ""
    """Digest of every client's examples; empty where they are not known."""
    labels: Sequence[str] = ()
    """Classification: the class names, by class."""
    notes: Sequence[str] = ()
    score: Callable[..., ModelScores] = no_scores
    sample: Callable[[GlobalModel], Mapping[str, str] | None] = lambda tuned: None
    """Continues the recipe's prompt before and after."""
    door: Door = "simulate"
    """What the run is conducted through."""
    clock: Clock | None = None
    """Says how long clients took; none where that says nothing of their devices."""
    devices: Mapping[str, Any] = field(default_factory=dict)
    """By client, the profile of the device that it is taken to be, with where each number comes from."""
    opened: Callable[[RunJournal], None] = lambda ledger: None
    """Handed the ledger before the first round; over the link, receipts say where its journal stands."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """What the journal holds of a run's beginning, and a resumed run is held against."""
        return {
            "recipe": render(self.recipe),
            "recipe_digest": digest(self.recipe),
            "base": self.base["digest"],
            "data": self.data,
            "door": self.door,
            "versions": " ".join(f"{name} {number}" for name, number in versions().items()),
            "platform": platform.platform(),
        }


def run_recipe(
    setting: RunContext, run: Path, transport: Transport, *, resume: bool = False, watch: Watch
) -> Mapping[str, Any]:
    """Run the rounds, or those that are left, record each of them in the run directory, and return the summary.

    With `resume` a run goes on that has begun; one that was killed before that starts.

    When a round cannot be completed, or on Ctrl-C, the rounds that were completed stay: their lines, the last adapter,
    and a summary that says so; then the exception goes on. The run can be resumed after that, and after any crash.

    Raises:
        RoundError: if a round could not be completed.
        StoreError: if the run directory cannot be written or trusted.
        ConfigError: if a run to be resumed was begun with another base or other data.
    """
    for note in (*setting.notes, *remarks(setting.recipe)):
        watch(Note(note))
    began, going_on = time.perf_counter(), resume and has_begun(run)
    # Over the link a client is told at once that its update is kept: each lasts by itself.
    group_s = 0.0 if setting.door == "link" else GROUP_S
    opening = RunJournal.reopen if going_on else RunJournal.create
    with opening(run, group_s=group_s) as ledger:
        # Everything that may be refused comes before anything of the run is changed.
        lines, state = load_resumed(setting, run, ledger, watch) if going_on else ([], None)
        write_recipe(run, render(setting.recipe))
        ledger.begin(setting.inputs)
        setting.opened(ledger)
        if lines and lines[-1]["round"]:
            write_result(setting, run, state, lines)  # a crash, or a hand, may have left another one
        earlier = sum(line["seconds"] for line in lines)

        def close(reason: str) -> Mapping[str, Any]:
            told = summary(setting, run, lines, reason=reason, seconds=earlier + time.perf_counter() - began)
            write_summary(run, told)
            return told

        try:
            if not lines:
                lines.append(record_base(setting, run))
                watch(RoundFinished(lines[-1]))
            elif lines[-1]["round"] == setting.recipe.rounds.count:
                watch(Note(f"nothing is left to do up to round {lines[-1]['round']}; set rounds.count for more"))
            for played in run_rounds_of(
                setting, transport, ledger=ledger, start=state, lines=tuple(lines), watch=watch
            ):
                lines.append(record_round(setting, run, played, lines))
                watch(RoundFinished(lines[-1]))
                if (left := lines[-1].get("figures", {}).get("rounds_left", FEW_ROUNDS_LEFT + 1)) <= FEW_ROUNDS_LEFT:
                    watch(Note(f"sums of 32 bits have room for {left} more rounds in the worst case"))
        except (KeyboardInterrupt, FedtuneError) as stop:
            reason = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else str(stop)
            if lines:
                with suppress(StoreError):  # a full disk: what stopped the run is told, not what came of it
                    close(reason)
            done = f"after round {lines[-1]['round']}" if lines else "before its first round"
            final = isinstance(stop, RoundError) and stop.final
            watch(Note(f"stopped {done}" + ("" if final else f"; go on with: {resume_command(setting.door, run)}")))
            raise
        told = close("")
        ledger.finish(lines[-1]["round"])
        return told


def load_resumed(
    setting: RunContext, run: Path, ledger: RunJournal, watch: Watch
) -> tuple[list[Mapping[str, Any]], Any | None]:
    """Return the lines of a run that goes on, and the state after the last of them; None before the first round.

    Raises:
        ConfigError: if it was begun with another base or other data, or has more rounds than the recipe.
        StoreError: if lines, journal and states do not belong together.
    """
    check_inputs(setting, ledger.first, watch)
    if setting.recipe.rounds.count < ledger.begun:
        expected = f"at least {ledger.begun}, the rounds that have begun"
        raise ConfigError(Fault("rounds.count", expected, str(setting.recipe.rounds.count)))
    lines = list(read_rounds(run))
    if not lines and ledger.begun:
        raise StoreError(
            f"{run / 'rounds.jsonl'}: expected the lines of {ledger.begun} rounds; got none; {RESTORE_ADVICE}"
        )
    kept = ledger.resume(lines[-1]["round"] if lines else 0)
    return lines, None if kept is None else states.decode(kept, first_state(setting.recipe, setting.blueprint))


def first_state(recipe: Recipe, blueprint: Blueprint) -> Any:
    return METHODS[recipe.method.name].init(blueprint, recipe.method)


def resume_command(door: Door, run: Path) -> str:
    """Return the command that goes on with a run."""
    if door == "simulate":
        return f"fedtune simulate --resume {shlex.quote(str(run))}"
    if door == "link":
        return f"fedtune serve --resume {shlex.quote(str(run))}"
    path = run.absolute()
    return f'flwr run . --run-config \'recipe="{path}/recipe.toml" store="{path.parent}" resume="{path.name}"\''


def run_rounds_of(
    setting: RunContext,
    transport: Transport,
    *,
    ledger: RoundJournal | None = None,
    start: Any | None = None,
    lines: Sequence[Mapping[str, Any]] = (),
    watch: Watch = lambda event: None,
) -> Iterator[RoundResult]:
    """Yield the recipe's rounds, from a state or from the first one; without a ledger nothing of them is kept.

    From the lines of the rounds before, the planner learns again what it knew.
    """
    return run_rounds(
        method=METHODS[setting.recipe.method.name],
        settings=setting.recipe.method,
        planner=setting.planner,
        transport=transport,
        schedule=setting.recipe.rounds,
        blueprint=setting.blueprint,
        base=setting.base["digest"],
        ledger=ledger,
        start=start,
        history=[round_records.observations(line) for line in lines],
        clock=setting.clock,
        clock_s=lines[-1].get("clock_s", 0.0) if lines else 0.0,
        watch=watch,
    )


def check_inputs(setting: RunContext, noted: Mapping[str, str], watch: Watch) -> None:
    """Refuse to go on over another base or other data, and note other versions.

    Raises:
        ConfigError: naming what differs.
    """
    now = setting.inputs
    faults = [
        Fault(path, f"what the run was begun with (digest {noted[key][:12]})", f"{now[key][:12]}", hint)
        for key, path, hint in (
            ("base", "model.base", "load the same model in the same revision and dtype"),
            ("data", "data", "put the files back, or start another run with --fresh"),
        )
        if noted[key] and now[key] and noted[key] != now[key]
    ]
    if faults:
        raise ConfigError(faults)
    if bool(noted["data"]) != bool(now["data"]):
        watch(Note("this run was begun where the data were known, or is now: whether they are the same is not checked"))
    for key in ("versions", "platform"):
        if noted[key] != now[key]:
            watch(Note(f"begun with {key} {noted[key]}; now {now[key]}: the last bits may differ from here on"))


def check_resumable(run: Path, recipe: Recipe) -> None:
    """Refuse to resume a run with another recipe than it was begun with; rounds.count and the engine may change.

    Raises:
        ConfigError: with every key that differs.
        StoreError: if the folder is no run, or its journal cannot be trusted.
    """
    if not has_begun(run):
        return  # killed before anything of it was noted: it starts
    noted = bind(RunJournal.inputs(run)["recipe"])
    different = [line for line in changes(noted, recipe) if not resumable(line)]
    if different:
        raise ConfigError(
            [Fault("", "the recipe that the run was begun with", line) for line in different], source=f"resume {run}"
        )


def resumable(change: str) -> bool:
    """Tell whether a run may go on in spite of a change, as `config.changes` writes it."""
    return change.startswith("rounds.count:")


def check_results(run: Path) -> None:
    """Hold recipe, round lines and adapter of a run against its journal and the states that it keeps.

    Of a line only the digest of its state can be checked: losses and times stand nowhere else.

    Raises:
        StoreError: naming what is another.
    """
    if not has_begun(run):
        return
    while True:
        before = replay_journal(run)[1]
        try:
            check_results_once(run)
        except StoreError:
            if replay_journal(run)[1] == before:
                raise  # and the run, going on, was not merely ahead of what had been read
        else:
            return


def check_results_once(run: Path) -> None:
    lines, folder = read_rounds(run), result.folder(run)
    written = result.read(run) if folder.exists() else None
    history, _ = replay_journal(run)
    digests, path = history.digests, run / "rounds.jsonl"
    noted = bind(history.inputs[-1]["recipe"])
    # A resume writes the recipe, and is noted after that: their rounds.count may differ where it was killed between.
    if different := [line for line in changes(noted, bind(run / "recipe.toml")) if not resumable(line)]:
        raise StoreError(f"{run / 'recipe.toml'}: expected the recipe that the journal notes; got {different[0]}")
    last = lines[-1]["round"] if lines else -1
    if last != len(digests) and not (last == len(digests) - 1 and (history.repeatable or not digests)):
        raise StoreError(f"{path}: expected lines up to round {len(digests)}; got them up to {last}; {RESTORE_ADVICE}")
    for number, line in enumerate(lines):
        expected = digests[number - 1] if number else ""
        if line["round"] != number or line["state_digest"] != expected:
            raise StoreError(
                f"{path}: expected round {number} with the state {expected[:12]}, as the journal notes; "
                f"got round {line['round']} with {str(line['state_digest'])[:12]}; {RESTORE_ADVICE}"
            )
    if last < 1 and written is None:
        return
    if written is None:
        raise StoreError(f"{folder}: expected the {folder.name} of round {last}; got none; {REWRITE_ADVICE} {run}")
    tuned, origin = written
    made = origin.get("round")
    if made not in (last, len(digests)) or not made:
        raise StoreError(
            f"{folder}: expected the {folder.name} of round {last}; got {made!r}'s; {REWRITE_ADVICE} {run}"
        )
    method, blueprint = METHODS[noted.method.name], Blueprint(modules={}, saved={}, max_rank=1, seed=noted.seed)
    body = Blobs(run / "blobs").get(digests[made - 1], f"the state of round {made}")
    state = states.decode(body, first_state(noted, blueprint))
    if not result.same(method.tuned(state), tuned):
        what = "other integers" if tuned.seeds else "other tensors"
        raise StoreError(
            f"{folder}: expected the {folder.name} of round {made}'s state; got {what}; {REWRITE_ADVICE} {run}"
        )


def remarks(recipe: Recipe) -> Iterator[str]:
    """Yield what is allowed and seldom meant."""
    planner, asked = recipe.planner, [each.ratio for each in recipe.override]
    if recipe.pruning is not None and isinstance(planner, FixedSettings) and not planner.ratio and not any(asked):
        yield "nobody is pruned in training, for planner.ratio is 0; the deployed model is cut after the fact"


def record_base(setting: RunContext, run: Path) -> Mapping[str, Any]:
    """Score the base before any training; the line of round 0."""
    began = time.perf_counter()
    scored = setting.score(GlobalModel(saved=setting.blueprint.saved), test=True, clients=True)
    record = round_records.base_record(scored.test, scored.held_out, time.perf_counter() - began)
    append_round(run, record)
    return record


def record_round(
    setting: RunContext, run: Path, played: RoundResult, lines: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Score the state as the recipe asks, write the result and the round's line, and return the line."""
    recipe, method = setting.recipe, METHODS[setting.recipe.method.name]
    tuned = method.tuned(played.state)
    last, every = played.round == recipe.rounds.count, recipe.evaluate.every
    test = last or (every > 0 and played.round % every == 0)
    scored = setting.score(tuned, test=test, clients=last, keep=deployed_structure(recipe, played.state))
    record = round_records.round_record(
        played,
        tuned.adapter,
        energy_kept=method.energy_kept(played.state),
        figures=method.figures(played.state),
        test=scored.test,
        held_out=scored.held_out,
        deployed=scored.deployed,
    )
    write_result(setting, run, played.state, [*lines, record])
    append_round(run, record)
    return record


def deployed_structure(recipe: Recipe, state: Any) -> ModelStructure | None:
    """Return what is kept of the model in the end; None where that is all of it, or is not known yet."""
    if recipe.pruning is None or not recipe.pruning.target:
        return None
    keep: ModelStructure | None = state.structure(recipe.pruning.target)
    return keep


def write_result(setting: RunContext, run: Path, state: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the global model of a state, with where it came from: the last of the lines."""
    tuned = METHODS[setting.recipe.method.name].tuned(state)
    result.write(run, tuned, setting.target, provenance(setting, tuned, lines))


def provenance(setting: RunContext, tuned: GlobalModel, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return what travels inside a result's folder: where it came from, and what it cost."""
    recipe = setting.recipe
    return {
        "fedtune": version("fedtune"),
        "name": recipe.name,
        "recipe": digest(recipe),
        "method": recipe.method.name,
        "seed": recipe.seed,
        "round": lines[-1]["round"],
        "state_digest": lines[-1]["state_digest"],
        "base": {"name": setting.base["name"], "digest": setting.base["digest"]},
        "model": {"task": recipe.model.task, "dtype": recipe.model.dtype, "revision": recipe.model.revision},
        "labels": list(setting.labels),
        "modules_to_save": list(recipe.adapter.modules_to_save),
        "clients": {
            name: {"examples": total["examples"], "rank": total["rank"]}
            for name, total in round_records.clients_summary(lines, setting.fleet).items()
        },
        "modules": {name: factors.rank for name, factors in sorted(tuned.adapter.items())},
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
    }


def summary(
    setting: RunContext, run: Path, lines: Sequence[Mapping[str, Any]], *, reason: str, seconds: float
) -> Mapping[str, Any]:
    """Return what a run says of itself; a reason says why it stopped before its last round."""
    recipe = setting.recipe
    tuned = result.read(run)[0] if result.folder(run).exists() else None
    scored = [line for line in lines if line["test"] is not None]
    after = scored[-1] if scored else lines[-1]
    return {
        "name": recipe.name,
        "method": recipe.method.name,
        "seed": recipe.seed,
        "rounds": lines[-1]["round"],
        "state": "interrupted" if reason else "finished",
        "reason": reason,
        "state_digest": lines[-1]["state_digest"],
        "base": setting.base,
        "trainable": num_trainable(setting, tuned),
        "before": round_records.scores(lines[0]["test"], lines[0]["held_out"]),
        "after": round_records.scores(after["test"], lines[-1]["held_out"]),
        "clients": round_records.clients_summary(lines, setting.fleet),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "seconds": seconds,
        "sample": setting.sample(tuned) if tuned and not reason else None,
        "failures": round_records.failures(lines),
        "recipe_digest": digest(recipe),
        "adapter_digest": result.digest(tuned) if tuned else "",
        "clock_s": lines[-1].get("clock_s", 0.0),
        "deployed": next((line["deployed"] for line in reversed(lines) if line.get("deployed")), None),
        "devices": dict(setting.devices),
        "versions": versions(),
        "machine": {**setting.machine, "platform": platform.platform()},
    }


def num_trainable(setting: RunContext, tuned: GlobalModel | None) -> int:
    """Return how many numbers are trained: of the largest adapter and modules_to_save, or of the tensors seeds move."""
    blueprint = setting.blueprint
    if METHODS[setting.recipe.method.name].task is ProbeSeeds:
        seeds = tuned.seeds if tuned else None
        return sum(seeds.manifest.entries[ordinal].num_parameters for ordinal in seeds.trainable) if seeds else 0
    return blueprint.max_rank * sum(m + n for m, n in blueprint.modules.values()) + sum(
        array.size for array in blueprint.saved.values()
    )


def versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages that matter, as far as they are installed."""
    return dict(installed_version()) | {"python": platform.python_version()}


def installed_version() -> Iterator[tuple[str, str]]:
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            yield name, version(name)
