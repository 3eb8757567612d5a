"""A recipe's text binds to the same recipe, and its digest changes with what changes the result, with nothing else."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.config import Override, Recipe, ReportSettings, bind, changes, digest, render
from fedtune.config.checks import IDLE
from fedtune.config.render import toml
from fedtune.data.settings import DataSettings, Split
from fedtune.messages import (
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.methods.settings import RobustRule, ServerOptimizer
from fedtune.model.settings import AdapterSettings, EvaluationSettings, ModelSettings
from fedtune.planning.verbs import DESCENDING, DescendSettings
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.schedule import Schedule
from fedtune.search.settings import Range, SearchSettings
from tests.config.conftest import SHORTEST

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT, st.lists))
def test_every_value_reads_back_as_written(value: object) -> None:
    assert tomllib.loads(f"value = {toml(value)}") == {"value": value}


def anything(annotation: Any) -> st.SearchStrategy[Any]:
    """Draw what a type allows, as binding makes it: lists are tuples, numbers finite, texts no local files."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return st.one_of(*map(anything, arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Sequence:
        return st.lists(anything(arguments[0]), min_size=1, max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(anything(arguments[0]), anything(arguments[1]), max_size=3)
    if annotation is ServerOptimizer:
        return OPTIMIZERS
    if annotation is RobustRule:
        return ROBUST
    if is_dataclass(annotation):
        return some(annotation)
    if annotation is str:
        return TEXT.map(lambda text: f"absent: {text}".replace("/", "-"))
    drawn: st.SearchStrategy[Any] = st.from_type(annotation)
    return drawn.filter(math.isfinite) if float in (annotation, *arguments) else drawn


def some(settings: Any, **chosen: Any) -> st.SearchStrategy[Any]:
    """Draw every field of a settings class by its type, but for those that are chosen."""
    hints = get_type_hints(settings, include_extras=True)
    drawn = {field.name: anything(hints[field.name]) for field in fields(settings)}
    return st.builds(settings, **drawn | {name: st.just(value) for name, value in chosen.items()})


BELOW_1 = st.floats(0, 1, exclude_max=True)
RANGES = st.tuples(st.floats(1e-9, 1.0), st.floats(1.5, 9.0), st.booleans(), st.none() | st.integers(2, 9))
SEARCHES = st.none() | st.builds(
    SearchSettings,
    kind=st.sampled_from(["random", "tpe"]),
    reduction=st.integers(2, 9),
    seed=st.none() | st.integers(0, 2**70),
    space=st.dictionaries(
        st.sampled_from(["client.learning_rate", "method", "override.0.rank"]),
        RANGES.map(lambda numbers: Range(*numbers)) | st.sampled_from([(1, 2), ("a",), (("q", "v"), ("q",), True)]),
        min_size=1,
    ),
)
OPTIMIZERS = st.one_of(
    st.just(ServerOptimizer()),
    st.builds(ServerOptimizer, name=st.just("fedavgm"), momentum=BELOW_1),
    st.builds(ServerOptimizer, name=st.sampled_from(["fedadam", "fedyogi"]), beta1=BELOW_1, tau=st.floats(1e-9, 1.0)),
)
ROBUST = st.one_of(
    # The other rules need more clients than the recipes here have.
    st.just(RobustRule()),
    st.builds(RobustRule, name=st.just("clip"), bound=st.just("median") | st.floats(1e-9, 1e9)),
)
WHOLE: dict[str, Any] = {"file": None, "match": None}
SPLITS = st.one_of(
    some(Split, kind="key", clients=None, alpha=None, sizes=None, only=None, **WHOLE).filter(lambda split: split.by),
    some(Split, kind="iid", by=None, clients=9, alpha=None, sizes=None, **WHOLE),
    some(Split, kind="dirichlet", clients=5, by="label", sizes=None, **WHOLE).filter(lambda split: split.alpha),
    some(Split, kind="sizes", by=None, clients=None, alpha=None, sizes=(3, 4), **WHOLE),
    some(Split, kind="files", by=None, clients=None, alpha=None, sizes=None, **WHOLE),
    some(Split, kind="meta", by="label", clients=4, alpha=None, sizes=None, **WHOLE),
    some(Split, kind="file", clients=None, alpha=None, sizes=None, file="absent: p", match=None),
)
SENDING = st.sampled_from(["after-aggregating", "after-receiving"])
SHARES = {"staleness_exponent": st.floats(0, 9), "max_staleness": st.integers(0, 99), "concurrency": st.none()}
OVERLAPPING = st.one_of(
    st.builds(AsyncSettings, buffer=st.just(1), send=SENDING, **SHARES),
    st.builds(AsyncSettings, trigger=st.just("time"), budget_s=st.floats(1e-3, 1e9), **SHARES),
)
ALONE = ("objective", "dpo_beta", "trainer")
"""Keys of `client` that go with few others; the first two are drawn below."""
LENGTHS = st.sampled_from([(3, None), (None, 0.5)])
RATES = st.floats(1e-9, 1.0)
"""Where the first round measures none."""
CHANGES = st.fixed_dictionaries(
    {"batch": st.integers(1, 9)},
    optional={
        name: anything(hint)
        for name, hint in get_type_hints(Training, include_extras=True).items()
        if name not in ("batch", "steps", "epochs", "optimizer", "momentum", "learning_rate", *ALONE)
    }
    | {"learning_rate": RATES},
)
FEWER = st.fixed_dictionaries({"batch": st.integers(1, 9)}, optional={"learning_rate": RATES})
BATCH_ALONE = st.fixed_dictionaries({"batch": st.integers(1, 9)})


@st.composite
def seeded(draw: st.DrawFn) -> FedKSeedSettings:
    """Draw settings of `fedkseed` that fit each other, and three steps."""
    bank, sampling = draw(st.sampled_from(["hadamard", "gaussian", "kron"])), draw(some_of("sampling"))
    sync = draw(some_of("sync"))
    drawn: FedKSeedSettings = draw(
        some(
            FedKSeedSettings,
            bank=bank,
            seeds=4 ** draw(st.integers(1, 6)),  # a power of two as well, and at least three
            queries=3,
            sampling=sampling,
            sync=sync,
            public_log=sampling != "pro" and sync == "auto" and draw(st.booleans()),
            vectors=bank == "kron" and draw(st.booleans()),
            embeddings=bank == "kron" and draw(st.booleans()),
            groups=1 if bank == "kron" else draw(st.sampled_from([1, 4, 64])),
            verb="probe",
            scalar_bits=8,
            **({"redraw": 0} if sampling == "pro" else {}),
        )
    )
    if (sampling, drawn.estimator, drawn.public_log) == ("uniform", "two-sided", False):
        verb = draw(some_of("verb"))
        bits: Any = 8 if verb == "probe" else draw(some_of("scalar_bits"))
        # Where every client descends, keys of probing are refused.
        probing = {"queries", "normalise", "clip", "largest_rate"} if verb == "descend" else set[str]()
        usual: dict[str, Any] = {name: getattr(FedKSeedSettings(), name) for name in probing}
        return replace(drawn, verb=verb, scalar_bits=bits, **usual)
    return drawn


def some_of(field: str) -> st.SearchStrategy[Any]:
    return anything(get_type_hints(FedKSeedSettings, include_extras=True)[field])


PLAIN = {"unquantised": "float32"}
"""A key that only a quantised base reads, at its default."""


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw a recipe whose settings fit together; which do not is told in `checks`."""
    task = draw(st.sampled_from(["causal", "classification"]))
    causal: dict[str, Any] = {} if task == "causal" else {"generate": 0, "prompt": None, "prompts": ()}
    # Rounds are compared by scores that are taken: as often as `every` says, and of the task.
    metric, every = draw(st.sampled_from(["loss", "perplexity" if task == "causal" else "accuracy"])), st.integers(1, 9)
    steps, epochs = draw(LENGTHS)
    parts = {"label": "y"} if task == "classification" else {"output": draw(TEXT)}
    template = draw(st.sampled_from(["auto", "alpaca", "chat", "plain"]) | TEXT.map(lambda text: f"#{text}{{output}}"))
    template = template if template.count("{output}") < 2 else "plain"
    method = draw(
        st.one_of(*(seeded() if name == "fedkseed" else some(method.settings) for name, method in METHODS.items()))
    )
    adapts = METHODS[method.name].task is TrainLora
    if not adapts:
        steps, epochs = 3, None  # epochs go with some samplings and estimators alone
    rounds = draw(
        some(Schedule, cohort=draw(st.none() | st.floats(0.01, 1) | st.just(1)), min_clients=1, metric=metric)
    )
    if getattr(method, "redraw", 0):
        # A bank more after each so many rounds: three at most, which any number of seeds and groups allows.
        redraw = max(method.redraw, 4, rounds.count // 2)
        method = replace(method, redraw=redraw if redraw <= 1_000_000 else 0)
    verb = getattr(method, "verb", "adapt")
    probes = verb in ("probe", "auto")
    if verb == "descend":
        steps = None
    fewer = FEWER if probes else BATCH_ALONE
    rank = st.none() | st.integers(1, 64) if METHODS[method.name].ranks == "any" and adapts else st.none()
    glob = st.sampled_from(["client-1", "client-[0-4]", "*", "ü?"])
    row = st.builds(
        Override, clients=st.lists(glob, min_size=1).map(tuple), rank=rank, training=CHANGES if adapts else fewer
    )
    device = draw(st.sampled_from(["auto", "cpu", "cuda:1"]))
    beginning: dict[str, Any] = {} if METHODS[method.name].start else {"start": None}
    head = draw(st.sampled_from(["drawn", "lda"])) if task == "classification" and rounds.count > 1 else "drawn"
    beginning |= {"head": head} | ({"start": None} if head == "lda" else {})
    steady = {"final_rate": Schedule.final_rate} if rounds.schedule == "constant" else {}
    packing: dict[str, Any] = {} if task == "causal" else {"packing": False}
    objective: dict[str, Any] = {"objective": "likelihood", "dpo_beta": Training.dpo_beta, "trainer": None}
    if task == "causal" and adapts and metric == "loss" and draw(st.booleans()):
        # Pairs of answers are neither packed nor compared with anything but the base.
        objective |= {"objective": "dpo", "dpo_beta": draw(st.floats(1e-9, 1e9))}
        packing, beginning = {"packing": False}, beginning | {"start": None}
    answers = {"loss_on": "completion"} if objective["objective"] == "dpo" else {}
    unquantised = st.sampled_from(["auto", "float32", "bfloat16"]).map(lambda dtype: {"dtype": dtype} | PLAIN)
    codes = st.fixed_dictionaries({"dtype": st.sampled_from(["nf4", "int8"]), "unquantised": st.just("bfloat16")})
    formats = unquantised | codes
    search = draw(SEARCHES)
    return Recipe(
        name=draw(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,9}", fullmatch=True)),
        seed=draw(st.integers(0, 2**70)),
        model=draw(
            some(
                ModelSettings,
                task=task,
                device=device,
                digest=draw(st.sampled_from([None, "0a" * 32])),
                kernels="auto",
                **draw(formats if adapts else unquantised),
                **({} if adapts else {"processes": 1}),
                **({"pooling": "auto"} if task == "causal" else {}),
            )
        ),
        adapter=draw(
            some(
                AdapterSettings,
                modules_to_save=(),
                layers=draw(st.sampled_from([None, "8-15", "0-3, 28"])),
                # Recipes of the other kinds: `test_adapter_kinds`.
                kind="lora",
                tokens=20,
                hidden=None,
                send="embeddings",
                init_text=None,
                **beginning,
            )
        ),
        method=method,
        client=draw(
            some(
                Training,
                steps=steps,
                epochs=epochs,
                **{**packing, **objective, **({"optimizer": "sgd"} if adapts else IDLE)},
                **({"learning_rate": draw(RATES)} if adapts else {}),
                **({"learning_rate": Training.learning_rate} if verb == "descend" else {}),
            )
        ),
        descend=draw(some(DescendSettings, steps=3)) if verb in DESCENDING else None,
        rounds=replace(rounds, warmup=draw(st.integers(0, rounds.count - 1)), **steady),
        data=data_of(draw(some(DataSettings, fields=parts, template=template, split=draw(SPLITS))), packing | answers),
        evaluate=replace(
            draw(some(EvaluationSettings, references=(), every=draw(every), **causal)),
            **({"clients": True} if search else {}),
        ),
        search=search,
        asynchronous=draw(st.none() | OVERLAPPING) if not METHODS[method.name].why_not_asynchronous else None,
        override=draw(st.lists(row, max_size=2).map(tuple)),
        report=draw(some(ReportSettings)),
    )


def data_of(drawn: DataSettings, packing: Mapping[str, Any]) -> DataSettings:
    """Return a table `data` without what its split excludes."""
    alone: Mapping[str, Any] = {"limit": None, "streaming": False} if drawn.split.kind == "file" else {}
    return replace(drawn, **alone, **packing)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipes())
def test_a_rendered_recipe_binds_to_the_same(recipe: Recipe) -> None:
    again = bind(render(recipe))
    assert again == recipe
    assert digest(again) == digest(recipe)
    assert not changes(recipe, again)
    assert type(again.rounds.cohort) is type(recipe.rounds.cohort)  # 1 is a client, 1.0 is all


def test_defaults_are_written_out(recipe: Recipe) -> None:
    text = render(recipe)
    assert "max_tokens = 512" in text
    assert "planner" in text
    assert "only" not in text  # none, and none when left out


def test_a_copy_in_another_folder_still_finds_the_data(tmp_path: Path) -> None:
    source, copy = tmp_path / "here" / "recipe.toml", tmp_path / "there" / "recipe.toml"
    source.parent.mkdir()
    copy.parent.mkdir()
    (source.parent / "train.jsonl").write_text("")
    source.write_text(SHORTEST)
    recipe = bind(source)
    copy.write_text(render(recipe))
    assert bind(copy) == recipe
    assert bind(copy).data.source == str(source.parent / "train.jsonl")


@pytest.mark.parametrize(
    "override", ["client.steps=21", "seed=1", "method=zeropad", "evaluate.every=2", "data.split.clients=5"]
)
def test_the_digest_changes_with_what_changes_the_result(recipe: Recipe, override: str) -> None:
    assert digest(bind(SHORTEST, overrides=[override])) != digest(recipe)


def test_a_key_that_came_later_leaves_digests_as_release_0_2_0_gave_them(recipe: Recipe) -> None:
    # The defaults of that release, which it wrote into every recipe that it bound.
    defaults = ["data.template=alpaca", "model.dtype=float32", "method.state_max_rank=none"]
    defaults += ["method.wire_dtype=bf16"]
    old = bind(SHORTEST, overrides=defaults)
    assert digest(old) == "85204c5f7d1b279e71536596f3d6f7252ed46ea34aee26732466d908781c9160"
    assert digest(bind(SHORTEST, overrides=["client.proximal=0.1"])) != digest(recipe)


def test_the_digest_ignores_name_report_and_folder(recipe: Recipe) -> None:
    other = replace(bind(SHORTEST, overrides=["name=other", "report.plots=false"]), root=Path("elsewhere"))
    assert digest(other) == digest(recipe)
    assert not changes(recipe, other)


def test_changes_are_told_key_by_key(recipe: Recipe) -> None:
    other = bind(SHORTEST, overrides=["client.steps=21", "client.clip_norm=none"])
    assert changes(recipe, other) == ['client.clip_norm: 1.0 -> "none"', "client.steps: 20 -> 21"]
