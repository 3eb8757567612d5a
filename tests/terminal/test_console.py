from __future__ import annotations

from io import StringIO

from rich.table import Table

from fedtune.terminal.console import console


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_gets_blanks_that_fill_lines() -> None:
    table = Table("a", "b", box=None, expand=True)
    table.add_row("x", "y  z")
    for file, wide in ((StringIO(), False), (Terminal(), True)):
        console(file).print(table)
        (row,) = [line for line in file.getvalue().splitlines() if "y  z" in line]
        assert row.endswith(" ") is wide


def test_a_file_is_wide_enough_for_every_table() -> None:
    assert console(StringIO()).width == 120
