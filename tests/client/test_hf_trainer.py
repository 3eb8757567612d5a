from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from fedtune.client.hf_trainer import base_of_trainer, check_trainer, hf_training, mean_loss
from fedtune.client.perform import perform
from fedtune.data.as_dataset import to_dataset
from fedtune.data.encode import Example
from fedtune.errors import ClientError, ConfigError
from fedtune.messages import Assignment, Plan, Preference, Training, TrainLora
from fedtune.model.base import Base, digest
from fedtune.model.peft_model import lora_layers
from tests.model.conftest import Loader

# PEFT reads names of transformers that are to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*pin_memory.*:UserWarning")

TRAINING = Training(batch=2, learning_rate=0.05, steps=3)
Examples = Callable[[int], list[Example]]
TARGETS = ("q_proj", "v_proj")


class Heard(TrainerCallback):  # type: ignore[misc]  # without types
    """What a user's own callback hears of."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.events.append(("begin", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.events.append(("step", state.global_step))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad as a user's own collator does."""
    from torch.nn.utils.rnn import pad_sequence

    padded = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill)
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    return {**padded, "attention_mask": (padded["input_ids"] != 0).long()}


def make(folder: Path, rows: list[Example], out: Path, *, peft: Any = None, **arguments: Any) -> Trainer:
    """Return a Trainer as a user makes it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if peft is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft)
    usual = {"per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1, "report_to": "none"}
    return Trainer(
        model=model,
        args=TrainingArguments(str(out), **{**usual, "save_strategy": "no", "use_cpu": True, **arguments}),
        train_dataset=to_dataset(rows),
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def order(base: Base, *, round: int = 1, rank: int = 4, steps: int = 3, **task: Any) -> Assignment:
    plan = Plan("ann", rank, 2.0, replace(TRAINING, steps=steps))
    made = TrainLora(a_key=5, **{"wire_dtype": "fp32", **task})
    return Assignment("flora", round=round, seed=10 + round, plan=plan, task=made, base=base.digest)


@pytest.fixture
def rows(examples: Examples) -> list[Example]:
    return examples(9)


def test_each_round_runs_the_trainers_own_train_with_the_rounds_rank_and_steps(
    checkpoints: dict[str, Path], loaded: Loader, rows: list[Example], tmp_path: Path
) -> None:
    trainer, heard = make(checkpoints["llama"], rows, tmp_path), Heard()
    trainer.add_callback(heard)
    base = base_of_trainer(trainer, TARGETS)
    assert base.digest == loaded("llama").digest
    own, left = hf_training(trainer)
    updates = [
        perform(base, range(9), order(base, round=1, rank=4), threads=1, own=own),  # type: ignore[arg-type]
        perform(base, range(9), order(base, round=2, rank=2, steps=2), threads=1, own=own),  # type: ignore[arg-type]
    ]
    name = sorted(base.modules)[0]
    assert [update.lora.tensors[f"{name}.a"].shape[0] for update in updates] == [4, 2]
    assert [update.num_examples for update in updates] == [9, 9]
    measured = updates[0].measured
    assert measured.loss_before is not None
    assert measured.loss_after is not None
    assert measured.loss_after != measured.loss_before  # of one row, which three steps on others may worsen
    # Logs and checkpoints count on; the user's callbacks hear of every step.
    assert heard.events == [("begin", 0), *(("step", n) for n in (1, 2, 3)), ("begin", 3), ("step", 4), ("step", 5)]
    assert [entry["step"] for entry in left.history if "loss" in entry] == [1, 2, 3, 4, 5]
    assert (trainer.args.max_steps, trainer.args.seed) == (-1, 42)
    assert left.output.global_step == 5
    assert digest(base.model) == base.digest


def test_rounds_see_other_rows_and_the_same_order_gives_the_same_bits(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    trainer = make(checkpoints["llama"], rows, tmp_path)
    base = base_of_trainer(trainer, TARGETS)
    own, _ = hf_training(trainer)
    first, again, other = (
        perform(base, range(9), order(base, round=round), threads=1, own=own).lora.tensors  # type: ignore[arg-type]
        for round in (1, 1, 2)
    )
    name = sorted(first)[0]
    np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])


class Seen:
    """A collator that remembers the rows of each round."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.rows += [row["input_ids"] for row in rows]
        return collate(rows)


def test_a_seed_of_the_users_own_does_not_draw_the_same_rows_in_every_round(
    checkpoints: dict[str, Path], examples: Examples, tmp_path: Path
) -> None:
    trainer = make(checkpoints["llama"], examples(40), tmp_path, data_seed=7)
    base = base_of_trainer(trainer, TARGETS)
    own, _ = hf_training(trainer)
    drawn = []
    for round in (1, 2):
        trainer.data_collator = seen = Seen()
        silent = replace(own, losses=lambda *_: 1.0)
        perform(base, range(40), order(base, round=round), threads=1, own=silent)  # type: ignore[arg-type]
        drawn.append(seen.rows)
    assert drawn[0] != drawn[1]
    assert trainer.accelerator.dataloader_config.data_seed == 7


