"""Pruned models as folders: a smaller stock model, our own of unequal widths, and a base read at its pruned widths."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.model.base import DTYPES, Base, choose_device, locate, not_found
from fedtune.model.libraries import quiet
from fedtune.model.merge import Merged
from fedtune.model.settings import ModelSettings
from fedtune.model.surgery import cut_linear, fit, layout_of, refuse_static_caches, slice_of
from fedtune.model.torch_seed import torch_seed
from fedtune.pruning.structure import (
    FAMILIES,
    FULL,
    Block,
    BlockLayout,
    BlockStructure,
    ModelStructure,
    check,
    cuts,
    slice_factors,
)
from fedtune.seeds import derive
from fedtune.tensors import Tensors

PREFIX = "fedtune-pruned-"
"""Before the family in `model_type`: a stock class that met these widths unprepared must not know the folder."""
FORMAT = 1
TASKS = ("causal", "classification")
FOREIGN = ("auto_map", "quantization_config", "implementation")
"""Ends of the keys of a config that may name code to fetch: a folder chooses none."""
DAMAGES = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    ShapeError,
    SafetensorError,
    StrictDataclassError,
)
"""What reading a folder ends in whose files are not as we write them."""

Source = Mapping[str, Callable[[], torch.Tensor]]
"""What reads a tensor of a checkpoint, by its name there."""


def skeleton(config: Any, *, task: str, dtype: torch.dtype) -> Any:
    """Return a stock model without memory for its tensors: they are on the meta device."""
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.requires_grad_(False).eval()


def shrink(model: Any, keep: ModelStructure, anatomy: BlockLayout) -> None:
    """Give every block of a skeleton its own widths, in place."""
    for name, cut in cuts(check(keep, anatomy), anatomy).items():
        cut_linear(model.get_submodule(name), slice_of(cut))
    fit(model, keep, anatomy)


def reading(files: Sequence[Path]) -> Source:
    """Return what reads the tensors of safetensors files, each when it is asked for.

    A file is opened for every tensor anew: the pages of one that stays open stay in memory with it.
    """

    def read(file: Path, key: str) -> torch.Tensor:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensor: torch.Tensor = opened.get_tensor(key)
            return tensor

    found: dict[str, Callable[[], torch.Tensor]] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            found |= {key: partial(read, file, key) for key in opened.keys()}  # noqa: SIM118
    return found


def files_of(path: str | Path, revision: str | None) -> Sequence[Path]:
    """Return the safetensors files of a folder or hub model: one, or those that its index names.

    Raises:
        OSError: if there is neither.
    """
    at = partial(cached_file, str(path), revision=revision)
    if one := at("model.safetensors", _raise_exceptions_for_missing_entries=False):
        return [Path(one)]
    index = json.loads(Path(at("model.safetensors.index.json")).read_text())
    return [Path(at(Path(name).name)) for name in sorted(set(index["weight_map"].values()))]


def match_names(source: Source, expected: Collection[str], prefix: str) -> Source:
    """Return a checkpoint's tensors by the names that the model has for them.

    As transformers does it: a bare model's checkpoint fits one with a head, and the other way round, and what early
    checkpoints call gamma and beta are a norm's weight and bias.
    """
    found = {}
    for key, read in source.items():
        name = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        choices = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        found[next((choice for choice in choices if choice in expected), name)] = read
    return found


def aliases(model: Any) -> Mapping[str, str]:
    """Return the first name of every tensor of a model by all of its names; tied ones have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def place(model: Any, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where a skeleton has a parameter or buffer of this name."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws what lacks this mark
    setattr(module, leaf, tensor)


def finish(model: Any, new: Collection[str], *, key: int, device: torch.device) -> Any:
    """Give a filled skeleton what no checkpoint holds: tied names, buffers, and a new head drawn by the key."""
    for name in new:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf), device="cpu"), requires_grad=False))
    model.tie_weights()
    for name, buffer in list(model.named_non_persistent_buffers()):
        place(model, name, torch.empty_like(buffer, device="cpu"))
    with quiet(), torch_seed(key, torch.device("cpu")):
        model.initialize_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    return model.to(device)


