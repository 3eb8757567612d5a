"""Rows that Python code gives in place of files: by client, as one data set to divide, or as a partitioner's parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from fedtune.data.settings import DataSettings
from fedtune.errors import ConfigError, Fault, type_of

FORMS = "rows by client, one Dataset to divide, or a partitioner of flwr-datasets"
"""What may be given."""
PARTITIONER_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OSError)
"""What partitioners raise for rows that they cannot divide."""


@dataclass(frozen=True)
class Given:
    """What was given, read: either rows by client, or rows that the recipe's split divides."""

    by_client: Mapping[str, Any] = field(default_factory=dict)
    """By client, a `datasets.Dataset` or a sequence of mappings; or a mapping with `train` and `held_out`."""
    whole: Any | None = None
    """Rows to divide; None where they are given by client."""
    test: Any | None = None
    """Test rows beside `whole`."""
    empty: Sequence[str] = ()
    """Clients to which a partitioner gives no row."""
    unused: Sequence[str] = ()
    """Other splits of a DatasetDict."""


def given_rows(data: Any) -> Given:
    """Return what an object gives, by what it is; one that was read already is returned as it is.

    Args:
        data: rows by client; a `datasets.Dataset`, or a `DatasetDict` with `train` and perhaps `test`; a sequence of
            rows; a partitioner of flwr-datasets whose data set is set; a data set and a partitioner as a pair; or a
            `FederatedDataset`. A partitioner is anything with `num_partitions` and `load_partition(number)`.

    Raises: ConfigError saying what was expected, if it is none of these or cannot be divided.
    """
    if isinstance(data, Given):
        return data
    datasets = sys.modules.get("datasets")  # code that gives one has imported it: others load nothing of it
    splits: Any = getattr(datasets, "DatasetDict", ())
    if isinstance(data, splits):
        return _of_splits(data)
    if isinstance(data, Mapping):
        if not data:
            raise ConfigError(Fault("data", "rows by client, of one client at least", "none"))
        return Given(by_client=data)
    if isinstance(data, getattr(datasets, "Dataset", ())):
        return Given(whole=data)
    if isinstance(data, tuple) and len(data) == 2 and _is_partitioner(data[1]):
        return _of_parts(_with_data(data[1], data[0]))
    if _is_partitioner(data):
        return _of_parts(_training_partitioner(data))
    if isinstance(data, Sequence) and data and all(isinstance(row, Mapping) for row in data):
        return Given(whole=data)
    if type(data).__name__ == "DataFrame":
        raise ConfigError(Fault("data", FORMS, "a DataFrame", "give datasets.Dataset.from_pandas(it)"))
    raise ConfigError(Fault("data", FORMS, "no row" if data == [] else type_of(data)))


def check_given(settings: DataSettings, given: Given) -> None:
    """Refuse a split that rows of Python cannot have.

    Raises: ConfigError naming the key.
    """
    split = settings.split
    if given.whole is not None:
        if split.kind == "files":
            hint = "choose another kind, such as iid with clients"
            raise ConfigError(Fault("data.split.kind", "any but 'files' for rows of Python", "'files'", hint))
        return
    if split.kind != "key":
        expected = "'key', by the client that each row is given for"
        raise ConfigError(Fault("data.split.kind", expected, repr(split.kind), "leave data.split out"))
    if split.match is not None:
        expected, hint = "nothing beside rows that are given by client", "give each client's own rows as held_out"
        raise ConfigError(Fault("data.split.match", expected, repr(split.match), hint))


def given_notes(given: Given | None) -> list[str]:
    """Return what a user should know of rows that were given: splits that are not used, clients without a row."""
    if given is None:
        return []
    notes = [f"data: not used: the splits {', '.join(given.unused)}"] if given.unused else []
    if given.empty:
        names = f"{', '.join(given.empty[:8])}{', ...' * (len(given.empty) > 8)}"
        verb = "takes" if len(given.empty) == 1 else "take"
        notes.append(f"data: the partitioner gives no row to {names}, which {verb} no part")
    return notes


def _of_splits(data: Mapping[str, Any]) -> Given:
    if "train" not in data:
        hint = "give one of its splits, or dict(data) where each split is a client"
        raise ConfigError(Fault("data", "a DatasetDict with a split 'train'", ", ".join(data) or "none", hint))
    others = [name for name in data if name not in ("train", "test")]
    return Given(whole=data["train"], test=data.get("test"), unused=others)


def _is_partitioner(data: Any) -> bool:
    return callable(getattr(data, "load_partition", None))


def _training_partitioner(data: Any) -> Any:
    """Return a partitioner; of a `FederatedDataset` that of its training rows, which it downloads for this."""
    if not hasattr(type(data), "partitioners"):
        return data
    try:
        partitioners: Mapping[str, Any] = data.partitioners
    except PARTITIONER_ERRORS as error:
        expected, got = "a FederatedDataset that can be loaded", f"{type(error).__name__} ({_first_line(error)})"
        raise ConfigError(Fault("data", expected, got, "give the data set and a partitioner as a pair")) from error
    if "train" not in partitioners and len(partitioners) != 1:
        raise ConfigError(Fault("data", "a FederatedDataset with a partitioner of 'train'", ", ".join(partitioners)))
    return partitioners.get("train") or next(iter(partitioners.values()))


def _with_data(partitioner: Any, data: Any) -> Any:
    """Return a copy of a partitioner, with a data set; the one that was given stays without, and can be given again."""
    if _has_data(partitioner):
        if getattr(partitioner, "dataset", None) is data:
            return partitioner
        got = f"{type_of(partitioner)} with another one"
        raise ConfigError(Fault("data", "a partitioner without a data set, beside one", got, "give one of the two"))
    own = deepcopy(partitioner)
    try:
        own.dataset = data
    except PARTITIONER_ERRORS as error:
        raise ConfigError(Fault("data", "a datasets.Dataset before its partitioner", type_of(data))) from error
    return own


def _has_data(partitioner: Any) -> bool:
    # A class of one's own that loads its parts from elsewhere need not say so.
    known = getattr(partitioner, "is_dataset_assigned", None)
    return bool(known()) if callable(known) else True


def _of_parts(partitioner: Any) -> Given:
    """Return a partitioner's parts as clients: client-0, client-1, ..., with as many digits as the last one needs."""
    kind = type(partitioner).__name__
    if not _has_data(partitioner):
        hint = "set partitioner.dataset, or give the data set and the partitioner as a pair"
        raise ConfigError(Fault("data", "a partitioner whose data set is set", f"{kind} without one", hint))
    try:
        parts = dict(_parts(partitioner))
        empty = [name for name, rows in parts.items() if not len(rows)]
    except PARTITIONER_ERRORS as error:
        got = f"{type(error).__name__} ({_first_line(error)})"
        raise ConfigError(Fault("data", f"rows that {kind} can divide", got)) from error
    if len(empty) == len(parts):
        raise ConfigError(Fault("data", "at least one part with a row", f"{len(parts)} empty parts of {kind}"))
    return Given(by_client={name: rows for name, rows in parts.items() if name not in empty}, empty=empty)


def _parts(partitioner: Any) -> Iterator[tuple[str, Any]]:
    count = int(partitioner.num_partitions)
    digits = len(str(count - 1))
    for number in range(count):
        yield f"client-{number:0{digits}d}", partitioner.load_partition(number)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or "no reason given"
