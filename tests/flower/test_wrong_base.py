"""A site whose base is another one, by a bit or in its number format, is refused before it is asked to train."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import MessageType

from fedtune.model.base import load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.rounds.transport import UnsolicitedReply
from tests.flower.conftest import FOUNDATION, NODE, Clock, client, fleet, orders, over
from tests.flower.test_grid_transport import ALL, names


def digest_of(folder: Path, **settings: str) -> str:
    model = ModelSettings(base=str(folder), device="cpu", **settings)  # type: ignore[arg-type]
    adapter = AdapterSettings(rank=1, targets=["q_proj"])
    return load(model, adapter, tokenizer=load_tokenizer(model, Path()), root=Path(), seed=0).digest


def one_bit(folder: Path) -> None:
    """Flip the lowest bit of the last number's first byte."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)


@pytest.mark.guarantee("G17")
@pytest.mark.parametrize("change", [one_bit, "bfloat16", "float16"], ids=["one bit", "bfloat16", "float16"])
def test_a_base_that_differs_is_refused_before_training(
    checkpoints: dict[str, Path], tmp_path: Path, clock: Clock, change: Callable[[Path], None] | str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(checkpoints["llama"], folder)
    own = digest_of(folder)
    if callable(change):
        change(folder)
    other = digest_of(folder, **({} if callable(change) else {"dtype": change}))
    wrong = client("bob", foundation=replace(FOUNDATION, base=other))
    right = client("ann", foundation=replace(FOUNDATION, base=own))
    grid = fleet("ann", "bob", ann=right, bob=wrong)
    transport = over(grid, clock, base=own)
    assert names(transport) == ["ann"]
    answers = [one for one in transport.exchange(orders("ann"), ALL) if isinstance(one, UnsolicitedReply)]
    assert [(one.client, one.kind) for one in answers] == [("bob", "refused")]
    assert own[:12] in answers[0].reason
    assert other[:12] in answers[0].reason
    assert (NODE + 1, MessageType.TRAIN) not in grid.pushed
