"""Which modules of a model get an adapter, and which are trained in full: a recipe's names matched to the model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError, Fault
from fedtune.model.classes import head_modules
from fedtune.model.quantised_linear import QuantisedLinear
from fedtune.model.settings import in_layers, is_pattern, layer_numbers, layer_of, names_module

READ_PAST: Mapping[str, Collection[str]] = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj", "dt_proj")),
    "jamba": ("dt_proj",),
}
"""By type of model, layers whose weight its scan reads past an adapter: peft refuses one there, or it has no effect."""


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer, None for any layer that LoRA cannot adapt."""
    if isinstance(module, nn.Linear) and gives_product(module):
        return module.out_features, module.in_features
    # GPT-2's layer holds its weight transposed, (in, out).
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    if isinstance(module, QuantisedLinear):
        return module.out_features, module.in_features
    return None


def gives_product(module: nn.Linear) -> bool:
    """Return whether a linear layer gives what its name says: some mixtures' routers give scores and choices."""
    if type(module).forward is nn.Linear.forward:
        return True
    try:
        with torch.no_grad():
            product = module(module.weight.new_zeros(1, module.in_features))
    except (RuntimeError, TypeError, ValueError, LookupError):  # it reads something else than rows, too
        return False
    return isinstance(product, torch.Tensor) and tuple(product.shape) == (1, module.out_features)


def shapes(model: Any) -> Sequence[tuple[str, tuple[int, int]]]:
    """Return full name and (out, in) of every linear layer."""
    return [(name, shape) for name, module in model.named_modules() if (shape := linear_shape(module))]


def is_reachable(model: Any, leaf: str) -> bool:
    """Return whether peft adapts the layers of a model whose names end so, and the model heeds it.

    In some mixtures peft takes such a name, of a shared expert or a dense layer, for the former one of stacked experts,
    and adapts these instead.
    """
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one of two names that it wants together
        return False
    return leaf in set(config.target_modules or ()) and leaf not in READ_PAST.get(model.config.model_type, ())


def find_targets(
    model: Any, targets: Sequence[str], *, leave_out: Sequence[str] = (), rank: int = 1, layers: str | None = None
) -> Mapping[str, tuple[int, int]]:
    """Return (out, in) of the modules that a recipe's targets name, by full name.

    A target matches a full name or the last parts of one. `all-linear` takes every linear layer but the output head,
    modules_to_save, and those too small for the rank, such as a gate of one row. Of all of them only those in `layers`.

    Raises:
        ConfigError: for each target that matches no linear layer, with the nearest one, or one tied to the embeddings;
            for layers that the model does not have.
    """
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    reachable = {leaf: is_reachable(model, leaf) for leaf in {name.rpartition(".")[2] for name, _ in shapes(model)}}
    everywhere = {
        name: shape
        for name, shape in shapes(model)
        if reachable[name.rpartition(".")[2]] and not any(name == m or name.startswith(f"{m}.") for m in leave_out)
    }
    linear = {name: shape for name, shape in everywhere.items() if in_layers(name, layers)}
    if everywhere and (fault := layers_fault(everywhere, layers)):
        raise ConfigError(fault)
    # By identity: the output layer has another name in every family.
    heads = {name for name, module in model.named_modules() if module is outputs}
    chosen: dict[str, tuple[int, int]] = {}
    faults = []
    for target in targets:
        if target == "all-linear":
            chosen |= {
                name: shape for name, shape in linear.items() if name not in heads and min(shape) >= max(2, rank)
            }
            continue
        matches = {name: shape for name, shape in linear.items() if names_module(target, name)}
        tied = {name for name in matches if model.get_submodule(name).weight is model.get_input_embeddings().weight}
        if is_pattern(target):  # which names a tied layer by chance; it leaves it out as all-linear does
            matches, tied = {name: shape for name, shape in matches.items() if name not in tied}, set()
        if not matches:
            faults.append(no_match(target, linear, everywhere, layers))
        for _ in tied:
            expected = "layers with weights of their own, or a merged model would change its embeddings too"
            got = f"{target!r}, which is tied to the input embeddings"
            faults.append(Fault("adapter.targets", expected, got, "leave it out"))
        chosen |= matches
    if not (linear or faults):
        faults.append(Fault("adapter.targets", "linear layers of its own", f"none in a {model.config.model_type}"))
    elif not (chosen or faults):
        widest = max((min(shape) for name, shape in linear.items() if name not in heads), default=0)
        faults.append(Fault("adapter.rank", f"at most {widest}, the smaller side of the largest layer", str(rank)))
    if faults:
        raise ConfigError(faults)
    # Sorted: the order of the modules is that of the draws and of the bytes on the wire.
    return dict(sorted(chosen.items()))


def layers_fault(linear: Collection[str], layers: str | None) -> Fault | None:
    """Return the fault of layers that no module of a model lies in; None if each has one."""
    present = {number for name in linear if (number := layer_of(name)) is not None}
    missing = sorted((layer_numbers(layers or "") or set()) - present)
    if layers is None or not missing:
        return None
    expected = (
        f"layers of this model ({min(present)} to {max(present)})" if present else "none: its layers have no numbers"
    )
    return Fault(
        "adapter.layers", expected, f"{layers!r}, of which {missing[0]} is none", "leave it out for all layers"
    )


def no_match(target: str, linear: Collection[str], everywhere: Collection[str], layers: str | None) -> Fault:
    """Return the fault of a target that names no linear layer, with what it may have meant."""
    known = sorted({name.rpartition(".")[2] for name in linear})
    nearest = get_close_matches(target.rpartition(".")[2], known, n=1)
    got = f"{target!r}, which matches nothing"
    if elsewhere := [name for name in everywhere if name not in linear and names_module(target, name)]:
        got += f" in adapter.layers = {layers!r}, though {elsewhere[0]} elsewhere"
    elif any(names_module(target, name) for name in linear):
        got += " but what is tied to the input embeddings"
    return Fault(
        path="adapter.targets",
        expected=f"names of linear layers of this model, or patterns of them ({', '.join(known)})",
        got=got,
        hint=f"did you mean {nearest[0]!r}?" if nearest else f'set targets = ["{known[0]}"]' if known else "",
    )


def frozen_notes(
    model: Any, modules: Collection[str], *, leave_out: Sequence[str], layers: str | None = None
) -> Sequence[str]:
    """Return what a user should know of the weights that stay as they are, though `all-linear` seems to name them.

    Args:
        model: of transformers.
        modules: names of the adapted layers.
        leave_out: names of the modules trained in full.
        layers: as in the recipe; the other ones are left out on purpose.
    """
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    frozen = [
        f"{name} {linear_shape(module)}"
        for name, module in model.named_modules()
        if linear_shape(module)
        and name not in modules
        and module is not outputs
        and in_layers(name, layers)
        and not any(name == m or name.startswith(f"{m}.") for m in leave_out)
    ]
    notes = []
    if frozen:
        notes.append(
            f"all-linear leaves {len(frozen)} layers out, too small for the rank or past an adapter's reach, "
            f"such as {frozen[0]}"
        )
    # transformers holds the experts of a mixture as one tensor of three axes, to which LoRA adds nothing here.
    stacked = {id(p): p.numel() for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name}
    if stacked:
        share = sum(stacked.values()) / sum({id(p): p.numel() for p in model.parameters()}.values())
        notes.append(f"experts: {share:.0%} of the weights are stacked experts, which are not adapted; nor are routers")
    return notes


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
