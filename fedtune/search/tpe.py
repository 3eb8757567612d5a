"""Draws of the tree-structured Parzen estimator, by the package optuna; its study is built anew for every draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.errors import ExtraError
from fedtune.search.settings import Dimension, Range, Value
from fedtune.search.space import within
from fedtune.seeds import derive

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOST_SEED = 2**32
"""Seeds of optuna's sampler are below this."""


def draw_by_tpe(
    space: Mapping[str, Dimension],
    seed: int,
    trial: int,
    earlier: Sequence[tuple[Mapping[str, Value], float | None]],
    *,
    lower_is_better: bool,
) -> Mapping[str, Value]:
    """Return the values of a trial, from those of earlier ones and their scores; None for one that failed.

    It follows from its arguments alone: no state of a sampler is kept, so a search that is resumed draws alike.

    Raises:
        ExtraError: if optuna is not installed.
    """
    optuna = load_optuna()
    distributions = {key: distribution(optuna, dimension) for key, dimension in space.items()}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=derive(seed, "search", trial) % MOST_SEED)
    study = optuna.create_study(direction="minimize" if lower_is_better else "maximize", sampler=sampler)
    states = optuna.trial.TrialState
    for values, score in earlier:
        params = {key: place_of(space[key], value) for key, value in values.items()}
        state = states.FAIL if score is None else states.COMPLETE
        study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=distributions, value=score))
    asked = study.ask(distributions)
    return {key: value_of(dimension, asked.params[key]) for key, dimension in space.items()}


def load_optuna() -> Any:
    """Return the package optuna.

    Raises:
        ExtraError: if it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ExtraError(
            'expected the package optuna, which draws for search.kind = "tpe"; got none; '
            "install it with: pip install 'fedtune[search]'; the other kinds need no package"
        ) from error
    return optuna


def distribution(optuna: Any, dimension: Dimension) -> BaseDistribution:
    """Return a dimension as optuna has it: a list by the places in it, whose values need no order and no hash."""
    kinds: Any = optuna.distributions
    result: BaseDistribution
    if not isinstance(dimension, Range):
        result = kinds.CategoricalDistribution(range(len(dimension)))
    elif dimension.whole:
        result = kinds.IntDistribution(dimension.low, dimension.high, log=dimension.log)
    else:
        result = kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return result


def place_of(dimension: Dimension, value: Value) -> Value:
    return value if isinstance(dimension, Range) else list(dimension).index(value)


def value_of(dimension: Dimension, param: Any) -> Value:
    return within(dimension, param) if isinstance(dimension, Range) else dimension[param]
