"""A recipe is read from a file, a text or tables; `--set` changes it; what cannot be read is said in one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.reading import apply_overrides, expand_short_forms, parse, read, value_of
from fedtune.errors import ConfigError, Fault


def message(source: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(source)
    return str(caught.value)


def test_a_file_gives_its_name_its_stem_and_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "dolly 8 (new).toml"
    file.write_text("seed = 3\n")
    assert read(file) == ("dolly 8 (new).toml", "dolly-8-new", tmp_path, {"seed": 3})


def test_a_file_with_a_long_name_still_names_a_run(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 150 + ".toml")
    file.write_text("seed = 3\n")
    assert read(file)[1] == "x" * 100


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert read(file)[3] == {"seed": 3}


def test_a_text_with_a_line_break_is_toml_and_any_other_a_path() -> None:
    assert read("seed = 3\n")[3] == {"seed": 3}
    assert "no such file" in message("seed = 3")


def test_tables_are_taken_as_they_are() -> None:
    assert read({"seed": 3}) == ("", "run", Path.cwd(), {"seed": 3})


def test_a_missing_file_is_named_with_the_command_that_writes_one(tmp_path: Path) -> None:
    missing = tmp_path / "nope.toml"
    assert message(missing) == (
        f'{missing}: 1 fault\n  expected a recipe file; got no such file; "fedtune demo --write recipe.toml" writes one'
    )


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    assert "expected a recipe file in TOML, UTF-8; got Is a directory" in message(tmp_path)


def test_a_binary_file_is_not_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x80\x04\xff\xfe")
    assert "expected a recipe file in TOML, UTF-8; got 'utf-8' codec can't decode byte 0x80" in message(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.touch(mode=0o000)
    assert "got Permission denied" in message(file)


def test_a_path_with_a_zero_byte_is_refused() -> None:
    assert "got embedded null" in message("a\0b")


def test_a_syntax_error_names_the_file_and_the_line(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('name = "x"\n\n[client\nsteps = 3\n')
    text = message(file)
    assert text.startswith("r.toml: 1 fault\n  expected TOML; got ")
    assert "line 3" in text


def test_a_key_that_is_given_twice_is_refused() -> None:
    assert "expected TOML; got Cannot overwrite a value (at line 2" in message("seed = 1\nseed = 2\n")


def test_brackets_without_end_are_refused_not_followed() -> None:
    with pytest.raises(ConfigError, match="TOML"):
        parse("a = " + "[" * 100_000, "r.toml")


def test_tables_of_one_word_are_written_out() -> None:
    long = {"method": {"name": "flora"}, "planner": {"name": "fixed"}, "data": {"split": {"kind": "files"}}}
    assert expand_short_forms({"method": "flora", "planner": "fixed", "data": {"split": "files"}}) == long
    assert (
        expand_short_forms({"method": {"name": "flora"}, "planner": "fixed", "data": {"split": {"kind": "files"}}})
        == long
    )
    assert expand_short_forms({"method": 3, "data": "x"}) == {"method": 3, "data": "x"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("3e-4", 3e-4),
        ("true", True),
        ("[4, 8]", [4, 8]),
        ('{ kind = "iid" }', {"kind": "iid"}),
        ('"8"', "8"),
        ("flora", "flora"),
        ("a/b.jsonl", "a/b.jsonl"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_value_on_the_command_line_is_toml_or_else_text(text: str, value: object) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("override", "table"),
    [
        ("seed=5", {"seed": 5}),
        ("rounds.count = 10", {"rounds": {"count": 10}}),
        ("data.fields.output=response", {"data": {"fields": {"output": "response"}}}),
        ("method=flora", {"method": {"name": "flora"}}),
        ("evaluate.prompt=a=b", {"evaluate": {"prompt": "a=b"}}),
    ],
)
def test_an_override_makes_the_tables_that_it_needs(override: str, table: dict[str, Any]) -> None:
    faults: list[Fault] = []
    assert apply_overrides({}, [override], faults) == table
    assert not faults


def test_overrides_are_applied_in_order_over_the_short_form() -> None:
    overrides = ["method.max_rank=16", "method.tau=0.5", "method.tau=0.9"]
    assert apply_overrides({"method": "flora"}, overrides, []) == {
        "method": {"name": "flora", "max_rank": 16, "tau": 0.9}
    }
    assert apply_overrides({"method": {"name": "flora", "tau": 0.9}}, ["method=fedit"], []) == {
        "method": {"name": "fedit"}
    }


def test_an_override_reaches_into_a_list_by_position() -> None:
    table = {"override": [{"rank": 4}, {"rank": 8}]}
    assert apply_overrides(table, ["override.1.rank=2"], []) == {"override": [{"rank": 4}, {"rank": 2}]}


def test_what_is_overridden_stays_as_it_was() -> None:
    table = {"rounds": {"count": 1}}
    apply_overrides(table, ["rounds.count=2"], [])
    assert table == {"rounds": {"count": 1}}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("steps", "--set steps: expected table.key=value; got something else; e.g. --set rounds.count=10"),
        ("=3", "--set =3: expected table.key=value; got something else; e.g. --set rounds.count=10"),
        ("a..b=3", "--set a..b=3: expected table.key=value; got something else; e.g. --set rounds.count=10"),
        ("seed.x=3", "--set seed.x=3: expected a key inside a table; got seed, which is no table"),
        ("override.4.x=3", "--set override.4.x=3: expected a key inside a table; got override.4, which is no table"),
    ],
)
def test_an_override_that_leads_nowhere_is_a_fault(override: str, text: str) -> None:
    faults: list[Fault] = []
    assert apply_overrides({"seed": 1, "override": []}, [override, "name=x"], faults)["name"] == "x"
    assert [str(fault) for fault in faults] == [text]
