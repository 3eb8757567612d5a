"""A base model, loaded once per process and shared by all its clients: weights that stay as they were loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fedtune.directions.rebuild_torch import as_array
from fedtune.directions.seed_ledger import Manifest, TensorEntry, describe_tensor, tensor_fault
from fedtune.errors import ConfigError, Fault, ShapeError, type_of
from fedtune.messages import Blueprint
from fedtune.model.base_config import auto_class, read_config
from fedtune.model.base_files import check_folder, locate, not_found, readable
from fedtune.model.base_paths import check_vocabulary
from fedtune.model.blocks import block_numbers
from fedtune.model.classes import Classes, draw_output_layer, output_layer
from fedtune.model.device import DTYPES, choose_device, name_of, number_format, share_devices
from fedtune.model.emulator_facts import middle_notes, resolve_layers
from fedtune.model.fused_loss import projects_plainly
from fedtune.model.libraries import quiet
from fedtune.model.load_checks import (
    check_causal,
    check_complete,
    check_finite,
    embedding_rows,
    longest_input,
    packs,
    padding_token,
)
from fedtune.model.pooling import Kind, choose_pooling, set_pooling, with_pooling
from fedtune.model.quantised_layers import (
    codes_digest,
    describe_weight,
    quantisable,
    quantise_layer,
    quantised_layers,
    shared_copy,
)
from fedtune.model.quantised_linear import QuantisedLinear, choose_kernels
from fedtune.model.quantised_stream import Streamed, stream_quantised
from fedtune.model.settings import (
    AdapterSettings,
    ModelSettings,
    NumberFormat,
    quantised_format,
    without_quantisation,
)
from fedtune.model.targets import find_saved, find_targets, frozen_notes
from fedtune.model.torch_seed import torch_seed
from fedtune.model.virtual_tokens import VirtualTokens, draw_virtual_tokens
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors

LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, ImportError, KeyError, TypeError, AttributeError)
"""The errors in which transformers ends where a checkpoint is not as its config says, or a library is missing."""


@dataclass(frozen=True)
class Base:
    """A loaded model whose own weights never change; adapters are attached to it for a while."""

    name: str
    """As the recipe gives it."""
    path: str
    """Folder or hub name it was loaded from."""
    model: Any
    """transformers.PreTrainedModel, in eval mode, nothing requires grad."""
    tokenizer: Any
    task: str
    device: torch.device
    digest: str
    """SHA-256 of names, shapes, dtypes and bytes of all tensors that came with the checkpoint."""
    modules: Mapping[str, tuple[int, int]]
    """(out, in) of every module that gets an adapter, by full name."""
    saved: Sequence[str]
    """Names of the parameters trained in full."""
    saved_modules: Sequence[str]
    """Names of the modules they belong to."""
    notes: Sequence[str] = ()
    """What a user should know about it, such as a head that was left out."""
    dtype: NumberFormat = "float32"
    """Number format of its weights, a name of `DTYPES`; of quantised ones, that of their codes."""
    fused: bool = False
    """Whether logits are nothing but the output layer on the body's hidden states: losses then need no logits."""
    quantised: Callable[[], Mapping[str, TensorEntry]] | None = None
    """The manifest's entries of the weights that only their codes are left of, by name; None where none is quantised.
    """
    kernels: str = "auto"
    """That read quantised weights, as the recipe says."""
    virtual: VirtualTokens | None = None
    """What trains in place of factors, with adapter.kind prefix, p-tuning or prompt; `saved` then names its tensors."""

    @property
    def positions(self) -> int:
        """The longest input in tokens: the smaller limit of model and tokenizer; 2^31 if neither names one."""
        # Virtual tokens take places of their own before a text.
        return longest_input(self.model, self.tokenizer) - (self.virtual.count if self.virtual else 0)

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint holds the adapted layers' weights as (in, out), as GPT-2's does."""
        if not self.modules:  # virtual tokens belong to no layer
            return False
        layer = self.model.get_submodule(next(iter(self.modules)))
        return isinstance(layer, Conv1D) or (isinstance(layer, QuantisedLinear) and layer.transposed)

    @cached_property
    def num_parameters(self) -> int:
        """Weights of the model, however few bits each takes."""
        plain: int = sum(parameter.numel() for parameter in self.model.parameters())
        return plain + sum(layer.out_features * layer.in_features for layer in quantised_layers(self.model).values())

    @cached_property
    def variants(self) -> dict[str, Any]:
        """The same base by other number formats, each a `Base`; see `variants.variant`."""
        return {}

    @cached_property
    def codes(self) -> bytes:
        """Digest of the codes of three fixed layers, by which clients of one number format agree; empty without any."""
        return codes_digest(self.model)

    @property
    def pad_id(self) -> int:
        """The token id that pads short rows, from the config: a decoder's classifier finds a text's end by it."""
        return int(self.model.config.pad_token_id)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of all parameters in the number format that they were loaded in.

        A shared parameter is listed under the first of its names, a quantised one as it was before that: so all number
        formats of one base have the same manifest.

        Raises:
            ConfigError: naming every tensor that is not finite or of another format than fp32, fp16 and bf16.
        """
        listed = manifest_of(self.model)
        if self.quantised is None:
            return listed
        entries = [*listed.entries, *self.quantised().values()]
        return Manifest(tuple(sorted(entries, key=lambda entry: entry.name.encode())))

    @cached_property
    def changed(self) -> dict[str, Any]:
        """The last frozen change added to weights, a `frozen.ChangedWeight` by module: clients of a round share it."""
        return {}

    @cached_property
    def checksums(self) -> Mapping[str, int]:
        """A number by parameter that changes with its bits; read it before anything can have written to them."""
        return {name: sum_bits(parameter) for name, parameter in self.model.named_parameters()}

    @cached_property
    def spoiled(self) -> list[str]:
        """Why the weights are not those that were loaded any more; empty as long as they are."""
        return []

    @cached_property
    def packs(self) -> bool:
        """Whether examples may share a row (`client.packing`); read it before adapters are attached."""
        return self.task == "causal" and self.virtual is None and packs(self.model, self.positions)

    @property
    def matrices(self) -> Collection[str]:
        """Names of the matrices of the adapted layers, and of modules_to_save that are linear layers."""
        parameters = dict(self.model.named_parameters())
        return {f"{name}.weight" for name in self.modules} | {
            n for n in self.saved if n in parameters and parameters[n].dim() == 2
        }

    def blueprint(self, *, max_rank: int, seed: int, whole: bool = False) -> Blueprint:
        """Return what a method must know of this model before the first round; `whole`: with every tensor's entry."""
        return Blueprint(
            modules=self.modules,
            saved=self.saved_tensors(),
            max_rank=max_rank,
            seed=seed,
            manifest=self.manifest.encode() if whole else b"",
        )

    def saved_tensors(self) -> Tensors:
        """Return the current values of modules_to_save, or the first virtual tokens, float32; zeros without weights."""
        if self.virtual:
            return self.virtual.initial
        parameters = dict(self.model.named_parameters())
        return {
            name: np.zeros(parameters[name].shape, np.float32)
            if parameters[name].is_meta
            else to_numpy(parameters[name])
            for name in self.saved
        }


