from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fedtune.directions.hadamard import Hadamard
from fedtune.edge import ggml, gguf_runtime
from fedtune.edge.bundle import read_bundle
from fedtune.edge.gguf_runtime import GgufRuntime, cross_entropies
from fedtune.errors import ClientError, ConfigError
from fedtune.model.batches import collate
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.seed_rebuild import with_rebuilt_weights
from fedtune.probing.rows import pad
from tests.edge.bundles import write_bundle
from tests.edge.gguf_models import EXPONENT, Twins, examples, twins

MOVES = [(0, 0), (6, -40_000), (6, 40_000), (9, -40_000)]
"""The base, both sides of a seed, and one side of another."""


@pytest.fixture(scope="session")
def built(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gguf")

    @cache
    def build(family: str, kind: str) -> Twins:
        return twins(checkpoints["llama"], folder / f"{family}-{kind}.gguf", family=family, kind=kind)

    return build


@pytest.fixture
def llama(built: Any) -> Twins:
    result: Twins = built("llama", "F16")
    return result


def reference(pair: Twins, lengths: Sequence[int], moves: Sequence[tuple[int, int]]) -> np.ndarray[Any, Any]:
    batch = collate(examples(*lengths), pair.base)
    with with_injected_paths(pair.base, pair.ledger, pair.trainable) as position, torch.inference_mode():
        return np.array(position.losses(batch, moves))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "F32"), ("llama", "F16"), ("llama", "Q8_0"), ("llama", "Q4_1"), ("qwen2", "F16"), ("qwen3", "Q8_0")],
)
def test_losses_are_torchs_on_all_sides(built: Any, family: str, kind: str) -> None:
    pair: Twins = built(family, kind)
    wanted = reference(pair, (9, 12, 5), MOVES)
    with pair.runtime().at(pair.ledger, pair.trainable) as position:
        got = np.array(position.losses(pad(examples(9, 12, 5), 0), MOVES))
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    # The slope is what training reads: the rounding of inputs to 8 bits alone would change it by far more.
    assert abs((got[1] - got[2]) - (wanted[1] - wanted[2])) < 0.002 * abs(wanted[1] - wanted[2])
    assert abs(wanted[1] - wanted[2]) > 0.002


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_a_tiny_perturbation_gives_a_tiny_difference(built: Any, kind: str) -> None:
    pair: Twins = built("llama", kind)
    tiny = round(1e-6 * 2**EXPONENT)
    with pair.runtime().at(pair.ledger, pair.trainable) as position:
        plus, minus = position.losses(pad(examples(9, 12, 5), 0), [(6, -tiny), (6, tiny)])
    assert abs(plus - minus) < 1e-4


def test_a_move_that_is_taken_back_gives_the_same_loss_to_the_last_bit(llama: Twins) -> None:
    rows = pad(examples(9, 12), 0)
    with llama.runtime().at(llama.ledger, llama.trainable) as position:
        [before] = position.losses(rows, [(0, 0)])
        position.move(3, 5000)
        [there] = position.losses(rows, [(0, 0)])
        position.move(3, -5000)
        assert position.losses(rows, [(0, 0)]) == [before]
    assert abs(there - before) > 1e-4
    assert there == pytest.approx(reference(llama, (9, 12), [(3, 5000)])[0], abs=2e-5)


def test_directions_follow_the_files_order_of_query_and_key_rows(llama: Twins, monkeypatch: Any) -> None:
    wanted = reference(llama, (9, 12), MOVES)
    monkeypatch.setattr(gguf_runtime, "interleave", lambda rows, heads: rows)
    with llama.runtime().at(llama.ledger, llama.trainable) as position:
        got = np.array(position.losses(pad(examples(9, 12), 0), MOVES))
    # The state's digest would be the others' all the same: only the losses show that another model is trained.
    assert np.abs(got - wanted).max() > 1e-3


def test_moves_beyond_one_pass_are_those_of_several(llama: Twins, monkeypatch: Any) -> None:
    rows = pad(examples(9, 12), 0)
    runtime = llama.runtime()
    with runtime.at(llama.ledger, llama.trainable) as position:
        whole = position.losses(rows, MOVES)
        monkeypatch.setattr(gguf_runtime, "TOKENS_AT_ONCE", 50)
        np.testing.assert_allclose(position.losses(rows, MOVES), whole, atol=1e-6)


def test_the_vocabulary_in_parts_is_the_whole(llama: Twins, monkeypatch: Any) -> None:
    outputs = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) * 8
    targets, engine = np.array([0, 17, 100, 200, 289]), llama.runtime()._engine
    weight = llama.base.model.lm_head.weight.detach()
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(outputs) @ weight.T, torch.from_numpy(targets), reduction="none"
    )
    for size in (2**23, 64 * 4 * 50):
        monkeypatch.setattr(gguf_runtime, "HEAD_BYTES", size)
        np.testing.assert_allclose(cross_entropies(engine, outputs, targets), wanted.numpy(), rtol=2e-6)


def test_rows_without_a_token_that_counts_have_no_loss(llama: Twins) -> None:
    with llama.runtime().at(llama.ledger, llama.trainable) as position:
        assert position.losses(pad(examples(3), 0), MOVES[:2]) == [0.0, 0.0]


