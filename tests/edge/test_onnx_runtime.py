"""A device's losses and texts are torch's: at the base, around any weights of seeds, for every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as states

from fedtune.data.encode import Example
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge import onnx_runtime
from fedtune.edge.bundle import read_bundle
from fedtune.edge.onnx_runtime import OnnxRuntime, load
from fedtune.errors import ClientError, ConfigError, StoreError
from fedtune.model.base import Base
from fedtune.model.batches import collate
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.seed_rebuild import with_rebuilt_weights
from fedtune.probing.rows import pad
from fedtune.runs.edge_bundle import write_bundle
from fedtune.store import manifest
from tests.edge.tiny_models import MODELS, tiny_base
from tests.model.conftest import examples as make_examples

PAIR = [(6, -60), (6, 60)]
QUERIES = [(3, 0), (3, -60), (5, -60), (14, -60)]
ROUNDS = (PAIR, QUERIES, [(0, 0)])
examples = make_examples


@pytest.fixture(scope="module", params=sorted(MODELS))
def exported(request: Any, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    base = tiny_base(request.param, checkpoints["llama"])
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    write_bundle(base, path, dtype="float32", signer=None)
    return base, path


@pytest.fixture(scope="module")
def llama(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    base = tiny_base("llama-tied", checkpoints["llama"])
    path = tmp_path_factory.mktemp("llama") / "bundle"
    write_bundle(base, path, dtype="float32", signer=None)
    return base, path


def ledger_of(base: Base, *, size: int = 16, exponent: int = 10) -> SeedLedger:
    sums = np.random.default_rng(size).integers(-8, 9, size).astype(np.int32)
    return SeedLedger(Kron(size, 0x0123456789ABCDEF), exponent, 3, base.manifest.digest, sums)


def reached(base: Base, *patterns: str) -> Sequence[int]:
    return trainable_ordinals(base.manifest, TensorSelection("kron", patterns), base.matrices)


def around(position: Any, batch: Any) -> list[float]:
    """Return the losses of pair, queries and evaluation, with a move between."""
    losses = list[float]()
    for number, moves in enumerate(ROUNDS):
        losses += position.losses(batch, moves)
        position.move(5 * number % 16, 33 - 9 * number)
    return losses


def torch_losses(base: Base, ledger: SeedLedger, ordinals: Sequence[int], rows: Sequence[Example]) -> list[float]:
    with with_injected_paths(base, ledger, ordinals) as position, torch.inference_mode():
        return around(position, collate(rows, base))


def device_losses(
    runtime: OnnxRuntime, base: Base, ledger: SeedLedger, ordinals: Sequence[int], rows: Sequence[Example]
) -> list[float]:
    with runtime.at(ledger, ordinals) as position:
        return around(position, pad(rows, base.pad_id))


def test_the_losses_of_every_family_are_those_of_torch(
    exported: tuple[Base, Path], examples: Callable[[int], list[Example]]
) -> None:
    base, path = exported
    runtime, ledger, rows = load(read_bundle(path), threads=1), ledger_of(base), examples(3)
    expected = torch_losses(base, ledger, reached(base), rows)
    assert np.ptp(expected[:2]) > 1e-3  # the two sides differ by far more than what is compared
    got = device_losses(runtime, base, ledger, reached(base), rows)
    np.testing.assert_allclose(got, expected, rtol=3e-6)
    still = SeedLedger(ledger.bank, 10, 0, base.manifest.digest, np.zeros(16, np.int32))
    [at_base] = torch_losses(base, still, reached(base), rows)[-1:]
    assert abs(at_base - expected[-1]) > 1e-3


def test_layers_that_a_recipe_leaves_out_stay_where_they_are(
    llama: tuple[Base, Path], examples: Callable[[int], list[Example]]
) -> None:
    base, path = llama
    runtime, ledger, rows = load(read_bundle(path), threads=1), ledger_of(base), examples(2)
    for ordinals in (reached(base, "*q_proj*", "*down_proj*"), reached(base), reached(base, "*.1.mlp.up_proj*")):
        got = device_losses(runtime, base, ledger, ordinals, rows)
        np.testing.assert_allclose(got, torch_losses(base, ledger, ordinals, rows), rtol=3e-6)


def test_banks_of_any_size_run_in_one_session(
    llama: tuple[Base, Path], examples: Callable[[int], list[Example]]
) -> None:
    base, path = llama
    runtime, rows = load(read_bundle(path), threads=1), examples(2)
    for size in (16, 256, 64):
        ledger = ledger_of(base, size=size)
        got = device_losses(runtime, base, ledger, reached(base), rows)
        np.testing.assert_allclose(got, torch_losses(base, ledger, reached(base), rows), rtol=3e-6)


def test_a_loss_does_not_depend_on_the_others_of_its_step(
    llama: tuple[Base, Path], examples: Callable[[int], list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path = llama
    runtime, ledger, rows = load(read_bundle(path), threads=1), ledger_of(base), examples(3)
    together = device_losses(runtime, base, ledger, reached(base), rows)
    monkeypatch.setattr(onnx_runtime, "MAX_TOKENS", 1)
    monkeypatch.setattr(onnx_runtime, "MAX_LOGITS", 400)
    np.testing.assert_allclose(device_losses(runtime, base, ledger, reached(base), rows), together, rtol=1e-6)


def test_small_steps_change_a_loss_by_little(
    llama: tuple[Base, Path], examples: Callable[[int], list[Example]]
) -> None:
    """A runtime that rounds activations fails here: its two losses differ by the rounding (up to .07)."""
    base, path = llama
    ledger = ledger_of(base, exponent=20)
    with load(read_bundle(path), threads=1).at(ledger, reached(base)) as position:
        for seed in range(16):
            minus, plus = position.losses(pad(examples(2), base.pad_id), [(seed, -1), (seed, 1)])
            assert abs(plus - minus) < 1e-4


def test_rows_in_which_nothing_counts_have_no_loss(
    llama: tuple[Base, Path], examples: Callable[[int], list[Example]]
) -> None:
    base, path = llama
    rows = examples(1)
    np.asarray(rows[0].labels)[:] = -100
    with load(read_bundle(path), threads=1).at(ledger_of(base), reached(base)) as position:
        assert position.losses(pad(rows, base.pad_id), PAIR) == [0.0, 0.0]


def test_a_text_goes_on_as_with_torch(exported: tuple[Base, Path]) -> None:
    base, path = exported
    # Far from the base, where texts are others.
    runtime, ledger, ordinals = load(read_bundle(path), threads=1), ledger_of(base, exponent=6), reached(base)
    prompt = [5, 60, 200, 7, 33]
    plain = list(runtime.continue_tokens(None, (), prompt, new_tokens=24))
    assert plain == greedy(base, prompt, 24)
    with with_rebuilt_weights(base, ledger, ordinals):
        expected = greedy(base, prompt, 24)
    tuned = list(runtime.continue_tokens(ledger, ordinals, prompt, new_tokens=24))
    assert tuned == expected
    assert tuned != plain


def greedy(base: Base, prompt: Sequence[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] == 2 else tokens


def test_a_text_ends_where_the_positions_end(llama: tuple[Base, Path]) -> None:
    base, path = llama
    runtime = load(read_bundle(path), threads=1)
    short = list(runtime.continue_tokens(None, (), [5, 60], new_tokens=10_000))
    assert len(short) <= 63
    # Of a prompt that is too long the end counts, as in `model.evaluate.continue_text`.
    prompt = list(range(3, 103))
    assert list(runtime.continue_tokens(None, (), prompt, new_tokens=8)) == greedy(base, prompt[-56:], 8)
    assert list(runtime.continue_tokens(None, (), [], new_tokens=4)) == greedy(base, [1], 4)


def test_what_a_device_cannot_move_is_refused_by_name(llama: tuple[Base, Path]) -> None:
    base, path = llama
    runtime, ledger = load(read_bundle(path), threads=1), ledger_of(base)
    dense = SeedLedger(Hadamard(16, 1), 10, 0, base.manifest.digest, ledger.accumulators)
    with (
        pytest.raises(ConfigError, match="expected 'kron' on devices; got 'hadamard'"),
        runtime.at(dense, reached(base)),
    ):
        pass
    table = base.manifest.ordinals["model.embed_tokens.weight"]
    with pytest.raises(ConfigError, match=r"got model\.embed_tokens\.weight"), runtime.at(ledger, (table,)):
        pass


def test_memory_that_runs_out_costs_a_round_and_names_the_knob(
    llama: tuple[Base, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def run_with_ort_values(self, names: Sequence[str], inputs: Any) -> None:
            raise states.RuntimeException("std::bad_alloc")

    with pytest.raises(ClientError, match=r"memory ran out; lower client\.batch"):
        onnx_runtime.run(Full(), ["hidden"], {})

    def refuse(*args: Any, **more: Any) -> Any:
        raise states.Fail("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ConfigError, match="expected memory for the weights; got too little; take a smaller base"):
        load(read_bundle(llama[1]), threads=1)


def test_memory_is_given_back_after_a_task(llama: tuple[Base, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, path = llama
    given: list[str] = []
    monkeypatch.setattr(onnx_runtime, "give_back_memory", lambda: given.append("back"))
    runtime = load(read_bundle(path), threads=1)
    with runtime.at(ledger_of(base), reached(base)):
        assert not given
    with pytest.raises(ClientError), runtime.at(ledger_of(base), reached(base)):
        raise ClientError("a step failed")
    assert given == ["back"] * 2


def test_an_error_of_another_kind_is_not_swallowed() -> None:
    class Broken:
        def run_with_ort_values(self, names: Sequence[str], inputs: Any) -> None:
            raise states.InvalidArgument("wrong shape")

    with pytest.raises(states.InvalidArgument, match="wrong shape"):
        onnx_runtime.run(Broken(), ["hidden"], {})


def test_a_vocabulary_that_is_not_the_graphs_is_refused_before_data_are_held_against_it(
    llama: tuple[Base, Path], tmp_path: Path
) -> None:
    path = tmp_path / "forged"
    shutil.copytree(llama[1], path)
    facts = json.loads(json.dumps(dict(manifest.open_folder(path).facts)))
    facts["bundle"]["vocabulary"] += 1
    (path / manifest.NAME).unlink()
    manifest.write(path, facts)
    with pytest.raises(StoreError, match=r"head\.onnx: expected scores of \d+ tokens, as fedtune.json says; got \d+"):
        load(read_bundle(path), threads=1)


@pytest.mark.parametrize("name", ["graph.onnx", "head.onnx"])
@pytest.mark.parametrize("damage", [b"", b"not a graph", b"\x3a\x00"])
def test_a_graph_that_is_none_is_refused_in_one_line(
    llama: tuple[Base, Path], tmp_path: Path, name: str, damage: bytes
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(llama[1], path)
    (path / name).write_bytes(damage)
    facts = dict(manifest.open_folder(llama[1]).facts)
    (path / "fedtune.json").unlink()
    manifest.write(path, facts)
    with pytest.raises((StoreError, ConfigError), match="expected") as caught:
        load(read_bundle(path), threads=1)
    assert "\n" not in str(caught.value)


def test_threads_that_wait_sleep_and_no_arena_keeps_memory(
    llama: tuple[Base, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = onnxruntime.InferenceSession

    def session(data: bytes, options: Any, **more: Any) -> Any:
        spinning = options.get_session_config_entry("session.intra_op.allow_spinning")
        seen.append(
            (options.intra_op_num_threads, options.inter_op_num_threads, options.enable_cpu_mem_arena, spinning)
        )
        return original(data, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    load(read_bundle(llama[1]), threads=3)
    assert seen == [(3, 1, False, "0")] * 2
