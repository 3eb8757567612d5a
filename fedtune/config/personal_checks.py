"""What the table `personal` must satisfy together with the rest of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedtune.config.error_text import display, join_words, quote
from fedtune.config.recipe import Recipe, method_type_of
from fedtune.errors import ConfigError, Fault
from fedtune.messages import Personal
from fedtune.methods import METHODS
from fedtune.methods.method import LinearMethod, Method
from fedtune.tasks import KEEP, STRENGTH

WHY_NOT: Mapping[str, str] = {
    "flora": "its clients draw new factors in every round, which nothing of an earlier round fits",
    "flexlora": "its server decomposes the mean anew in every round, into factors of other coordinates",
    "fedex": "its server moves what the mean lacks into the base, under the clients' own models",
    "hetlora": "its clients cut their ranks",
    "fedkseed": "its clients train no adapter",
}
"""Why methods take no personal model, where there is more to say than that their server averages no factors."""


def personal_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse personal models where nothing of them could be right, and keys that another kind reads."""
    personal = recipe.personal
    if personal is None:
        return
    method = method_type_of(recipe)
    if not averages(method):
        able = [name for name, other in METHODS.items() if averages(other)]
        why = WHY_NOT.get(method.name, "its server averages no factors")
        expected = f"a method that averages factors ({join_words(able, joint='or')}) beside [personal]"
        yield Fault("method.name", expected, f"{quote(method.name)}: {why}", "change it, or leave [personal] out")
    others = {
        "pruning": (recipe.pruning is not None, "that table"),
        # A client would store the states of rounds that it has been asked for in any order.
        "asynchronous": (recipe.asynchronous is not None, "that table"),
        "client.objective": (recipe.client.objective != "likelihood", quote(recipe.client.objective)),
        "model.processes": (recipe.model.processes > 1, str(recipe.model.processes)),
        "adapter.kind": (recipe.adapter.kind != "lora", quote(recipe.adapter.kind)),
    }
    for path, (there, got) in others.items():
        if there:
            yield Fault(path, "none beside [personal]", got, "leave one of the two out")
    yield from key_faults(personal)
    yield from kept_faults(recipe, personal)
    yield from step_faults(recipe, personal)


def check_scored(recipe: Recipe) -> None:
    """Refuse models of clients' own that a simulation would never score; a site has its own `data.held_out`.

    Raises:
        ConfigError: if clients hold no rows out.
    """
    if recipe.personal is not None and not recipe.data.held_out:
        expected = "a share above 0 beside [personal]: a client's own model is scored on the rows that it holds out"
        raise ConfigError(Fault("data.held_out", expected, "0", "write, say, 0.1, or leave [personal] out"))


def averages(method: Method[Any]) -> bool:
    """Return whether a server averages the factors that clients train, in the coordinates in which they start."""
    return isinstance(method, LinearMethod) and method.averages_factors


def key_faults(personal: Personal) -> Iterator[Fault]:
    """Refuse keys that the kind does not read: a recipe must not say what is not done."""
    kind = personal.kind
    readers: Mapping[str, tuple[str, ...]] = {
        "keep": tuple(KEEP),
        "strength": tuple(STRENGTH),
        "rate": ("ditto", "pfedme", "fedrep", "finetune"),
        "steps": ("ditto", "pfedme", "fedrep", "finetune"),
    }
    for key, kinds in readers.items():
        value = getattr(personal, key)
        if kind not in kinds and value not in (None, ()):
            expected = f"none with kind = {quote(kind)}; {join_words(map(quote, kinds))} read it"
            yield Fault(f"personal.{key}", expected, display(value), "leave it out, or change the kind")
    if kind == "fedrep" and not personal.keep:
        expected = "globs over the tensors that stay with their client"
        hint = 'e.g. keep = ["*layers.4.*"], ["score*"] or ["*.b"]'
        yield Fault("personal.keep", expected, "none", hint)


def kept_faults(recipe: Recipe, personal: Personal) -> Iterator[Fault]:
    """Refuse first values that would have to be sent of tensors which come in no message."""
    if personal.kind not in KEEP:
        return
    if recipe.adapter.start is not None:
        expected = (
            f"none with personal.kind = {quote(personal.kind)}: what stays with clients is not sent to them either"
        )
        yield Fault("adapter.start", expected, display(recipe.adapter.start), 'or take kind = "ditto"')
    if recipe.adapter.head == "lda":
        expected = f"'drawn' with personal.kind = {quote(personal.kind)}, whose clients may keep the head"
        yield Fault("adapter.head", expected, "'lda'", 'or take kind = "ditto"')


def step_faults(recipe: Recipe, personal: Personal) -> Iterator[Fault]:
    """Refuse a pull that goes past its aim, and FedProx's where clients have no part of the plain method."""
    client, kind = recipe.client, personal.kind
    if client.proximal > 0 and kind in ("pfedme", "fedrep"):
        yield Fault("client.proximal", f"0 with personal.kind = {quote(kind)}", f"{client.proximal:g}")
    if kind not in STRENGTH:
        return
    rates = {} if client.learning_rate == "auto" else {"client.learning_rate": client.learning_rate}
    own = {"personal.rate": personal.rate} if personal.rate else rates
    # Adam's steps have the size of the rate, whatever the gradient.
    pulled = {**(own if client.optimizer == "sgd" else {}), **(rates if kind == "pfedme" else {})}
    for path, rate in pulled.items():
        if rate * personal.pull > 1:
            expected = f"at most {1 / rate:g}, one over {path}: a larger one goes past what it pulls towards"
            yield Fault("personal.strength", expected, f"{personal.pull:g}", f"or lower {path}")
