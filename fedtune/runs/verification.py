"""Whether a run's recipe, round lines and result are those that its journal notes: `fedtune runs verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, bind, changes
from fedtune.config.recipe import method_of
from fedtune.errors import StoreError
from fedtune.messages import Blueprint
from fedtune.methods import serialization
from fedtune.methods.method import GlobalModel
from fedtune.rounds.selection import kept_record
from fedtune.runs.context import bind_recorded, first_state
from fedtune.runs.resume import RESTORE_ADVICE, resumable
from fedtune.store import result
from fedtune.store.blobs import Blobs
from fedtune.store.history import History, has_begun, replay_journal
from fedtune.store.round_records import read_rounds

REWRITE_ADVICE = "write it again with fedtune simulate --resume"


def check_results(run: Path) -> None:
    """Compare recipe, round lines and result of a run with its journal and the states that it keeps.

    Of a line only the digest of its state can be checked: losses and times are recorded nowhere else. Safe beside the
    run's writer.

    Raises:
        StoreError: naming the first thing that differs.
    """
    if not has_begun(run):
        return
    while True:
        before = replay_journal(run)[1]
        try:
            check_results_once(run)
        except StoreError:
            # A run in progress may have written the next round between two of our reads: then look again.
            if replay_journal(run)[1] == before:
                raise
        else:
            return


def check_results_once(run: Path) -> None:
    # The result and the lines are read before the journal, which is written first: it can only be ahead of them.
    records, folder = read_rounds(run), result.folder(run)
    written = result.read(run) if folder.exists() else None
    history, _ = replay_journal(run)
    recipe = bind_recorded(history.inputs[-1]["recipe"])
    check_recipe_file(run, recipe)
    last = records[-1].round if records else -1
    check_last_line(run, last, history)
    for record in records:
        expected = history.digests[record.round - 1] if record.round else ""
        if record.state_digest != expected:
            raise StoreError(
                f"{run / 'rounds.jsonl'}: expected round {record.round} with the state {expected[:12]}, as the journal "
                f"notes; got {record.state_digest[:12]}; {RESTORE_ADVICE}"
            )
    if last < 1 and written is None:
        return
    if written is None:
        raise StoreError(f"{folder}: expected the {folder.name} of round {last}; got none; {REWRITE_ADVICE} {run}")
    check_result(run, written, recipe, history.digests, last=last, kept=kept_record(recipe.rounds, records).round)


def check_recipe_file(run: Path, recipe: Recipe) -> None:
    # A resume writes the recipe before it notes it: if it was killed in between, the two differ in rounds.count.
    different = [change for change in changes(recipe, bind(run / "recipe.toml")) if not resumable(change)]
    if different:
        raise StoreError(f"{run / 'recipe.toml'}: expected the recipe that the journal notes; got {different[0]}")


def check_last_line(run: Path, last: int, history: History) -> None:
    """Check that the lines end where the journal does, or one round before while that round can be repeated."""
    committed = history.committed
    if last != committed and not (last == committed - 1 and (history.repeatable or not committed)):
        raise StoreError(
            f"{run / 'rounds.jsonl'}: expected lines up to round {committed}; got them up to {last}; {RESTORE_ADVICE}"
        )


def check_result(
    run: Path,
    written: tuple[GlobalModel, Mapping[str, Any]],
    recipe: Recipe,
    digests: list[str],
    *,
    last: int,
    kept: int,
) -> None:
    """Check that a result is the global model of the round that is kept, or of one whose line is not written yet."""
    (tuned, provenance), folder = written, result.folder(run)
    number = provenance.get("round")
    if number not in (kept, len(digests) if last < len(digests) else kept) or not number:
        raise StoreError(
            f"{folder}: expected the {folder.name} of round {kept}; got {number!r}'s; {REWRITE_ADVICE} {run}"
        )
    method, blueprint = method_of(recipe), Blueprint(modules={}, saved={}, max_rank=1, seed=recipe.seed)
    data = Blobs(run / "blobs").get(digests[number - 1], f"the state of round {number}")
    state = serialization.decode(data, first_state(recipe, blueprint))
    if not result.same(method.global_model(state), tuned):
        difference = "other integers" if tuned.seeds else "other tensors"
        raise StoreError(
            f"{folder}: expected the {folder.name} of round {number}'s state; got {difference}; {REWRITE_ADVICE} {run}"
        )
