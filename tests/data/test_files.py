from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import files
from fedtune.data.files import format_of, read_file
from fedtune.data.table import Table
from fedtune.errors import ConfigError

ROWS = [{"text": "one", "site": "a"}, {"text": "zwei", "site": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def read(path: Path, form: str | None = None) -> dict[str, list[object]]:
    table = read_file(path, form or format_of(path) or "", "data.source")
    return columns(table)


def columns(table: Table) -> dict[str, list[object]]:
    return {name: list(table.column(name)) for name in table.names}


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, form: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, form)
    return str(caught.value)


def test_lines_of_text_end_before_the_break_of_any_system(tmp_path: Path) -> None:
    path = written(tmp_path / "x.txt", b"one\r\ntwo\x0cof it\r\n\r\nthree")
    assert read(path) == {"text": ["one", "two\x0cof it", "three"]}


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_files_are_read_like_others(tmp_path: Path, ending: str) -> None:
    pack = PACKERS[ending]
    plain = {"text": ["one", "zwei"], "site": ["a", "b"]}
    assert read(written(tmp_path / f"x.jsonl{ending}", pack(LINES))) == plain
    assert read(written(tmp_path / f"x.CSV{ending.upper()}", pack(b"text,site\none,a\nzwei,b\n"))) == plain
    assert read(written(tmp_path / f"y.json{ending}", pack(json.dumps(ROWS).encode()))) == plain
    assert read(written(tmp_path / f"y.txt{ending}", pack(b"one\n"))) == {"text": ["one"]}
    assert read(written(tmp_path / f"two.jsonl{ending}", pack(LINES[:30]) + pack(LINES[30:]))) == plain


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "flipped", "junk"])
def test_a_damaged_archive_is_one_error(tmp_path: Path, ending: str, damage: str) -> None:
    packed = bytearray(PACKERS[ending](LINES * 50))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed = bytearray(b"this is no archive")
    text = refusal(written(tmp_path / f"x.jsonl{ending}", bytes(packed)))
    # A flipped bit that no checksum covers may also be seen by who reads the text.
    assert f"expected a whole {ending} archive; got {tmp_path}" in text or f"x.jsonl{ending}" in text
    assert text.startswith("data.source: expected")


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALL", 2**20)
    bomb = written(tmp_path / "x.jsonl.gz", gzip.compress(b" " * 2**24))
    assert f"unpacks to at most 200 times its size; got more in {bomb}" in refusal(bomb)


def test_a_packed_file_under_another_ending_is_named(tmp_path: Path) -> None:
    text = refusal(written(tmp_path / "x.jsonl", gzip.compress(LINES)))
    assert text.endswith("its first bytes are those of a .gz file: give it that ending")
    assert refusal(written(tmp_path / "x.csv", b"PK\x03\x04\xff")).endswith("are those of a .zip file: unpack it")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_says_how_a_csv_is_divided(tmp_path: Path, delimiter: str) -> None:
    content = f'question{delimiter}"answer{delimiter * 3}"\r\n"a{delimiter}b"{delimiter}c\r\n'
    assert read(written(tmp_path / "x.csv", content)) == {
        "question": [f"a{delimiter}b"],
        f"answer{delimiter * 3}": ["c"],
    }


@given(st.lists(st.tuples(st.text("ab;,\n\"'| é"), st.text("xy\t;,")), min_size=1), st.sampled_from(",;\t|"))
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], by: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=by, quoting=csv.QUOTE_ALL)
        writer.writerows([("question", "answer"), *rows])
    kept = rows
    while kept and not any(kept[-1]):
        kept = kept[:-1]
    assert read(path) == {"question": [a for a, _ in kept], "answer": [b for _, b in kept]}


def test_a_csv_as_spreadsheets_export_it(tmp_path: Path) -> None:
    long = "x" * 200_000
    before = csv.field_size_limit()
    assert read(written(tmp_path / "x.csv", f"\ufefftext,site\n{long},a\n,\n,\n\n")) == {"text": [long], "site": ["a"]}
    assert csv.field_size_limit() == before
    assert "columns that each have a name of their own; got 'b' 2 times in" in refusal(
        written(tmp_path / "y.csv", "a,b,b\n1,2,3\n")
    )
    assert read(written(tmp_path / "z.tsv", "a\tb\n1\t\n")) == {"a": ["1"], "b": [""]}
    assert read(written(tmp_path / "m.csv", "a;b\r1,5;2\r")) == {"a": ["1,5"], "b": ["2"]}
    assert read(written(tmp_path / "e.csv", "sep=;\r\na;b\r\n1;2\r\n")) == {"a": ["1"], "b": ["2"]}
    text = refusal(written(tmp_path / "w.csv", "a;b,c;d\n1;2\n"))
    assert text.startswith("data.source: expected 3 columns in every row; got another number in line 2 of")
    assert text.endswith("its header is divided by ';'")