def load_tokenizer(settings: ModelSettings, root: Path, *, weights: bool = True) -> Any:
    """Return the base's tokenizer; without `weights` also of a folder that holds none yet.

    Raises:
        ConfigError: if there is none at `model.base`.
    """
    path = locate(settings, root)
    check_folder(settings, path, weights=weights)
    check_vocabulary(path)
    try:
        source = readable(path, settings.revision)
        with quiet():
            return AutoTokenizer.from_pretrained(source, revision=settings.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:  # also a torn file, or a missing tokenizer library
        raise not_found(settings, error) from error


def load(
    settings: ModelSettings,
    adapter: AdapterSettings,
    *,
    tokenizer: Any,
    root: Path,
    seed: int,
    labels: Sequence[str] = (),
) -> Base:
    """Load the base model and find the modules that get adapters. Never runs code that came with a checkpoint.

    Args:
        settings: the recipe's table `model`.
        adapter: the recipe's table `adapter`.
        tokenizer: from `load_tokenizer`.
        root: folder that relative paths are relative to.
        seed: the run's seed; a classification head that the checkpoint lacks is drawn from it.
        labels: names of the classes, for classification.

    Raises:
        ConfigError: if the model, the device or a target module does not exist, or weights are missing.
    """
    path = locate(settings, root)
    check_folder(settings, path)
    # Before the weights are read, which may take minutes.
    share_devices(settings)
    settings = replace(settings, dtype=number_format(settings))
    classifies = settings.task == "classification"
    try:
        source = readable(path, settings.revision)
        config, classes = read_config(source, settings, labels)
        streamed = stream_quantised(settings, adapter, source, config, classes, seed=seed)
        if streamed is None:
            model, new, given = read_whole(settings, source, config, classes, seed=seed)
        else:
            model, new, given = streamed.model, streamed.new, streamed.given
        embedding_rows(model)  # fails for models that read characters
        pooling = choose_pooling(settings, config, source)
    except (*LOAD_ERRORS, ShapeError) as error:
        raise not_found(settings, error) from error
    check_complete(settings, model, new)
    came = classifies and not {name for name in given if name.startswith(output_layer(model))}
    notes = [classes.note] if came and classes.note else []
    base = base_of(
        settings,
        adapter,
        model,
        tokenizer,
        path=str(path),
        new=new,
        notes=notes,
        streamed=streamed,
        pooling=pooling,
        seed=seed,
    )
    if not classifies:
        check_causal(settings, base.model, base.positions)
    check_digest(settings, base)
    return base


def read_whole(
    settings: ModelSettings, source: str | Path, config: Any, classes: Classes, *, seed: int
) -> tuple[Any, Sequence[str], Sequence[str]]:
    """Return a model as transformers reads it, the names of the tensors that are drawn anew, and of those missing."""
    resized = settings.task == "classification" and not classes.fits
    # A head that the checkpoint lacks is drawn from torch's global generator, and must be the same everywhere.
    with quiet(), torch_seed(derive(seed, "model.head"), torch.device("cpu")):
        model, info = auto_class(settings.task).from_pretrained(
            source,
            revision=settings.revision,
            trust_remote_code=False,
            config=config,
            dtype=DTYPES[without_quantisation(settings).dtype],
            # Never a pickled checkpoint, which can run code as it is read.
            use_safetensors=True,
            output_loading_info=True,
            # A head of other classes, which is drawn anew; any other difference in shape is an error.
            ignore_mismatched_sizes=resized,
        )
        embedding_rows(model)  # fails for models that read characters
        new = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        if resized:
            new = sorted({*new, *draw_output_layer(model, new)})
    return model, new, sorted(info["missing_keys"])


def check_digest(settings: ModelSettings, base: Base) -> None:
    """Refuse another base than the one that the recipe pins.

    Raises:
        ConfigError: with both digests.
    """
    if settings.digest not in (None, base.digest):
        expected = f"the base of digest {settings.digest}, which the recipe pins"
        got = f"{base.digest} ({settings.base} in {without_quantisation(settings).dtype})"
        hint = "load the same model in the same revision and dtype, or pin this one: fedtune plan RECIPE --pin"
        raise ConfigError(Fault("model.digest", expected, got, hint))


def base_of(
    settings: ModelSettings,
    adapter: AdapterSettings,
    model: Any,
    tokenizer: Any,
    *,
    path: str,
    new: Sequence[str] = (),
    notes: Sequence[str] = (),
    streamed: Streamed | None = None,
    pooling: Kind | None = None,
    seed: int = 0,
) -> Base:
    """Return a loaded model as a base: frozen, in eval mode, quantised, on the recipe's device; all of that in place.

    Args:
        settings: the recipe's table `model`.
        adapter: the recipe's table `adapter`.
        model: of transformers.
        tokenizer: of the model.
        path: folder or hub name that the model comes from.
        new: names of the tensors that its checkpoint lacks.
        notes: what a user should know about it.
        streamed: what is known of a model that was quantised as it was read.
        pooling: of a classifier, where that is not its architecture's own.
        seed: the run's; virtual tokens are drawn from it.

    Raises:
        ConfigError: if the device or a target module does not exist, or no layer can be quantised.
    """
    device = choose_device(settings.device)
    check_finite(settings, model)
    # Before a pooler goes, and the heads are held in float32 below: the digest is of the tensors as they were loaded.
    raw_digest = streamed.digest if streamed else digest(model, leave_out=new)
    base_digest = with_pooling(raw_digest, pooling)
    set_pooling(model, pooling)
    present = model.state_dict().keys()
    new = [name for name in new if name in present]  # not of a pooler that is gone
    # A decoder's classifier refuses batches without a padding token.
    model.config.pad_token_id = padding_token(model, tokenizer)
    # In eval mode for good: only adapters have dropout; see `train.only_adapters_train`.
    model.requires_grad_(False).eval()
    saved_modules = find_saved(model, adapter.modules_to_save, new, task=settings.task)
    entries = streamed.entries if streamed else quantise_model(settings, model, saved_modules)
    model.to(device)
    if (outside := without_quantisation(settings).dtype) != "float32":
        for name in saved_modules:
            hold_in_float32(model.get_submodule(name), DTYPES[outside])
    layers = resolve_layers(
        adapter.layers, path, blocks=block_numbers(model), dtype=without_quantisation(settings).dtype, digest=raw_digest
    )
    virtual = draw_virtual_tokens(adapter, model, tokenizer, seed=seed)
    modules = {} if virtual else targets_of(adapter, model, saved_modules, layers)
    if modules and "all-linear" in adapter.targets:
        notes = [*notes, *frozen_notes(model, modules, leave_out=saved_modules, layers=layers)]
    notes = [*notes, *middle_notes(path, [*modules, *saved_modules])]
    return Base(
        name=settings.base,
        path=path,
        model=model,
        tokenizer=tokenizer,
        task=settings.task,
        device=device,
        digest=base_digest,
        modules=modules,
        saved_modules=saved_modules,
        saved=sorted(virtual.initial) if virtual else parameters_of(model, saved_modules),
        notes=tuple(notes),
        dtype=settings.dtype,
        fused=settings.task == "causal" and projects_plainly(model),
        quantised=None if entries is None else lambda: entries,
        kernels=settings.kernels,
        virtual=virtual,
    )


def targets_of(
    adapter: AdapterSettings, model: Any, saved_modules: Sequence[str], layers: str | None
) -> Mapping[str, tuple[int, int]]:
    """Return (out, in) of the modules that get factors, by full name; see `targets.find_targets`."""
    return find_targets(model, adapter.targets, leave_out=saved_modules, rank=adapter.rank, layers=layers)


def parameters_of(model: Any, modules: Sequence[str]) -> Sequence[str]:
    """Return the names of the parameters of some modules, sorted."""
    return sorted(name for name, _ in model.named_parameters() if any(name.startswith(f"{m}.") for m in modules))


def quantise_model(
    settings: ModelSettings, model: Any, saved_modules: Sequence[str]
) -> Mapping[str, TensorEntry] | None:
    """Quantise a loaded model as its settings say, in place; return the manifest's entries of its former weights."""
    if (kind := quantised_format(settings.dtype)) is None:
        return None
    kernels, entries = choose_kernels(settings.kernels, kind, choose_device(settings.device)), {}
    for name in quantisable(model, saved_modules):
        weight = model.get_submodule(name).weight.detach()
        entries[f"{name}.weight"] = describe_weight(f"{name}.weight", weight)
        quantise_layer(model, name, weight, kind, kernels=kernels)
    return entries


def base_from_object(settings: ModelSettings, adapter: AdapterSettings, given: Any, *, seed: int = 0) -> Base:
    """Return the base that Python code gives: a `Base`, or a transformers model and its tokenizer.

    Raises:
        ConfigError: if it is neither, or does not fit the recipe's tables `model` and `adapter`.
    """
    if isinstance(given, Base):
        layers = resolve_layers(adapter.layers, given.path, blocks=block_numbers(given.model))
        virtual = draw_virtual_tokens(adapter, given.model, given.tokenizer, seed=seed)
        targets = {} if virtual else targets_of(adapter, given.model, given.saved_modules, layers)
        wanted_text, own_text = describe_trained(targets, virtual), describe_trained(given.modules, given.virtual)
        if given.task != settings.task or given.modules != targets or wanted_text != own_text:
            expected = f"a base for the task {settings.task!r} that adapts {wanted_text}, as the recipe says"
            got = f"one for {given.task!r} that adapts {own_text}"
            raise ConfigError(Fault("model", expected, got, "pass the model and its tokenizer instead"))
        if (wanted := quantised_format(settings.dtype)) != quantised_format(given.dtype) and settings.dtype != "auto":
            hint = f"set model.dtype to it, or load a base in {settings.dtype}"
            raise ConfigError(
                Fault("model.dtype", f"a base in {wanted or settings.dtype}", f"one in {given.dtype}", hint)
            )
        # Drawn from this run's seed, not from that of the run that it was loaded for.
        return replace(given, virtual=virtual) if virtual else given
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], nn.Module):
        expected = "a fedtune.model.base.Base, or a pair of a transformers model and its tokenizer"
        raise ConfigError(Fault("model", expected, type_of(given)))
    model, tokenizer = given
    dtype = next(model.parameters()).dtype
    if settings.dtype == "auto":
        settings = replace(settings, dtype=name_of(dtype))
    if dtype != DTYPES[loaded := without_quantisation(settings).dtype]:
        key = "model.dtype" if loaded == settings.dtype else "model.unquantised"
        known, got = dtype in DTYPES.values(), f"one in {str(dtype).removeprefix('torch.')}"
        hint = f"set {key} to the model's" if known else f"convert it: model.to(torch.{loaded})"
        raise ConfigError(Fault(key, f"a model in {loaded}", got, hint))
    if quantised_layers(model):
        hint = "pass the model that it was before; fedtune quantises a copy"
        raise ConfigError(Fault("model", "a model that holds its weights", "codes in place of some of them", hint))
    pooling = choose_pooling(settings, model.config, None)
    if quantised_format(settings.dtype) or pooling:
        model = shared_copy(model)  # the caller's own keeps its layers, for another run
    path = model.name_or_path or settings.base
    base = base_of(settings, adapter, model, tokenizer, path=path, pooling=pooling, seed=seed)
    check_digest(settings, base)
    return base


