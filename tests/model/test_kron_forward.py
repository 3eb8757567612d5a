"""What the kron bank adds beside the layers against the same change written into their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import directions
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.errors import ClientError, ConfigError
from fedtune.model.base import Base, digest
from fedtune.model.batches import Batch, collate
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.probe import at_position
from fedtune.model.quantised_layers import codes_digest, quantised_layers
from fedtune.model.seed_rebuild import RebuiltPosition, with_rebuilt_weights, working_copy
from fedtune.model.settings import QUANTISED
from fedtune.probing.steps import Move
from tests.model.conftest import ledger_of

PAIR = [(6, -60), (6, 60)]
QUERIES = [(3, 0), (3, -60), (5, -60), (14, -60)]


def reached(base: Base, *, vectors: bool = False, embeddings: bool = False) -> Sequence[int]:
    return trainable_ordinals(
        base.manifest, TensorSelection("kron", vectors=vectors, embeddings=embeddings), base.matrices
    )


def materialised(
    base: Base, ledger: SeedLedger, ordinals: Sequence[int], batch: Batch, rounds: Sequence[Sequence[Move]]
) -> list[Sequence[float]]:
    """Losses at rewritten weights, with a move between the rounds."""
    with working_copy(base, ordinals) as trios, torch.inference_mode():
        return around(RebuiltPosition(base, ledger, trios), batch, rounds)


def beside(
    base: Base, ledger: SeedLedger, ordinals: Sequence[int], batch: Batch, rounds: Sequence[Sequence[Move]]
) -> list[Sequence[float]]:
    """Losses of the forward passes with the change added in them, with the same moves between."""
    with with_injected_paths(base, ledger, ordinals) as position, torch.inference_mode():
        return around(position, batch, rounds)


def around(position: Any, batch: Batch, rounds: Sequence[Sequence[Move]]) -> list[Sequence[float]]:
    found = []
    for number, moves in enumerate(rounds):
        found.append(position.losses(batch, moves))
        position.move(5 * number % 16, 33 - 9 * number)
    return found


def close(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    """All losses agree, and differ among themselves by far more than that."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    every = sorted(loss for losses in expected for loss in losses)
    assert max(every) - min(every) > 1e-2


def hooks(base: Base) -> int:
    return sum(len(module._forward_hooks) for module in base.model.modules())


def tied(base: Base) -> Base:
    base.model.lm_head.weight = base.model.model.embed_tokens.weight
    return base


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_losses_are_those_of_weights_with_the_change_in_them(
    kind: str, vectors: bool, embeddings: bool, loaded: Any, examples: Any
) -> None:
    name = kind.rpartition(" ")[2]
    base = loaded(name, targets=["all-linear"])
    base = tied(base) if kind == "tied llama" else base
    ordinals = reached(base, vectors=vectors, embeddings=embeddings)
    batch, ledger = collate(examples(5), base), ledger_of(base, "kron")
    assert not batch.attention_mask.all()  # rows of several lengths
    rounds = [PAIR, QUERIES, PAIR]
    close(beside(base, ledger, ordinals, batch, rounds), materialised(base, ledger, ordinals, batch, rounds))


def test_token_types_are_repeated_with_the_texts(loaded: Any, examples: Any) -> None:
    base = loaded("bert", targets=["query"], task="classification", labels=["a", "b", "c"])
    typed = [replace(row, token_types=np.arange(len(row.input_ids)) % 2) for row in examples(4, classes=3)]
    batch, ledger, ordinals = collate(typed, base), ledger_of(base, "kron"), reached(base, embeddings=True)
    assert batch.token_types is not None
    expected = materialised(base, ledger, ordinals, batch, [PAIR])
    close(beside(base, ledger, ordinals, batch, [PAIR]), expected)
    blind = materialised(base, ledger, ordinals, replace(batch, token_types=None), [PAIR])
    assert abs(blind[0][0] - expected[0][0]) > 1e-4


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("name", "target"), [("bert", "query"), ("gpt2", "c_attn")])
def test_a_classifier_s_losses_are_too_with_its_head_and_all_embeddings(
    name: str, target: str, everything: bool, loaded: Any, examples: Any
) -> None:
    base = loaded(name, targets=[target], task="classification", labels=["a", "b", "c"])
    ordinals = reached(base, vectors=everything, embeddings=everything)
    assert any(base.manifest.entries[ordinal].name in base.saved for ordinal in ordinals)
    batch, ledger = collate(examples(6, classes=3), base), ledger_of(base, "kron")
    rounds = [PAIR, QUERIES, PAIR]
    close(beside(base, ledger, ordinals, batch, rounds), materialised(base, ledger, ordinals, batch, rounds))


