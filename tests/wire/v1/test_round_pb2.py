"""The schema, the code that is generated from it, and the schemas of the releases before."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from fedtune.wire.v1 import link_pb2, round_pb2

ROOT = Path(__file__).parents[3]
GENERATED = ROOT / "fedtune" / "wire" / "v1"
HISTORY = sorted((ROOT / "proto" / "history").glob("v1-*.binpb"))
PROJECT: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


FILES = ("round", "link")


def generate(folder: Path) -> FileDescriptorProto:
    """Write what `make proto` writes into a folder, and return the schema as the compiler reads it."""
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "fedtune/wire/v1=proto/fedtune/v1"]
    outputs = [f"--python_out={folder}", f"--pyi_out={folder}", f"--descriptor_set_out={folder / 'schema.binpb'}"]
    subprocess.run([*command, *outputs, *(f"fedtune/wire/v1/{name}.proto" for name in FILES)], cwd=ROOT, check=True)
    return joined((folder / "schema.binpb").read_bytes())


def joined(data: bytes) -> FileDescriptorProto:
    """Return the files of a compiled schema as one; they share a package, so no name stands in two."""
    files = FileDescriptorSet.FromString(data).file
    whole = FileDescriptorProto(package=files[0].package)
    for file in files:
        assert file.package == whole.package
        whole.message_type.extend(file.message_type)
        whole.enum_type.extend(file.enum_type)
        whole.service.extend(file.service)
    return whole


def protobuf_version(code: str) -> str:
    match = re.search(r"^# Protobuf Python Version: (\S+)$", code, re.MULTILINE)
    assert match
    return match[1]


def numbered(schema: FileDescriptorProto) -> Mapping[tuple[str, int], tuple[object, ...]]:
    """Return what must never change of each number: of fields the name and type, of enum values the name."""

    def fields(message: DescriptorProto) -> Iterator[tuple[tuple[str, int], tuple[object, ...]]]:
        for enum in message.enum_type:
            yield from (((f"{message.name}.{enum.name}", one.number), (one.name,)) for one in enum.value)
        for one in message.field:
            kind = FieldDescriptorProto.Type.Name(one.type), FieldDescriptorProto.Label.Name(one.label)
            yield (message.name, one.number), (one.name, *kind, one.type_name, one.proto3_optional)

    def values(enum: EnumDescriptorProto) -> Iterator[tuple[tuple[str, int], tuple[object, ...]]]:
        for one in enum.value:
            yield (enum.name, one.number), (one.name,)

    return {
        **{key: value for message in schema.message_type for key, value in fields(message)},
        **{key: value for enum in schema.enum_type for key, value in values(enum)},
    }


def broken(old: FileDescriptorProto, new: FileDescriptorProto) -> list[str]:
    """Return what a peer of the old schema would misread: removed, reused and changed numbers."""
    now = numbered(new)
    return [
        f"{name} = {number}: expected {was}; got {now.get((name, number), 'no such number')}"
        for (name, number), was in numbered(old).items()
        if now.get((name, number)) != was
    ]


@pytest.fixture(scope="module")
def current() -> FileDescriptorProto:
    files = FileDescriptorSet()
    for module in (round_pb2, link_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    return joined(files.SerializeToString())


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FileDescriptorProto]:
    """Generate once: the folder and the schema."""
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools, of the extra test")
    folder = tmp_path_factory.mktemp("generated")
    return folder / "fedtune" / "wire" / "v1", generate(folder)


def test_the_committed_code_describes_the_schema(
    fresh: tuple[Path, FileDescriptorProto], current: FileDescriptorProto
) -> None:
    _, schema = fresh
    assert numbered(current) == numbered(schema), "run `make proto`"
    assert current.package == schema.package


@pytest.mark.parametrize("name", [f"{file}_pb2.{ending}" for file in FILES for ending in ("py", "pyi")])
def test_the_committed_code_is_what_the_generator_writes(fresh: tuple[Path, FileDescriptorProto], name: str) -> None:
    folder, _ = fresh
    versions = [protobuf_version((place / "round_pb2.py").read_text()) for place in (GENERATED, folder)]
    if versions[0] != versions[1]:
        pytest.skip(f"the installed grpcio-tools writes code for protobuf {versions[1]}, not {versions[0]}")
    assert (folder / name).read_bytes() == (GENERATED / name).read_bytes(), "run `make proto`"


def test_the_oldest_protobuf_that_may_be_installed_runs_the_committed_code() -> None:
    """Generated code runs under its own major version and the next one."""
    bounds = [entry for entry in PROJECT["dependencies"] if entry.startswith("protobuf")]
    oldest = protobuf_version((GENERATED / "round_pb2.py").read_text())
    assert bounds == [f"protobuf>={oldest},<{int(oldest.partition('.')[0]) + 2}"]


@pytest.mark.parametrize("path", HISTORY, ids=lambda path: str(path.stem))
def test_every_released_schema_is_still_understood(path: Path, current: FileDescriptorProto) -> None:
    assert broken(joined(path.read_bytes()), current) == []


def test_the_schema_of_this_release_is_kept(current: FileDescriptorProto) -> None:
    path = ROOT / "proto" / "history" / f"v1-{PROJECT['version']}.binpb"
    assert path in HISTORY, "run `make proto`"
    assert numbered(joined(path.read_bytes())) == numbered(current), "run `make proto`"


def edited(schema: FileDescriptorProto) -> tuple[FileDescriptorProto, DescriptorProto]:
    """Return a copy of a schema and its message Plan, to be spoilt."""
    copy = FileDescriptorProto.FromString(schema.SerializeToString())
    return copy, next(message for message in copy.message_type if message.name == "Plan")


def test_a_removed_field_is_found(current: FileDescriptorProto) -> None:
    new, plan = edited(current)
    del plan.field[0]
    assert [line.partition(":")[0] for line in broken(current, new)] == ["Plan = 1"]


def test_a_reused_number_is_found(current: FileDescriptorProto) -> None:
    new, plan = edited(current)
    plan.field[0].name = "bits"
    assert len(broken(current, new)) == 1


def test_a_changed_type_is_found(current: FileDescriptorProto) -> None:
    new, plan = edited(current)
    plan.field[0].type = FieldDescriptorProto.TYPE_UINT64
    assert len(broken(current, new)) == 1


def test_a_renumbered_enum_value_is_found(current: FileDescriptorProto) -> None:
    new, _ = edited(current)
    new.enum_type[0].value[1].number = 3
    assert len(broken(current, new)) == 1


def test_a_new_field_breaks_nothing(current: FileDescriptorProto) -> None:
    new, plan = edited(current)
    plan.field.add(name="bits", number=4, type=FieldDescriptorProto.TYPE_UINT32)
    assert broken(current, new) == []
