"""Tuned ends in the true base: by name, to the bit where nothing was dropped, and refused for another base."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import fedtune
from fedtune.config import render
from fedtune.errors import ConfigError
from fedtune.model.distill import DistillSettings
from fedtune.model.emulator_facts import NAME, encode, read
from fedtune.runs.emulator import EmulatorSettings, digest_as_loaded, export_emulator
from fedtune.runs.plug_back import EMULATOR, FULL, PLUGGED_BACK, ZERO_SHOT, gives_away, plug_back
from fedtune.store import manifest
from tests.conftest import ROOT, Simulated, kseed
from tests.runs.offsite import Tables, deep_base, over

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
WEIGHTS = "adapter_model.safetensors"
FILES = {"source": "train.jsonl", "test": "test.jsonl"}


@pytest.fixture(scope="module")
def deep(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_base(tmp_path_factory.mktemp("deep"), checkpoints["llama"])


@pytest.fixture(scope="module")
def emulators(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("emulators")
    return {drop: export_emulator(deep, folder / str(drop), EmulatorSettings(drop=drop)).path for drop in (0.0, 0.5)}


@pytest.fixture
def tuned(simulated: Simulated, tables: Tables, emulators: dict[float, Path], tmp_path: Path) -> Path:
    return simulated(over(tables, emulators[0.5], "ends"), tmp_path / "run").path


def test_where_nothing_was_dropped_plug_back_is_tuning_the_ends_directly(
    simulated: Simulated, tables: Tables, deep: Path, emulators: dict[float, Path], tmp_path: Path
) -> None:
    emulated = simulated(over(tables, emulators[0.0], "ends"), tmp_path / "emulated").path
    direct = simulated(over(tables, deep, "0, 5"), tmp_path / "direct").path
    written = plug_back(emulated, deep, full=direct)
    assert (written.path / WEIGHTS).read_bytes() == (direct / "adapter" / WEIGHTS).read_bytes()
    losses = {name: scores["loss"] for name, scores in written.scores.items()}
    assert losses[EMULATOR] == losses[PLUGGED_BACK] == losses[FULL] != losses[ZERO_SHOT]
    assert written.gives_away


def test_an_adapter_loads_on_the_true_base_in_stock_peft(tuned: Path, deep: Path, tmp_path: Path) -> None:
    written = plug_back(tuned, deep)
    assert written.path == tuned / "plug-back"
    names = {name.split(".")[4] for name in load_file(written.path / WEIGHTS)}
    assert names == {"0", "5"}
    origin = json.loads((written.path / "fedtune.json").read_text())
    assert origin["base"]["digest"] == read(Path(fedtune.bind(tuned / "recipe.toml").model.base)).base_digest
    assert set(origin["plug_back"]["scores"]) == {ZERO_SHOT, EMULATOR, PLUGGED_BACK}
    merged = AutoModelForCausalLM.from_pretrained(plug_back(tuned, deep, form="merged", out=tmp_path / "merged").path)
    own = AutoModelForCausalLM.from_pretrained(deep)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = own(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(own, written.path).eval()(input_ids=ids).logits
        torch.testing.assert_close(adapted, merged.eval()(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert (adapted - before).abs().max() > 1e-3
    uniform = plug_back(tuned, deep, form="uniform", max_rank=2, out=tmp_path / "uniform", with_scores=False)
    assert json.loads((uniform.path / "adapter_config.json").read_text())["r"] == 2
    assert uniform.scores == {}
    assert not uniform.gives_away


def test_scores_are_of_the_rank_that_is_written(tuned: Path, deep: Path, tmp_path: Path) -> None:
    whole, cut = (plug_back(tuned, deep, max_rank=rank, out=tmp_path / f"cut-{rank}").scores for rank in (None, 1))
    assert cut[PLUGGED_BACK] != whole[PLUGGED_BACK]
    assert cut[ZERO_SHOT] == whole[ZERO_SHOT]


def test_names_and_not_the_order_of_keys_decide(tuned: Path, deep: Path, tmp_path: Path) -> None:
    """The same tensors under the same names in another order of the file: the same adapter, to the bit."""
    written = plug_back(tuned, deep, with_scores=False)
    run = tmp_path / "shuffled"
    shutil.copytree(tuned, run)
    shutil.rmtree(run / "plug-back")
    file = run / "adapter" / WEIGHTS
    tensors = load_file(file)
    facts = {k: v for k, v in json.loads((run / "adapter" / manifest.NAME).read_text()).items() if k != "manifest"}
    save_file(dict(sorted(tensors.items(), reverse=True)), file, metadata={"format": "pt"})
    manifest.write(run / "adapter", facts)
    again = plug_back(run, deep, with_scores=False)
    assert (again.path / WEIGHTS).read_bytes() == (written.path / WEIGHTS).read_bytes()


def test_modules_trained_whole_are_renamed_too(
    simulated: Simulated, tables: Tables, deep: Path, emulators: dict[float, Path], tmp_path: Path
) -> None:
    saved = ["layers.3.mlp.up_proj", "lm_head"]
    tables = over(tables, emulators[0.5], "ends", modules_to_save=saved, targets=["q_proj", "down_proj"])
    run = simulated(tables, tmp_path / "run").path
    written = plug_back(run, deep)
    config = json.loads((written.path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.layers.5.mlp.up_proj"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(deep), written.path).eval()
    merged = AutoModelForCausalLM.from_pretrained(plug_back(run, deep, form="merged", out=tmp_path / "m").path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_seeds_of_kron_are_plugged_back_as_factors(
    simulated: Simulated, tables: Tables, deep: Path, emulators: dict[float, Path], tmp_path: Path
) -> None:
    seeds = kseed(over(tables, emulators[0.5], None), "kron")
    seeds["adapter"] = {"targets": ["all-linear"], "layers": "ends"}
    seeds["client"]["steps"] = seeds["rounds"]["count"] = 1
    run = simulated(seeds, tmp_path / "run").path
    written = plug_back(run, deep)
    assert {name.split(".")[4] for name in load_file(written.path / WEIGHTS)} == {"0", "5"}
    assert written.scores[ZERO_SHOT] != written.scores[PLUGGED_BACK]
    other = kseed(over(tables, emulators[0.5], None), "hadamard")
    other["client"]["steps"] = other["rounds"]["count"] = 1
    with pytest.raises(ConfigError, match="only bank = 'kron' over the weights of adapted layers"):
        plug_back(simulated(other, tmp_path / "other").path, deep)


def test_another_base_than_the_emulators_is_refused(
    tuned: Path, checkpoints: dict[str, Path], deep: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(deep, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1e-3  # in a block that was dropped
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for base in (other, checkpoints["llama"]):
        with pytest.raises(ConfigError, match="base: expected the base that the emulator was made from"):
            plug_back(tuned, base)
    assert not (tuned / "plug-back").exists()


def test_a_run_over_a_whole_base_or_over_the_middle(
    simulated: Simulated, tables: Tables, deep: Path, emulators: dict[float, Path], tmp_path: Path
) -> None:
    whole = simulated(over(tables, deep, "0, 5"), tmp_path / "whole").path
    with pytest.raises(ConfigError, match=r"expected the folder of an emulator"):
        plug_back(whole, deep)
    middle = simulated(over(tables, emulators[0.5], None), tmp_path / "middle").path
    with pytest.raises(ConfigError, match=r"expected changes of the ends alone.*adapter\.layers = \"ends\""):
        plug_back(middle, deep)


def test_an_emulator_that_was_exchanged_after_the_run(
    tuned: Path, deep: Path, emulators: dict[float, Path], tmp_path: Path
) -> None:
    recipe = tuned / "recipe.toml"
    other = export_emulator(deep, tmp_path / "other", EmulatorSettings(front=2, back=1, drop=0.7)).path
    recipe.write_text(recipe.read_text().replace(str(emulators[0.5]), str(other)))
    with pytest.raises(ConfigError, match=r"the base that .* was trained on"):
        plug_back(tuned, deep)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": [0, 1, 5, 6], "base_blocks": 7}, r"7 blocks model\.layers, as in emulator\.json; got 6 blocks"),
        ({"blocks": "model.norm"}, r"6 blocks model\.norm, as in emulator\.json"),
        ({"base_digest": "0" * 64}, "expected the base that the emulator was made from"),
        ({"digests": {}}, r"expected the weights that emulator\.json is of"),
    ],
)
def test_an_emulator_json_that_names_other_blocks(
    change: dict[str, Any], words: str, tuned: Path, deep: Path, emulators: dict[float, Path], tmp_path: Path
) -> None:
    copied = tmp_path / "emulator"
    shutil.copytree(emulators[0.5], copied)
    facts = read(copied)
    (copied / NAME).write_bytes(encode(replace(facts, **change)))
    recipe = tuned / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(emulators[0.5]), str(copied)))
    with pytest.raises(ConfigError, match=words):
        plug_back(tuned, deep)
    assert not (tuned / "plug-back").exists()


def test_an_emulator_with_other_ends_than_the_true_base(
    simulated: Simulated, tables: Tables, deep: Path, emulators: dict[float, Path], tmp_path: Path
) -> None:
    """Whose digests are right: only a comparison with the true base's own tensors finds it."""
    copied = tmp_path / "emulator"
    shutil.copytree(emulators[0.5], copied)
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    facts = read(copied)
    config = AutoConfig.from_pretrained(copied)
    digests = {"float32": digest_as_loaded(copied, "causal", "float32", config)}
    (copied / NAME).write_bytes(encode(replace(facts, digests=digests)))
    run = simulated(over(tables, copied, "ends"), tmp_path / "run").path
    with pytest.raises(
        ConfigError, match=r"layers\.3\.mlp\.up_proj\.weight: expected the true base's model\.layers\.5\.mlp"
    ):
        plug_back(run, deep)


