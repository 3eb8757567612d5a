"""Dividing rows among clients: by a column's values, whole or in groups, evenly, by a Dirichlet distribution, by sizes
or by files; and the test rows in the same shares.

Flower Datasets has partitioners of these kinds, but flwr-datasets 0.6.1 needs datasets below 5, rich below 15 and
seaborn, does not resolve beside current versions of them, and brings telemetry that is on by default.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedtune.data.settings import Split
from fedtune.errors import ConfigError, Fault
from fedtune.seeds import derive, generator

Rows = NDArray[np.int64]

T = TypeVar("T")

_DRAWS = 100


def partition(split: Split, *, rows: int, groups: Sequence[str] | None, seed: int) -> Mapping[str, Rows]:
    """Return each client's row indices, ascending, by client name in sorted order; no row goes to two clients.

    Every row goes to a client, except with `sizes` that leave some over and with `clients` that drops keys or files.
    Clients are called by their key or file, with `meta` by their largest value, otherwise client-0, client-1, ... (as
    many digits as the last one needs). `groups` holds one value per row: what `key`, `meta`, `dirichlet` and `files`
    divide by.

    Raises: ConfigError if a client would get fewer than `min_examples` rows.
    """
    if split.kind in ("key", "files"):
        parts = _by_group(_check_values("by", groups), split.clients)
    elif split.kind == "meta":
        parts = _by_meta(_check_values("by", groups), _check_values("clients", split.clients))
    elif split.kind == "iid":
        parts = _name_clients(np.array_split(_shuffle(rows, seed), _check_values("clients", split.clients)))
    elif split.kind == "sizes":
        parts = _by_sizes(_check_values("sizes", split.sizes), rows=rows, seed=seed)
    else:
        return _dirichlet(split, _check_values("by", groups), seed=seed)
    check_sizes(parts, split.min_examples)
    return parts


def check_sizes(parts: Mapping[str, Rows], least: int) -> None:
    """Refuse a client with fewer than `least` rows, by name."""
    if short := _too_small(parts, least):
        hint = "lower clients or min_examples, or give more rows"
        raise ConfigError(Fault("data.split", f"at least {least} examples per client", short, hint))


def match_rows(
    groups: Sequence[str], parts: Mapping[str, Rows], test_groups: Sequence[str], *, seed: int
) -> Mapping[str, Rows]:
    """Return each client's rows of the test data, in random order: of each value its share of the training rows.

    No test row goes to two clients; those of a value that no client trains on go to none.

    Args:
        groups: the value of each training row.
        parts: the training rows of each client.
        test_groups: the value of each test row.
        seed: the run's.
    """
    counts = {name: Counter(groups[row] for row in part.tolist()) for name, part in parts.items()}
    shares: dict[str, list[Rows]] = {name: [np.empty(0, np.int64)] for name in parts}
    for value, members in _where(test_groups).items():
        trained = np.array([counts[name][value] for name in parts], np.int64)
        if not trained.any():
            continue
        # In whole numbers: the same cuts on every machine, a half rounded down.
        ends = (2 * np.cumsum(trained) * len(members) + trained.sum() - 1) // (2 * trained.sum())
        order = generator(derive(seed, "data.match", client=value)).permutation(members)
        for share, taken in zip(shares.values(), np.split(order, ends[:-1]), strict=True):
            share.append(taken)
    # Each client's rows of all values mixed: the first so many are a fair sample.
    return {
        name: generator(derive(seed, "data.held_out", client=name)).permutation(np.concatenate(share))
        for name, share in shares.items()
    }


def sorted_values(values: Iterable[str]) -> list[str]:
    """Return the distinct values: in numeric order if all are whole numbers, otherwise in text order."""
    distinct = sorted(set(values))
    return sorted(distinct, key=int) if all(value.isdecimal() for value in distinct) else distinct


def client_names(values: Sequence[str]) -> list[str]:
    """Return a name for each of the given distinct values: letters, digits, `_`, `-` and `.`, unique.

    Whole numbers are padded, so that names in text order are in numeric order.

    >>> client_names(["2", "10"]), client_names(["Dickens, Charles", "Dickens Charles"])
    (['02', '10'], ['Dickens-Charles', 'Dickens-Charles-2'])
    """
    width = max(map(len, values)) if all(value.isdecimal() for value in values) else 0
    names: list[str] = []
    for value in values:
        stem = re.sub(r"[^\w.-]+", "-", value.zfill(width)).strip("-.") or "client"
        names.append(next(name for name in _candidates(stem) if name not in names))
    return names


def _candidates(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def _by_group(groups: Sequence[str], clients: int | None) -> dict[str, Rows]:
    where = _where(groups)
    parts = dict(zip(client_names(list(where)), where.values(), strict=True))
    return {name: parts[name] for name in sorted(parts)[:clients]}


def _by_meta(groups: Sequence[str], clients: int) -> dict[str, Rows]:
    """Deal the values out, the largest first, each to the client with the fewest rows; of several, to the first."""
    where = _where(groups)
    if clients > len(where):
        expected = f"at most {len(where)}, the values of the column"
        raise ConfigError(Fault("data.split.clients", expected, str(clients), "use 'dirichlet', which divides values"))
    dealt: list[list[str]] = [[] for _ in range(clients)]
    sizes = [0] * clients
    for value in sorted(where, key=lambda value: -len(where[value])):  # stable: those of one size stay in order
        least = sizes.index(min(sizes))
        dealt[least].append(value)
        sizes[least] += len(where[value])
    names = dict(zip(where, client_names(list(where)), strict=True))
    parts = {names[own[0]]: np.sort(np.concatenate([where[value] for value in own])) for own in dealt}
    return dict(sorted(parts.items()))


def _by_sizes(sizes: Sequence[int], *, rows: int, seed: int) -> dict[str, Rows]:
    if sum(sizes) > rows:
        raise ConfigError(Fault("data.split.sizes", f"sizes that sum to at most {rows} rows", str(sum(sizes))))
    return _name_clients(np.split(_shuffle(rows, seed), np.cumsum(sizes))[:-1])


def _dirichlet(split: Split, groups: Sequence[str], *, seed: int) -> dict[str, Rows]:
    """Give each client a share of every group, the shares drawn from Dirichlet(alpha) (Hsu et al. 2019, 1909.06335).

    As in NIID-Bench (Li et al. 2021, arXiv 2102.02079) the draw is over clients for each group, and repeated while a
    client is too small.
    """
    clients, alpha = _check_values("clients", split.clients), _check_values("alpha", split.alpha)
    where = _where(groups)
    if clients * split.min_examples > len(groups):
        expected = f"at least {clients} x {split.min_examples} rows"
        raise ConfigError(Fault("data.split", expected, str(len(groups)), "lower clients or min_examples"))
    draw = generator(derive(seed, "data.partition"))
    for _ in range(_DRAWS):
        shares: list[list[Rows]] = [[] for _ in range(clients)]
        for members in where.values():
            proportions = draw.dirichlet(np.full(clients, alpha))
            # Rounded positions along the shuffled group: each row falls between exactly two of them.
            ends = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
            for share, taken in zip(shares, np.split(draw.permutation(members), ends), strict=True):
                share.append(taken)
        parts = _name_clients([np.concatenate(share) for share in shares])
        short = _too_small(parts, split.min_examples)
        if short is None:
            return parts
    expected = f"at least {split.min_examples} examples per client"
    got = f"{short} after {_DRAWS} draws with dirichlet alpha {alpha:g} and {clients} clients"
    raise ConfigError(Fault("data.split", expected, got, "raise alpha, lower clients or min_examples"))


def _where(groups: Sequence[str]) -> dict[str, Rows]:
    """Return the ascending rows of every value, values in order."""
    rows: dict[str, list[int]] = {value: [] for value in sorted_values(groups)}
    for row, value in enumerate(groups):
        rows[value].append(row)
    return {value: np.array(members, dtype=np.int64) for value, members in rows.items()}


def _shuffle(rows: int, seed: int) -> Rows:
    return generator(derive(seed, "data.partition")).permutation(rows).astype(np.int64)


def _name_clients(parts: Sequence[Rows]) -> dict[str, Rows]:
    width = len(str(len(parts) - 1))
    return {f"client-{number:0{width}d}": np.sort(part) for number, part in enumerate(parts)}


def _too_small(parts: Mapping[str, Rows], least: int) -> str | None:
    name = min(parts, key=lambda name: len(parts[name]))
    return f"{len(parts[name])} for {name}" if len(parts[name]) < least else None


def _check_values(name: str, value: T | None) -> T:
    if value is None:
        raise ConfigError(Fault(f"data.split.{name}", "a value", "none"))
    return value
