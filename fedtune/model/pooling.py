"""How a text encoder's hidden states become the vector that a classifier's head reads: their mean, or the first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers.utils import cached_file

from fedtune.errors import ConfigError, Fault
from fedtune.model.settings import ModelSettings

Kind: TypeAlias = Literal["mean", "cls"]
KEY = "classifier_pooling"
"""Of a model's config.json, as ModernBERT names it: so a model that is written with one is read again with it."""
SENTENCE_CONFIG = "1_Pooling/config.json"
"""In which a sentence encoder says how its hidden states are pooled; see sentence-transformers, models.Pooling."""
MODES: Mapping[str, Kind] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
"""Its keys, of which one is true."""

POOLED = frozenset(("albert", "bert", "mobilebert"))
"""Types of models whose head is on the output of a pooler, a layer over the first token's state: it is taken out."""
FIRST = frozenset(
    (
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    )
)
"""Types whose head reads the state of the first token through a layer of its own, which reads the mean instead."""
NATIVE = frozenset(("modernbert",))
"""Types that read `KEY` themselves."""


def choose_pooling(settings: ModelSettings, config: Any, source: str | Path | None) -> Kind | None:
    """Return how a classifier is to pool; None: as its architecture does.

    Args:
        settings: the recipe's table `model`.
        config: of transformers.
        source: folder or hub name that the model is read from; None for one that Python code gives.

    Raises:
        ConfigError: if the recipe names a pooling that this type of model does not have.
    """
    kind, known = str(config.model_type), POOLED | FIRST | NATIVE
    if settings.task != "classification" or settings.pooling == "model":
        return None
    if settings.pooling == "auto":
        stated = stated_pooling(config, source, settings.revision)
        # Decoders that embed sentences say so too, by other means.
        return stated if kind in known and (kind in NATIVE or stated != default_pooling(kind)) else None
    if kind not in known:
        expected, got = f"auto or model for a {kind}", repr(settings.pooling)
        hint = f"types of models that can pool otherwise: {', '.join(sorted(known))}"
        raise ConfigError(Fault("model.pooling", expected, got, hint))
    return None if settings.pooling == default_pooling(kind) else settings.pooling


def default_pooling(kind: str) -> Kind | None:
    """Return how a type of model pools by itself; None where it is neither the mean nor the first state."""
    return "cls" if kind in FIRST else None


def stated_pooling(config: Any, source: str | Path | None, revision: str | None) -> Kind | None:
    """Return what a model's files say of its pooling; None where they say nothing, or something else."""
    named = getattr(config, KEY, None)
    if named == "mean" or named == "cls":
        return named  # type: ignore[no-any-return]
    if source is None:
        return None
    path = cached_file(
        str(source),
        SENTENCE_CONFIG,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        stated = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    modes = [key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True]
    return MODES.get(modes[0]) if len(modes) == 1 else None


def set_pooling(model: Any, kind: Kind | None) -> None:
    """Have a classifier of transformers pool in a way from now on, in place; None changes nothing.

    The pooler of a BERT goes: nothing reads it any more, and what is trained should move the output.
    """
    if kind is None:
        return
    setattr(model.config, KEY, kind)
    if (family := model.config.model_type) in NATIVE:
        return
    body = model.base_model
    if family in POOLED:
        body.pooler = None
        body.register_forward_hook(pool_output if kind == "mean" else take_first, with_kwargs=True)
    else:
        body.register_forward_hook(put_mean_first, with_kwargs=True)


def pool_output(body: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Set the pooled output of a model's body to the mean over the tokens that its attention mask shows."""
    output.pooler_output = masked_mean(output.last_hidden_state, kwargs.get("attention_mask"))
    return output


def take_first(body: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    output.pooler_output = output.last_hidden_state[:, 0]
    return output


def put_mean_first(body: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Put the mean over the tokens in the place of the first one's state, which is all that the head reads."""
    hidden = output.last_hidden_state
    mean = masked_mean(hidden, kwargs.get("attention_mask"))
    output.last_hidden_state = torch.cat([mean[:, None], hidden[:, 1:]], dim=1)
    return output


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of hidden states (batch, time, width) over the tokens of a mask (batch, time), in their format.

    >>> masked_mean(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]])).tolist()
    [[3.0]]
    """
    if mask is None:
        return hidden.mean(1)
    # In float32: a sum over hundreds of tokens in 16 bits would lose the last ones.
    shown = mask[..., None].to(torch.float32)
    mean = (hidden.float() * shown).sum(1) / shown.sum(1).clamp(min=1.0)
    return mean.to(hidden.dtype)


def with_pooling(base_digest: str, kind: Kind | None) -> str:
    """Return the digest (hex) of a base that pools in a way: sites that pool otherwise hold another base."""
    return base_digest if kind is None else hashlib.sha256(f"{base_digest} {KEY}={kind}".encode()).hexdigest()
