"""Virtual tokens: read as a text is, in training, in scores and in generation, and drawn alike on every machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedtune.data.encode import Example
from fedtune.errors import ConfigError, ShapeError
from fedtune.lora.virtual_tokens import MODULE, encode, full_names, own_names
from fedtune.messages import Training
from fedtune.model import virtual_tokens
from fedtune.model.base import Base, base_from_object, digest, load, load_tokenizer
from fedtune.model.base_sizes import sized_base
from fedtune.model.batches import collate
from fedtune.model.evaluate import continue_text
from fedtune.model.lora import with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.token_layers import token_layers
from fedtune.model.train import train
from fedtune.model.virtual_tokens import VirtualTokens, misread, with_virtual_tokens
from tests.model import families

KINDS = (
    {"kind": "prefix"},
    {"kind": "p-tuning"},
    {"kind": "p-tuning", "send": "encoder", "hidden": 24},
    {"kind": "prompt"},
)


def load_kind(folder: Path, *, dtype: str = "float32", seed: int = 0, sizes: bool = False, **adapter: Any) -> Base:
    settings = ModelSettings(base=str(folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    tokenizer = load_tokenizer(settings, Path())
    usual: Any = {} if adapter.get("kind") == "lora" else {"tokens": 5}
    wanted = AdapterSettings(**{**usual, **adapter})
    return (sized_base if sizes else load)(settings, wanted, tokenizer=tokenizer, root=Path(), seed=seed)


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, checkpoints: dict[str, Path], kind: Any) -> Base:
    return load_kind(checkpoints[request.param], **kind)


def some_ids(count: int, length: int) -> torch.Tensor:
    return torch.arange(3, 3 + count * length).reshape(count, length)


def test_the_counts_are_those_of_the_papers(base: Base, kind: Any) -> None:
    n, d, h = 5, 32, 24
    layers, heads, width = virtual_tokens.cache_shape(base.model)
    expected = {
        "prefix": n * 2 * layers * heads * width,
        "prompt": n * d,
        "p-tuning": n * d + ((d + 1) * h + (h + 1) * h + (h + 1) * d if "send" in kind else 0),
    }
    assert sum(array.size for array in base.saved_tensors().values()) == expected[kind["kind"]]
    assert base.saved == sorted(base.saved_tensors())
    assert base.modules == {}
    assert base.positions == 128 - n


def test_nothing_of_the_base_changes_and_outside_the_block_nothing_is_read(base: Base) -> None:
    ids, before = some_ids(1, 6), digest(base.model)
    names = [name for name, _ in base.model.named_parameters()]
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits
        with with_adapters(base, saved=base.saved_tensors()) as model:
            within = model(input_ids=ids).logits
            assert any(name.startswith(MODULE) for name, _ in model.named_parameters())
        again = base.model(input_ids=ids).logits
    assert within.shape == plain.shape
    assert (within - plain).abs().max() > 1e-3
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert digest(base.model) == before == base.digest
    assert [name for name, _ in base.model.named_parameters()] == names
    assert "forward" not in vars(base.model.base_model)


def test_an_error_in_the_block_leaves_the_base_as_it_was(base: Base) -> None:
    with pytest.raises(KeyError), with_adapters(base, saved=base.saved_tensors()):
        raise KeyError
    assert not hasattr(base.model, MODULE)
    assert "forward" not in vars(base.model.base_model)


def test_padding_changes_no_text_beside_it(base: Base) -> None:
    ids = some_ids(2, 6)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, 4:], mask[1, 4:] = 0, 0
    left, left_mask = torch.roll(padded, 2, 1), torch.roll(mask, 2, 1)
    with torch.no_grad(), with_adapters(base, saved=base.saved_tensors()) as model:
        alone = model(input_ids=ids[1:, :4]).logits[0]
        right = model(input_ids=padded, attention_mask=mask).logits[1, :4]
        places = (left_mask.cumsum(1) - 1).clamp(min=0)
        at_the_left = model(input_ids=left, attention_mask=left_mask, position_ids=places).logits[1, 2:]
    torch.testing.assert_close(right, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(at_the_left, alone, rtol=0, atol=1e-5)


def test_generation_is_the_same_with_a_cache_without_one_and_token_by_token(base: Base) -> None:
    ids = some_ids(1, 4)
    options: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    base.model.generation_config.eos_token_id = None
    with torch.no_grad(), with_adapters(base, saved=base.saved_tensors()) as model:
        stepwise = ids
        for _ in range(6):
            stepwise = torch.cat([stepwise, model(input_ids=stepwise).logits[:, -1:].argmax(-1)], 1)
        cached = model.generate(input_ids=ids, **options)
        whole = model.generate(input_ids=ids, use_cache=False, **options)
        text = continue_text(model, base, ids[0].tolist(), new_tokens=6)
    assert cached.tolist() == stepwise.tolist() == whole.tolist()
    assert text == base.tokenizer.decode(stepwise[0, 4:], skip_special_tokens=True)


def test_the_fused_loss_is_that_of_the_logits(base: Base, examples: Callable[[int], list[Example]]) -> None:
    batch = collate(examples(3), base)
    with torch.no_grad(), with_adapters(base, saved=base.saved_tensors()) as model:
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
        direct = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        assert batch.fused
        torch.testing.assert_close(summed_loss(model, batch, task="causal"), direct)


def learn(base: Base, rows: Sequence[Example], **training: Any) -> tuple[float, float, dict[str, np.ndarray[Any, Any]]]:
    settings = Training(**{"batch": 4, "learning_rate": 0.05, "steps": 50, "autocast": "off", **training})
    with with_adapters(base, local={}, saved=base.saved_tensors()) as model:
        measured = train(base, rows, settings, key=1, client="a", rows=rows).measured
        parameters = dict(model.named_parameters())
        trained = {name: parameters[name].detach().float().numpy().copy() for name in base.saved}
    assert measured.loss_before is not None
    assert measured.loss_after is not None
    return measured.loss_before, measured.loss_after, trained


def test_fifty_steps_lower_the_loss_and_move_every_tensor(base: Base, examples: Callable[[int], list[Example]]) -> None:
    before, after, trained = learn(base, examples(8))
    assert after < before
    for name, start in base.saved_tensors().items():
        assert (trained[name] != start).any(), name


@pytest.mark.parametrize("kind", KINDS[1:], indirect=True, ids=lambda kind: "-".join(map(str, kind.values())))
def test_layers_that_are_computed_again_give_the_same_prompt(
    base: Base, examples: Callable[[int], list[Example]]
) -> None:
    plain, again = (learn(base, examples(6), steps=2, gradient_checkpointing=flag)[2] for flag in (False, True))
    for name, array in plain.items():
        np.testing.assert_allclose(again[name], array, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_virtual_tokens_stay_float32_over_a_base_of_another_format(
    dtype: str, checkpoints: dict[str, Path], kind: Any, examples: Callable[[int], list[Example]]
) -> None:
    base = load_kind(checkpoints["llama"], dtype=dtype, **kind)
    before, after, trained = learn(base, examples(8), steps=10)
    assert after < before
    assert all(array.dtype == np.float32 for array in trained.values())
    # Finer than the base's own format: otherwise small steps would be rounded away.
    assert any((array != torch.tensor(array).bfloat16().float().numpy()).any() for array in trained.values())


def test_under_autocast_a_prompt_learns_too(base: Base, examples: Callable[[int], list[Example]]) -> None:
    before, after, _ = learn(base, examples(6), steps=5, autocast="bf16")
    assert after < before


def test_the_first_values_follow_from_the_seed_alone(checkpoints: dict[str, Path], kind: Any) -> None:
    one, same, other = (load_kind(checkpoints["llama"], seed=seed, **kind).saved_tensors() for seed in (3, 3, 4))
    for name, array in one.items():
        np.testing.assert_array_equal(array, same[name])
        assert (array != other[name]).any()
    torch.manual_seed(5)  # nor does torch's generator matter, or is it moved
    state = torch.get_rng_state()
    load_kind(checkpoints["llama"], seed=3, **kind)
    assert torch.equal(state, torch.get_rng_state())


def test_a_base_without_weights_has_the_same_names_and_shapes(checkpoints: dict[str, Path], kind: Any) -> None:
    sized, whole = (load_kind(checkpoints["gpt2"], sizes=sizes, **kind) for sizes in (True, False))
    shapes = [{name: array.shape for name, array in one.saved_tensors().items()} for one in (sized, whole)]
    assert shapes[0] == shapes[1]
    assert (sized.modules, sized.saved, sized.positions) == (whole.modules, whole.saved, whole.positions)


def test_a_prompt_starts_from_embeddings_of_the_vocabulary_or_of_a_text(checkpoints: dict[str, Path]) -> None:
    base = load_kind(checkpoints["llama"], kind="prompt", init_text="the fox")
    ids = base.tokenizer("the fox", add_special_tokens=False)["input_ids"]
    table = base.model.get_input_embeddings().weight.numpy()
    expected = table[[ids[place % len(ids)] for place in range(5)]]
    np.testing.assert_array_equal(base.saved_tensors()["virtual_tokens.embedding"], expected)
    drawn = load_kind(checkpoints["llama"], kind="prompt").saved_tensors()["virtual_tokens.embedding"]
    assert all((table == row).all(1).any() for row in drawn)
    with pytest.raises(ConfigError, match=r"adapter\.init_text: expected a text of at least one token"):
        load_kind(checkpoints["llama"], kind="prompt", init_text="")


def test_an_encoders_first_embeddings_do_not_depend_on_the_order_of_its_sums() -> None:
    drawn = virtual_tokens.draw_encoder(7, 4, 48, 64)
    given = encode(drawn, virtual_tokens.on_grid)
    backwards = {**drawn, "embedding": drawn["embedding"][:, ::-1]}
    backwards["encoder.0.weight"] = drawn["encoder.0.weight"][:, ::-1]
    for place in (2, 4):
        # Hidden units in another order, here and in the layer before.
        backwards[f"encoder.{place}.weight"] = backwards[f"encoder.{place}.weight"][:, ::-1]
        for name in ("weight", "bias"):
            before = f"encoder.{place - 2}.{name}"
            backwards[before] = backwards[before][::-1]
    np.testing.assert_array_equal(encode(backwards, virtual_tokens.on_grid), given)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("llama", "gpt2", "opt", "gemma2") else pytest.mark.slow)
        for name in families.CAUSAL
    ],
)
def test_tokens_given_as_virtual_ones_are_read_as_the_text_or_the_base_is_refused(family: str, kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **families.COMMON, **families.CAUSAL[family])
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    settings = AdapterSettings(kind=kind)  # type: ignore[arg-type]
    # Latent or single keys for all heads, and memories without keys.
    refused = {"falcon_mamba", "mamba", "rwkv", *(("falcon", "deepseek_v3") if kind == "prefix" else ())}
    if family in refused:
        with pytest.raises(ConfigError, match=r"adapter.kind: expected a base that reads virtual tokens"):
            virtual_tokens.check_reads(settings, model)
        return
    virtual_tokens.check_reads(settings, model)
    moved, apart = misread(model, kind)
    assert moved < 1e-5 * apart


def test_a_base_that_passes_by_its_body_is_refused(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual_tokens, "body_of", lambda model: model.lm_head)
    with pytest.raises(
        ConfigError, match=r"adapter\.kind: expected a base that reads virtual tokens of the kind 'prompt'"
    ):
        load_kind(checkpoints["llama"], kind="prompt")


def test_tensors_of_another_shape_are_refused(base: Base) -> None:
    wrong = {name: np.concatenate([array, array]) for name, array in base.saved_tensors().items()}
    with pytest.raises(ShapeError, match="virtual_tokens"), with_adapters(base, saved=wrong):
        pass
    more = {"virtual_tokens.more": np.zeros(3, np.float32)}
    with pytest.raises(ShapeError, match="no such module"), with_adapters(base, saved=more):
        pass


def test_a_loaded_base_that_python_gives_is_held_against_the_recipe(checkpoints: dict[str, Path]) -> None:
    base = load_kind(checkpoints["llama"], kind="prompt")
    settings = ModelSettings(base="x", device="cpu")
    given = base_from_object(settings, AdapterSettings(kind="prompt", tokens=5), base)
    assert given.model is base.model
    drawn = base_from_object(settings, AdapterSettings(kind="prompt", tokens=5), base, seed=9)
    assert (drawn.saved_tensors()["virtual_tokens.embedding"] != base.saved_tensors()["virtual_tokens.embedding"]).any()
    for other in (
        AdapterSettings(kind="prompt", tokens=6),
        AdapterSettings(kind="prefix", tokens=5),
        AdapterSettings(),
    ):
        with pytest.raises(ConfigError, match="pass the model and its tokenizer instead"):
            base_from_object(settings, other, base)
    pair = base_from_object(settings, AdapterSettings(kind="prefix", tokens=3), (base.model, base.tokenizer))
    assert pair.virtual is not None
    assert pair.virtual.count == 3


def test_an_encoder_is_scored_by_what_is_exported(checkpoints: dict[str, Path]) -> None:
    base = load_kind(checkpoints["llama"], kind="p-tuning", send="encoder")
    tokens, ids = base.virtual, some_ids(1, 5)
    assert tokens is not None
    flat = full_names({"embedding": encode(own_names(tokens.initial))})
    with torch.no_grad():
        with with_virtual_tokens(base.model, tokens, tokens.initial, trainable=False):
            scored = base.model(input_ids=ids).logits
        with with_virtual_tokens(base.model, VirtualTokens("prompt", 5, flat), flat, trainable=False):
            torch.testing.assert_close(base.model(input_ids=ids).logits, scored, rtol=0, atol=0)


def test_tokens_that_leave_no_place_for_a_text_are_refused_before_they_are_drawn(
    checkpoints: dict[str, Path], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_kind(checkpoints["gpt2"], **kind, tokens=126).positions == 2
    monkeypatch.setattr(virtual_tokens, "generator", lambda key: pytest.fail("drawn"))
    for sizes in (False, True):
        with pytest.raises(ConfigError, match=r"adapter\.tokens: expected at most 126, of the base's 128 places"):
            load_kind(checkpoints["gpt2"], **kind, tokens=127, sizes=sizes)


def test_they_are_no_rows_of_tokens_and_no_matrices_of_the_base(base: Base) -> None:
    assert token_layers(base) == []
    assert base.matrices == set()
    assert base.manifest.entries == load_kind(Path(base.path), kind="lora", targets=["all-linear"]).manifest.entries


def test_what_an_encoder_first_gives_lies_on_the_grid_whose_sums_are_exact(checkpoints: dict[str, Path]) -> None:
    base = load_kind(checkpoints["llama"], kind="p-tuning")
    steps = base.saved_tensors()["virtual_tokens.embedding"].astype(np.float64) / virtual_tokens.GRID
    np.testing.assert_array_equal(steps, np.round(steps))
