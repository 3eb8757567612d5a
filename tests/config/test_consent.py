"""The orders that a recipe permits: those that servers make of it, for every method and planner, and no others."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from fedtune.client.site import Site
from fedtune.config import Recipe, bind
from fedtune.config.consent import (
    first_order,
    order_differences,
    permission,
    permission_texts,
    result_differences,
    score_differences,
)
from fedtune.config.order_rules import FREE
from fedtune.config.personal_requests import personal_request
from fedtune.config.recipe import planned_training, possible_verbs, requested_ratio, verb_request
from fedtune.directions.seed_ledger import describe_base
from fedtune.messages import (
    Assignment,
    Blueprint,
    Client,
    DescendSeeds,
    Personal,
    PersonalRequest,
    Plan,
    PlannedClient,
    Preference,
    ProbeSeeds,
    Proximal,
    Pruning,
    ScoreRequest,
    SeedState,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.methods.personal import with_personal
from fedtune.planning.arms import AdaptiveSettings, Setting, arms_of
from fedtune.planning.planner import PlannerInputs
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout
from fedtune.rounds.transport import Rule, Transport
from fedtune.runs.local import Experiment, prepare, run_context, transport
from fedtune.runs.runner import run_rounds_of
from fedtune.tensors import Tensors
from fedtune.wire.codec import EncodedAssignment, decode_outline, encode_assignment
from fedtune.wire.profile import ClientProfile, ModelSpec
from tests.golden.recipes import recipes, write_data


def profiles(prepared: Experiment) -> Mapping[str, ClientProfile]:
    """Return what each client of an experiment would say of itself."""
    shards = prepared.federation.clients
    sites = {name: Site(name, prepared.base, shard.train, (), 1) for name, shard in shards.items()}
    return {name: site.profile() for name, site in sites.items()}


@dataclass
class Watched:
    """A transport that holds every order against the recipe before it is delivered."""

    inner: Transport
    recipe: Recipe
    profiles: Mapping[str, ClientProfile]
    seen: list[tuple[int, str]] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    orders: list[Assignment] = field(default_factory=list)

    def clients(self) -> Any:
        return self.inner.clients()

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Any:
        for name, encoded in orders.items():
            order = decode_outline(encoded.header)
            self.seen.append((order.round, name))
            self.orders.append(order)
            found = order_differences(self.recipe, self.profiles[name], order)
            self.differing += [f"round {order.round}, {name}: {one}" for one in found]
        return self.inner.exchange(orders, rule)


def watched(recipe: Recipe) -> Watched:
    """Run a recipe whose orders are held against it."""
    prepared = prepare(recipe)
    with transport(prepared) as started:
        result = Watched(started, recipe, profiles(prepared))
        list(run_rounds_of(run_context(prepared), result))
    return result


FAST = ("hetlora",)
"""Of the recipes; the others run in the slow tier."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in recipes()]
)
def test_no_order_of_an_honest_run_is_vetoed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = watched(bind(recipes()[name]))
    assert len({number for number, _ in result.seen}) == 3
    assert result.differing == []


