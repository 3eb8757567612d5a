from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

import fedtune
from fedtune.config import bind
from fedtune.config.site import SiteSettings
from fedtune.data.encode import Example
from fedtune.deployment import patch as patch_module
from fedtune.deployment.patch import suits_objective
from fedtune.errors import ClientError, ConfigError
from fedtune.lora.adapter import Adapter
from fedtune.messages import Assignment, Plan, Training, TrainLora
from fedtune.store import peft
from fedtune.wire.codec import decode_update, encode_assignment
from tests.cli.test_flower_server import toml
from tests.client.conftest import examples, loaded
from tests.client.test_hf_trainer import make
from tests.config.conftest import SHORTEST
from tests.link.federation import Federation, federation
from tests.model.conftest import Loader

__all__ = ["examples", "loaded"]
# PEFT reads names of transformers that are to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*pin_memory.*:UserWarning")

SCRIPT = Path(__file__).with_name("patched_site.py")
NAMES = ("theirs", "ours")
Q = "model.layers.0.self_attn.q_proj"


def recipe(stories: Path, shared: Path, **method: Any) -> dict[str, Any]:
    return {
        "name": "patched",
        "model": {"base": str(stories), "threads": 1},
        "adapter": {"rank": 4, "alpha": "2r", "targets": ["q_proj", "up_proj"]},
        "method": {"name": "flora", **method},
        "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
        "rounds": {"count": 2, "min_clients": 2},
        "data": {"source": str(shared / "data" / "dolly" / "small_train.jsonl"), "template": "plain", "max_tokens": 48},
        "evaluate": {"every": 0, "clients": False},
    }


