from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pytest

from fedtune.cli.edge_options import add_site, ask


def test_the_file_of_the_device_is_site_toml_unless_another_is_named() -> None:
    own = argparse.ArgumentParser()
    add_site(own)
    assert own.parse_args([]).site == Path("site.toml")
    assert own.parse_args(["x/y.toml"]).site == Path("x/y.toml")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "agrees"), [("y\n", True), (" Yes \n", True), ("\n", False), ("", False), ("no\n", False)]
)
def test_only_a_person_who_says_yes_agrees(
    answer: str, agrees: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert ask("Take part?") is agrees
    assert capsys.readouterr().err == "Take part? [y/N] "
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert ask("Take part?") is False
