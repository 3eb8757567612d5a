"""What a run leaves for others: every form loads, seeds are replayed to the bit, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedtune
from fedtune import api
from fedtune.directions import rebuild_torch
from fedtune.directions.rebuild_numpy import rebuild
from fedtune.directions.rebuild_torch import as_array
from fedtune.directions.seed_ledger import Manifest, SeedLedger
from fedtune.directions.space import directions, plain_banks
from fedtune.errors import ConfigError, StoreError, WireError
from fedtune.methods.method import SeedModel
from fedtune.model.base import manifest_of
from fedtune.rounds.events import Note
from fedtune.store import seeds
from tests.conftest import Simulated, base_of, kseed

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Tables = dict[str, Any]


def test_every_form_of_export_loads_with_the_same_logits(ran: api.Run, tables: Tables) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model.eval()(input_ids=ids).logits
        return result

    def stock() -> Any:
        return AutoModelForCausalLM.from_pretrained(tables["model"]["base"])

    expected = logits(PeftModel.from_pretrained(stock(), ran.adapter))
    for form in ("peft", "uniform"):
        folder = fedtune.export(ran.path, form=form)
        assert folder == ran.path / form
        torch.testing.assert_close(logits(PeftModel.from_pretrained(stock(), folder)), expected, atol=1e-5, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(fedtune.export(ran.path, form="merged"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    uniform = json.loads((ran.path / "uniform" / "adapter_config.json").read_text())
    assert uniform["rank_pattern"] == {}


def test_a_cut_export_has_that_rank_and_says_what_it_kept(ran: api.Run) -> None:
    notes: list[Any] = []
    folder = fedtune.export(ran.path, form="uniform", max_rank=2, watch=notes.append)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    assert next(note.text for note in notes if isinstance(note, Note)).startswith("cut to rank 2: ")


def test_an_export_never_overwrites(ran: api.Run, tmp_path: Path) -> None:
    fedtune.export(ran.path, out=tmp_path / "x")
    with pytest.raises(StoreError, match="it holds files"):
        fedtune.export(ran.path, out=tmp_path / "x")


def test_a_merged_model_can_be_cut_too(ran: api.Run, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base = AutoModelForCausalLM.from_pretrained(base_of(ran)).state_dict()[name]
    whole, cut = (
        AutoModelForCausalLM.from_pretrained(
            fedtune.export(ran.path, form="merged", max_rank=rank, out=tmp_path / str(rank))
        ).state_dict()[name]
        for rank in (None, 1)
    )
    assert torch.linalg.matrix_rank(whole - base, atol=1e-4) > 1
    assert torch.linalg.matrix_rank(cut - base, atol=1e-4) == 1


def test_an_adapter_takes_no_dtype(ran: api.Run) -> None:
    with pytest.raises(ConfigError, match="dtype: expected none: adapters are float32; got 'float16'"):
        fedtune.export(ran.path, form="uniform", dtype="float16")


def test_an_unknown_form_is_refused(ran: api.Run) -> None:
    forms = "peft, uniform, merged, ledger, flowertune"
    with pytest.raises(ConfigError, match=f"form: expected one of {forms}; got 'gguf'"):
        fedtune.export(ran.path, form="gguf")


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    return found


def test_a_whole_model_is_written_that_is_replayed_to_the_bit_from_every_copy_of_the_seeds(
    seeded: api.Run, tmp_path: Path
) -> None:
    notes, base = list[Any](), base_of(seeded)
    folder = fedtune.export(seeded.path, watch=notes.append)
    assert folder == seeded.path / "merged"
    weights = json.loads((folder / "fedtune.json").read_text())["weights"]
    assert f"rebuilt from 64 integers; digest of the weights {weights}" in [note.text for note in notes]
    bare = fedtune.export(seeded.path, form="ledger", out=tmp_path / "ledger") / "ledger.ftks"
    assert bare.read_bytes() == (seeded.adapter / "ledger.ftks").read_bytes()
    moved = json.loads((seeded.adapter / "fedtune.json").read_text())["trainable"]
    replays = [fedtune.replay(base, ledger) for ledger in (seeded.adapter, folder, bare.parent)]
    replays.append(fedtune.replay(base, bare, trainable=moved))
    assert {replay.weights for replay in replays} == {weights}
    assert {replay.state for replay in replays} == {seeded.summary["adapter_digest"]}
    written = fedtune.replay(base, bare.parent, out=tmp_path / "replayed").path
    assert written == tmp_path / "replayed"
    merged, replayed = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, written))
    assert torch.equal(logits_of(merged), logits_of(replayed))
    own = AutoModelForCausalLM.from_pretrained(base)
    assert (logits_of(merged) - logits_of(own)).abs().max() > 1e-4
    with pytest.raises(StoreError, match="it holds files"):
        fedtune.replay(base, bare, out=tmp_path / "replayed")


def test_seeds_that_move_some_tensors_are_replayed_over_those_from_a_ledger_alone_where_they_are_named(
    tables: Tables, tmp_path: Path, simulated: Simulated
) -> None:
    globs = ["*.mlp.*", "lm_head.weight"]
    run = simulated(kseed(tables, trainable=globs), tmp_path / "run")
    base, ledger = base_of(run), run.adapter / "ledger.ftks"
    whole = fedtune.replay(base, run.adapter).weights
    assert fedtune.replay(base, ledger, trainable=globs).weights == whole
    assert fedtune.replay(base, ledger).weights != whole


@pytest.mark.parametrize(
    ("bank", "method"),
    [pytest.param("hadamard", {"groups": 4}, marks=pytest.mark.slow), ("kron", {"groups": "tensor", "seeds": 16})],
)
def test_seeds_of_groups_are_exported_and_replayed_from_every_copy_to_the_bit(
    bank: str, method: dict[str, Any], tables: Tables, tmp_path: Path, simulated: Simulated
) -> None:
    run = simulated(kseed(tables, bank, **method), tmp_path / "run")
    base, folder = base_of(run), fedtune.export(run.path)
    bare = fedtune.export(run.path, form="ledger", out=tmp_path / "ledger") / "ledger.ftks"
    # A ledger with numbers of each tensor says which tensors it moves.
    replays = [fedtune.replay(base, ledger) for ledger in (run.adapter, folder, bare)]
    assert {replay.weights for replay in replays} == {json.loads((folder / "fedtune.json").read_text())["weights"]}
    assert {replay.state for replay in replays} == {run.summary["adapter_digest"]}
    merged, stock = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, base))
    assert (logits_of(merged) - logits_of(stock)).abs().max() > 1e-4
    if bank == "kron":
        adapted = logits_of(PeftModel.from_pretrained(stock, fedtune.export(run.path, form="peft")))
        torch.testing.assert_close(adapted, logits_of(merged), atol=1e-5, rtol=0)
        with pytest.raises(ConfigError, match="trainable: expected those that the ledger has numbers for"):
            fedtune.replay(base, bare, trainable=["*.q_proj.weight"])
    else:
        with pytest.raises(ConfigError, match="form: expected merged or ledger"):
            fedtune.export(run.path, form="peft")


@pytest.mark.slow
def test_a_run_of_both_verbs_over_redrawn_banks_is_replayed_to_the_bit_by_every_backend(
    tables: Tables, tmp_path: Path, simulated: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = kseed(tables, groups=4, redraw=4) | {
        "rounds": {"count": 6},
        "descend": {"steps": 2},
        "override": [{"clients": ["client-1"], "verb": "descend"}],
    }
    run = simulated(changed, tmp_path / "run")
    ledger = seeds.read(run.adapter)[0].ledger
    assert [len(plain_banks(ledger.bank)), ledger.bank.size] == [2, 2 * 4 * 64]
    assert all(sums.any() for sums in ledger.accumulators.reshape(2, -1))
    compiled = fedtune.replay(base_of(run), run.adapter).weights
    monkeypatch.setattr(rebuild_torch, "fastest", lambda device: rebuild_torch.rebuild)
    assert fedtune.replay(base_of(run), run.adapter).weights == compiled
    monkeypatch.setattr(rebuild_torch, "fastest", lambda device: rebuilt_by_numpy)
    assert fedtune.replay(base_of(run), run.adapter).weights == compiled


def rebuilt_by_numpy(tensor: torch.Tensor, sums: Any, *, out: torch.Tensor, **options: Any) -> None:
    """Rebuild by the reference."""
    rebuild(as_array(tensor.contiguous()), sums, out=as_array(out), **options)


def test_redrawn_banks_are_replayed_from_a_folder_and_from_a_ledger_alone(
    checkpoints: dict[str, Path], loaded_manifest: Manifest, tmp_path: Path
) -> None:
    ordinals = (1, len(loaded_manifest.entries) - 1)
    bank = directions("hadamard", 8, [1, 2, 3], "tensor", ordinals)
    ledger = SeedLedger(bank, 20, 9, loaded_manifest.digest, np.arange(bank.size, dtype=np.int32) * 1000)
    folder = seeds.write(tmp_path / "seeds", SeedModel(ledger, loaded_manifest, ordinals), {})
    replays = [fedtune.replay(checkpoints["llama"], path).weights for path in (folder, folder / "ledger.ftks")]
    assert replays[0] == replays[1] != loaded_manifest.digest.hex()


def test_a_ledger_with_numbers_of_a_tensor_that_the_base_lacks_is_refused(
    checkpoints: dict[str, Path], loaded_manifest: Manifest, tmp_path: Path
) -> None:
    count = len(loaded_manifest.entries)
    bank = directions("hadamard", 8, [1], "tensor", [1, count])
    ledger = SeedLedger(bank, 20, 9, loaded_manifest.digest, np.zeros(bank.size, np.int32))
    (tmp_path / "ledger.ftks").write_bytes(ledger.encode())
    with pytest.raises(ConfigError, match=f"ledger: expected tensors below {count}, .*; got {count}"):
        fedtune.replay(checkpoints["llama"], tmp_path / "ledger.ftks")


@pytest.fixture
def loaded_manifest(checkpoints: dict[str, Path]) -> Manifest:
    """The tensors of the tiny checkpoint."""
    return manifest_of(AutoModelForCausalLM.from_pretrained(checkpoints["llama"]))


@pytest.mark.parametrize("seeded", ["hadamard"], indirect=True)
def test_replay_refuses_another_base_and_bytes_that_are_no_ledger(
    seeded: api.Run, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    merged = fedtune.export(seeded.path)
    for other in (merged, checkpoints["gpt2"]):  # one that is rebuilt already is another, too
        with pytest.raises(ConfigError, match="base: expected the base whose manifest has the digest"):
            fedtune.replay(other, seeded.adapter)
        with pytest.raises(ConfigError, match="base: expected the base whose manifest has the digest"):
            fedtune.replay(other, seeded.adapter / "ledger.ftks", out=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    torn = tmp_path / "torn.ftks"
    torn.write_bytes((seeded.adapter / "ledger.ftks").read_bytes()[:-1])
    with pytest.raises(WireError, match="seed ledger: expected 316 bytes for 64 seeds; got 315"):
        fedtune.replay(checkpoints["llama"], torn)
    with pytest.raises(StoreError, match=r"nowhere"):
        fedtune.replay(checkpoints["llama"], tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_adapter_of_the_kron_bank_gives_stock_peft_the_rebuilt_model_s_logits(
    name: str, tables: Tables, checkpoints: dict[str, Path], tmp_path: Path, simulated: Simulated
) -> None:
    tables["model"]["base"] = str(checkpoints[name])
    run = simulated(kseed(tables, "kron"), tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(fedtune.export(run.path, form="merged"))
    stock = AutoModelForCausalLM.from_pretrained(checkpoints[name])
    own = logits_of(stock)
    folder = fedtune.export(run.path, form="peft")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8  # the root of 64
    adapted = logits_of(PeftModel.from_pretrained(stock, folder))
    torch.testing.assert_close(adapted, logits_of(merged), atol=1e-5, rtol=0)
    assert (adapted - own).abs().max() > 1e-4


@pytest.mark.parametrize(
    "method", [{"bank": "hadamard"}, {"bank": "kron", "vectors": True}, {"bank": "kron", "embeddings": True}]
)
@pytest.mark.parametrize("form", ["peft", "uniform"])
def test_what_no_adapter_can_hold_is_refused_with_the_reason(
    form: str, method: dict[str, Any], tables: Tables, tmp_path: Path, simulated: Simulated
) -> None:
    run = simulated(kseed(tables, **method) | {"rounds": {"count": 1}}, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"form: expected merged or ledger: only bank = 'kron'.*--form merged"):
        fedtune.export(run.path, form=form)
    assert not (run.path / form).exists()


def test_a_head_that_the_kron_bank_moves_is_no_adapter_either(
    tables: Tables, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Stock PEFT takes the head of a classifier from `modules_to_save`, and the checkpoint lacks it."""
    rows = [{"text": f"the {'quick' if i % 2 else 'lazy'} dog {i}", "label": f"l{i % 2}"} for i in range(40)]
    data = tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables["model"] |= {"base": str(checkpoints["bert"]), "task": "classification"}
    tables["data"] |= {"source": str(data), "split": {"kind": "dirichlet", "by": "label", "alpha": 5.0, "clients": 3}}
    tables["evaluate"] = {"batch": 8}
    run = fedtune.simulate(kseed(tables, "kron", seeds=16), out=tmp_path / "run")
    scores = fedtune.evaluate(run.path)
    assert scores["after"]["loss"] == pytest.approx(run.summary["after"]["test"]["loss"], abs=1e-6)
    merged = fedtune.export(run.path, form="merged")
    weights = json.loads((merged / "fedtune.json").read_text())["weights"]
    assert fedtune.replay(checkpoints["bert"], run.adapter).weights == weights
    with pytest.raises(ConfigError, match=r"form: expected merged or ledger"):
        fedtune.export(run.path, form="peft")


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"max_rank": 2}, {"dtype": "float32", "form": "merged"}])
def test_seeds_give_one_model_that_is_neither_cast_nor_cut(
    options: dict[str, Any], tables: Tables, tmp_path: Path, simulated: Simulated
) -> None:
    run = simulated(kseed(tables, bank="hadamard") | {"rounds": {"count": 1}}, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"dtype: expected none|export: expected neither dtype nor max_rank"):
        fedtune.export(run.path, **options)


def test_a_run_of_adapters_has_no_ledger(ran: api.Run) -> None:
    with pytest.raises(ConfigError, match=r"form: expected a run of a method .*'ledger'.*'flora'"):
        fedtune.export(ran.path, form="ledger")


@pytest.mark.parametrize("seeded", ["hadamard"], indirect=True)
def test_seeds_of_another_base_are_refused(seeded: api.Run, tmp_path: Path) -> None:
    """The same checkpoint in another format is another base."""
    recipe = seeded.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('dtype = "float32"', 'dtype = "bfloat16"'))
    for call in (fedtune.evaluate, fedtune.export):
        with pytest.raises(ConfigError, match=r"model\.base: expected the base that .*seeds was trained on"):
            call(seeded.path)
