from __future__ import annotations

import os

import pytest
import torch

from fedtune.errors import ConfigError
from fedtune.model.device import choose_device, memory_bytes, number_format, share_devices
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


def sharing(device: str, processes: int) -> ModelSettings:
    return ModelSettings(base="x", device=device, processes=processes)


def test_each_process_of_a_client_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert share_devices(sharing("cuda", 2)) == share_devices(sharing("auto", 2)) == ["cuda:0", "cuda:1"]
    assert share_devices(sharing("cuda:1", 1)) == ["cuda:1"]
    with pytest.raises(ConfigError, match=r"model\.processes: expected at most 2, the GPUs of this machine; got 3"):
        share_devices(sharing("cuda", 3))
    with pytest.raises(ConfigError, match="'cuda:1', which names one GPU; got 2"):
        share_devices(sharing("cuda:1", 2))


def test_without_cuda_processes_share_the_cores_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert share_devices(sharing("cpu", 2)) == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match=r"expected 1 on a machine without CUDA; got 2; .* model\.device = .cpu."):
        share_devices(sharing("auto", 2))
    with pytest.raises(ConfigError, match="at most 2, the cores of this process; got 3"):
        share_devices(sharing("cpu", 3))