def sites(tables: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the files of a site that fedtune trains and of one with a Trainer, which names no model and no data."""
    adapter = {"targets": ["q_proj", "up_proj"]}
    ours = {"model": tables["model"], "adapter": adapter, "data": {**tables["data"], "limit": 40}}
    return {"ours": toml(ours), "theirs": toml({"adapter": adapter})}


def start(fed: Federation, base: Path, *launcher: str) -> None:
    """Start the user's script."""
    command = [*launcher, str(SCRIPT), str(base), str(fed.folder / "theirs" / "site.toml"), str(fed.folder / "out")]
    fed.start("theirs", *command)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stock_script_takes_part_beside_a_site_of_fedtunes_own(
    processes: int, shared: Path, stories: Path, tmp_path: Path
) -> None:
    tables = recipe(stories, shared)
    text = toml(tables) + '\n[[override]]\nclients = ["theirs"]\nrank = 2\n'
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    with federation(tmp_path, text, NAMES, site=sites(tables)) as fed:
        fed.serve()
        fed.join("ours")
        start(fed, stories, *launcher)
        assert fed.exit_statuses("server", "ours", "theirs") == [0, 0, 0], fed.log("theirs") + fed.log("server")
        rounds = [json.loads(line) for line in (fed.run / "rounds.jsonl").read_text().splitlines()]
        assert [sorted(line["clients"]) for line in rounds if line["round"]] == [["ours", "theirs"]] * 2
        theirs = [line["clients"]["theirs"] for line in rounds if line["round"]]
        assert all(one["examples"] == 12 for one in theirs), theirs
        # What the script saves is the model of all clients.
        final = fed.folder / "out" / "final"
        assert (final / "adapter_config.json").is_file()
        assert same_change(peft.read(fed.run / "adapter")[0], tensors_in(final))


@contextmanager
def scripted_join(monkeypatch: pytest.MonkeyPatch, orders: Sequence[Assignment], folder: Path) -> Iterator[list[Any]]:
    """Put a server's orders in the place of the link: each is handed to the trainer as the link does, in its thread."""
    updates: list[Any] = []

    def join(settings: SiteSettings, *, record: Any, trainer: Any, suits: Any, **options: Any) -> None:
        record("hello", server="there", run="1")
        trainer.profile(folder / "profile")
        for order in orders:
            encoded = encode_assignment(order)
            place = folder / str(order.round)
            place.mkdir()
            (place / "front").write_bytes(encoded.header)
            for name, body in encoded.blobs.items():
                (place / name).write_bytes(body)
            try:
                trainer.perform(place, list(encoded.blobs), place / "update")
                update = decode_update((place / "update").read_bytes(), client=order.plan.client, limit_bytes=10**7)
                updates.append(update)
            except ClientError as error:
                updates.append(error)

    monkeypatch.setattr(patch_module, "join", join)
    yield updates


SITE = {
    "name": "ann",
    "adapter": {"targets": ["q_proj", "v_proj"]},
    "link": {"address": "localhost:9000"},
    "policy": {"min_examples": 1},
}


def orders_for(digest: str) -> list[Assignment]:
    return [
        Assignment(
            "flora",
            round=number,
            seed=number,
            plan=Plan("ann", rank, 2.0, Training(batch=2, learning_rate=0.1, steps=2)),
            task=TrainLora(a_key=5, wire_dtype="fp32"),
            base=base,
        )
        for number, rank, base in ((1, 4, digest), (2, 2, digest), (3, 2, "0" * 64), (4, 3, digest))
    ]


def test_train_takes_part_until_the_run_is_over_and_a_bad_order_costs_one_round(
    checkpoints: dict[str, Path],
    examples: Callable[[int], list[Example]],
    loaded: Loader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make(checkpoints["llama"], examples(9), tmp_path / "out")
    assert fedtune.patch(trainer, site=SITE) is trainer
    with scripted_join(monkeypatch, orders_for(loaded("llama").digest), tmp_path) as updates:
        output = trainer.train()
    first, second, refused, last = updates
    assert [update.lora.tensors[f"{Q}.a"].shape[0] for update in (first, second, last)] == [4, 2, 3]
    assert [update.num_examples for update in (first, second, last)] == [9, 9, 9]
    assert "ann: expected base 000000000000; has" in str(refused)
    assert output.global_step == 6
    assert "fedtune: connected to there, run 1" in capsys.readouterr().err
    # Without a result of the run the Trainer holds what it has trained last, and saves it as any adapter.
    trainer.save_model(str(tmp_path / "final"))
    saved = tensors_in(tmp_path / "final")
    np.testing.assert_array_equal(
        saved[f"base_model.model.{Q}.lora_A.weight"], last.lora.tensors[f"{Q}.a"].astype(np.float32)
    )
    with pytest.raises(ConfigError, match=r"trainer.train: expected no argument in a federation; got resume_from"):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_that_a_trainer_cannot_follow_is_refused_at_the_start() -> None:
    text = SHORTEST
    suits_objective(None, bind(text), "ann")
    with pytest.raises(
        ConfigError, match=r"method.name: expected a method of LoRA adapters beside a trainer of the site"
    ):
        suits_objective(None, bind(text, overrides=["method.name=fedkseed"]), "ann")
    dpo = bind(text, overrides=["client.objective=dpo", "client.dpo_beta=0.2"])
    suits_objective(0.2, dpo, "ann")
    with pytest.raises(
        ConfigError, match=r"expected one that compares no answers, as this site's Trainer has it; got 'dpo'"
    ):
        suits_objective(None, dpo, "ann")
    with pytest.raises(
        ConfigError, match=r"expected 'dpo' with beta 0.1, as this site's Trainer has it; got 'dpo' with"
    ):
        suits_objective(0.1, dpo, "ann")


def test_a_fault_of_the_link_is_raised_in_the_script(
    checkpoints: dict[str, Path],
    examples: Callable[[int], list[Example]],
    tmp_path: Path,
) -> None:
    trainer = make(checkpoints["llama"], examples(4), tmp_path / "out")
    fedtune.patch(trainer, site={**SITE, "link": {"address": "localhost:9000", "identity": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match="none"):
        trainer.train()
    with pytest.raises(ConfigError, match=r"trainer: expected a transformers.Trainer"):
        fedtune.patch(object(), site=SITE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_fault_train_can_be_called_again(
    checkpoints: dict[str, Path],
    examples: Callable[[int], list[Example]],
    loaded: Loader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = LoraConfig(r=7, target_modules=["q_proj", "v_proj"])
    trainer = make(checkpoints["llama"], examples(9), tmp_path / "out", peft=config)
    fedtune.patch(trainer, site={name: table for name, table in SITE.items() if name != "adapter"})

    def fail(*_: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(patch_module, "join", fail)
    # Any error of the link's thread ends the training: without it the run would seem complete.
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert trainer.model.peft_config["default"].r == 7
    with scripted_join(monkeypatch, orders_for(loaded("llama").digest)[:1], tmp_path) as updates:
        trainer.train()
    assert [update.num_examples for update in updates] == [9]
    # No result came.
    assert (
        "warning: expected the run's result as an adapter; got none; the Trainer's model has" in capsys.readouterr().err
    )


def tensors_in(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def same_change(adapter: Adapter, tensors: Mapping[str, Any]) -> bool:
    """Return whether PEFT's file has an adapter's factors, which have scale 1."""
    prefix = "base_model.model."
    return all(
        np.array_equal(tensors[f"{prefix}{name}.lora_A.weight"], factors.a)
        and np.array_equal(tensors[f"{prefix}{name}.lora_B.weight"], factors.b)
        for name, factors in adapter.items()
    )
