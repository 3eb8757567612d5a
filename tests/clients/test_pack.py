"""The packer: what a file must not hold, what it needs, and the same bytes for the same tree."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.clients.toy import EDGE, load, toy_file, toy_tree

PACK, CONTENTS = load("pack"), load("contents")


@pytest.mark.parametrize(
    ("name", "modules", "folders", "surplus"),
    [
        ("fedtune-edge", {"numpy", "torch.nn", "fedtune.edge"}, [], "torch"),
        ("fedtune-edge", {"numpy"}, ["pyarrow-20.0.dist-info"], "pyarrow"),
        ("fedtune-edge", {"flwr.server"}, ["transformers"], "flwr, transformers"),
        ("fedtune-edge", set(), ["xllamacpp"], "xllamacpp"),
        ("fedtune-edge-gguf", {"onnxruntime.capi"}, [], "onnxruntime"),
        ("fedtune-client", {"torch", "flwr"}, ["transformers"], "flwr"),
    ],
)
def test_a_package_that_must_not_be_in_stops_the_build(
    name: str, modules: set[str], folders: list[str], surplus: str, tmp_path: Path
) -> None:
    for folder in folders:
        (tmp_path / "_internal" / folder).mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"expected {name} without {surplus};"):
        CONTENTS.check_contents(tmp_path, modules, name=name)


def test_a_file_that_lacks_what_it_works_with_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "_internal" / "onnxruntime").mkdir(parents=True)
    modules = {"fedtune.edge", "numpy", "grpc", "torchless"}
    with pytest.raises(SystemExit, match="expected fedtune-edge with tokenizers; nothing that it imports"):
        CONTENTS.check_contents(tmp_path, modules, name="fedtune-edge")
    CONTENTS.check_contents(tmp_path, modules | {"tokenizers"}, name="fedtune-edge")


def test_the_newest_glibc_that_any_library_asks_for_counts(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_bytes(b"\x7fELF\0GLIBC_2.28\0GLIBC_2.4\0GLIBC_PRIVATE\0GLIBCXX_3.4.29\0")
    (tmp_path / "b.so").write_bytes(b"\x7fELF\0GLIBC_2.9\0")
    (tmp_path / "page.txt").write_bytes(b"GLIBC_2.99")
    assert PACK.glibc_version(tmp_path) == "2.28"


def test_the_same_tree_gives_the_same_file_elsewhere_and_later(tmp_path: Path) -> None:
    first, second = toy_file(tmp_path / "a"), tmp_path / "b"
    tree = toy_tree(second)
    for path in tree.rglob("*"):
        os.utime(path, (10**9, 10**9))
        path.chmod(path.stat().st_mode & 0o700)
    again = PACK.pack(tree, second / "dist", name="toy", version="1.0", arch=os.uname().machine, epoch=0)
    assert again.read_bytes() == first.read_bytes()


def test_a_file_is_the_header_and_an_archive_whose_digest_and_place_stand_in_it(tmp_path: Path) -> None:
    body = toy_file(tmp_path).read_bytes()
    line = next(line for line in body.split(b"\n") if line.startswith(b"name="))
    values = dict(word.split("=") for word in line.decode().split())
    packed = body[int(values["first_byte"]) - 1 :]
    assert hashlib.sha256(packed).hexdigest() == values["digest"]
    assert (values["name"], values["megabytes"]) == ("toy", "1")
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed))) as archive:
        entries = {entry.name: entry for entry in archive}
    assert sorted(entries) == [".sha256sums", "_internal", "_internal/lib.so", "toy"]
    assert {(entry.uid, entry.gid, entry.uname, entry.mtime) for entry in entries.values()} == {(0, 0, "", 0)}
    assert {name: entry.mode for name, entry in entries.items() if entry.isfile()} == {
        ".sha256sums": 0o644,
        "_internal/lib.so": 0o644,
        "toy": 0o755,
    }


def test_a_package_and_its_libraries_are_one_part_of_the_table(tmp_path: Path) -> None:
    for name, size in {"numpy/a": 5, "numpy.libs/b": 7, "numpy-2.4.6.dist-info/c": 1, "grpc/d": 9}.items():
        path = tmp_path / "_internal" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    assert CONTENTS.sizes(tmp_path) == {"numpy": 13, "grpc": 9}


def test_sums_name_every_file_that_is_there(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(name)
    PACK.write_sums(tmp_path, ["two", "one"])
    (tmp_path / "two").unlink()
    PACK.write_sums(tmp_path, ["three"])
    assert [line.split("  ")[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()] == ["one", "three"]
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_scripts_for_devices_are_plain_posix() -> None:
    for script in ("header.sh", "install.sh"):
        subprocess.run(["sh", "-n", EDGE / script], check=True)
        words = (EDGE / script).read_text()
        assert "[[" not in words
        assert "python" not in words.lower()
