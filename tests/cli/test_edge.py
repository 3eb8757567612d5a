"""The command `fedtune-edge`, as a device's owner meets it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.cli.edge import commands, main, with_errors
from fedtune.cli.edge_options import DONE, INTERRUPTED, PROGRAM, RETRY, SITE, TRAIN, USAGE
from fedtune.errors import ConfigError, Fault, StoreError


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == DONE
    return capsys.readouterr().out


def test_help_fits_80_columns_and_says_what_every_command_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert TRAIN not in text
    for name, command in commands().items():
        assert name in text
        own = shown(capsys, name, "--help")
        assert command.summary[1:20] in own
        assert not [line for line in (text + own).splitlines() if len(line) > 80]
        for example in command.examples:
            assert f"{PROGRAM} {example}" in own
            assert example.split()[0] == name


def test_the_version_says_what_this_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == DONE
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("fedtune ")
    assert "protocol 1" in first
    assert "method fedkseed, bank kron" in second


def test_a_missing_file_is_one_line_with_what_to_do_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["join"]) == USAGE
    error = capsys.readouterr().err
    assert error == (
        f"{PROGRAM}: expected keys of this device in identity; got none; fedtune-edge enroll "
        f"(then 2 more: a certificate of this device, this device's file {SITE})\n"
    )
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_without_a_word_it_shows_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == USAGE
    shown = capsys.readouterr()
    assert (shown.out, "First time here?" in shown.err) == ("", True)


def test_the_version_is_also_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == DONE
    assert capsys.readouterr().out.startswith("fedtune ")


@pytest.mark.parametrize("words", [["status"], ["inspect"], ["pause"], ["resume"], ["chat"], ["export", "out"]])
def test_a_device_without_its_file_hears_how_it_gets_one(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == USAGE
    assert capsys.readouterr().err == (
        f"{PROGRAM}: expected this device's file {SITE}; got no such file; "
        f"{PROGRAM} enroll CODE --server HOST writes one; one elsewhere is named in this command\n"
    )


def test_a_word_that_is_no_command_is_an_error_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["jion"], ["join", "--log", "xml"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == USAGE
    assert "jion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError(Fault("model.base", "a bundle", "none")), USAGE),
        (OSError(errno.EACCES, "Permission denied", "state"), USAGE),
        (OSError(errno.ENOSPC, "No space left on device", "state"), RETRY),
        (KeyboardInterrupt(), INTERRUPTED),
    ],
)
def test_an_error_is_one_line_and_its_status(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert with_errors(fail, debug=False) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{PROGRAM}: ")


def test_a_full_disk_may_have_room_later_and_a_damaged_file_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise StoreError("state: full") from OSError(errno.ENOSPC, "No space left on device")

    def damaged() -> int:
        raise StoreError("state: another file\x1b[2J")

    assert with_errors(full, debug=False) == RETRY
    assert with_errors(damaged, debug=False) == USAGE
    assert "\x1b" not in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_DEBUG", "")
    with pytest.raises(ConfigError):
        main(["join", "none.toml", "--debug"])


def test_a_frozen_program_trains_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.cli.edge_options import train_command

    assert train_command() == (sys.executable, "-m", "fedtune.cli.edge", "_train")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert train_command() == (sys.executable, "_train")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from fedtune.cli.edge import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'numpy', 'grpc', 'pydantic', 'onnxruntime', 'torch', 'typer'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
