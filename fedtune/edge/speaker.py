"""The model of a device, opened for a conversation: its bundle, the seeds that it has received last, its runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.config.site import SiteSettings, bind_site
from fedtune.data.federation import form_of
from fedtune.data.settings import Form
from fedtune.data.source import read_source
from fedtune.edge.base import open_base
from fedtune.edge.current_model import CurrentModel, read_model
from fedtune.edge.site import check_local
from fedtune.edge.talk import Speaker, check_tuned
from fedtune.errors import ConfigError, Fault, FedtuneError


def open_speaker(site: Path, *, tuned: bool) -> tuple[Speaker, Sequence[str]]:
    """Return what answers on a device, and what its owner should know before.

    Args:
        site: the device's own file.
        tuned: answer as the model that was received last; otherwise as the base.

    Raises:
        ConfigError: if the file is wrong, no model was received yet, or it is one of another base.
        StoreError: if the bundle or the model is damaged.
    """
    settings = bind_site(site)
    model = current_model(settings, site) if tuned else None
    opened = open_base(settings, source=str(site))
    if model is not None:
        check_tuned(opened.bundle, model.ledger)
    form, note = form_of_rows(settings)
    speaker = Speaker(
        opened.bundle,
        opened.tokenizer,
        opened.runtime,
        None if model is None else model.ledger,
        () if model is None else model.trainable,
        settings.data,
        form,
    )
    about = [f"the model after round {model.ledger.round}" if model else "the base alone"]
    return speaker, [*about, *opened.bundle.warnings, *([note] if note else [])]


def current_model(settings: SiteSettings, site: Path) -> CurrentModel:
    """Return the model that a device has received last.

    Raises:
        ConfigError: if there is none.
        StoreError: if its file is damaged.
    """
    model = read_model(settings.state)
    if model is None:
        hint = f"run fedtune-edge join {site} until a round is complete, or chat --base"
        raise ConfigError(Fault("link.state", f"a tuned model in {settings.state}", "none yet", hint))
    return model


def form_of_rows(settings: SiteSettings) -> tuple[Form, str]:
    """Return what the device's rows are, and a note where they cannot be read: a conversation needs none of them."""
    try:
        check_local(settings.data, settings.root)
        return form_of(read_source(settings.data, settings.root, task="causal")), ""
    except FedtuneError as error:
        return "instruction", f"questions are written as instructions, since the rows cannot be read: {error}"