@dataclass(frozen=True)
class Loaded:
    """A base that was never whole in memory."""

    model: Any
    """transformers.PreTrainedModel at its pruned widths, in eval mode, nothing requires grad."""
    new: Sequence[str]
    """Names of the parameters that the checkpoint lacks."""
    digest: str
    """Of the whole base, as `base.digest` would give it."""


def config_of(settings: ModelSettings, *, root: Path, labels: Sequence[str]) -> Any:
    classes: dict[str, Any] = {}
    if settings.task == "classification":
        classes = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    path = locate(settings, root)
    return AutoConfig.from_pretrained(path, revision=settings.revision, trust_remote_code=False, **classes)


def anatomy_at(settings: ModelSettings, *, root: Path) -> BlockLayout:
    """Return the blocks of a base from its config alone.

    Raises:
        ConfigError: if there is no such base, or it cannot be pruned.
    """
    try:
        model = skeleton(config_of(settings, root=root, labels=("",)), task=settings.task, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise not_found(settings, error) from error
    return layout_of(model)


def load_pruned_base(
    settings: ModelSettings, keep: ModelStructure, *, root: Path, seed: int, labels: Sequence[str] = ()
) -> Loaded:
    """Load a base at its pruned widths, one tensor at a time: what it takes is the smaller model and one tensor.

    A head that the checkpoint lacks is drawn as `base.load` draws it. Never runs code that came with a checkpoint.

    Args:
        settings: the recipe's table `model`.
        keep: what is kept, in the base's coordinates.
        root: folder that relative paths are relative to.
        seed: the run's seed.
        labels: names of the classes, for classification.

    Raises:
        ConfigError: if the model or device does not exist, weights are missing, or the model cannot be pruned.
        ShapeError: if the keep is not one of this base, or a tensor is not as its config says.
    """
    device, dtype = choose_device(settings.device), DTYPES[settings.dtype]
    path = locate(settings, root)
    try:
        model = skeleton(config_of(settings, root=root, labels=labels), task=settings.task, dtype=dtype)
        anatomy = layout_of(model)
        whole = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        first, cut = aliases(model), cuts(check(keep, anatomy), anatomy)
        shrink(model, keep, anatomy)
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        sha, new, placed = hashlib.sha256(), [], set()
        source = reading(files_of(path, settings.revision))
        found = match_names(source, whole.keys(), model.base_model_prefix)
        for name, (shape, kind) in sorted(whole.items()):
            read = next((found[other] for other in whole if first[other] == first[name] and other in found), None)
            if read is None:
                new.append(name)
                continue
            tensor = read()
            if tensor.shape != shape:
                raise ShapeError(f"{name}: expected {tuple(shape)}, as the config says; got {tuple(tensor.shape)}")
            tensor = tensor.to(kind)
            sha.update(f"{name}\0{kind}\0{tuple(shape)}\0".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)  # no copy
            if first[name] not in placed:
                placed.add(first[name])
                # A clone, for what was only read lies in the file's pages, and goes with them.
                place(model, first[name], part_of(model, name, tensor, cut).clone().to(device))
            del tensor  # or it would still be there when the next one is read
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise not_found(settings, error) from error
    missing = [name for name in new if not any(re.search(pattern, name) for pattern in ignored)]
    if missing and settings.task == "causal":
        reason = f"it lacks {len(missing)} of the model's tensors: {', '.join(missing)}"
        raise not_found(settings, ValueError(reason))
    finish(model, new, key=derive(seed, "model.head"), device=device)
    with_generation_config(model, path, settings.revision)
    refuse_static_caches(model)
    return Loaded(model=model, new=missing, digest=sha.hexdigest())


def part_of(model: Any, name: str, tensor: torch.Tensor, cut: Mapping[str, Any]) -> torch.Tensor:
    """Return what is kept of a parameter of the base."""
    module, _, leaf = name.rpartition(".")
    part = slice_of(cut.get(module, FULL))
    return part.rows(tensor) if leaf == "bias" else part.weight(model.get_submodule(module))(tensor)


def with_generation_config(model: Any, path: str | Path, revision: str | None = None) -> None:
    file = cached_file(
        str(path), "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision)


def sliced_tensors(
    base: Base,
    keep: ModelStructure,
    anatomy: BlockLayout,
    adapter: Adapter,
    saved: Tensors,
    *,
    dtype: str,
    revision: str | None,
) -> tuple[Mapping[str, torch.Tensor], Merged]:
    """Return every tensor of the pruned model by its first name, the change added, and what the cast cost.

    The base is read again from its checkpoint, tensor by tensor, and is cast once, at the end; see `merge`.
    """
    model, cut = base.model, cuts(check(keep, anatomy), anatomy)
    held, first = model.state_dict(), aliases(model)
    source = reading(files_of(base.path, revision))
    found = match_names(source, held.keys(), model.base_model_prefix)
    tensors, along, squared, off = {}, 0.0, 0.0, 0.0
    check_tied(adapter, first)
    for name in held:
        names = [other for other in held if first[other] == first[name]]
        if name != names[0]:
            continue
        read = next((found[other] for other in names if other in found), None)
        given = next((saved[other] for other in names if other in saved), None)
        if given is not None:
            whole = torch.from_numpy(np.array(given, np.float32))
        else:  # what the checkpoint lacks was drawn when the base was loaded
            whole = held[name].detach().cpu() if read is None else read()
        if whole.shape != held[name].shape:
            raise ShapeError(f"{name}: expected {tuple(held[name].shape)}; got {tuple(whole.shape)}")
        part = part_of(model, name, whole, cut)
        before = part.float() if part.is_floating_point() else part.clone()
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in adapter:
            change = change_of(slice_factors(adapter[module], cut.get(module, FULL)))
            if isinstance(model.get_submodule(module), Conv1D):
                change = change.T
            after = (before.double() + change).float()
            cast = after.to(DTYPES[dtype]).double() - before.to(DTYPES[dtype]).double()
            along += float((cast * change).sum())
            squared += float(change.square().sum())
            off += float((cast - change).square().sum())
            before = after
        target = DTYPES[dtype] if before.is_floating_point() else before.dtype
        tensors[name] = before.to(target, copy=True).contiguous()
    cost = Merged(applied=1.0, error=0.0)
    if squared > 0.0:
        cost = Merged(applied=along / squared, error=(off / squared) ** 0.5)
    return tensors, cost


def change_of(factors: Factors) -> torch.Tensor:
    # The arrays of a state are views that must not be written to, of which torch warns.
    return torch.tensor(factors.b).double() @ torch.tensor(factors.a).double()  # (out, in)


def check_tied(adapter: Adapter, first: Mapping[str, str]) -> None:
    """Refuse to merge into a layer that is another one too.

    Raises:
        ConfigError: naming both.
    """
    tied = [module for module in sorted(adapter) if first.get(f"{module}.weight", "") not in ("", f"{module}.weight")]
    if tied:
        hint = "leave it out of adapter.targets; peft itself puts such an adapter beside the whole base"
        expected = f"adapters on layers of their own; {tied[0]} shares its weight with {first[f'{tied[0]}.weight']}"
        raise ConfigError(Fault("adapter.targets", expected, f"{len(tied)} such", hint))


def merge_into(model: Any, keep: ModelStructure, anatomy: BlockLayout, adapter: Adapter, saved: Tensors) -> None:
    """Add an adapter to a pruned model, and put modules_to_save in their place; both in the base's coordinates.

    Raises:
        ShapeError: if a factor is not one of this base.
        ConfigError: if a layer shares its weight with another.
    """
    check_tied(adapter, aliases(model))
    cut, parameters = cuts(check(keep, anatomy), anatomy), dict(model.named_parameters())
    strange = sorted({*(f"{name}.weight" for name in adapter), *saved} - parameters.keys())
    if strange:
        raise ShapeError(f"{strange[0]}: expected a parameter of the base; it has none of that name")
    with torch.no_grad():
        for name, factors in adapter.items():
            weight = parameters[f"{name}.weight"]
            change = change_of(slice_factors(factors, cut.get(name, FULL))).to(weight.device)
            if isinstance(model.get_submodule(name), Conv1D):
                change = change.T
            if change.shape != weight.shape:
                raise ShapeError(f"{name}: expected a change of {tuple(weight.shape)}; got {tuple(change.shape)}")
            weight.copy_(weight.double() + change)
        for name, values in saved.items():
            if values.shape != tuple(parameters[name].shape):
                raise ShapeError(f"{name}: expected {tuple(parameters[name].shape)}; got {values.shape}")
            parameters[name].copy_(torch.from_numpy(np.array(values, np.float32)))


def write(
    out: Path,
    base: Base,
    keep: ModelStructure,
    anatomy: BlockLayout,
    adapter: Adapter | None,
    *,
    saved: Tensors,
    dtype: str,
    revision: str | None,
) -> Merged:
    """Write a pruned model of any widths as a folder that `load` reads, and that stock transformers refuses by name.

    Args:
        out: the folder.
        base: its checkpoint must still be where it was loaded from.
        keep: what is kept.
        anatomy: of the base.
        adapter: in the base's coordinates, scale 1, merged in; or none.
        saved: values of modules_to_save, in the base's coordinates.
        dtype: of the tensors, a key of `DTYPES`.
        revision: of the base.

    Raises:
        ShapeError: if the keep or a factor is not one of this base.
    """
    config = json.loads(base.model.config.to_json_string())
    config["model_type"] = PREFIX + anatomy.family
    config["fedtune_pruning"] = {
        "format": FORMAT,
        "task": base.task,
        "blocks": [
            {"heads": len(kept.q), "kv_heads": len(kept.kv), "channels": len(kept.ff)}
            for kept in check(keep, anatomy).blocks
        ],
    }
    config["dtype"] = dtype
    merged = write_tensors(out, base, keep, anatomy, adapter, saved=saved, dtype=dtype, revision=revision)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return merged


def write_uniform(
    out: Path,
    base: Base,
    keep: ModelStructure,
    anatomy: BlockLayout,
    adapter: Adapter | None,
    *,
    saved: Tensors,
    dtype: str,
    revision: str | None,
) -> Merged:
    """Write a pruned model whose blocks are equally wide as a folder that stock transformers loads; see `write`.

    Raises:
        ConfigError: if no stock config describes these widths.
        ShapeError: if the keep or a factor is not one of this base.
    """
    config = uniform(base.model.config, keep, anatomy)
    config.dtype = DTYPES[dtype]
    config.architectures = [type(base.model).__name__]
    merged = write_tensors(out, base, keep, anatomy, adapter, saved=saved, dtype=dtype, revision=revision)
    config.save_pretrained(out)
    return merged


def write_tensors(
    out: Path,
    base: Base,
    keep: ModelStructure,
    anatomy: BlockLayout,
    adapter: Adapter | None,
    *,
    saved: Tensors,
    dtype: str,
    revision: str | None,
) -> Merged:
    """Write all but the config."""
    for name, factors in (adapter or {}).items():
        if base.modules.get(name) != factors.shape:
            raise ShapeError(f"{name}: expected {base.modules.get(name, 'no such module')}; got {factors.shape}")
    out.mkdir(parents=True, exist_ok=True)
    tensors, merged = sliced_tensors(base, keep, anatomy, adapter or {}, saved, dtype=dtype, revision=revision)
    save_file(dict(tensors), out / "model.safetensors", metadata={"format": "pt"})
    with quiet():
        if base.model.can_generate():
            base.model.generation_config.save_pretrained(out)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(out)
    return merged


def uniform(config: Any, keep: ModelStructure, anatomy: BlockLayout) -> Any:
    """Return the stock config of a pruned model whose blocks are equally wide.

    Raises:
        ConfigError: if they are not, or the family's config cannot say it, with the nearest counts that it can.
    """
    counts = [(len(kept.q), len(kept.kv), len(kept.ff)) for kept in check(keep, anatomy).blocks]
    block = anatomy.blocks[0]
    if len(set(counts)) > 1 or len({(b.heads, b.kv_heads, b.channels) for b in anatomy.blocks}) > 1:
        got = "; ".join(
            f"{name} from {min(part)} to {max(part)}"
            for name, part in zip(("heads", "key/value heads", "channels"), zip(*counts, strict=True), strict=True)
            if len(set(part)) > 1
        )
        hint = 'for that train with pruning.allocation = "uniform"; the folder model has the widths as they are'
        raise ConfigError(
            Fault("export", "blocks of equal widths, as a stock config has them", got or "a base without", hint)
        )
    heads, kv_heads, channels = counts[0]
    if not fits(anatomy, block, heads):
        nearest = sorted(sorted(possible(anatomy, block), key=lambda count: abs(count - heads))[:2])
        expected = f"{' or '.join(map(str, nearest))} heads in every block, which a stock {anatomy.family} can have"
        raise ConfigError(
            Fault("export", expected, str(heads), "prune to that; the folder model has the widths as they are")
        )
    found = copy.deepcopy(config)
    if anatomy.family == "gpt2":
        found.n_inner = channels
    else:
        found.intermediate_size = channels
    if anatomy.family in ("llama", "mistral", "qwen2", "qwen3"):
        found.num_attention_heads, found.num_key_value_heads = heads, kv_heads
        found.head_dim = block.head_dim
    return found


def possible(anatomy: BlockLayout, block: Block) -> Sequence[int]:
    """Return the head counts that the stock config of a family can say of a pruned block."""
    reached = {kv * each for kv in range(1, block.kv_heads + 1) for each in range(1, block.group + 1)}
    return [heads for heads in sorted(reached) if fits(anatomy, block, heads)]


def fits(anatomy: BlockLayout, block: Block, heads: int) -> bool:
    if anatomy.family in ("gpt2", "bert", "roberta"):  # they know a head's size only as width / heads
        return heads == block.heads
    return anatomy.family != "llama" or anatomy.width % heads == 0


def load(folder: Path, *, dtype: str, device: torch.device) -> Any:
    """Return the pruned model that `write` wrote: the stock class with its blocks at their own widths.

    Reads one tensor at a time, and runs no code that lies in the folder.

    Raises:
        ConfigError: naming the file, if the folder is not one of ours, or is damaged.
    """
    try:
        data = json.loads((folder / "config.json").read_text())
        described = data.pop("fedtune_pruning")
        family = str(data["model_type"]).removeprefix(PREFIX)
        if family not in FAMILIES or described["format"] != FORMAT:
            raise ValueError(f"model_type {data['model_type']!r}, format {described['format']!r}")
        if described["task"] not in TASKS:
            raise ValueError(f"task {described['task']!r}")
        plain = {key: value for key, value in data.items() if not key.endswith(FOREIGN)}
        config = CONFIG_MAPPING[family].from_dict({**plain, "model_type": family})
        model = skeleton(config, task=described["task"], dtype=DTYPES[dtype])
        anatomy = layout_of(model)
        blocks = zip(anatomy.blocks, described["blocks"], strict=True)
        shrink(model, ModelStructure(tuple(leading(block, **counts) for block, counts in blocks)), anatomy)
        first, expected = aliases(model), model.state_dict()
        source = reading([folder / "model.safetensors"])
        if source.keys() != set(first.values()):
            strange = sorted(source.keys() ^ set(first.values()))
            raise ValueError(f"its tensors are not those of the config: {', '.join(strange[:3])}")
        for name, read in source.items():
            tensor = read()
            if tensor.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
            place(model, name, tensor.to(device, expected[name].dtype, copy=True))
        finish(model, (), key=0, device=device)
        with_generation_config(model, folder)
    except DAMAGES as error:
        reason = " ".join(str(error).split())[:200]
        expected_folder = "a folder of a pruned model as fedtune exports it"
        raise ConfigError(
            Fault(str(folder), expected_folder, f"{type(error).__name__}: {reason}", "export it again")
        ) from error
    refuse_static_caches(model)
    return model


def leading(block: Block, *, heads: int, kv_heads: int, channels: int) -> BlockStructure:
    """Return a kept set of these sizes: on a skeleton it does not matter which heads and channels are meant."""
    if not (0 <= heads <= block.heads and 0 <= kv_heads <= block.kv_heads and 0 <= channels <= block.channels):
        widest = f"{block.heads}, {block.kv_heads} and {block.channels}"
        raise ShapeError(f"{block.prefix}: expected at most {widest} wide; got {heads}, {kv_heads}, {channels}")
    each = heads // max(1, kv_heads)
    q = tuple(kv * block.group + i for kv in range(kv_heads) for i in range(each))
    if len(q) != heads or each > block.group:
        raise ShapeError(f"{block.prefix}: expected as many heads for every key/value head; got {heads} and {kv_heads}")
    return BlockStructure(q=q, kv=tuple(range(kv_heads)), ff=tuple(range(channels)))
