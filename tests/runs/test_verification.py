from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune import api
from fedtune.config import bind, changes
from fedtune.errors import FedtuneError, StoreError
from fedtune.link.audit_log import AuditLog
from fedtune.link.pki.identity import load_identity
from fedtune.link.provenance import Signer, sign_folder
from fedtune.runs.export import export
from fedtune.runs.local import Experiment, run_context, transport
from fedtune.runs.resume import resumable
from fedtune.runs.runner import run_recipe
from fedtune.runs.verification import check_results
from fedtune.store import manifest, peft, result
from tests.link.ceremony import enroll_parties
from tests.runs.conftest import cut, edit, read_lines, run_prepared

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_changed_or_missing_adapter_is_written_again_from_the_state(prepared: Experiment, run: Path) -> None:
    right = run_prepared(prepared, run)["adapter_digest"]
    adapter, saved, origin = peft.read(run / "adapter")
    double = {name: replace(factors, b=2 * factors.b) for name, factors in adapter.items()}
    peft.write(run / "adapter", double, saved, run_context(prepared).target, origin)
    with pytest.raises(StoreError, match="expected the adapter of round 2's state"):
        check_results(run)
    assert run_prepared(prepared, run, resume=True)["adapter_digest"] == right
    check_results(run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(StoreError, match="expected the adapter of round 2; got none"):
        check_results(run)
    assert run_prepared(prepared, run, resume=True)["adapter_digest"] == right


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "rounds.jsonl").unlink(), "up to round 2; got them up to -1"),
        (lambda run: cut(run / "rounds.jsonl"), "up to round 2; got them up to 1"),
        (lambda run: edit(run / "rounds.jsonl", read_lines(run)[1]["state_digest"], "ab" * 32), "got abababababab"),
        (lambda run: edit(run / "recipe.toml", "steps = 3", "steps = 4"), r"recipe.toml: .*client.steps: 3 -> 4"),
        (
            lambda run: manifest.write(run / "adapter", {**manifest.open_folder(run / "adapter").facts, "round": 1}),
            "expected the adapter of round 2",
        ),
        (lambda run: edit(run / "adapter" / "fedtune.json", '"round": 2', '"round": 1'), "with its own digest"),
    ],
)
def test_what_was_removed_or_changed_is_detected(
    spoil: Callable[[Path], Any], message: str, prepared: Experiment, run: Path
) -> None:
    run_prepared(prepared, run)
    check_results(run)
    spoil(run)
    with pytest.raises(StoreError, match=message):
        check_results(run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: edit(run / "rounds.jsonl", '"bytes_up": ', '"bytes_up": 1'),
            r"rounds\.jsonl, line 1: expected the digest \w{12}, as the journal notes of round 0",
        ),
        (
            lambda run: edit(run / "summary.json", '"seconds": ', '"seconds": 1'),
            r"summary\.json: expected the digest .*; this writes it again: fedtune simulate --resume",
        ),
        (lambda run: (run / "summary.json").unlink(), r"summary\.json: expected the digest \w{12}.* got no file"),
        (lambda run: (run / "adapter" / "adapter_model.bin").write_bytes(b"x"), "expected only the files that"),
        (
            lambda run: edit(run / "partition.jsonl", '"rows": [0, ', '"rows": [1, '),
            r"partition\.jsonl: expected the digest \w{12}, as the journal notes; got \w{12}; this writes it again: ",
        ),
        (lambda run: (run / "partition.jsonl").unlink(), r"partition\.jsonl: expected the digest .* got no file"),
    ],
)
@pytest.mark.guarantee("G18")
def test_losses_times_and_files_beside_the_result_are_covered(
    spoil: Callable[[Path], Any], message: str, prepared: Experiment, run: Path
) -> None:
    run_prepared(prepared, run)
    checked = check_results(run)
    assert (checked.folders, checked.files, checked.remarks) == (1, 2, ())
    spoil(run)
    with pytest.raises(StoreError, match=message):
        check_results(run)


def test_what_a_resume_writes_again_is_in_order_again(prepared: Experiment, run: Path) -> None:
    run_prepared(prepared, run)
    (run / "summary.json").unlink()
    (run / "partition.jsonl").unlink()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    run_prepared(prepared, run, resume=True)
    check_results(run)
    run_prepared(prepared, run, resume=True)  # nothing is left, and the summary has other seconds
    check_results(run)