def of_tokens(**adapter: Any) -> Recipe:
    """Return a recipe of the tests whose clients train virtual tokens."""
    tables = {key: value for key, value in recipes()["fedit"].items() if key != "override"}
    client = {**tables["client"], "dropout": 0.0}
    return bind({**tables, "rounds": {"count": 1}, "client": client, "adapter": {"tokens": 3, **adapter}})


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "prefix"},
        pytest.param({"kind": "prompt"}, marks=pytest.mark.slow),
        pytest.param({"kind": "p-tuning", "send": "encoder", "hidden": 8}, marks=pytest.mark.slow),
    ],
)
def test_an_order_for_virtual_tokens_passes_and_any_other_tensor_is_vetoed(
    adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe, lora = of_tokens(**adapter), bind(recipes()["fedit"])
    result = watched(recipe)
    assert result.differing == []
    assert len(result.seen) == 3
    order = result.orders[-1]
    own, task = result.profiles[order.plan.client], order.lora
    assert set(task.blobs) == {"saved"}
    name, tensor = next(iter(task.blobs["saved"].items()))

    def vetoes(**blobs: Tensors) -> list[str]:
        changed = replace(order, task=replace(task, blobs={**task.blobs, **blobs}))
        return [str(one) for one in order_differences(recipe, own, changed)]

    assert any("as saved" in text for text in vetoes(saved={name: np.concatenate([tensor, tensor])}))
    assert any("as saved" in text for text in vetoes(saved={**task.blobs["saved"], "lm_head.weight": tensor}))
    factor = {"model.layers.0.self_attn.q_proj.a": np.ones((1, 4), np.float32)}
    assert vetoes(local=factor)
    assert vetoes(**{"global": factor})
    # A site whose own file says factors, under the same recipe, and the other way round.
    [layers, *_] = profiles(prepare(lora)).values()
    assert any("this site's file must name too" in str(one) for one in order_differences(recipe, layers, order))
    assert any("this site's file must name too" in str(one) for one in order_differences(lora, own, order))


def test_no_order_of_a_run_whose_clients_train_the_upper_blocks_is_vetoed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    tables = recipes()["flora"]
    override = [*tables["override"], {"clients": ["client-1"], "top": 0.4, "down_rank": 1}]
    recipe = bind({**tables, "override": override, "planner": {"name": "fixed", "top": 0.6}})
    result = watched(recipe)
    assert len(result.seen) == 9
    assert result.differing == []
    assert sorted(permission(recipe, "client-1", 8).choices.tops) == [0.4]
    assert (
        permission_texts(recipe, "client-0")["modules"] == "all, or those of a share of the blocks, from the top: 0.6"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedkseed-one-sided"])
def test_no_order_of_a_run_with_a_schedule_over_rounds_is_vetoed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    tables = recipes()[name]
    result = watched(bind({**tables, "rounds": {**tables["rounds"], "schedule": "cosine", "warmup": 1}}))
    assert len(result.seen) == 9
    assert result.differing == []


DESCENDING: Mapping[str, Mapping[str, Any]] = {
    "alone": {"verb": "descend", "groups": 4, "scalar_bits": 4},
    "mixed": {"verb": "auto", "scalar_step": "auto"},
    "redrawn": {"verb": "auto", "redraw": 4, "groups": "tensor"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DESCENDING)
def test_no_order_of_a_run_whose_clients_descend_is_vetoed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    tables, alone = recipes()["fedkseed-hadamard"], name == "alone"
    verbs = [{"clients": ["client-1"], "verb": "probe"}, {"clients": ["client-2"], "verb": "descend"}]
    tables |= {"client": {"batch": 3}} if alone else {"override": verbs}
    rounds = {**tables["rounds"], "count": 5, "schedule": "cosine", "warmup": 1}
    result = watched(
        bind({**tables, "method": {**tables["method"], **DESCENDING[name]}, "descend": {"steps": 2}, "rounds": rounds})
    )
    assert len(result.seen) == 15
    assert result.differing == []


BLOCK = Block("model.layers.0", heads=4, kv_heads=2, head_dim=2, channels=32)
LAYOUT = BlockLayout("llama", (BLOCK,), width=8)
MODULES = {"model.layers.0.mlp.up_proj": (32, 8), "model.layers.0.self_attn.q_proj": (8, 8)}
LISTED = describe_base({f"{name}.weight": np.ones(shape, np.float32) for name, shape in MODULES.items()})
UP = "model.layers.0.mlp.up_proj"
SAVED = {"norm.weight": np.ones(8, np.float32)}
PROFILE = ClientProfile(
    "site-a",
    40,
    ModelSpec("9f3c" * 16, MODULES, SAVED, ("norm",), parameters=320, manifest=LISTED.encode(), anatomy=LAYOUT),
)

ADAPTERS = """
name = "x"
seed = 7
model = { base = "none" }
adapter = { rank = 4, targets = ["q_proj", "up_proj"], modules_to_save = ["norm"] }
method = "flora"
client = { epochs = 1, batch = 4, learning_rate = 0.01, proximal = 0.1 }
rounds = { count = 5 }
planner = { name = "random", ratios = [0.0, 0.25, 0.5], ranks = [2, 4] }
pruning = { multiple = 8, stages = 2 }
evaluate = { batch = 8, client_examples = 16 }
data = { source = "at the sites", split = { kind = "files" } }
"""
PAIRS = """
name = "x"
seed = 7
model = { base = "none" }
adapter = { rank = 4, targets = ["q_proj", "up_proj"] }
method = "fedit"
client = { steps = 6, batch = 4, learning_rate = 0.01, objective = "dpo", dpo_beta = 0.2 }
rounds = { count = 5 }
evaluate = { batch = 8, client_examples = 16 }
data = { source = "at the sites", split = { kind = "files" } }
"""
OWN = """
name = "x"
seed = 7
model = { base = "none" }
adapter = { rank = 4, targets = ["q_proj", "up_proj"] }
method = "fedit"
client = { steps = 6, batch = 4, learning_rate = 0.01 }
rounds = { count = 5 }
evaluate = { batch = 8, client_examples = 16 }
personal = { kind = "ditto", strength = 0.2 }
data = { source = "at the sites", split = { kind = "files" } }
"""
FINETUNED = OWN.replace('"ditto", strength = 0.2', '"finetune", steps = 3')
SEEDS = """
name = "x"
seed = 7
model = { base = "none" }
method = { name = "fedkseed", seeds = 64, scalar_step = 1e-4 }
client = { steps = 6, batch = 4, learning_rate = 0.01 }
rounds = { count = 5 }
data = { source = "at the sites", split = { kind = "files" } }
"""
DESCEND = """
name = "x"
seed = 7
model = { base = "none" }
method = { name = "fedkseed", seeds = 64, scalar_step = 1e-4, verb = "auto", groups = "tensor", redraw = 4 }
client = { steps = 6, batch = 4, learning_rate = 0.01 }
descend = { steps = 3, accumulation = 2 }
rounds = { count = 5 }
data = { source = "at the sites", split = { kind = "files" } }
"""


@cache
def recipe_of(text: str) -> Recipe:
    return bind(text)


def made(text: str, *, ratio: float = 0.0, rank: int = 4) -> Assignment:
    """Return a server's first order, as it comes out of the codec; pruned where a ratio is given."""
    recipe = recipe_of(text)
    method = with_personal(METHODS[recipe.method.name], recipe.personal)
    ranking = {"heads": np.arange(4, dtype=np.float32), "channels": np.arange(32, dtype=np.float32)} if ratio else {}
    blueprint = Blueprint(
        MODULES, SAVED, 4, recipe.seed, LISTED.encode(), LAYOUT, recipe.pruning, ranking if recipe.pruning else {}
    )
    blueprint = replace(blueprint, verbs=possible_verbs(recipe))
    inputs = PlannerInputs(
        seed=recipe.seed,
        rounds=5,
        training=lambda client: (rank, planned_training(recipe, client)[1]),
        verb=partial(verb_request, recipe),
    )
    planned = inputs.plan(Client("site-a", PROFILE.num_examples), rank=rank, ratio=ratio)
    state = method.init(blueprint, recipe.method)
    order = replace(method.assign(state, recipe.seed, planned), base=PROFILE.foundation.base)
    return decode_outline(encode_assignment(order).header)


def own_scores(text: str) -> ScoreRequest:
    """Return a server's request for the scores of a client's own model beside the global one, after two rounds."""
    own = personal_request(recipe_of(text), "site-a", PROFILE.num_examples, 2)
    return ScoreRequest("site-a", "fedit", 2, PROFILE.foundation.base, 8, 16, personal=own)


def keys(text: str, order: Assignment | ScoreRequest) -> set[str]:
    """Return the keys of an order, or a request, that the recipe does not permit."""
    check: Any = order_differences if isinstance(order, Assignment) else score_differences
    return {one.key for one in check(recipe_of(text), PROFILE, order)}


def leaves(value: Any, path: str = "") -> Iterator[tuple[type[Any], str, str, Any]]:
    """Yield (class, field, dotted path, value) of every field of a message."""
    for one in fields(value):
        inner = getattr(value, one.name)
        yield type(value), one.name, f"{path}{one.name}", inner
        if is_dataclass(inner):
            yield from leaves(inner, f"{path}{one.name}.")


def put(value: Any, path: str, new: Any) -> Any:
    """Return a message with one field changed."""
    name, _, rest = path.partition(".")
    return replace(value, **{name: put(getattr(value, name), rest, new) if rest else new})


def others(cls: type[Any], name: str, value: Any) -> Sequence[Any]:
    """Return values that a field may have beside its own."""
    hint = get_type_hints(cls)[name]
    if choices := [one for one in get_args(hint) if isinstance(one, str) and one != value]:
        return choices
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, 10**9, max(0, value - 1)] if value else [1, 10**9]
        case float():
            return [value * 2 + 1e-3, 1e30]
        case str():
            return [f"{value}x", ""] if value else ["x"]
        case bytes():
            return [value + b"x"]
        case None:
            return [7]
        case tuple() | list():
            return [(*value, "x"), ()] if value else [("x",)]
        case dict():
            return [{"strange": {"x": np.zeros((1, 1), np.float32)}}]
        case _:
            return [None]


ORDERS: Mapping[str, tuple[str, Callable[[], Assignment | ScoreRequest]]] = {
    "adapters": (ADAPTERS, lambda: made(ADAPTERS)),
    "pruned": (ADAPTERS, lambda: made(ADAPTERS, ratio=0.5, rank=2)),
    "seeds": (SEEDS, lambda: made(SEEDS)),
    "descend": (DESCEND, lambda: made(DESCEND)),
    "own": (OWN, lambda: made(OWN)),
    "own scores": (OWN, lambda: own_scores(OWN)),
    "own scores after training": (FINETUNED, lambda: own_scores(FINETUNED)),
    "scores": (ADAPTERS, lambda: ScoreRequest("site-a", "flora", 2, PROFILE.foundation.base, 8, 16, {"saved": SAVED})),
}
MESSAGES = (
    *(Assignment, Plan, Training, TrainLora, Pruning, PruningSettings, ProbeSeeds, DescendSeeds, ScoreRequest),
    *(Personal, PersonalRequest),
)
"""The classes whose fields an order has; a `SeedState` is one value, whose digest the client checks."""


@pytest.mark.parametrize("kind", ORDERS)
def test_what_a_server_makes_of_a_recipe_is_permitted(kind: str) -> None:
    text, make = ORDERS[kind]
    assert keys(text, make()) == set()


def test_every_field_of_an_order_is_held_against_the_recipe() -> None:
    """A field that a later release adds is in this test by itself: it must be equal, or be given bounds in `FREE`."""
    met, passed = set[type[Any]](), set[str]()
    for text, make in ORDERS.values():
        order = make()
        for cls, name, path, value in leaves(order):
            if cls is SeedState:
                continue
            met.add(cls)
            if is_dataclass(value):
                continue
            for new in others(cls, name, value):
                named = keys(text, put(order, path, new))
                # Some are held to the recipe as a whole, and named by it.
                found = {key for key in named if f"{key}.".startswith(f"{path}.") or path.startswith(f"{key}.")}
                # Another round has other keys: the seed of the round that it was is the difference.
                if not found and not (path == "round" and keys(text, put(order, path, new))):
                    passed.add(f"{cls.__name__}.{name}")
    assert met == set(MESSAGES)
    swapped = replace(made(SEEDS), task=made(ADAPTERS).task), replace(made(ADAPTERS), task=made(SEEDS).task)
    assert [keys(text, order) for text, order in zip((SEEDS, ADAPTERS), swapped, strict=True)] == [{"task"}] * 2
    # Within their bounds these follow from the server's state, and with the wrong values are refused below.
    assert passed <= FREE.keys() | {"ScoreRequest.round"}


def test_an_order_compares_answers_where_the_recipe_does_and_by_its_beta_alone() -> None:
    order, request = made(PAIRS), ScoreRequest("site-a", "fedit", 2, PROFILE.foundation.base, 8, 16)
    asked = replace(request, preference=Preference(0.2))
    assert keys(PAIRS, order) == keys(PAIRS, asked) == set()
    for terms in ((), (Preference(0.1),), (Preference(0.2), Proximal(0.1))):
        assert keys(PAIRS, replace(order, task=replace(order.lora, terms=terms))) == {"task.terms"}
    assert keys(PAIRS, request) == {"preference"}
    assert keys(PAIRS, replace(request, preference=Preference(0.1))) == {"preference.beta"}
    likelihood = PAIRS.replace(', objective = "dpo", dpo_beta = 0.2', "")
    assert keys(likelihood, order) == {"task.terms"}
    assert keys(likelihood, asked) == {"preference"}


@pytest.mark.parametrize("text", [ADAPTERS, SEEDS], ids=["adapters", "seeds"])
def test_the_rate_of_an_order_is_that_of_its_round_and_no_other(text: str) -> None:
    plain, text = text, text.replace("count = 5", 'count = 5, schedule = "linear", warmup = 1, final_rate = 0.4')
    for number, share in enumerate((0.5, 1.0, 0.8, 0.6, 0.4), 1):
        for other in (0.5, 1.0, 0.8, 0.6, 0.4, 0.55):
            order = put(put(made(plain), "round", number), "plan.training.learning_rate", 0.01 * other)
            differing = {key for key in keys(text, order) if key.startswith("plan")}
            # Along seeds the server halves it where losses rise.
            shares = {share * 0.5**count for count in range(5 if plain == SEEDS else 1)}
            assert differing == (set() if other in shares else {"plan.training.learning_rate"})


def descending(text: str, number: int = 1, head: Tensors | None = None) -> Assignment:
    """Return a server's order of a round to a client that descends, or to measure where the recipe's verb says so."""
    recipe, method = recipe_of(text), METHODS["fedkseed"]
    blueprint = Blueprint(MODULES, SAVED, 4, 7, LISTED.encode(), verbs=possible_verbs(recipe))
    request = verb_request(recipe, "site-a")
    plan = Plan("site-a", 1, 1.0, replace(planned_training(recipe, "site-a")[1], steps=3))
    state = replace(method.init(blueprint, recipe.method), round=number - 1, head=head or {})
    order = method.assign(state, recipe.seed, PlannedClient(plan, verb=request.verb, probing=request.probing))
    return decode_outline(encode_assignment(replace(order, base=PROFILE.foundation.base)).header)


def test_with_auto_a_client_may_be_asked_to_probe_and_a_client_that_descends_may_not() -> None:
    probing, order = made(SEEDS), made(DESCEND)
    bank = order.probe
    alone = replace(order, task=bank, plan=replace(order.plan, training=probing.plan.training))
    assert keys(DESCEND, alone) == set()
    assert keys(DESCEND, put(alone, "plan.training.steps", 3)) == {"plan.training.steps"}
    must = DESCEND.replace('"auto"', '"descend"').replace("client = { steps = 6, batch = 4, learning_rate = 0.01 }", "")
    assert keys(must, descending(must)) == set()
    assert "task" in keys(must, alone)
    # An order with no way out, where the recipe leaves the client one.
    assert keys(DESCEND, put(order, "task.fallback", None)) == {"task.fallback"}
    assert keys(DESCEND, put(order, "task.fallback.steps", 7)) == {"task.fallback.steps"}


def test_what_a_client_that_descends_may_be_asked_and_sends_is_said_in_words() -> None:
    texts = permission_texts(recipe_of(DESCEND), "site-a")
    assert texts["work"] == (
        "3 steps of 8 examples, at the rate 0.01 of the size of its weights; "
        "or, where its memory is too small, 6 steps of 4 examples, at the rate 0.01"
    )
    assert texts["bytes"] == (
        "numbers of 8 bits, 64 for each tensor that is tuned: its whole change of the weights, projected on as many "
        "directions"
    )
    few = permission_texts(recipe_of(DESCEND.replace('"tensor"', "4, scalar_bits = 4")), "site-a")
    assert few["bytes"].startswith("numbers of 4 bits, 256: its whole change")
    assert "bytes" not in permission_texts(recipe_of(SEEDS), "site-a")


def test_all_measure_in_the_first_round_of_a_mixed_run_and_descend_after() -> None:
    mixed = DESCEND.replace(", scalar_step = 1e-4", "")
    first = descending(mixed)
    assert (type(first.task), first.probe.calibrate) == (ProbeSeeds, True)
    assert keys(mixed, first) == set()
    second = descending(mixed, 2)
    assert isinstance(second.task, DescendSeeds)
    assert keys(mixed, put(second, "task.probe.calibrate", False)) == set()
    assert keys(mixed, second) == {"task.probe.calibrate"}


@pytest.mark.parametrize("verb", ["descend", "auto"])
@pytest.mark.parametrize("rate", ["", ", learning_rate = 0.01"])
def test_all_measure_in_the_round_after_the_one_that_makes_the_head(verb: str, rate: str) -> None:
    row = 'override = [{ clients = ["site-b"], verb = "probe" }]\nadapter = { head = "lda" }\n'
    text = row + DESCEND.replace('verb = "auto"', f'verb = "{verb}"').replace(", scalar_step = 1e-4", "")
    text = text.replace('base = "none"', 'base = "none", task = "classification"')
    text = text.replace(", learning_rate = 0.01", rate)
    second = descending(text, 2, head=SAVED)
    assert (type(second.task), second.probe.calibrate) == (ProbeSeeds, True)
    assert keys(text, second) == set()
    third = descending(text, 3, head=SAVED)
    assert isinstance(third.task, DescendSeeds)
    assert keys(text, put(third, "task.probe.calibrate", False)) == set()
    # In no later round may one be asked to that must descend.
    late = put(put(second, "round", 3), "task.state.round", 2)
    assert bool(keys(text, late) & {"task", "method"}) == (verb == "descend")
    assert all(str(one).partition("; got ")[2] for one in order_differences(recipe_of(text), PROFILE, late))


@pytest.mark.parametrize("number", [1, 4, 5])
def test_the_banks_of_an_order_are_those_of_its_round(number: int) -> None:
    order = descending(DESCEND, number)
    assert len(order.probe.earlier) == (number - 1) // 4
    assert keys(DESCEND, order) == set()
    other = descending(DESCEND, 6 - number if number != 4 else 5).probe
    if other.key != order.probe.key:
        differing = put(put(order, "task.probe.key", other.key), "task.probe.earlier", other.earlier)
        assert keys(DESCEND, differing) == {"task.probe.key", "task.probe.earlier"}


def test_a_measurement_of_the_unit_is_permitted_at_the_full_rate_alone() -> None:
    text = SEEDS.replace(", scalar_step = 1e-4", "").replace("count = 5", "count = 5, warmup = 1")
    order = made(text)
    assert order.probe.calibrate
    assert keys(text, order) == set()
    assert keys(text, put(order, "plan.training.learning_rate", 0.005)) == {"plan.training.learning_rate"}


def test_a_rate_that_the_first_round_measures_may_be_any_up_to_the_largest_of_the_recipe() -> None:
    text = SEEDS.replace(", learning_rate = 0.01", "").replace("seeds = 64", "seeds = 64, largest_rate = 0.03")
    order = made(text)
    assert (order.probe.calibrate, order.probe.curvatures) == (True, True)
    assert recipe_of(text).client.learning_rate == "auto"
    assert keys(text, order) == set()
    stepping = put(put(order, "task.calibrate", False), "task.curvatures", False)
    for rate, vetoed in ((1e-9, False), (0.03, False), (0.0301, True), (1e9, True)):
        differing = keys(text, put(stepping, "plan.training.learning_rate", rate))
        assert differing == ({"plan.training.learning_rate"} if vetoed else set())
    # The rate of an order that only measures is used for nothing, and within the same bound.
    low = text.replace("largest_rate = 0.03", "largest_rate = 1e-4")
    assert keys(low, made(low)) == set()
    # The unit of scalars is still the recipe's own.
    assert keys(text, put(stepping, "task.exponent", 1)) == {"task.exponent", "task.perturbation"}
    assert "that the first round measures" in permission_texts(recipe_of(text), "site-a")["work"]


def test_a_rate_may_be_halved_four_times_and_be_no_other_below_the_recipes() -> None:
    order = put(put(made(SEEDS), "round", 5), "task.state.round", 4)
    for rate, vetoed in ((0.005, False), (0.01 / 16, False), (0.01 / 32, True), (0.006, True), (0.02, True)):
        differing = keys(SEEDS, put(order, "plan.training.learning_rate", rate)) - {"seed"}
        assert differing == ({"plan.training.learning_rate"} if vetoed else set())
    # Once a round: none has gone before the first.
    for number, rate, vetoed in ((1, 0.005, True), (2, 0.005, False), (2, 0.0025, True)):
        early = put(
            put(put(order, "round", number), "task.state.round", number - 1), "plan.training.learning_rate", rate
        )
        assert ("plan.training.learning_rate" in keys(SEEDS, early)) == vetoed
    # Of adapters no server halves the rate.
    assert keys(ADAPTERS, put(made(ADAPTERS), "plan.training.learning_rate", 0.005)) == {"plan.training.learning_rate"}


@pytest.mark.guarantee("G4")
def test_the_rate_of_a_fallback_is_held_against_the_recipe_like_that_of_the_order() -> None:
    order = made(DESCEND)
    task = order.descend
    assert task.fallback is not None
    for rate in (1e9, 0.0101):
        lie = replace(order, task=replace(task, fallback=replace(task.fallback, learning_rate=rate)))
        assert any(key.endswith("learning_rate") for key in keys(DESCEND, lie))


def test_curvatures_are_not_measured_where_the_recipe_gives_a_rate() -> None:
    order = made(SEEDS.replace(", scalar_step = 1e-4", ""))
    text = SEEDS.replace(", scalar_step = 1e-4", "")
    assert keys(text, put(order, "task.curvatures", True)) == {"task.curvatures"}


def test_an_order_of_the_attack_is_vetoed_with_every_key_that_differs() -> None:
    order = made(ADAPTERS)
    one_example = replace(order.plan.training, steps=1, batch=1)
    found = order_differences(recipe_of(ADAPTERS), PROFILE, put(order, "plan.training", one_example))
    assert [str(one) for one in found] == [
        "plan.training.batch: expected 4; got 1",
        "plan.training.steps: expected 10; got 1",
    ]
    # The planner may ask for a half or a quarter of the steps, and for nothing between.
    half, third = (put(order, "plan.training.steps", steps) for steps in (5, 4))
    assert [list(order_differences(recipe_of(ADAPTERS), PROFILE, one)) for one in (half,)] == [[]]
    assert [str(one) for one in order_differences(recipe_of(ADAPTERS), PROFILE, third)] == [
        "plan.training.steps: expected 10; got 4"
    ]
    endless = replace(order.plan.training, steps=10**9, learning_rate=1e30)
    assert keys(ADAPTERS, put(order, "plan.training", endless)) == {
        "plan.training.learning_rate",
        "plan.training.steps",
    }
    assert keys(ADAPTERS, put(order, "base", "")) == {"base"}
    for number in (0, 6, 2**31):
        assert keys(ADAPTERS, replace(order, round=number)) == {"round"}


@pytest.mark.guarantee("G2")
def test_a_recipe_does_not_decide_how_much_memory_a_site_takes_to_refuse_it() -> None:
    """A layer as wide as this rank would take 36 MB at 3,000, and 14 GB at 60,000."""
    recipe = bind(ADAPTERS.replace("rank = 4", "rank = 3000").replace("ranks = [2, 4]", "ranks = [3000]"))
    tracemalloc.start()
    try:
        found = order_differences(recipe, PROFILE, replace(made(ADAPTERS), seed=1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 1
    assert "adapter.rank: expected at most 32, as a layer here is wide; got 3000" in str(found[0])
    assert peak < 2**20


def test_a_client_may_be_asked_for_the_rank_that_it_has_left_after_a_cut() -> None:
    text = (
        ADAPTERS.replace('"flora"', '"hetlora"').replace("pruning =", "# ").replace(", ratios = [0.0, 0.25, 0.5]", "")
    )
    order = put(made(text), "task.blobs", {"saved": SAVED})
    assert keys(text, put(order, "plan.rank", 3)) == set()
    assert keys(text, put(order, "plan.rank", 5)) == {"plan.rank"}


def test_a_planner_that_does_not_name_its_choices_may_ask_for_less_and_not_for_more() -> None:
    from fedtune.planning.planner import PlannerType, any_choice

    allowed = any_choice(None, 4, 0.0)
    assert (allowed.ranks, allowed.ratios, allowed.fewer_steps) == (None, None, True)
    assert PlannerType("x", Plan, lambda settings, inputs: None).choices is any_choice  # type: ignore[arg-type, return-value]


RECIPES = sorted((Path(__file__).parents[2] / "simulations").rglob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_recipe_permits_what_its_planner_may_choose(path: Path) -> None:
    recipe = bind(path)
    allowed = permission(recipe, "client-0", 100)
    order = first_order(recipe, "client-0", 100)
    assert order.method == recipe.method.name
    assert order.plan.training.steps == allowed.training.steps
    if isinstance(recipe.planner, AdaptiveSettings):
        pruning = recipe.pruning
        run = Setting(recipe.adapter.rank, pruning.target if pruning else 0.0, pruned=pruning is not None)
        arms = arms_of(recipe.planner, run)
        assert all(allowed.rank(arm.rank) and allowed.ratio(arm.ratio) for arm in arms)
        assert {arm.top for arm in arms} == {1.0, *allowed.choices.tops}
        assert {arm.back for arm in arms} == {0.0, *allowed.choices.backs}
    else:
        assert allowed.ratio(requested_ratio(recipe, "client-0"))
        assert not allowed.rank(0)


def test_scores_are_asked_for_as_the_recipe_says_or_not_at_all() -> None:
    request = ORDERS["scores"][1]()
    assert isinstance(request, ScoreRequest)
    assert keys(ADAPTERS.replace("{ batch = 8", "{ clients = false, batch = 8"), request) == {"evaluate.clients"}
    assert keys(ADAPTERS, replace(request, round=6)) == {"round"}
    seeds = replace(request, method="fedkseed", batch=16, examples=64, blobs={}, ledger=b"x", trainable=(0,))
    assert keys(SEEDS, seeds) == set()
    assert keys(SEEDS, replace(seeds, ledger=b"", blobs={"saved": SAVED})) == {"ledger", "blobs", "trainable"}
    # The base is scored before the first round, which no seeds have changed yet.
    assert keys(SEEDS, replace(seeds, round=0, ledger=b"", trainable=())) == set()
    assert keys(SEEDS, replace(seeds, round=1, ledger=b"", trainable=())) == {"ledger"}


def test_a_result_is_of_the_kind_that_the_recipe_makes() -> None:
    recipe = recipe_of(ADAPTERS)
    assert result_differences(recipe, 5, ["adapter/adapter_config.json"]) == []
    assert [one.key for one in result_differences(recipe, 6, ["seeds/ledger.ftks"])] == ["result", "round"]
