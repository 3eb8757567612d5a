from __future__ import annotations

import os

import pytest
import torch

from fedtune.errors import ConfigError
from fedtune.model.device import choose_device, memory_bytes, number_format
from fedtune.model.settings import ModelSettings, same_everywhere


@pytest.mark.parametrize("name", ["tpu", "cuda:7", "nonsense"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.device: expected one of auto"):
        choose_device(name)


def test_cpu_is_always_there() -> None:
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("device", "capability", "wanted"),
    [
        ("cpu", (9, 0), "float32"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda", (9, 0), "bfloat16"),
        ("cuda", (7, 5), "float32"),
    ],
)
def test_the_number_format_is_left_to_the_device(
    device: str, capability: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert number_format(ModelSettings(base="x", device="auto")) == wanted
    assert number_format(ModelSettings(base="x", device=device, dtype="float16")) == "float16"
    assert same_everywhere(ModelSettings(base="x")).dtype == "float32"
    assert same_everywhere(ModelSettings(base="x", dtype="bfloat16")).dtype == "bfloat16"


def test_on_a_cpu_a_base_has_the_memory_of_the_machine() -> None:
    assert memory_bytes(torch.device("cpu")) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
