from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_inspect import LONGEST, MOST_FILES, shorten
from fedtune.cli.edge_options import DONE, USAGE
from tests.edge.speaking import write_device


@pytest.fixture
def site(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    path, _ = write_device(tmp_path, checkpoints["llama"])
    (tmp_path / "rows.txt").write_text("the quick \x1b[2J fox\n" * 31)
    return path


def test_an_owner_sees_what_is_used_and_sent_and_what_stays(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(site), "--hex"]) == DONE
    text = capsys.readouterr().out
    assert f"{site.parent}/rows.txt: 31 rows" in text
    assert "examples: 28 to train on, 3 held out, 0 of 31 rows left out" in text
    assert "takes part with at least 32 examples; it has 28" in text
    assert "\\x1b[2J" in text
    assert "\x1b" not in text  # nothing of a row commands the terminal
    assert "once, before the first round:" in text
    assert "kitchen" in text
    assert "NEVER LEAVES THIS DEVICE" in text
    # The bytes of the profile begin with the name: field 1, of 7 letters.
    assert f"    0a 07 {b'kitchen'.hex(' ')}" in text


def test_the_same_as_json(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(site), "--json", "--examples", "1"]) == DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["used"]["rows"] == 31
    assert len(shown["used"]["examples"]) == 1
    for message in shown["sent"][:3]:
        assert len(bytes.fromhex(message["hex"])) == message["bytes"] == sum(f["num_bytes"] for f in message["fields"])
    assert [size["directions"] for size in shown["answer_sizes"]] == [20, 100, 200]


def test_data_and_a_bundle_alone_are_enough(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.parent)
    assert main(["inspect", "--data", "rows.txt", "--bundle", "bundle"]) == DONE
    assert "31 rows" in capsys.readouterr().out
    assert main(["inspect", "--data", "rows.txt"]) == USAGE
    assert "--bundle: expected both --data PATH and --bundle DIR" in capsys.readouterr().err
    assert main(["inspect", "--data", "none.txt", "--bundle", "bundle"]) == USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_of_a_folder_with_many_files_the_first_are_named(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = site.parent / "many"
    many.mkdir()
    for number in range(MOST_FILES + 13):
        (many / f"{number:02}.txt").write_text("the quick fox\nand more\n")
    given = ["inspect", "--data", str(many), "--bundle", str(site.parent / "bundle")]
    assert main(given) == DONE
    text = capsys.readouterr().out
    assert text.count("txt: 2 rows") == MOST_FILES
    assert "  and 13 more files with 26 rows; --json names all\n" in text
    assert main([*given, "--json"]) == DONE
    assert len(json.loads(capsys.readouterr().out)["used"]["files"]) == MOST_FILES + 13


def test_long_texts_keep_start_and_end() -> None:
    assert shorten("x" * LONGEST) == "x" * LONGEST
    assert shorten("a" + "x" * 999 + "b")[0] + shorten("a" + "x" * 999 + "b")[-1] == "ab"
