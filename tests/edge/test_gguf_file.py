from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from fedtune.edge.gguf_file import GgufFile
from fedtune.errors import ConfigError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_block_count(3)
    writer.add_rope_freq_base(5000.0)
    writer.add_uint64("llama.expert_count", 8)
    writer.add_tensor("a.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b.weight", np.arange(64, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def test_a_file_gives_its_values_and_tensors(written: Path) -> None:
    file = GgufFile(written)
    assert (file.text("general.architecture"), file.integer("llama.block_count")) == ("llama", 3)
    assert file.real("llama.rope.freq_base") == 5000.0
    assert (file.text("no.text"), file.integer("no.number", 7), file.real("no.number", 0.5)) == ("", 7, 0.5)
    assert file.has("llama.block_count")
    assert not file.has("llama.head_count")
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {"a.weight": (4, 3), "b.weight": (64,)}
    assert (file.tensors["a.weight"].rows, file.tensors["b.weight"].rows) == (3, 1)
    file.close()


def test_a_value_of_another_format_is_refused_and_no_default_takes_its_place(written: Path) -> None:
    # The library ends the process where a value is read in another format than it has.
    file = GgufFile(written)
    with pytest.raises(ConfigError, match=r"llama\.expert_count in the format 10 where 4 belongs"):
        file.integer("llama.expert_count", 0)
    with pytest.raises(ConfigError, match=r"llama\.rope\.freq_base in the format 6 where 4 belongs"):
        file.integer("llama.rope.freq_base", 7)
    with pytest.raises(ConfigError, match=r"llama\.block_count in the format 4 where 6 belongs"):
        file.real("llama.block_count", 7.0)
    with pytest.raises(ConfigError, match=r"llama\.block_count in the format 4 where 8 belongs"):
        file.text("llama.block_count")
    with pytest.raises(ConfigError, match=r"one without llama\.head_count"):
        file.integer("llama.head_count")


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"version https://git-lfs", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40]
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a whole GGUF file at .*other\.gguf.*get the file again") as refused:
        GgufFile(path)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ConfigError, match="a whole GGUF file"):
            GgufFile(path)


def test_every_truncation_is_refused(written: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = written.read_bytes()
    for length in range(0, len(data), 7):
        written.write_bytes(data[:length])
        with pytest.raises(ConfigError, match="a whole GGUF file"):
            GgufFile(written)
    # What the library writes about it goes into the error, not to the terminal.
    assert capfd.readouterr() == ("", "")


def test_damage_to_a_header_never_ends_the_process(written: Path) -> None:
    data = written.read_bytes()
    refused = 0
    for place in range(4, 320):
        torn = bytearray(data)
        torn[place] ^= 0xFF
        written.write_bytes(torn)
        try:
            GgufFile(written).close()
        except ConfigError:
            refused += 1
    assert refused > 100
