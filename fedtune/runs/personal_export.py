"""A client's own model, put together from the run's last state and what the client has stored: for others to load."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.methods.method import GlobalModel
from fedtune.runs.context import bind_to_score
from fedtune.store.round_records import read_rounds

FOLDER = "personal"


def own_model(run: Path, client: str, round: str | None) -> tuple[GlobalModel, Mapping[str, Any]]:
    """Return (model, provenance) of one client after a run's last round.

    With `fedrep`, `share-a` and `fedbn` that is the server's model with the client's tensors in their places, with
    `ditto` and `pfedme` what the client has trained for itself; as it was scored.

    Args:
        run: the directory of a simulated run.
        client: its name.
        round: `last`, or none.

    Raises:
        ConfigError: if the run has no models of its clients, none of that client, or another round is asked for.
        StoreError: if the client has stored none, or it is damaged.
    """
    check_request(bind_to_score(run), round)
    records = read_rounds(run)
    check_name(client, sorted({name for record in records for name in record.clients}))
    from fedtune.client.personal_scoring import combine
    from fedtune.client.personal_state import client_folder
    from fedtune.runs.trained_run import load_run

    last = records[-1]
    stored = client_folder(run / FOLDER, client).load(client, last.round + 1)
    if stored is None:
        hint = "its model is the global one: leave --client out"
        raise StoreError(
            f"{run / FOLDER}: expected a model that {client} has stored; got none, or a damaged one; {hint}"
        )
    tuned = load_run(run, last=True).tuned
    adapter, saved = combine(tuned.adapter, tuned.saved, stored.state)
    origin = {"client": client, "personal": stored.state.kind, "personal_state": stored.digest.hex()}
    return GlobalModel(adapter, saved), {**origin, "round": last.round, "state_digest": last.state_digest}


def check_request(recipe: Recipe, round: str | None) -> None:
    """Refuse what has no models of its clients that could be written.

    Raises:
        ConfigError: saying why.
    """
    if recipe.personal is None:
        raise ConfigError(Fault("client", "a run with the table personal", "one without", "leave --client out"))
    if not recipe.personal.has_state:
        got = f"personal.kind = {recipe.personal.kind!r}, of which nothing stays"
        hint = "export the global model, and tune it at the client"
        raise ConfigError(Fault("client", "a kind that stores clients' own models", got, hint))
    if round == "best":
        raise ConfigError(Fault("round", "'last': clients store their own models of the last rounds", repr(round)))


def check_name(client: str, known: list[str]) -> None:
    if client not in known:
        near = difflib.get_close_matches(client, known, n=1)
        names = f"{', '.join(known[:5])}{', ...' * (len(known) > 5)}"
        hint = f"did you mean {near[0]}?" if near else ""
        raise ConfigError(Fault("client", f"a client of the run ({names})", repr(client), hint))


def folder_name(form: str, client: str) -> str:
    """Return the name of the folder that a client's model is written to.

    Raises:
        ConfigError: if the client's name is none of a folder.
    """
    if re.fullmatch(r"[\w-][\w.-]*", client) is None:
        raise ConfigError(Fault("out", "a folder for this client, whose name is none", repr(client), "give --out"))
    return f"{form}-{client}"