def describe_trained(modules: Mapping[str, tuple[int, int]], virtual: VirtualTokens | None) -> str:
    """Return in words what trains over a base."""
    if virtual is None:
        return f"{len(modules)} modules"
    numbers = sum(array.size for array in virtual.initial.values())
    return f"{virtual.count} virtual tokens of the kind {virtual.kind!r} ({numbers:,} numbers)"


def hold_in_float32(module: nn.Module, outside: torch.dtype) -> None:
    """Keep a module's weights in float32 within a base of another format, in place; its inputs and outputs are cast.

    In 16 bits most of AdamW's steps would be rounded away, and in float16 its epsilon would be zero.
    """
    for part in module.modules():
        if next(part.parameters(recurse=False), None) is not None:
            part.float()
            part.register_forward_pre_hook(
                lambda _, inputs: tuple(x.float() if x.is_floating_point() else x for x in inputs)
            )
            part.register_forward_hook(lambda _, inputs, output: output.to(outside))


def check_packing(base: Base) -> None:
    """Refuse to pack examples for a model whose tokens would see those of other examples.

    Raises:
        ConfigError: naming the model.
    """
    if not base.packs:
        expected = "a causal model whose attention stays within the examples of a row"
        got = f"{base.name} ({base.model.config.model_type}), which reads two examples in one row otherwise than alone"
        raise ConfigError(Fault("client.packing", expected, got, "leave client.packing out, or choose another base"))