def test_a_trainer_that_keeps_its_workers_still_evaluates_on_all_rows(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make(checkpoints["llama"], rows, tmp_path, **workers)
    trainer.eval_dataset = to_dataset(rows)
    assert mean_loss(trainer, trainer.model, 1)
    assert len(trainer.get_eval_dataloader().dataset) == len(rows)
    assert trainer.args.dataloader_persistent_workers


def test_the_optimizers_state_goes_on_only_where_that_is_asked(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    ends = []
    for keep in (False, True):
        trainer = make(checkpoints["llama"], rows, tmp_path)
        base = base_of_trainer(trainer, TARGETS)
        own, left = hf_training(trainer, keep_optimizer=keep)
        for round in (1, 2):
            update = perform(base, range(9), order(base, round=round), threads=1, own=own)  # type: ignore[arg-type]
        assert bool(left.optimizer) == keep
        ends.append(update.lora.tensors)
        # Another rank has other parameters: there the state starts empty, and the round is done.
        perform(base, range(9), order(base, round=3, rank=2), threads=1, own=own)  # type: ignore[arg-type]
    name = sorted(ends[0])[0]
    assert not np.array_equal(ends[0][name], ends[1][name])


def test_a_trainer_that_has_wrapped_its_model_gets_the_rank_of_the_round(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    from peft import LoraConfig

    trainer = make(checkpoints["llama"], rows, tmp_path, peft=LoraConfig(r=7, target_modules=["q_proj"]))
    base = base_of_trainer(trainer, ())
    assert {name.rpartition(".")[2] for name in base.modules} == {"q_proj"}
    own, _ = hf_training(trainer)
    update = perform(base, range(9), order(base, rank=3), threads=1, own=own)  # type: ignore[arg-type]
    assert {array.shape[0] for name, array in update.lora.tensors.items() if name.endswith(".a")} == {3}


def test_an_adapter_that_has_learned_something_is_not_thrown_away(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    from peft import LoraConfig

    trainer = make(checkpoints["llama"], rows, tmp_path, peft=LoraConfig(r=2, target_modules=["q_proj"]))
    torch.nn.init.ones_(next(iter(lora_layers(trainer.model).values())).lora_B["default"].weight)
    with pytest.raises(
        ConfigError, match=r"trainer.model: expected an adapter as PEFT makes it; got one that has been"
    ):
        base_of_trainer(trainer, ())


def test_an_error_of_the_trainer_costs_one_round(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    trainer = make(checkpoints["llama"], rows, tmp_path)
    base = base_of_trainer(trainer, TARGETS)
    own, _ = hf_training(trainer)
    collator, trainer.data_collator = trainer.data_collator, lambda rows: {}
    with pytest.raises(ClientError, match=r"^ann: "):
        perform(base, range(9), order(base), threads=1, own=replace(own, losses=lambda *_: 1.0))  # type: ignore[arg-type]
    trainer.data_collator = collator
    assert perform(base, range(9), order(base), threads=1, own=own).lora.tensors  # type: ignore[arg-type]


def test_an_objective_of_compared_answers_needs_a_trainer_that_compares_them(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    trainer = make(checkpoints["llama"], rows, tmp_path)
    base = base_of_trainer(trainer, TARGETS)
    own, _ = hf_training(trainer)
    with pytest.raises(ClientError, match=r"got answers compared with beta 0\.2; "):
        perform(base, range(9), order(base, terms=(Preference(0.2),)), threads=1, own=own)  # type: ignore[arg-type]
    compares = replace(own, preference=0.1)
    with pytest.raises(ClientError, match="got an objective that compares no answers; "):
        perform(base, range(9), order(base), threads=1, own=compares)  # type: ignore[arg-type]


def test_a_trainer_that_cannot_take_part_is_refused_with_all_reasons(
    checkpoints: dict[str, Path], rows: list[Example], tmp_path: Path
) -> None:
    trainer = make(checkpoints["llama"], rows, tmp_path)
    check_trainer(trainer)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.train_dataset = None
    with pytest.raises(ConfigError) as caught:
        check_trainer(trainer)
    text = str(caught.value)
    assert "trainer.train_dataset: expected a data set with a length, by which clients count; got none" in text
    assert "trainer.optimizers: expected none: each round trains another adapter; got an optimizer" in text
    with pytest.raises(ConfigError, match=r"trainer: expected a transformers.Trainer, or one of trl's; got a list"):
        check_trainer([])
    with pytest.raises(ConfigError, match=r"adapter.targets: expected the layers that get an adapter"):
        base_of_trainer(make(checkpoints["llama"], rows, tmp_path), ())
