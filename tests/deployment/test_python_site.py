from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import fedtune
from fedtune.errors import ConfigError
from fedtune.wire.codec import decode_assignment, encode_assignment
from tests.client.conftest import loaded
from tests.deployment.test_patch import Q, orders_for, scripted_join
from tests.model.conftest import Loader
from tests.own_trainers import sgd

__all__ = ["loaded"]
# PEFT reads names of transformers that are to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
ROWS = [{"text": f"the quick brown fox jumps over {number} dogs"} for number in range(8)]
TABLES: dict[str, dict[str, Any]] = {"policy": {"min_examples": 1}, "data": {"template": "plain", "max_tokens": 32}}


def site(base: Any, data: Any = ROWS, **options: Any) -> fedtune.Site:
    return fedtune.Site("ann", base, data, sgd, targets=("q_proj", "v_proj"), tables=TABLES, **options)


@pytest.mark.parametrize("data", [ROWS, Dataset.from_list(ROWS), {"train": ROWS[:6], "held_out": ROWS[6:]}])
def test_a_site_of_python_objects_takes_part_over_the_link(
    data: Any, checkpoints: dict[str, Path], loaded: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = orders_for(loaded("llama").digest)[:2]
    with scripted_join(monkeypatch, orders, tmp_path) as updates:
        heard: list[str] = []
        ended = site(str(checkpoints["llama"]), data).join(
            "localhost:9000", identity=tmp_path, record=lambda kind, **fields: heard.append(kind)
        )
    assert ended is None  # the orders of this test end without a result
    assert heard == ["hello"]
    assert [update.lora.tensors[f"{Q}.a"].shape[0] for update in updates] == [4, 2]
    # Without held-out rows of its own, a tenth is held out, as with any site.
    assert updates[0].num_examples == (6 if isinstance(data, dict) else 7)


def test_its_client_app_trains_with_the_same_bits(checkpoints: dict[str, Path], loaded: Loader) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoints["llama"]
    pair = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    order = orders_for(loaded("llama").digest)[0]
    encoded = encode_assignment(order)
    made = [
        one._load(one._settings(one.tables)).perform(decode_assignment(encoded.header, encoded.blobs))
        for one in (site(pair), site(folder))
    ]
    for name, array in made[0].lora.tensors.items():
        assert (made[1].lora.tensors[name] == array).all()
    assert site(pair).client_app() is not None


def test_what_is_no_site_is_refused_by_its_key(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data: expected rows, or a datasets.Dataset; got a list"):
        site(str(checkpoints["llama"]), []).join("localhost:9000", identity=tmp_path)
    with pytest.raises(ConfigError, match=r"trainer: expected a function that Python can import"):
        fedtune.Site("ann", str(checkpoints["llama"]), ROWS, "nowhere:train", ("q_proj",), TABLES).join(
            "localhost:9000", identity=tmp_path
        )
