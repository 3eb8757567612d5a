"""The clients' side of a frozen change, against PEFT's own forward of the exact sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedtune.errors import ClientError
from fedtune.flower import FedEx, FLoRA, add_frozen
from fedtune.flower.frozen_change import DIGEST, digest
from fedtune.flower.lora_strategy import LoraStrategy
from fedtune.flower.peft_records import arrays_to_record
from tests.flower.stock_app import grid_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def tuned(base: Path, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


class PeftClient:
    """Moves the factors of a PEFT model by a seeded step, with the frozen change beside them."""

    def __init__(self, base: Path, seed: int, rank: int) -> None:
        """Keep what its model is made of."""
        self.base, self.seed, self.rank = base, seed, rank
        self.logits: Any = None

    def __call__(self, message: Message) -> RecordDict:
        """Train; `logits` are those of the model as it was received."""
        import torch
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model = tuned(self.base, self.rank)
        set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
        frozen = add_frozen(model, message.content)
        self.logits = model(torch.arange(8)[None]).logits.detach()
        draw = torch.Generator().manual_seed(self.seed)
        state = {
            key: one + 0.1 * torch.randn(one.shape, generator=draw)
            for key, one in get_peft_model_state_dict(model).items()
        }
        metrics = MetricRecord({"num-examples": 1 + self.seed, **frozen})
        return RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [(FedEx(alpha=8), (4, 4)), (FLoRA(alpha=8, down="whole", ranks={"node-0": 2}), (2, 4))],
    ids=["fedex", "flora"],
)
def test_every_client_holds_the_exact_sum_whatever_its_rank(
    checkpoints: dict[str, Path], tmp_path: Path, strategy: LoraStrategy, ranks: tuple[int, int]
) -> None:
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = checkpoints["llama"]
    first = ArrayRecord(get_peft_model_state_dict(tuned(base, 4)))
    clients = [PeftClient(base, seed, rank) for seed, rank in enumerate(ranks)]
    grid = grid_of(*clients)
    result = strategy.start(grid=grid, initial_arrays=first, num_rounds=1, timeout=1)
    strategy.save(tmp_path / "adapter")
    # What they are sent in round 2 is the model after round 1.
    grid.send_and_receive(list(strategy.configure_train(2, result.arrays, empty(), grid)))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    exact = model(torch.arange(8)[None]).logits.detach()
    for client in clients:
        assert (client.logits - exact).abs().max() < 1e-4 * exact.abs().max()


def empty() -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord()


def test_a_message_without_a_frozen_change_leaves_the_model_as_it_is() -> None:
    assert add_frozen(object(), RecordDict()) == {}
    assert add_frozen(object(), RecordDict({"frozen": ArrayRecord()})) == {}


def test_a_layer_that_the_model_lacks_is_named() -> None:
    import torch

    record = arrays_to_record({"base_model.model.x.w": np.ones((2, 2), np.float32)})
    with pytest.raises(ClientError, match=r"expected an adapted layer 'base_model\.model\.x'"):
        add_frozen(torch.nn.Linear(2, 2), RecordDict({"frozen": record}))


def test_a_dense_change_is_added_to_the_layers_output() -> None:
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = torch.nn.Linear(3, 2, bias=False)

    layer = Adapted()
    model = torch.nn.Sequential(layer)
    change = np.arange(6, dtype=np.float32).reshape(2, 3)
    record = arrays_to_record({"0.w": change})
    before = layer.base_layer(torch.ones(3)).detach()
    assert add_frozen(model, RecordDict({"frozen": record})) == {DIGEST: digest(record)}
    after = layer.base_layer(torch.ones(3)).detach()
    assert torch.allclose(after - before, torch.tensor([3.0, 12.0]))
    # A model that lives on: the next message takes its place, and one without a change takes it away.
    add_frozen(model, RecordDict({"frozen": arrays_to_record({"0.w": 2 * change})}))
    assert torch.allclose(layer.base_layer(torch.ones(3)) - before, torch.tensor([6.0, 24.0]))
    assert add_frozen(model, RecordDict()) == {}
    assert torch.equal(layer.base_layer(torch.ones(3)), before)


def test_the_digest_is_of_names_and_bytes() -> None:
    ones, twos = np.ones((2, 2), np.float32), 2 * np.ones((2, 2), np.float32)
    same = [digest(arrays_to_record({"x": ones, "y": twos})), digest(arrays_to_record({"y": twos, "x": ones}))]
    assert same[0] == same[1]
    assert digest(arrays_to_record({"x": twos, "y": ones})) != same[0]
    assert 0 <= same[0] < 2**48
