from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.edge.current_model import NAME, store_model
from fedtune.edge.speaker import open_speaker
from fedtune.edge.talk import Talk
from fedtune.errors import ConfigError, StoreError
from tests.edge.speaking import Scripted, tune, write_device

Device = tuple[Path, Scripted]


@pytest.fixture
def device(tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Device:
    site, runtime = write_device(tmp_path, checkpoints["llama"])
    monkeypatch.setattr("fedtune.edge.base.load_runtime", lambda bundle, threads: runtime)
    return site, runtime


def test_the_model_that_was_received_last_answers(device: Device) -> None:
    site, runtime = device
    _, model = tune(site)
    speaker, notes = open_speaker(site, tuned=True)
    assert notes[0] == "the model after round 3"
    assert speaker.form == "text"  # as the rows on the device are
    assert "".join(Talk(speaker, system=None, new_tokens=64).ask("the")) == "the lazy dog"
    [(ledger, trainable, _)] = runtime.asked
    assert (ledger.digest, trainable) == (model.ledger.digest, model.trainable)


def test_the_base_answers_without_a_tuned_model(device: Device) -> None:
    site, runtime = device
    speaker, notes = open_speaker(site, tuned=False)
    list(Talk(speaker, system=None, new_tokens=4).ask("the"))
    assert (notes[0], runtime.asked[0][:2]) == ("the base alone", (None, ()))


def test_rows_that_are_gone_do_not_silence_it(device: Device) -> None:
    site, _ = device
    tune(site)
    (site.parent / "rows.txt").unlink()
    speaker, notes = open_speaker(site, tuned=True)
    assert speaker.form == "instruction"
    assert notes[-1].startswith("questions are written as instructions, since the rows cannot be read: data.source")


def test_what_cannot_speak_is_one_line(device: Device) -> None:
    site, _ = device
    with pytest.raises(ConfigError, match=r"link\.state: expected a tuned model .*; got none yet; run fedtune-edge"):
        open_speaker(site, tuned=True)
    _, model = tune(site)
    store_model(site.parent / "state", replace(model, ledger=replace(model.ledger, manifest=b"m" * 32)))
    with pytest.raises(ConfigError, match="use the bundle that the model was tuned on, or --base"):
        open_speaker(site, tuned=True)
    (site.parent / "state" / NAME).write_bytes(b"torn")
    with pytest.raises(StoreError, match="delete the file"):
        open_speaker(site, tuned=True)