def test_a_batch_of_one_row_is_told_from_positions_that_are_looked_up_once(loaded: Any, examples: Any) -> None:
    base = loaded("gpt2", targets=["c_attn"])
    ordinals, batch, ledger = reached(base, embeddings=True), collate(examples(1), base), ledger_of(base, "kron")
    rounds = [PAIR, [(3, 8)], QUERIES]
    close(beside(base, ledger, ordinals, batch, rounds), materialised(base, ledger, ordinals, batch, rounds))


def test_a_vector_alone_is_moved_too(loaded: Any, examples: Any) -> None:
    base = loaded("gpt2", targets=["c_attn"])
    names = ("transformer.h.0.attn.c_attn.bias", "transformer.h.1.ln_1.weight")
    ordinals = [base.manifest.ordinals[name] for name in names]
    batch, ledger = collate(examples(4), base), ledger_of(base, "kron", exponent=8)
    rounds = [PAIR, QUERIES]
    close(beside(base, ledger, ordinals, batch, rounds), materialised(base, ledger, ordinals, batch, rounds))


def test_layers_in_bfloat16_give_out_what_they_gave_and_their_losses_are_near_those_of_float32(
    loaded: Any, examples: Any
) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        base = loaded(targets=["all-linear"], dtype=dtype)
        layer = base.model.model.layers[0].mlp.down_proj
        batch, ledger = collate(examples(4), base), ledger_of(base, "kron")
        with with_injected_paths(base, ledger, reached(base)) as position, torch.inference_mode():
            found.append(position.losses(batch, PAIR))
            assert layer(torch.zeros(8, 1, 48, dtype=layer.weight.dtype)).dtype == layer.weight.dtype
    assert found[1] == pytest.approx(found[0], abs=0.1)


