from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.paths import group_names, may_be_hub_name, places
from fedtune.errors import ConfigError


def files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}\n")


def named(root: Path, *sources: str, form: str = "auto") -> list[str]:
    return [str(Path(place.name).relative_to(root)) for place in places(sources, form, root, "data.source")[0]]


def refusal(root: Path, *sources: str) -> str:
    with pytest.raises(ConfigError) as caught:
        places(sources, "auto", root, "data.source")
    return str(caught.value)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/train.jsonl", "b/train.jsonl"], ["a", "b"]),
        (["x/a/1/train.jsonl", "x/b/1/train.jsonl.gz"], ["a", "b"]),
        (["a/train.jsonl", "a/more.jsonl", "b/train.jsonl"], ["a-train", "a-more", "b-train"]),
        (["a.jsonl", "a.csv"], ["a.jsonl", "a.csv"]),
        (["one/a.jsonl", "two/b.csv.gz"], ["a", "b"]),
        (["train.jsonl", "a/train.jsonl"], ["train", "a-train"]),
        (["2.jsonl", "10.jsonl"], ["2", "10"]),
        (["only/train.jsonl"], ["train"]),
    ],
)
def test_a_client_is_called_by_what_differs_in_its_path(paths: list[str], names: list[str]) -> None:
    assert list(group_names(paths)) == names


@given(st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), min_size=1, max_size=6))
def test_files_that_differ_have_names_that_differ(paths: set[str]) -> None:
    with suppress(ConfigError):  # a-b beside a/b
        assert len(set(group_names([f"{path}.jsonl" for path in sorted(paths)]))) == len(paths)


@pytest.mark.parametrize("paths", [["ward a.jsonl", "ward-a.jsonl"], ["Ward.jsonl", "ward.jsonl"]])
def test_files_whose_clients_would_have_one_name_are_refused(paths: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"one for each client; got {paths[0]} and {paths[1]};"):
        group_names(paths)


def test_a_file_is_read_once_however_it_is_named(tmp_path: Path) -> None:
    files(tmp_path, "d/a.jsonl", "d/b.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d/a.jsonl")
    assert named(tmp_path, "d/a.jsonl", "d/*.jsonl", "./d/../d/b.jsonl", "link.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    _, note = places(["d/a.jsonl", "d/*.jsonl"], "auto", tmp_path, "data.source")
    assert note == f"data.source: named more than once, read once: {tmp_path / 'd/a.jsonl'}"
    assert places(["d/*.jsonl"], "auto", tmp_path, "data.source")[1] == ""


def test_a_folder_gives_its_files_in_order_and_nothing_else(tmp_path: Path) -> None:
    files(tmp_path, "d/b.jsonl", "d/a.jsonl.gz", "d/sub/c.jsonl", "d/README.md", "d/.hidden.jsonl", "d/_tmp/x.jsonl")
    assert named(tmp_path, "d") == ["d/a.jsonl.gz", "d/b.jsonl", "d/sub/c.jsonl"]
    assert named(tmp_path, "d/s*/*") == ["d/sub/c.jsonl"]
    assert named(tmp_path, "d/**/c*") == ["d/sub/c.jsonl"]
    files(tmp_path, "wards/one/rows.jsonl", "wards/two/rows.jsonl")
    assert named(tmp_path, "wards/*") == ["wards/one/rows.jsonl", "wards/two/rows.jsonl"]


def test_a_folder_of_several_formats_or_parts_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "mixed/a.jsonl", "mixed/b.csv", "parts/train-0.parquet", "parts/test-0.parquet", "notes/README.md")
    assert f"a folder of files of one format; got 1 csv, 1 jsonl in {tmp_path}/mixed;" in refusal(tmp_path, "mixed")
    assert f"a folder of files to train on; got test and train in {tmp_path}/parts;" in refusal(tmp_path, "parts")
    assert "or one with files ending in .jsonl" in refusal(tmp_path, "notes")


def test_a_missing_file_of_a_folder_that_is_there_is_no_hub_name(tmp_path: Path) -> None:
    files(tmp_path, "d/a.jsonl")
    assert refusal(tmp_path, "d/b").startswith("data.source: expected an existing file, glob or folder; got 'd/b'")
    assert may_be_hub_name("meta/data:test")
    assert not may_be_hub_name("data.jsonl.gz")
    assert not may_be_hub_name("./data")