def test_directions_are_built_once_for_a_run(llama: Twins) -> None:
    runtime = llama.runtime()
    with runtime.at(llama.ledger, llama.trainable):
        paths = runtime._paths
    later = replace(llama.ledger, round=2, accumulators=llama.ledger.accumulators + 1)
    with runtime.at(later, llama.trainable) as position:
        assert runtime._paths is paths
        few = position.losses(pad(examples(9), 0), [(0, 0)])
    with runtime.at(later, llama.trainable[:3]) as position:
        assert runtime._paths is not paths
        assert position.losses(pad(examples(9), 0), [(0, 0)]) != few


@pytest.mark.parametrize(("family", "kind"), [("llama", "F32"), ("qwen2", "F32"), ("qwen3", "F32")])
def test_text_is_continued_as_torch_does(built: Any, family: str, kind: str) -> None:
    pair: Twins = built(family, kind)
    prompt = examples(7)[0].input_ids.tolist()
    for ledger in (None, pair.ledger):
        wanted = list(prompt)
        for _ in range(9):
            with torch.inference_mode():
                if ledger is None:
                    logits = pair.base.model(torch.tensor([wanted])).logits
                else:
                    with with_rebuilt_weights(pair.base, ledger, pair.trainable):
                        logits = pair.base.model(torch.tensor([wanted])).logits
            wanted.append(int(logits[0, -1].argmax()))
        got = list(pair.runtime().continue_tokens(ledger, pair.trainable, prompt, new_tokens=9))
        assert got == wanted[len(prompt) :]


def test_text_ends_before_its_end_token_and_where_positions_end(llama: Twins) -> None:
    runtime, prompt = llama.runtime(), examples(7)[0].input_ids.tolist()
    whole = list(runtime.continue_tokens(None, (), prompt, new_tokens=12))
    runtime._eos_ids = frozenset({whole[5]})
    assert list(runtime.continue_tokens(None, (), prompt, new_tokens=12)) == whole[: whole.index(whole[5])]
    long = examples(62)[0].input_ids.tolist()
    assert len(list(llama.runtime().continue_tokens(None, (), long, new_tokens=12))) == 2
    assert list(llama.runtime().continue_tokens(None, (), [*long, 5, 6, 7], new_tokens=12)) == []


def test_what_cannot_be_moved_is_refused_by_name(llama: Twins) -> None:
    names = [entry.name for entry in llama.base.manifest.entries]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        with (
            pytest.raises(ConfigError, match=f"linear layers of the blocks alone.*{name}.*runtime onnx"),
            llama.runtime().at(llama.ledger, [names.index(name)]),
        ):
            pass
    other = replace(llama.ledger, bank=Hadamard(16, 99))
    with pytest.raises(ConfigError, match="'kron', which a device runs"), llama.runtime().at(other, llama.trainable):
        pass


def test_a_bundle_for_another_file_is_refused(built: Any, llama: Twins) -> None:
    wide = built("qwen3", "Q8_0")
    runtime = GgufRuntime(llama.runtime()._file, wide.base.manifest, eos_ids=[], threads=1)
    with (
        pytest.raises(ConfigError, match="as the bundle's list of tensors says"),
        runtime.at(wide.ledger, wide.trainable),
    ):
        pass


def test_no_memory_is_said_and_the_file_stays_usable(llama: Twins, monkeypatch: Any) -> None:
    runtime, rows = llama.runtime(), pad(examples(9), 0)
    with runtime.at(llama.ledger, llama.trainable) as position:
        wanted = position.losses(rows, MOVES)
        for owner, name, stand_in in (
            (ggml.library(), "ggml_gallocr_alloc_graph", lambda *_: False),
            (np, "where", Mock(side_effect=MemoryError)),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, stand_in)
                with pytest.raises(ClientError, match=r"the system gave none.*lower client\.batch"):
                    position.losses(rows, MOVES)
        assert position.losses(rows, MOVES) == wanted
    with monkeypatch.context() as patch:
        patch.setattr(ggml.library(), "ggml_backend_alloc_ctx_tensors_from_buft", lambda *_: None)
        with (
            pytest.raises(ClientError, match="the system gave none"),
            llama.runtime().at(llama.ledger, llama.trainable),
        ):
            pass


def test_tokens_that_the_vocabulary_lacks_are_refused(llama: Twins) -> None:
    # The library would end the process.
    rows, runtime = pad(examples(9, vocabulary=5000), 0), llama.runtime()
    with runtime.at(llama.ledger, llama.trainable) as position, pytest.raises(ClientError, match="another model"):
        position.losses(rows, MOVES)
    with pytest.raises(ClientError, match="another model"):
        next(runtime.continue_tokens(None, (), [5, -1], new_tokens=2))


def test_a_bundle_names_its_file(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", runtime="gguf", details={"weights": "other.gguf"})
    with pytest.raises(ConfigError, match=r"a bundle that lists its GGUF file under 'weights'; got .*'other\.gguf'"):
        gguf_runtime.load(read_bundle(folder), threads=1)
    folder = write_bundle(tmp_path / "wrong", runtime="gguf", details={"weights": "graph.onnx"})
    with pytest.raises(ConfigError, match=r"a whole GGUF file at .*graph\.onnx.*another file"):
        gguf_runtime.load(read_bundle(folder), threads=1)
