from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.site import bind_site
from fedtune.edge import site as edge_site
from fedtune.edge.disclosure import profile_sent
from fedtune.edge.inspection import inspect_site, site_of
from fedtune.edge.site import from_file
from fedtune.errors import ConfigError
from tests.edge.speaking import bundle_of

ROWS = [{"instruction": f"What is {n}?", "output": f"It is {n} and more.", "secret": f"s{n}"} for n in range(40)]


@pytest.fixture
def bundle(checkpoints: dict[str, Path]) -> Path:
    return bundle_of(checkpoints["llama"])


@pytest.fixture
def site(tmp_path: Path, bundle: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "site.toml"
    path.write_text(
        f'name = "kitchen"\n[model]\nbase = "{bundle}"\n'
        '[data]\nsource = "rows.jsonl"\ntemplate = "plain"\nmax_tokens = 120\n'
        "[policy]\nunsigned_base = true\n"
    )
    return path


def test_what_would_be_used_is_counted_and_shown_as_the_model_reads_it(site: Path) -> None:
    shown = inspect_site(bind_site(site), source=str(site))
    assert [count for _, count in shown.files] == [40]
    assert (list(shown.parts), shown.rows) == (["instruction", "output"], 40)
    assert shown.training + shown.held_out == 40
    assert shown.held_out == 4
    first = shown.first[0]
    learned = "".join(text for text, is_learned in first.pieces if is_learned)
    read_only = "".join(text for text, is_learned in first.pieces if not is_learned)
    assert "and more." in learned
    assert "What is" in read_only
    assert "secret" not in learned + read_only
    assert len(shown.first) == 3


def test_the_profile_shown_is_the_one_that_is_sent_byte_for_byte(site: Path) -> None:
    shown = inspect_site(bind_site(site), source=str(site))
    edge_site.from_file.cache_clear()
    assert shown.sent[0].data == profile_sent(from_file(str(site)).profile()).data
    edge_site.from_file.cache_clear()


def test_no_text_of_the_data_is_in_what_would_be_sent(site: Path) -> None:
    shown = inspect_site(bind_site(site), source=str(site))
    everything = b"".join(message.data for message in shown.sent)
    for row in ROWS:
        assert not any(value.encode() in everything for value in row.values() if len(value) > 4)
    assert b"rows.jsonl" not in everything


def test_no_network_and_no_identity_are_needed_and_nothing_is_written(
    site: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    (site.parent / "notes.txt").write_text("the quick fox\n" * 40)
    before = sorted(path.name for path in site.parent.iterdir())
    settings = site_of("notes.txt", bundle, site.parent)
    shown = inspect_site(settings, source="notes.txt", examples=0)
    assert shown.first == []
    assert sorted(path.name for path in site.parent.iterdir()) == before
    assert shown.notes[0].endswith("may come from anyone")


def test_a_device_that_keeps_its_scores_is_not_shown_to_send_any(site: Path) -> None:
    site.write_text(site.read_text() + 'scores = "refuse"\n')
    shown = inspect_site(bind_site(site), source=str(site))
    assert "where the run asks for scores" not in [message.what for message in shown.sent]
    names = {field.name for message in shown.sent for field in message.fields}
    assert not names & {"loss_before", "loss_after", "metrics", "held_out"}


@pytest.mark.parametrize("key", ["source", "test"])
def test_a_mistyped_path_is_looked_for_on_no_hub(site: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    site.write_text(site.read_text().replace("[data]", '[data]\ntest = "rows.jsonl"'))
    monkeypatch.setattr(edge_site, "federate", lambda *given, **settings: pytest.fail("it was read"))
    for named in ('"notes-of-anna"', '["rows.jsonl", "anna/notes"]'):
        lines = [
            line if not line.startswith(f"{key} =") else f"{key} = {named}" for line in site.read_text().split("\n")
        ]
        site.write_text("\n".join(lines))
        with pytest.raises(ConfigError, match=f"^data.{key}: expected a file or folder on this device; got '.*; paths"):
            inspect_site(bind_site(site), source=str(site))
        edge_site.from_file.cache_clear()
        with pytest.raises(ConfigError, match="a device reads nothing from elsewhere"):
            from_file(str(site))


def test_data_that_cannot_be_read_are_refused_as_at_a_start(site: Path) -> None:
    (site.parent / "rows.jsonl").write_text("no\n")
    with pytest.raises(ConfigError, match="expected one JSON object per line"):
        inspect_site(bind_site(site), source=str(site))
