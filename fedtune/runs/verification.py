"""Whether a run's files are those that its journal notes, and its exports and logs whole: `fedtune runs verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, bind, changes
from fedtune.config.recipe import PYTHON, method_of
from fedtune.errors import StoreError
from fedtune.link import audit_files, audit_log, provenance
from fedtune.messages import Blueprint
from fedtune.methods import serialization
from fedtune.methods.method import GlobalModel
from fedtune.rounds.selection import kept_record
from fedtune.runs.context import bind_recorded, first_state
from fedtune.runs.resume import RESTORE_ADVICE, resumable, resume_command
from fedtune.store import manifest, result
from fedtune.store.blobs import Blobs
from fedtune.store.files import store_errors
from fedtune.store.history import History, has_begun, replay_journal
from fedtune.store.round_records import line_digests, read_rounds
from fedtune.store.run_directory import PARTITION, partition_digest, read_summary, summary_digest

LINK, AUDIT, ID, BASE = "link", "audit", "id", "base"
"""Of a served run: the folder of the link, and the files in it that are checked."""


@dataclass(frozen=True)
class Checked:
    """How much of a run's other files was checked and is whole."""

    folders: int = 0
    """With a manifest: the result, and the exports that lie within the run directory."""
    files: int = 0
    """Listed in these manifests."""
    remarks: tuple[str, ...] = ()
    """Why the files of a folder could not be checked, and what of a folder is to be checked elsewhere."""
    entries: int = 0
    """Of the audit log of a served run."""


def check_results(run: Path) -> Checked:
    """Compare recipe, round lines, summary and result of a run with its journal, and check its exports and audit log.

    The last line of a run in progress is compared by the digest of its state alone, as are all lines of a run that
    0.2.0 wrote: its journal notes no digests of lines. Safe beside the run's writer.

    Raises:
        StoreError: naming the first thing that differs.
    """
    if not has_begun(run):
        return Checked()
    while True:
        before = replay_journal(run)[1]
        try:
            check_results_once(run)
            return check_folders(run, check_link(run))
        except StoreError:
            # A run in progress may have written the next round between two of our reads: then look again.
            if replay_journal(run)[1] == before:
                raise


def check_results_once(run: Path) -> None:
    # All this is read before the journal, which is written first: it can only be ahead of them.
    records, digests, folder = read_rounds(run), line_digests(run), result.folder(run)
    summary, content, partition = summary_digest(run), read_summary(run), partition_digest(run)
    problem, written = "", None
    try:
        written = result.read(run) if folder.exists() else None
    except StoreError as error:
        problem = str(error)
    history, _ = replay_journal(run)
    recipe = bind_recorded(history.inputs[-1]["recipe"])
    advice = rewrite_advice(run, recipe, history)
    if problem:
        raise StoreError(f"{problem}; {advice}")
    check_recipe_file(run, recipe)
    check_partition(run, partition, history, advice)
    last = records[-1].round if records else -1
    check_last_line(run, last, history)
    for record in records:
        expected = history.digests[record.round - 1] if record.round else ""
        if record.state_digest != expected:
            raise StoreError(
                f"{run / 'rounds.jsonl'}: expected round {record.round} with the state {expected[:12]}, as the journal "
                f"notes; got {record.state_digest[:12]}; {RESTORE_ADVICE}"
            )
    for number, noted in history.lines.items():
        if digests[number : number + 1] != [noted]:
            actual = digests[number][:12] if number < len(digests) else "none"
            raise StoreError(
                f"{run / 'rounds.jsonl'}, line {number + 1}: expected the digest {noted[:12]}, as the journal notes of "
                f"round {number}; got {actual}; {RESTORE_ADVICE}"
            )
    check_summary(run, content, summary, history, advice)
    if last < 1 and written is None:
        return
    if written is None:
        raise StoreError(f"{folder}: expected the {folder.name} of round {last}; got none; {advice}")
    chosen = kept_record(recipe.rounds, records).round
    check_result(run, written, recipe, history.digests, last=last, kept=chosen, advice=advice)


