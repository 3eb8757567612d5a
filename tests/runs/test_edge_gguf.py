"""A GGUF file becomes a bundle where the runtime's losses are torch's, and nothing where they are not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.client import site as torch_site
from fedtune.directions.downlink import encode_whole
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge import gguf_forward, gguf_runtime
from fedtune.edge import site as edge_site
from fedtune.edge.bundle import read_bundle
from fedtune.edge.runtime import load_runtime
from fedtune.errors import ConfigError, StoreError
from fedtune.link.provenance import load_roster
from fedtune.messages import Assignment, Plan, ProbeResult, ProbeSeeds, SeedState, Training
from fedtune.model.base import load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.probing.rows import pad
from fedtune.runs.edge_gguf import export_gguf_bundle
from fedtune.wire.codec import decode_assignment, encode_assignment
from fedtune.wire.profile import difference
from tests.edge.gguf_models import EXPONENT, Twins, examples, twins
from tests.link.ceremony import enroll_parties

NOW = int(time.time())
RUNNER = CliRunner()


@pytest.fixture(scope="module")
def pair(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return twins(checkpoints["llama"], tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind="Q8_0")


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions go into a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_becomes_a_signed_bundle_that_shares_torchs_state(pair: Twins, tmp_path: Path) -> None:
    server, out = enroll_parties(tmp_path / "sites", now=NOW)["server"], tmp_path / "bundle"
    written = export_gguf_bundle(pair.file, out, identity=server)
    bundle = read_bundle(out, load_roster(server / "roster", None)[0], now=int(time.time()))
    assert (bundle.signer, written.signer) == ("server", "server")
    assert (bundle.facts.runtime, bundle.facts.family, bundle.facts.dtype) == ("gguf", "llama", "q8_0")
    assert (bundle.facts.positions, bundle.facts.eos_ids, bundle.base_name) == (64, (2,), "tiny.gguf")
    assert written.difference < 1e-5
    assert written.sizes["weights"] == pair.file.stat().st_size
    # A torch client that loads the same file: its base has the same digests, so the state's digest is one.
    settings = ModelSettings(base=str(pair.file), device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    base = load(settings, AdapterSettings(rank=1), tokenizer=tokenizer, root=Path(), seed=0)
    assert (bundle.base_digest, bundle.manifest.digest) == (base.digest, base.manifest.digest)
    assert bundle.manifest.digest == pair.base.manifest.digest
    trainable = trainable_ordinals(bundle.manifest, TensorSelection("kron"), bundle.facts.layers)
    with load_runtime(bundle, threads=1).at(pair.ledger, trainable) as position:
        got = position.losses(pad(examples(9, 12), bundle.facts.pad_id), [(0, 0)])
    with pair.runtime().at(pair.ledger, pair.trainable) as position:
        assert got == position.losses(pad(examples(9, 12), 0), [(0, 0)])


@pytest.mark.parametrize("fault", ["rows of queries as transformers has them", "inputs in 8 bits", "another rotation"])
def test_nothing_is_written_where_losses_are_others_than_torchs(
    pair: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "inputs in 8 bits":
        whole = gguf_forward.run_blocks
        monkeypatch.setattr(gguf_runtime, "run_blocks", lambda *args: whole(*args, expand=False))
    elif fault == "another rotation":
        monkeypatch.setattr(gguf_forward, "FAMILIES", {"llama": 2})
    else:
        monkeypatch.setattr(gguf_runtime, "interleave", lambda rows, heads: rows)
    with pytest.raises(ConfigError, match=r"a loss of [\d.]+, as torch computes it|losses 1e-6 apart"):
        export_gguf_bundle(pair.file, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_another_base_is_refused_before_it_is_loaded(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a GGUF file for the runtime gguf; got .*runtime onnx"):
        export_gguf_bundle(checkpoints["llama"], tmp_path / "bundle")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(StoreError, match="it holds files"):
        export_gguf_bundle(checkpoints["llama"], tmp_path / "full")


def test_the_command_takes_a_file_and_leaves_its_weights_as_they_are(pair: Twins, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = RUNNER.invoke(app, ["export", str(pair.file), "--edge", str(out), "--runtime", "gguf"])
    assert result.exit_code == 0, result.output
    assert "losses within" in result.stdout
    assert (out / "weights.gguf").read_bytes() == pair.file.read_bytes()
    for arguments in (["--runtime", "gguf", "--dtype", "int8"], ["--runtime", "tflite"]):
        refused = RUNNER.invoke(app, ["export", str(pair.file), "--edge", str(tmp_path / "other"), *arguments])
        assert refused.exit_code == 2
    assert RUNNER.invoke(app, ["export", str(pair.file), "--runtime", "gguf"]).exit_code == 2


def test_a_damaged_file_is_refused_in_one_line(pair: Twins, tmp_path: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(pair.file.read_bytes()[:-1000])
    result: Any = RUNNER.invoke(app, ["export", str(torn), "--edge", str(tmp_path / "out"), "--runtime", "gguf"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "expected a whole GGUF file at" in result.stderr
    assert not (tmp_path / "out").exists()


SITE = """
name = "ann"
[model]
base = "{}"
{}
[data]
source = "rows.jsonl"
held_out = 0.25
max_tokens = 24
[policy]
min_examples = 1
unsigned_base = true
"""


def test_a_device_sends_what_a_client_with_torch_sends_over_the_same_file(pair: Twins, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"the quick fox {'and ' * (i % 5)} over the dog {i}"}) for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    export_gguf_bundle(pair.file, tmp_path / "bundle")
    (tmp_path / "full.toml").write_text(SITE.format(pair.file, '[adapter]\ntargets = ["all-linear"]'))
    (tmp_path / "small.toml").write_text(SITE.format("bundle", ""))
    full, device = torch_site.from_file(str(tmp_path / "full.toml")), edge_site.from_file(str(tmp_path / "small.toml"))
    theirs, ours = full.profile(), device.profile()
    assert difference(theirs.foundation, ours.foundation) == ""
    assert (ours.num_examples, ours.held_out) == (theirs.num_examples, theirs.held_out)
    updates = [site.perform(order(pair)) for site in (full, device)]
    results = [update.result for update in updates if isinstance(update.result, ProbeResult)]
    assert len(results) == 2
    assert results[0].state == results[1].state != b""
    assert results[0].checks == results[1].checks
    # Losses differ by 1e-6: an integer may fall on the other side of a rounding, and no farther.
    scalars = [result.scalars.astype(int) for result in results]
    assert np.abs(scalars[0] - scalars[1]).max() <= 1
    assert np.abs(scalars[0]).max() > 3
    assert updates[0].measured.loss_after == pytest.approx(updates[1].measured.loss_after, abs=1e-3)


def order(pair: Twins) -> Assignment:
    """Return an order of FedKSeed over the twins' ledger."""
    sent = pair.ledger
    state = SeedState("whole", 0, encode_whole(sent.accumulators), sent.round, sent.digest)
    task = ProbeSeeds("kron", 16, sent.bank.key, exponent=EXPONENT, shift=11, perturbation=30_000, state=state)
    training = Training(batch=3, learning_rate=1e-4, steps=6)
    sent_order = Assignment("fedkseed", 2, 9, Plan("ann", 1, 1.0, training), task, base=pair.base.digest)
    encoded = encode_assignment(sent_order)
    return decode_assignment(encoded.header, encoded.blobs)
