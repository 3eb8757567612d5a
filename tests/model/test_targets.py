from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from fedtune.errors import ConfigError
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings, layer_of
from fedtune.model.targets import linear_shape
from tests.model.families import CAUSAL, build


def test_targets_are_found_by_their_last_part_with_out_and_in_sizes(loaded: Any) -> None:
    base = loaded(targets=["q_proj", "v_proj"])
    assert base.modules == {
        "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.0.self_attn.v_proj": (16, 32),
        "model.layers.1.self_attn.q_proj": (32, 32),
        "model.layers.1.self_attn.v_proj": (16, 32),
    }


@pytest.mark.parametrize(
    ("pattern", "ends"),
    [
        (
            "self_attn.[qv]_proj",
            ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"],
        ),
        ("layers.1.*.?_proj", [f"1.self_attn.{side}_proj" for side in "koqv"]),
        ("*.0.*up_proj", ["0.mlp.up_proj"]),
        ("model.layers.[1-3].mlp.down_proj", ["1.mlp.down_proj"]),
        ("up_*", ["0.mlp.up_proj", "1.mlp.up_proj"]),
    ],
)
def test_a_pattern_takes_the_modules_whose_name_or_last_parts_it_fits(
    loaded: Any, pattern: str, ends: list[str]
) -> None:
    assert list(loaded(targets=[pattern]).modules) == [f"model.layers.{end}" for end in ends]


def test_a_pattern_of_everything_leaves_a_tied_output_head_out(loaded: Any) -> None:
    modules = loaded("gpt2", targets=["*"]).modules
    assert modules == loaded("gpt2", targets=["all-linear"]).modules
    with pytest.raises(ConfigError, match="'lm_h\\*', which matches nothing but what is tied to the input embeddings"):
        loaded("gpt2", targets=["lm_h*"])


def test_layers_are_chosen_by_their_numbers(loaded: Any) -> None:
    assert list(loaded(layers="1").modules) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert loaded(layers="0-1").modules == loaded(layers="1, 0").modules == loaded().modules
    linear = loaded(targets=["all-linear"], layers="0")
    assert len(linear.modules) == 7
    assert linear.notes == ()  # layer 1 is left out on purpose


def test_layers_that_the_model_does_not_have_are_named(loaded: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.layers: expected layers of this model \(0 to 1\); got '1-5', of which 2"
    ):
        loaded(layers="1-5")
    with pytest.raises(ConfigError, match=r"'0\.mlp\.up_proj', which matches nothing in adapter\.layers = '1', though"):
        loaded(targets=["0.mlp.up_proj"], layers="1")


def test_the_layer_of_an_expert_is_its_block() -> None:
    assert layer_of("model.layers.7.mlp.experts.3.gate_proj") == 7
    assert layer_of("lm_head") is None


def test_all_linear_leaves_the_output_head_out(loaded: Any) -> None:
    modules = loaded(targets=["all-linear"]).modules
    assert len(modules) == 2 * 7
    assert "lm_head" not in modules


def test_a_gpt2_layer_is_given_as_out_by_in_although_its_weight_is_transposed(loaded: Any) -> None:
    assert loaded("gpt2", targets=["c_attn"]).modules["transformer.h.0.attn.c_attn"] == (96, 32)


