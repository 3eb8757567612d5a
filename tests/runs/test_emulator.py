"""Emulators as they are written: what is in the folder, what is not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedtune.client.perform import perform
from fedtune.errors import ClientError, ConfigError, StoreError
from fedtune.messages import Assignment, Plan, Training, TrainLora
from fedtune.model.base import load, load_tokenizer
from fedtune.model.distill import DistillSettings
from fedtune.model.emulator_facts import NAME, read
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.rounds.events import Note, Phase
from fedtune.runs.emulator import EmulatorSettings, export_emulator
from fedtune.store import manifest
from tests.runs.offsite import deep_base, public_text


@pytest.fixture(scope="module")
def deep(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_base(tmp_path_factory.mktemp("deep"), checkpoints["llama"])


def settings_of(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(base=str(folder), device="cpu", **{"dtype": "float32", **changes})


def load_ends(folder: Path, layers: str | None = "ends", **changes: Any) -> Any:
    settings = settings_of(folder, **changes)
    adapter = AdapterSettings(rank=1, layers=layers)
    return load(settings, adapter, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)


def test_an_emulator_is_an_ordinary_base_whose_ends_are_found(deep: Path, tmp_path: Path) -> None:
    events = list[Any]()
    written = export_emulator(deep, tmp_path / "emulator", watch=events.append)
    assert written.facts.layers == [0, 1, 4, 5]
    assert written.parameters < written.base_parameters
    assert [event.text for event in events if isinstance(event, Phase)] == [
        "loading the base",
        "building the emulator",
        "writing it",
    ]
    base = load_ends(written.path)
    assert base.digest == written.facts.digests["float32"] != written.facts.base_digest
    assert {name.split(".")[2] for name in base.modules} == {"0", "3"}
    assert load_ends(written.path, "0, 3").modules == base.modules
    assert written.facts.base_digest == load_ends(deep, None).digest
    stock = AutoModelForCausalLM.from_pretrained(written.path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(stock(input_ids=ids).logits, base.model(input_ids=ids).logits)
    manifest.open_folder(written.path).check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "nf4"])
def test_ends_are_found_in_every_number_format(dtype: str, deep: Path, tmp_path: Path) -> None:
    written = export_emulator(deep, tmp_path / "emulator", dtype="bfloat16")
    base = load_ends(written.path, dtype=dtype)
    assert {name.split(".")[2] for name in base.modules} == {"0", "3"}
    assert json.loads((written.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_no_byte_of_a_dropped_block_is_in_the_folder(deep: Path, tmp_path: Path) -> None:
    written = export_emulator(deep, tmp_path / "emulator", EmulatorSettings(drop=0.75))
    content = b"".join(file.read_bytes() for file in sorted(written.path.rglob("*")) if file.is_file())
    tensors = load_file(deep / "model.safetensors")
    present = {layer: 0 for layer in range(6)}
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and tensor.ndim == 2:  # norms are all ones in every block
            # Every row: a part of a dropped matrix is as bad as all of it.
            rows = [row.numpy().tobytes() for row in tensor]
            present[int(name.split(".")[2])] += sum(row in content for row in rows)
    assert {layer for layer, rows in present.items() if rows} == {0, 1, 5}
    assert sum(".input_layernorm." in name for name in load_file(written.path / "model.safetensors")) == 3


@pytest.mark.parametrize("kind", ["drop", "prune", "quantise"])
def test_a_distilled_middle_comes_nearer(kind: Any, deep: Path, tmp_path: Path) -> None:
    notes = list[Any]()
    written = export_emulator(
        deep,
        tmp_path / "emulator",
        EmulatorSettings(kind=kind),
        text=public_text(tmp_path / "public.jsonl"),
        distill=DistillSettings(steps=10, learning_rate=5e-4 if kind == "quantise" else 3e-3, batch=4),
        watch=notes.append,
    )
    course = written.facts.distilled
    assert course is not None
    assert course["last_error"] < course["first_error"]
    assert course["steps"] == 10
    texts = [file.read_text() for file in written.path.glob("*.json")]
    assert texts
    assert not any(str(tmp_path) in text or str(deep) in text for text in texts)
    assert sum(isinstance(note, Note) for note in notes) == 10
    assert load_ends(written.path).digest == written.facts.digests["float32"]


def test_the_same_seed_writes_the_same_weights(deep: Path, tmp_path: Path) -> None:
    text, course = public_text(tmp_path / "public.jsonl"), DistillSettings(steps=2, batch=2)
    digests = [
        export_emulator(deep, tmp_path / name, EmulatorSettings(seed=seed), text=text, distill=course).facts.digests
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_nothing_is_left_of_an_export_that_was_stopped(deep: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if isinstance(event, Phase) and event.text == "writing it":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_emulator(deep, tmp_path / "new" / "emulator", watch=stop)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_a_stop_while_it_is_written_leaves_nothing(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export_emulator(deep, tmp_path / "emulator")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "dtype", "words"),
    [
        (EmulatorSettings(front=3, back=3), None, "leave at least one block between the ends"),
        (EmulatorSettings(drop=1.0), None, "below 1 of the middle"),
        (EmulatorSettings(kind="bits"), None, "kind: expected one of drop, prune, quantise"),  # type: ignore[arg-type]
        (EmulatorSettings(select="up"), None, "select: expected one of round, floor"),  # type: ignore[arg-type]
        (EmulatorSettings(codes="int4"), None, "codes: expected one of int8, nf4"),  # type: ignore[arg-type]
        (EmulatorSettings(seed=-1), None, "seed: expected a whole number from 0; got -1"),
        (EmulatorSettings(), "int8", "dtype: expected one of float32, bfloat16, float16"),
    ],
)
def test_settings_of_no_emulator(
    settings: EmulatorSettings, dtype: Any, words: str, deep: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        export_emulator(deep, tmp_path / "emulator", settings, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_text_that_is_not_there_or_empty(deep: Path, tmp_path: Path) -> None:
    empty = tmp_path / "short.jsonl"
    empty.write_text('{"text": "a"}\n')
    for text, words in (
        (tmp_path / "none.jsonl", "^distill: .*none"),
        (empty, "^distill: expected text of at least two"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_emulator(deep, tmp_path / "emulator", text=text)
    assert not (tmp_path / "emulator").exists()


def test_an_emulator_overwrites_nothing(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="it holds files"):
        export_emulator(deep, tmp_path)


def test_an_emulator_json_of_other_weights_is_refused(deep: Path, tmp_path: Path) -> None:
    one = export_emulator(deep, tmp_path / "one", EmulatorSettings(select="round")).path
    two = export_emulator(deep, tmp_path / "two", EmulatorSettings(front=2, back=1, drop=0.7)).path
    assert len(read(one).layers) == len(read(two).layers) == 4
    (one / NAME).write_bytes((two / NAME).read_bytes())
    with pytest.raises(ConfigError, match=r"expected the weights that emulator\.json is of"):
        load_ends(one)
    (one / NAME).unlink()
    with pytest.raises(ConfigError, match="expected the folder of an emulator"):
        load_ends(one)
    with pytest.raises(ConfigError, match="expected the folder of an emulator"):
        load_ends(deep)


def test_adapters_in_the_middle_are_named_before_the_run(deep: Path, tmp_path: Path) -> None:
    written = export_emulator(deep, tmp_path / "emulator").path
    [note] = load_ends(written, None).notes
    assert note.startswith(
        f"an emulator of {deep.name}: 14 adapted layers lie in its middle, such as model.layers.1.mlp"
    )
    assert note.endswith('set adapter.layers = "ends"')
    assert load_ends(written).notes == ()
    assert load_ends(deep, None).notes == ()


def test_a_client_with_another_emulator_trains_nothing(deep: Path, tmp_path: Path) -> None:
    ours = load_ends(export_emulator(deep, tmp_path / "ours").path)
    theirs = load_ends(export_emulator(deep, tmp_path / "other", EmulatorSettings(drop=0.7)).path)
    plan = Plan(client="a", rank=1, scale=1.0, training=Training(batch=1, learning_rate=0.1, steps=1))
    assignment = Assignment("fedit", 1, 0, plan, TrainLora(a_key=0), base=ours.digest)
    with pytest.raises(ClientError, match=f"a: expected base {ours.digest[:12]}; has {theirs.digest[:12]}"):
        perform(theirs, [], assignment, threads=1)
    settings = settings_of(tmp_path / "other", digest=ours.digest)
    with pytest.raises(ConfigError, match=r"model\.digest: expected the base of digest"):
        load(settings, AdapterSettings(), tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)


def test_a_base_of_a_recipe_and_a_classifier(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.model.families import CLASSIFIERS, build

    sizes = {**CLASSIFIERS["bert"], "num_hidden_layers": 6}
    bert = build("bert", sizes, tmp_path / "bert", AutoTokenizer.from_pretrained(checkpoints["bert"]))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\nbase = "{bert}"\ntask = "classification"\n[data]\nlabels = ["a", "b"]\n')
    written = export_emulator(recipe, tmp_path / "emulator")
    names = load_file(written.path / "model.safetensors")
    assert not any("classifier" in name for name in names)
    settings = settings_of(written.path, task="classification")
    adapter = AdapterSettings(rank=1, layers="ends")
    tokenizer = load_tokenizer(settings, Path())
    base = load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0, labels=("a", "b", "c"))
    assert {name.split(".")[3] for name in base.modules} == {"0", "3"}
    assert base.saved_modules == ["classifier"]