def test_what_cannot_be_compared_or_written(tuned: Path, deep: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="form: expected one of peft, uniform, merged"):
        plug_back(tuned, deep, form="ledger")
    recipe = tuned / "recipe.toml"
    written = recipe.read_text()
    prompts = {**tomllib.loads(written), "adapter": {"kind": "prompt"}}
    recipe.write_text(render(fedtune.bind(prompts)))
    with pytest.raises(ConfigError, match=r"expected a run of adapter\.kind = 'lora'.*got 'prompt'"):
        plug_back(tuned, deep)
    recipe.write_text(written)
    with pytest.raises(ConfigError, match="full: expected a run over"):
        plug_back(tuned, deep, full=tuned)
    with pytest.raises(ConfigError, match="full: expected test data"):
        plug_back(tuned, deep, full=tuned, with_scores=False)


def test_the_warning() -> None:
    assert gives_away({EMULATOR: {"loss": 1.0}, PLUGGED_BACK: {"loss": 1.0}})
    assert not gives_away({EMULATOR: {"loss": 1.1}, PLUGGED_BACK: {"loss": 1.0}})
    assert not gives_away({})


@pytest.mark.slow
def test_the_order_of_losses_on_novels(stories: Path, shared: Path, simulated: Simulated, tmp_path: Path) -> None:
    """Fast siblings: the middle comes nearer (model/test_distill.py), and both ends of a run on a tiny base above."""
    text, course = (
        shared / "data/stories/train.jsonl",
        DistillSettings(steps=120, learning_rate=1e-3, lm_weight=0.0, batch=4),
    )
    recipe = render(fedtune.bind(ROOT / "simulations/offsite/novels.toml"))

    def tune(name: str, base: Path, layers: str) -> Path:
        tables = tomllib.loads(recipe)
        tables["model"]["base"], tables["adapter"]["layers"] = str(base), layers
        tables["data"] |= {key: str(shared / f"data/novels/{file}") for key, file in FILES.items()}
        return simulated(tables, tmp_path / name).path

    full = tune("full", stories, "0-4")
    losses = {}
    for name, given in (("raw", None), ("distilled", text)):
        settings = EmulatorSettings(drop=0.5)
        emulator = export_emulator(stories, tmp_path / f"emulator-{name}", settings, text=given, distill=course)
        written = plug_back(tune(name, emulator.path, "ends"), stories, full=full)
        losses[name] = {key: scores["loss"] for key, scores in written.scores.items()}
    assert losses["distilled"][PLUGGED_BACK] < losses["raw"][PLUGGED_BACK]
    for scores in losses.values():
        assert scores[FULL] <= scores[PLUGGED_BACK] < scores[ZERO_SHOT]
        assert scores[EMULATOR] > scores[PLUGGED_BACK]
