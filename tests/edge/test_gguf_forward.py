from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fedtune.edge.gguf_decoder import read_decoder
from fedtune.edge.gguf_file import GgufFile
from fedtune.edge.gguf_forward import Engine, Tokens, logits_of, run_blocks
from fedtune.errors import ClientError
from tests.edge.gguf_models import Twins, examples, twins
from tests.model.gguf_files import write_gguf

NONE = np.zeros((1, 1, 1), np.float32)


@pytest.fixture(scope="module")
def pair(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return twins(checkpoints["llama"], tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind="Q8_0")


def engine_of(path: Path, threads: int = 1) -> Engine:
    file = GgufFile(path)
    return Engine(file, read_decoder(file), threads=threads)


def test_logits_are_torchs_at_the_scored_tokens(pair: Twins) -> None:
    ids, engine = examples(20)[0].input_ids, engine_of(pair.file)
    scored = np.array([3, 4, 19])
    logits = logits_of(engine, run_blocks(engine, {}, Tokens(ids[None], scored, NONE)), 0, engine.decoder.vocabulary)
    with torch.inference_mode():
        wanted = pair.base.model(torch.from_numpy(ids)[None]).logits[0, scored].numpy()
    np.testing.assert_allclose(logits, wanted, atol=2e-5)


def test_threads_change_no_more_than_the_last_bits(pair: Twins) -> None:
    ids = examples(33)[0].input_ids
    one, two = (
        run_blocks(engine_of(pair.file, threads), {}, Tokens(ids[None], np.arange(33), NONE)) for threads in (1, 2)
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_product_that_fails_is_no_result(pair: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    # C prints the error of a function that it calls, and goes on with whatever numbers are there.
    engine, tokens = engine_of(pair.file), Tokens(examples(20)[0].input_ids[None], np.arange(20), NONE)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(np, "matmul", Mock(side_effect=MemoryError))
        with pytest.raises(ClientError, match="the system gave none"):
            run_blocks(engine, {}, tokens)
    assert np.isfinite(run_blocks(engine, {}, tokens)).all()


def test_weights_as_they_are_stored_round_the_inputs(pair: Twins) -> None:
    # The reason for expanding them: the difference is thousands of times that of float32.
    tokens = Tokens(examples(20)[0].input_ids[None], np.arange(20), NONE)
    exact, rounded = (run_blocks(engine_of(pair.file), {}, tokens, expand=expand) for expand in (True, False))
    assert 1e-3 < np.abs(exact - rounded).max() < 0.5


def test_stretched_rotary_positions_are_torchs(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    factors = np.array([1.0, 1.0, 2.0, 8.0], np.float32)
    model = write_gguf(checkpoints["llama"], tmp_path / "long.gguf", factors=factors).eval()
    model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    ids, engine = examples(30)[0].input_ids, engine_of(tmp_path / "long.gguf")
    outputs = run_blocks(engine, {}, Tokens(ids[None], np.array([29]), NONE))
    with torch.inference_mode():
        wanted = model.model(torch.from_numpy(ids)[None])[0][0, 29].numpy()
    np.testing.assert_allclose(outputs[0], wanted, atol=2e-5)
