"""Which modules of a model get an adapter, and which are trained in full: a recipe's names matched to the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError, Fault
from fedtune.model.classes import head_modules

STATE_SPACE = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
"""Types of models whose fused kernels read the weight of `out_proj` past an adapter, so that peft refuses one there."""


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer, None for any layer that LoRA cannot adapt."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    # GPT-2's layer holds its weight transposed, (in, out).
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return None


def find_targets(model: Any, targets: Sequence[str], *, leave_out: Sequence[str] = ()) -> Mapping[str, tuple[int, int]]:
    """Return (out, in) of the modules that a recipe's targets name, by full name.

    A target matches a full name or the last parts of one. `all-linear` takes every linear layer but the output head
    and modules_to_save.

    Raises:
        ConfigError: for each target that matches no linear layer, with the nearest one, or one tied to the embeddings.
    """
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: shape
        for name, module in model.named_modules()
        if (shape := linear_shape(module))
        and not any(name == m or name.startswith(f"{m}.") for m in leave_out)
        and not (model.config.model_type in STATE_SPACE and name.rpartition(".")[2] == "out_proj")
    }
    # By identity: the output layer has another name in every family.
    heads = {name for name, module in model.named_modules() if module is outputs}
    chosen: dict[str, tuple[int, int]] = {}
    faults = []
    for target in targets:
        if target == "all-linear":
            chosen |= {name: shape for name, shape in linear.items() if name not in heads}
            continue
        matches = {name: s for name, s in linear.items() if name == target or name.endswith(f".{target}")}
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in linear})
            nearest = get_close_matches(target, known, n=1)
            faults.append(
                Fault(
                    path="adapter.targets",
                    expected=f"names of linear layers of this model ({', '.join(known)})",
                    got=f"{target!r}, which matches nothing",
                    hint=f"did you mean {nearest[0]!r}?" if nearest else f'set targets = ["{known[0]}"]',
                )
            )
        for name in matches:
            if model.get_submodule(name).weight is model.get_input_embeddings().weight:
                expected = "layers with weights of their own, or a merged model would change its embeddings too"
                got = f"{target!r}, which is tied to the input embeddings"
                faults.append(Fault("adapter.targets", expected, got, "leave it out"))
        chosen |= matches
    if faults:
        raise ConfigError(faults)
    # Sorted: the order of the modules is that of the draws and of the bytes on the wire.
    return dict(sorted(chosen.items()))


def find_saved(model: Any, names: Sequence[str], new: Sequence[str], *, task: str) -> list[str]:
    """Return the full names of the modules trained in full: those of a recipe, and for classification the head.

    The head always travels with a classifier's adapter, as PEFT expects it, whether or not it came with the checkpoint.
    Of nested modules only the topmost is named.

    Raises:
        ConfigError: if a name matches no module, or a module shares its weights with another (tied embeddings).
    """
    modules = dict(model.named_modules())
    tied = {id(model.get_input_embeddings().weight)} if getattr(model.config, "tie_word_embeddings", False) else set()
    chosen = {*head_modules(model), *new_modules(model, new)} if task == "classification" else set()
    for wanted in names:
        matches = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not matches:
            known = sorted(
                {name.rpartition(".")[2] for name in modules if name and not name.rpartition(".")[2].isdigit()}
            )
            nearest = get_close_matches(wanted, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "leave it out"
            raise ConfigError(Fault("adapter.modules_to_save", "names of modules of this model", repr(wanted), hint))
        for name in matches:
            if tied & {id(parameter) for parameter in modules[name].parameters()}:
                raise ConfigError(
                    Fault(
                        "adapter.modules_to_save",
                        "modules with weights of their own",
                        f"{wanted!r}, which is tied to the input embeddings",
                        "leave it out, or use a base with untied embeddings",
                    )
                )
        chosen |= set(matches)
    return sorted(name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen))


def new_modules(model: Any, new: Sequence[str]) -> Sequence[str]:
    """Return the topmost modules of which a checkpoint holds no parameter, by the names of the parameters it lacks."""
    known = [name for name, _ in model.named_parameters() if name not in set(new)]
    tops = dict[str, None]()
    for name in new:
        parts = name.split(".")[:-1]
        prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
        top = next((each for each in prefixes if not any(old.startswith(f"{each}.") for old in known)), prefixes[-1])
        tops[top] = None
    return list(tops)