def rewrite_advice(run: Path, recipe: Recipe, history: History) -> str:
    """Return what writes a run's summary and result again from its states; the command is that of its door."""
    if PYTHON in (recipe.model.base, recipe.data.source, recipe.planner.name):
        return f"resume the run from Python, fedtune.simulate(resume={str(run)!r}, ...), which writes it again"
    command = resume_command(history.inputs[-1].get("door", "simulate"), run)
    return f"this writes it again: {command}"


def check_summary(run: Path, content: Mapping[str, Any] | None, digest: str, history: History, advice: str) -> None:
    """Check that a summary is the one that the journal notes, or, of a stopped run, that it fits the journal."""
    path = run / "summary.json"
    if history.summary and digest != history.summary:
        raise StoreError(
            f"{path}: expected the digest {history.summary[:12]}, as the journal notes; "
            f"got {digest[:12] or 'no file'}; {advice}"
        )
    if content is None:
        return
    number, state = content.get("rounds"), content.get("state_digest")
    if not isinstance(number, int) or not 0 <= number <= history.committed:
        raise StoreError(f"{path}: expected at most {history.committed} rounds; got {number!r}; {advice}")
    expected = history.digests[number - 1] if number else ""
    if state != expected:
        raise StoreError(f"{path}: expected the state {expected[:12]}; got {str(state)[:12]!r}; {advice}")


def check_partition(run: Path, digest: str, history: History, advice: str) -> None:
    """Check that the partition file is the one that the journal notes; runs of before 0.3.0 have none."""
    noted = history.inputs[-1].get("partition", "")
    if digest != noted:
        raise StoreError(
            f"{run / PARTITION}: expected {f'the digest {noted[:12]}' if noted else 'no file'}, as the journal notes; "
            f"got {digest[:12] or 'no file'}; {advice}"
        )


def check_link(run: Path) -> Checked:
    """Check the audit log of a served run, and that its number and its base are those of the journal."""
    folder = run / LINK
    if not folder.is_dir():
        return Checked()
    start = replay_journal(run)[0].inputs[0]
    for name, key, what in ((ID, "number", "number"), (BASE, "base", "base")):
        noted, file = str(start.get(key, "")), folder / name
        if not noted or not file.exists():
            continue
        with store_errors(file):
            text = file.read_bytes().strip().decode(errors="replace")
        if text != noted:
            advice = "remove the file: it is written again from the journal" if name == ID else "put back a copy of it"
            raise StoreError(f"{file}: expected the run's {what} {noted}; got {text[:64]}; {advice}")
    log = folder / AUDIT
    return Checked(entries=len(audit_log.read_audit_log(log).entries) if audit_files.exists(log) else 0)


def check_folders(run: Path, checked: Checked) -> Checked:
    """Check every file that the manifests of the folders in a run directory list, and that signatures are of them."""
    with store_errors(run):
        folders = sorted(path.parent for path in run.glob(f"*/{manifest.NAME}") if not path.parent.name.startswith("."))
    for folder in folders:
        opened = manifest.open_folder(folder)
        opened.check()
        remarks = (*checked.remarks, opened.remark) if opened.remark else checked.remarks
        if provenance.check_statement(opened):
            remarks = (*remarks, f"{folder}: signed as it is; by whom, says fedtune verify {folder} --roster FILE")
        listed = len(opened.listed or ())
        checked = replace(checked, folders=checked.folders + 1, files=checked.files + listed, remarks=remarks)
    return checked


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
    advice: str,
) -> None:
    """Check that a result is the global model of the round that is kept, or of one whose line is not written yet."""
    (tuned, provenance), folder = written, result.folder(run)
    number = provenance.get("round")
    if number not in (kept, len(digests) if last < len(digests) else kept) or not number:
        raise StoreError(f"{folder}: expected the {folder.name} of round {kept}; got {number!r}'s; {advice}")
    method, blueprint = method_of(recipe), Blueprint(modules={}, saved={}, max_rank=1, seed=recipe.seed)
    data = Blobs(run / "blobs").get(digests[number - 1], f"the state of round {number}")
    state = serialization.decode(data, first_state(recipe, blueprint))
    if not result.same(method.global_model(state), tuned):
        difference = "other integers" if tuned.seeds else "other tensors"
        raise StoreError(f"{folder}: expected the {folder.name} of round {number}'s state; got {difference}; {advice}")
