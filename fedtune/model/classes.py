"""Names of a classifier's classes: which row of a checkpoint's head is which class of the data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Classes:
    """The classes of a base and its data."""

    labels: Sequence[str]
    """Their names, by row of the head."""
    fits: bool
    """Whether the rows of a head that comes with the checkpoint are these classes; otherwise a new one is drawn."""
    note: str = ""
    """What a user should know, where the checkpoint comes with a head."""


def match_classes(own: Sequence[str], labels: Sequence[str]) -> Classes:
    """Return the classes of a base whose config names its head's rows `own`, for data with these labels.

    The base's names are the truth where the data's are among them. Names such as LABEL_0, which say nothing, take the
    data's in their order.

    >>> match_classes(["yes", "no", "maybe"], ["maybe", "no", "yes"]).labels
    ['yes', 'no', 'maybe']
    """
    if len(set(own)) == len(own) and set(labels) <= set(own):
        unused = [name for name in own if name not in set(labels)]
        note = f"the data hold {len(labels)} of the base's {len(own)} classes (not {shorten(unused)})" if unused else ""
        return Classes(list(own), fits=True, note=note)
    if len(own) == len(labels) and all(re.fullmatch(r"LABEL_\d+", name) for name in own):
        note = f"the base does not name its {len(own)} classes: they are taken for {shorten(labels)}, in this order"
        return Classes(list(labels), fits=True, note=note)
    note = f"the base's head is of other classes ({shorten(own)}) than the data ({shorten(labels)}): a new one is drawn"
    return Classes(list(labels), fits=False, note=note)


def shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def named_rows(config: Any) -> Sequence[str]:
    """Return the names that a config gives its head's rows, by row; none if they are not numbered from zero."""
    names = getattr(config, "id2label", None) or {}
    return [str(names[row]) for row in range(len(names))] if names.keys() == set(range(len(names))) else []


def class_settings(labels: Sequence[str]) -> Mapping[str, Any]:
    """Return the keys of a transformers config that name the classes."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: row for row, label in enumerate(labels)},
        # Of a checkpoint for regression or many labels at once: merged models would compute another loss.
        "problem_type": None,
    }


def head_modules(model: Any) -> Sequence[str]:
    """Return the modules of a classifier beside its body, by name: the layers that make classes of hidden states."""
    children = [(name, child) for name, child in model.named_children() if child is not model.base_model]
    return [name for name, child in children if next(child.parameters(), None) is not None]


def output_layer(model: Any) -> str:
    """Return the name of a classifier's last layer, whose rows are the classes."""
    layers = [
        f"{head}.{name}".rstrip(".")
        for head in head_modules(model)
        for name, module in model.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    return layers[-1]


def draw_output_layer(model: Any, new: Sequence[str]) -> Sequence[str]:
    """Draw a classifier's last layer anew, unless it is new already, and return the names of its parameters."""
    name = output_layer(model)
    layer = model.get_submodule(name)
    names = [f"{name}.{leaf}" for leaf, _ in layer.named_parameters()]
    if not set(names) <= set(new):
        for leaf, parameter in list(layer.named_parameters()):
            setattr(layer, leaf, nn.Parameter(torch.empty_like(parameter)))  # transformers draws no marked parameter
        with torch.no_grad():
            model._init_weights(layer)
    return names