def test_no_weight_is_written_and_no_hook_stays(loaded: Any, examples: Any) -> None:
    base = loaded("gpt2", targets=["all-linear"])
    own, parameters = digest(base.model), dict(base.model.named_parameters())
    places = {name: (p.data_ptr(), p._version) for name, p in parameters.items()}
    ordinals, batch = reached(base, vectors=True, embeddings=True), collate(examples(2), base)
    with with_injected_paths(base, ledger_of(base, "kron"), ordinals) as position, torch.inference_mode():
        assert hooks(base) > 0
        for number in range(50):
            position.losses(batch, [(number % 16, -60), (number % 16, 60)])
            position.move(number % 16, number - 25)
    assert hooks(base) == 0
    assert digest(base.model) == own
    assert {name: (p.data_ptr(), p._version) for name, p in base.model.named_parameters()} == places
    assert all(base.model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not any(parameter.is_inference() for parameter in parameters.values())


def test_hooks_are_gone_after_an_error_too(loaded: Any) -> None:
    base = loaded()
    own = digest(base.model)
    with pytest.raises(ZeroDivisionError), with_injected_paths(base, ledger_of(base, "kron"), reached(base)):
        raise ZeroDivisionError
    assert hooks(base) == 0
    assert digest(base.model) == own


def test_a_forward_pass_that_breaks_off_leaves_every_vector_in_its_place(loaded: Any, examples: Any) -> None:
    base = loaded("gpt2", targets=["c_attn"])
    own, batch = digest(base.model), collate(examples(2), base)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    base.model.transformer.h[1].ln_1.forward = broken
    with (
        pytest.raises(RuntimeError, match="broken"),
        with_injected_paths(base, ledger_of(base, "kron"), reached(base, vectors=True)) as position,
        torch.inference_mode(),
    ):
        position.losses(batch, PAIR)
    assert hooks(base) == 0
    assert digest(base.model) == own


class Odd(nn.Module):
    """Multiplies by a matrix, and is no linear layer that anybody knows."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_a_matrix_of_another_kind_of_layer_is_refused_by_name_and_leaves_no_hook(loaded: Any) -> None:
    base = loaded(targets=["all-linear"])
    layer = base.model.model.layers[1].mlp
    layer.down_proj = Odd(layer.down_proj.weight)
    message = r"method\.bank: .*model\.layers\.1\.mlp\.down_proj\.weight, of an Odd.*use \"hadamard\""
    with pytest.raises(ConfigError, match=message), with_injected_paths(base, ledger_of(base, "kron"), reached(base)):
        pass
    assert hooks(base) == 0


class Int8Linear(nn.Linear):
    """Holds whole numbers of eight bits and one scale, and makes weights of them only to multiply."""

    def __init__(self, whole: torch.Tensor, scale: float) -> None:
        super().__init__(whole.shape[1], whole.shape[0], bias=False)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.float() * self.scale)


def test_layers_that_hold_whole_numbers_of_eight_bits_need_no_other_weights(loaded: Any, examples: Any) -> None:
    base = loaded(targets=["all-linear"])
    scale = 2.0**-8
    layers = {name: base.model.get_submodule(name) for name in base.modules}
    for layer in layers.values():
        layer.weight.copy_((layer.weight / scale).round().clamp(-127, 127) * scale)
    ordinals, batch, ledger = reached(base), collate(examples(5), base), ledger_of(base, "kron")
    rounds = [PAIR, QUERIES, PAIR]
    expected = materialised(base, ledger, ordinals, batch, rounds)
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(base.model.get_submodule(parent), last, Int8Linear((layer.weight / scale).to(torch.int8), scale))
    assert {base.model.get_submodule(name).weight.dtype for name in layers} == {torch.int8}
    close(beside(base, ledger, ordinals, batch, rounds), expected)


def test_a_layer_that_sees_other_rows_than_the_batch_s_is_told_what_to_do(loaded: Any, examples: Any) -> None:
    base = loaded()
    batch = collate(examples(3), base)
    layer = base.model.model.layers[0].self_attn.q_proj

    with with_injected_paths(base, ledger_of(base, "kron"), reached(base)) as position, torch.inference_mode():
        position.losses(batch, PAIR)
        with pytest.raises(
            ClientError, match=r"q_proj\.weight: expected a layer that sees the 6 rows of the batch; got 3;"
        ):
            layer(torch.zeros(3, 1, 32))


def test_the_path_beside_a_layer_is_u_transposed_m_v_by_hand(loaded: Any) -> None:
    """One layer alone, its input the identity: what comes out in addition is -u (M + E e_ij) between the signs."""
    base = loaded()
    ledger = ledger_of(base, "kron")
    (ordinal, *_) = reached(base)
    entry = base.manifest.entries[ordinal]
    layer = base.model.get_submodule(entry.name.removesuffix(".weight"))
    u, v = ledger.bank.factors(ordinal, entry.shape)  # type: ignore[attr-defined]
    matrix = ledger.accumulators.reshape(4, 4).astype(np.float64)
    x = torch.eye(entry.shape[1]).repeat(2, 1, 1)  # both sides of a batch of one row
    with with_injected_paths(base, ledger, [ordinal]) as position, torch.inference_mode():
        position.moves, position.num_rows = [(6, -60), (6, 60)], 2
        sides = layer(x)
    for side, amount in zip(sides, (-60, 60), strict=True):
        moved = matrix.copy()
        moved[1, 2] += amount  # 6 = 1 * 4 + 2
        expected = layer.weight.double().numpy() - 2.0**-10 * (u.T @ moved @ v)
        np.testing.assert_allclose(side.T.numpy(), expected, atol=1e-5)


class Doubled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_an_embedding_that_does_more_than_look_up_is_refused(loaded: Any) -> None:
    base = loaded(targets=["all-linear"])
    own = base.model.get_input_embeddings()
    scaled = Doubled(own.num_embeddings, own.embedding_dim, _weight=own.weight)
    scaled.weight = own.weight
    base.model.set_input_embeddings(scaled)
    ledger, ordinals = ledger_of(base, "kron"), reached(base, embeddings=True)
    with (
        pytest.raises(ConfigError, match=r"embed_tokens\.weight, of a Doubled"),
        with_injected_paths(base, ledger, ordinals),
    ):
        pass
    assert hooks(base) == 0


def with_values_of(quantised: Base, plain: Base) -> Base:
    """Return a plain base whose weights are the values of a quantised one, listed as that one's are."""
    for name, layer in quantised_layers(quantised.model).items():
        plain.model.get_submodule(name).weight.data.copy_(layer.weight)
    vars(plain)["manifest"] = quantised.manifest
    return plain


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_over_codes_are_those_of_their_values_with_the_change_in_them(
    name: str, kind: str, loaded: Any, examples: Any
) -> None:
    """Together with embeddings and vectors, which are moved as without quantisation."""
    whole, base = loaded(name, targets=["all-linear"]), loaded(name, targets=["all-linear"], dtype=kind)
    # The same ledger fits both: digests and ordinals are those of the unquantised base.
    ledger, ordinals = ledger_of(whole, "kron"), reached(whole, vectors=True, embeddings=True)
    assert base.manifest == whole.manifest
    batch, codes = collate(examples(5), base), codes_digest(base.model)
    values = with_values_of(base, whole)
    rounds = [PAIR, QUERIES, PAIR]
    close(beside(base, ledger, ordinals, batch, rounds), materialised(values, ledger, ordinals, batch, rounds))
    assert (hooks(base), codes_digest(base.model)) == (0, codes)


@pytest.mark.parametrize(("groups", "banks"), [("tensor", 1), (1, 3), ("tensor", 2)])
def test_numbers_of_each_matrix_and_of_several_banks_are_measured_beside_the_layers_too(
    groups: Any, banks: int, loaded: Any, examples: Any
) -> None:
    whole, base = loaded(targets=["all-linear"]), loaded(targets=["all-linear"], dtype="int8")
    ordinals = reached(whole, vectors=True, embeddings=True)
    bank = directions("kron", 16, range(1, banks + 1), groups, ordinals)
    sums = np.random.default_rng(5).integers(-8, 9, bank.size).astype(np.int32)
    ledger, batch, rounds = SeedLedger(bank, 10, 3, whole.manifest.digest, sums), collate(examples(5), base), [PAIR]
    # By the way that clients take, which has no weights to rewrite where there are codes.
    with at_position(base, ledger, ordinals) as position, torch.inference_mode():
        losses = around(position, batch, rounds)
    close(losses, materialised(with_values_of(base, whole), ledger, ordinals, batch, rounds))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_rebuilt_from_seeds_over_codes_has_the_changes_beside_them(name: str, loaded: Any) -> None:
    whole, base = loaded(name, targets=["all-linear"]), loaded(name, targets=["all-linear"], dtype="nf4")
    ledger, ordinals = ledger_of(whole, "kron"), reached(whole, vectors=True, embeddings=True)
    values, ids = with_values_of(base, whole), torch.arange(3, 19)[None]
    with torch.inference_mode():
        before = base.model(input_ids=ids).logits
        with with_rebuilt_weights(values, ledger, ordinals):
            expected = values.model(input_ids=ids).logits
        with with_rebuilt_weights(base, ledger, ordinals):
            torch.testing.assert_close(base.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(base.model(input_ids=ids).logits, before)
    assert float((expected - before).abs().max()) > 0.1


@pytest.mark.parametrize("bank", ["hadamard", "gaussian"])
def test_codes_are_not_rewritten_by_other_banks(bank: str, loaded: Any) -> None:
    base = loaded(dtype="nf4")
    ledger, ordinals = ledger_of(base, bank), reached(base)
    expected = r"method\.bank: expected 'kron' over a quantised base, .*; got one that rewrites model\.layers.*weight"
    with pytest.raises(ConfigError, match=expected), with_rebuilt_weights(base, ledger, ordinals):
        pass
    with pytest.raises(ConfigError, match=expected), at_position(base, ledger, ordinals):
        pass