def test_a_target_that_matches_nothing_names_the_nearest_one(loaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets.*'q_prjo', which matches nothing.*'q_proj'"):
        loaded(targets=["q_prjo", "v_proj"])
    with pytest.raises(ConfigError, match=r"'self_attn\.q_prj\*', which matches nothing; did you mean 'q_proj'\?"):
        loaded(targets=["self_attn.q_prj*"])


def test_every_target_that_matches_nothing_is_named(loaded: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(targets=["c_attn", "c_fc"])
    assert len(caught.value.faults) == 2


def test_tied_embeddings_cannot_be_trained_in_full(loaded: Any) -> None:
    with pytest.raises(ConfigError, match="tied to the input embeddings"):
        loaded("gpt2", targets=["c_attn"], saved=["lm_head"])


def test_a_module_to_save_that_does_not_exist_is_named(loaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save.*'lm_haed'.*'lm_head'"):
        loaded(saved=["lm_haed"])


def test_a_tied_output_head_is_no_target(loaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets: .*'lm_head'.*tied"):
        loaded("gpt2", targets=["lm_head", "c_attn"])
    assert "lm_head" in loaded("llama", targets=["lm_head"]).modules


def test_all_linear_leaves_out_what_is_too_small_for_the_rank_and_says_so(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = build("qwen2_moe", CAUSAL["qwen2_moe"], tmp_path, tokenizer_of(checkpoints), task="causal")
    small, large = (load_with_rank(folder, rank) for rank in (1, 20))
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate not in small.modules  # of one row: a rank of 1 is the whole of it
    assert "model.layers.0.self_attn.k_proj" in small.modules
    assert "model.layers.0.self_attn.k_proj" not in large.modules  # (16, 32)
    assert "model.layers.0.self_attn.q_proj" in large.modules
    assert any("leaves 2 layers out" in note and f"{gate} (1, 32)" in note for note in small.notes)
    assert any("leaves 6 layers out" in note for note in large.notes)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_the_share_of_experts_that_stays_as_it_is_is_said(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = load_with_rank(build(kind, CAUSAL[kind], tmp_path, tokenizer_of(checkpoints), task="causal"), 2)
    experts = sum(
        p.numel() for name, p in base.model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))
    )
    share = experts / sum(p.numel() for p in base.model.parameters())
    assert f"experts: {share:.0%} of the weights are stacked experts, which are not adapted" in base.notes[-1]


def test_a_layer_past_an_adapters_reach_is_left_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = load_with_rank(build("mamba", CAUSAL["mamba"], tmp_path, tokenizer_of(checkpoints), task="causal"), 1)
    assert "backbone.layers.0.mixer.in_proj" in base.modules
    assert not [name for name in base.modules if name.endswith(("out_proj", "dt_proj"))]
    assert "leaves 4 layers out" in base.notes[0]


def test_an_ordinary_base_needs_no_word(loaded: Any) -> None:
    assert loaded(targets=["all-linear"]).notes == ()


def test_a_rank_for_which_every_layer_is_too_small_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank: expected at most 32, .*got 33"):
        load_with_rank(checkpoints["llama"], 33)


def tokenizer_of(checkpoints: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints["llama"])


def load_with_rank(folder: Path, rank: int) -> Base:
    settings = ModelSettings(base=str(folder), device="cpu")
    adapter, tokenizer = AdapterSettings(rank=rank), load_tokenizer(settings, Path())
    return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0)


class Turned(nn.Linear):
    """A linear layer that multiplies in a way of its own, as Falcon's."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight.T


class Router(nn.Linear):
    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(rows)
        return scores, scores.argmax(-1)


class Grouped(nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows.reshape(-1, 7, self.in_features))


def test_only_what_gives_a_product_is_a_linear_layer() -> None:
    shapes = [linear_shape(kind(4, 3)) for kind in (nn.Linear, Turned, Router, Grouped)]
    assert shapes == [(3, 4), (3, 4), None, None]
    assert linear_shape(Router(4, 3, device="meta")) is None


def test_layers_that_peft_takes_for_stacked_experts_are_left_out_by_name(tmp_path: Path, loaded: Any) -> None:
    tokenizer = loaded().tokenizer
    settings = ModelSettings(base=str(tmp_path), device="cpu")
    build("deepseek_v3", CAUSAL["deepseek_v3"], tmp_path, tokenizer, task="causal")

    def base(target: str) -> Base:
        adapter = AdapterSettings(rank=2, targets=[target])
        return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0)

    whole = base("all-linear")
    assert "model.layers.0.self_attn.o_proj" in whole.modules
    assert not any("mlp" in name for name in whole.modules)
    assert "all-linear leaves 6 layers out" in whole.notes[0]
    with pytest.raises(ConfigError, match=r"adapter\.targets: .*'up_proj', which matches nothing"):
        base("up_proj")
