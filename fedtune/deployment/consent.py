"""A site's orders held against the recipe that it has accepted, and against what the site says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import starmap
from pathlib import Path

from fedtune.config import Recipe, bind
from fedtune.config.consent import order_differences, result_differences, score_differences
from fedtune.errors import ConfigError, Fault, StoreError, WireError
from fedtune.link.client.order_limits import limit_violations
from fedtune.link.client.policy import OrderCheck, PolicyViolation
from fedtune.link.client.session import Greeting
from fedtune.link.envelopes import EVALUATE, RESULT, TRAIN
from fedtune.link.settings import Policy
from fedtune.store.files import store_errors
from fedtune.wire.codec import decode_outline
from fedtune.wire.profile import ClientProfile, profile_outline
from fedtune.wire.scores import score_request_outline
from fedtune.wire.v1 import link_pb2 as pb


def order_check(state: Path, rules: Policy) -> OrderCheck:
    """Return the check of a site's orders.

    Args:
        state: the site's folder, where its profile lies.
        rules: what it allows.
    """

    def check(greeting: Greeting, header: pb.Header, front: bytes) -> Sequence[PolicyViolation]:
        limits = list[tuple[pb.Veto, str]]()
        try:
            texts = recipe_faults(greeting, state, header, front)
            if header.task == TRAIN:
                order = decode_outline(front)
                num_examples = stored_profile(state, order.labels).num_examples
                limits = [*limit_violations(rules, order, num_examples)]
        except (ConfigError, WireError, StoreError) as error:
            texts = [f"expected an order that can be held against the recipe; {error}"]
        return [*(PolicyViolation(pb.VETO_RECIPE_DIFFERS, text) for text in texts), *starmap(PolicyViolation, limits)]

    return check


def recipe_faults(greeting: Greeting, state: Path, header: pb.Header, front: bytes) -> Sequence[str]:
    """Return in which sentences an order is none that the accepted recipe permits.

    Raises:
        ConfigError: if the recipe cannot be bound here.
        StoreError: if the site's profile cannot be read.
        WireError: if the order is malformed.
    """
    if header.recipe != greeting.recipe_digest:
        return ["expected an order under the recipe that this site has accepted; got one under another"]
    return [str(one) for one in order_faults(accepted_recipe(greeting.recipe), state, header, front)]


def order_faults(recipe: Recipe, state: Path, header: pb.Header, front: bytes) -> Sequence[object]:
    """Return what of an order is not as the recipe says; `front` is empty for the order that brings the result."""
    if header.task == RESULT:
        return result_differences(recipe, header.round, [part.key for part in header.parts])
    if header.task == EVALUATE:
        request = score_request_outline(front)
        profile = stored_profile(state, request.labels)
        return [*base_faults(profile, header), *score_differences(recipe, profile, request)]
    order = decode_outline(front)
    profile = stored_profile(state, order.labels)
    return [*base_faults(profile, header), *order_differences(recipe, profile, order)]


def base_faults(profile: ClientProfile, header: pb.Header) -> Sequence[str]:
    """Return what is wrong with the base of a signed header: seeds name it nowhere else."""
    own, came = profile.foundation.base, header.base.hex()
    return [] if own == came else [f"base: expected this site's own, {own[:12]}; got {came[:12] or 'none'}"]


@lru_cache(maxsize=2)
def accepted_recipe(text: bytes) -> Recipe:
    """Return the recipe of a greeting.

    Raises:
        ConfigError: if it is wrong, or its method or planner is not installed here.
    """
    try:
        return bind(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(Fault("recipe", "text in UTF-8", "bytes that are none")) from error


def stored_profile(state: Path, labels: Sequence[str]) -> ClientProfile:
    """Return what the site says of itself: with the classes of the federation, where it was asked for these."""
    with store_errors(state):
        profile = profile_outline((state / "profile" / "front").read_bytes())
        agreed = state / "profile-labels" / "front"
        if labels and tuple(labels) != tuple(profile.foundation.labels) and agreed.exists():
            # The head has a row for each class of the federation.
            profile = profile_outline(agreed.read_bytes())
    return profile