def test_exports_within_the_run_are_checked_and_name_what_they_were_made_from(prepared: Experiment, run: Path) -> None:
    run_prepared(prepared, run)
    folder = export(run)
    assert manifest.open_folder(folder).facts["source"] == manifest.source(run / "adapter")
    assert check_results(run).folders == 2
    edit(folder / "adapter_config.json", '"CAUSAL_LM"', '"SEQ_CLS"')
    with pytest.raises(StoreError, match=r"peft/adapter_config\.json: expected"):
        check_results(run)


def check_flips(run: Path, count: int, cases: Callable[[int], None]) -> list[str]:
    """Flip bits in every file of a run, one after the other; return those that passed with harm."""
    wrong = []
    right, recipe = result.digest(result.read(run)[0]), bind(run / "recipe.toml")
    draw = random.Random(0)
    # The lock holds the number of a process, for people.
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "lock"]
    for path in files:
        size, whole = path.stat().st_size, path.read_bytes()
        for at in draw.sample(range(size), min(count, size)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
            try:
                verified = api.verify(run)
            except FedtuneError:
                # What verify names must not be exported either.
                if path.parent.name == "adapter":
                    with pytest.raises(FedtuneError):
                        export(run, out=run.parent / "out")
            else:
                # Harmless: a torn end of the journal, which a resume cuts off; or the same recipe in other words.
                different = [change for change in changes(recipe, bind(run / "recipe.toml")) if not resumable(change)]
                if not verified.torn_bytes and (different or result.digest(result.read(run)[0]) != right):
                    wrong.append(f"{path.name}, byte {at}")
                if path.name not in ("journal", "recipe.toml"):
                    wrong.append(f"{path.name}, byte {at}: passed")
            path.write_bytes(whole)
            cases(1)
    return wrong


@pytest.mark.guarantee("G18")
def test_no_flipped_bit_of_a_run_passes_with_harm(
    prepared: Experiment, run: Path, cases: Callable[[int], None]
) -> None:
    run_prepared(prepared, run)
    assert not check_flips(run, 6, cases)  # recipe, journal, state, lines, summary, and the three files of the adapter


@pytest.mark.slow
@pytest.mark.guarantee("G18")
def test_no_flipped_byte_of_a_run_passes_with_harm(
    prepared: Experiment, run: Path, cases: Callable[[int], None]
) -> None:
    run_prepared(prepared, run)
    assert not check_flips(run, 130, cases)


def test_the_signed_statement_of_a_result_is_held_against_it(prepared: Experiment, run: Path, tmp_path: Path) -> None:
    run_prepared(prepared, run)
    assert check_results(run).remarks == ()
    identity = load_identity(enroll_parties(tmp_path / "sites")["server"], role="coordinator", now=int(time.time()))
    sign_folder(run / "adapter", Signer("f", identity.name, identity.key), now=0)
    assert "fedtune verify" in check_results(run).remarks[0]
    file = run / "adapter" / "manifest.dsse"
    file.write_bytes(file.read_bytes().replace(b"payload", b"paylord", 1))
    with pytest.raises(StoreError, match=r"manifest\.dsse"):
        check_results(run)


def test_the_number_base_and_audit_log_of_a_served_run_are_checked(prepared: Experiment, run: Path) -> None:
    with transport(prepared) as engine:
        run_recipe(replace(run_context(prepared), number="ab" * 8), run, engine, watch=lambda event: None)
    (run / "link").mkdir()
    log = AuditLog(run / "link" / "audit")
    for kind in ("serving", "complete"):
        log.record(kind)
    log.close()
    (run / "link" / "id").write_text("ab" * 8)
    (run / "link" / "base").write_text(run_context(prepared).base["digest"])
    assert check_results(run).entries == 2
    for name, message in (
        ("id", "link/id: expected the run's number (ab)+; got (ab)+aa; remove the file"),
        ("base", "link/base: expected the run's base"),
        ("audit", "link/audit, record 0: .*the journal is damaged"),
    ):
        whole = (run / "link" / name).read_bytes()
        (run / "link" / name).write_bytes(whole[:15] + bytes([whole[15] ^ 3]) + whole[16:])
        with pytest.raises(StoreError, match=message):
            check_results(run)
        (run / "link" / name).write_bytes(whole)
    check_results(run)
