"""The base of a device's own file: its bundle, tokenizer and layers, checked, and its runtime once it is needed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedtune.config.site import SiteSettings
from fedtune.edge.bundle import Bundle, read_bundle
from fedtune.edge.memory import check_memory
from fedtune.edge.runtime import Runtime, load_runtime
from fedtune.edge.tokenizer import EdgeTokenizer, read_tokenizer
from fedtune.errors import ConfigError, Fault
from fedtune.link.pki.identity import ROOT, ROSTER, parse_root_key
from fedtune.link.pki.roster import Roster, decode
from fedtune.link.settings import GIB
from fedtune.model.settings import ModelSettings, is_pattern, names_module

ALL = "all-linear"


@dataclass(frozen=True)
class Opened:
    """A bundle that a device can compute with."""

    bundle: Bundle
    tokenizer: EdgeTokenizer
    modules: Mapping[str, tuple[int, int]]
    """(out, in) of the layers that the device's file names, by full name in sorted order."""
    threads: int
    max_bytes: int | None
    """Main memory that the owner allows; None: no limit."""

    @property
    def layers(self) -> Collection[str]:
        """Names of the matrices of these layers."""
        return [f"{name}.weight" for name in self.modules]

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return "runtime" in vars(self)

    @cached_property
    def runtime(self) -> Runtime:
        """What computes; loaded when it is first asked for."""
        check_memory(self.bundle, self.max_bytes)
        return load_runtime(self.bundle, threads=self.threads)


def open_base(settings: SiteSettings, *, source: str) -> Opened:
    """Return the base of a device's file.

    Raises:
        ConfigError: if the bundle is none, or another than the file asks for.
        StoreError: if a file of it is damaged or missing, or its signature does not hold.
    """
    model = settings.model
    bundle = read_bundle(settings.root / model.base, own_roster(settings), unsigned=settings.policy.unsigned_base)
    if faults := [*model_faults(model, bundle), *layer_faults(settings, bundle)]:
        raise ConfigError(faults, source=source)
    limit = settings.policy.max_memory_gib
    max_bytes = None if limit is None else int(limit * GIB)
    # Before the device says hello: a base that it cannot hold is no reason for a round to wait.
    check_memory(bundle, max_bytes)
    # Read once, when the tokenizer first encodes several texts: without it that takes every core.
    os.environ.setdefault("RAYON_NUM_THREADS", str(model.threads))
    return Opened(bundle, read_tokenizer(bundle), named_modules(settings, bundle), model.threads, max_bytes)


def own_roster(settings: SiteSettings) -> Roster | None:
    """Return the roster of the device's federation, checked; None before it is enrolled.

    Raises:
        ConfigError: if the roster is not one of the federation.
    """
    if settings.link is None:
        return None
    folder = (settings.root / settings.link.identity).resolve()
    if not (folder / ROSTER).exists():
        return None
    return decode((folder / ROSTER).read_bytes(), parse_root_key((folder / ROOT).read_bytes()))


def model_faults(model: ModelSettings, bundle: Bundle) -> Iterator[Fault]:
    """Yield every setting of the table `model` that a bundle cannot follow."""
    where = "for a bundle"
    if model.task != "causal":
        yield Fault("model.task", f"'causal' {where}", repr(model.task))
    if model.revision is not None:
        yield Fault("model.revision", f"none {where}, which is one revision", repr(model.revision), "leave it out")
    own = bundle.facts.dtype
    if model.dtype not in ("auto", own):
        hint = "leave it out, or get a bundle in that format: fedtune export --edge"
        yield Fault("model.dtype", f"{own!r}, the format of this bundle", repr(model.dtype), hint)
    if model.kernels not in ("auto", "torch"):
        yield Fault("model.kernels", f"'auto' {where}", repr(model.kernels), "leave it out")
    if model.device not in ("auto", "cpu"):
        yield Fault("model.device", f"'cpu' {where}", repr(model.device), "leave it out, or run fedtune-client")
    if model.processes != 1:
        yield Fault("model.processes", f"1 {where}", str(model.processes), "raise model.threads instead")
    if model.digest is not None and model.digest != bundle.base_digest:
        expected = f"the base that the file names, {model.digest[:12]}"
        yield Fault("model.base", expected, f"a bundle of {bundle.base_digest[:12]}", "get the bundle of that base")


def layer_faults(settings: SiteSettings, bundle: Bundle) -> Iterator[Fault]:
    """Yield what of the table `adapter` a bundle cannot follow."""
    if settings.adapter is None:
        return
    if settings.adapter.modules_to_save:
        saved = ", ".join(settings.adapter.modules_to_save)
        yield Fault("adapter.modules_to_save", "none for a device, which trains no module in full", saved)
    names = bundle.facts.modules
    for target in settings.adapter.targets:
        if target != ALL and not any(names_module(target, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            got = f"{target!r}, which {'fits' if is_pattern(target) else 'is'} none"
            yield Fault("adapter.targets", f"layers of the bundle ({known})", got)


def named_modules(settings: SiteSettings, bundle: Bundle) -> Mapping[str, tuple[int, int]]:
    """Return the layers that a device's file names, as a client with torch reads the same table; all without one."""
    targets = (ALL,) if settings.adapter is None else tuple(settings.adapter.targets)
    return {
        name: (module.out, module.width)
        for name, module in sorted(bundle.facts.modules.items())
        if any(target == ALL or names_module(target, name) for target in targets)
    }