def digest(model: nn.Module, *, leave_out: Sequence[str] = ()) -> str:
    """Return the SHA-256 (hex) over names, shapes, dtypes and bytes of the state dict, sorted by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        # Not the new head: it is drawn by the run's seed, and no part of the base that sites have in common.
        if name not in leave_out:
            sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            # Viewed as bytes: numpy has no bfloat16.
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def sum_bits(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's bits as whole numbers, modulo 2^64: another one after almost any change.

    It reads the tensor once. It finds what a program changes by mistake, and proves nothing of one that hides it.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().view(-1)
    return int(flat.view(whole).sum(dtype=torch.int64)) if tensor.numel() else 0


def manifest_of(model: nn.Module) -> Manifest:
    """Return the manifest of a model's parameters, of those without numbers by their shapes; see `Base.manifest`."""
    # By the bytes of the name, on every machine: the place in this order is a tensor's ordinal.
    faults, entries = [], []
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].encode()):
        kind = parameter.dtype
        if kind not in DTYPES.values():
            faults.append(Fault(name, f"weights in {', '.join(DTYPES)}", str(kind), "convert the base"))
            continue
        if parameter.is_meta:
            outline = describe_tensor(name, as_array(torch.empty(0, dtype=kind)))
            entries.append(replace(outline, shape=tuple(parameter.shape)))
            continue
        array = as_array(parameter.detach().cpu().contiguous())
        if fault := tensor_fault(name, array):
            faults.append(fault)
        else:
            entries.append(describe_tensor(name, array))
    if faults:
        raise ConfigError(faults)
    return Manifest(tuple(entries))


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a float32 copy that shares no memory with the tensor."""
    array: Array = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return array


def to_torch(array: Array, device: torch.device) -> torch.Tensor:
    """Return a float32 tensor on the device that shares no memory with the array."""
    return torch.tensor(np.asarray(array, np.float32), device=device)
