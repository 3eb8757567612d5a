"""Who holds which rows of a source: those to train on, those held out, and those of the test data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedtune.data.mix import Mix, mix_of
from fedtune.data.partition import Rows, check_sizes, match_rows, partition
from fedtune.data.partition_file import ClientRows, Division, all_rows, pool, read_division
from fedtune.data.settings import GROUP, DataSettings
from fedtune.data.source import Source
from fedtune.errors import ConfigError, Fault
from fedtune.seeds import derive, generator


def divide(
    settings: DataSettings,
    source: Source,
    test: Source | None,
    *,
    prints: tuple[Sequence[bytes], Sequence[bytes]],
    seed: int,
    root: Path,
    apart: Collection[str] = (),
) -> Division:
    """Return every client's rows: held-out ones are never None, those of the test data only with `split.match`.

    Args:
        settings: the recipe's table `data`.
        source: the rows to divide.
        test: the test data.
        prints: fingerprints of the rows of both; none without test data.
        seed: the run's.
        root: folder that relative paths start from.
        apart: clients that brought held-out rows of their own, and hold out none of these.

    Raises:
        ConfigError: if the rows cannot be divided so.
    """
    split = settings.split
    own, tests = pool(prints[0]), None if split.match is None else pool(prints[1])
    if split.kind == "file":
        assert split.file is not None  # checked when the recipe is bound
        clients = dict(read_division(root / split.file, own, tests).clients)
        check_sizes({name: all_rows(rows) for name, rows in clients.items()}, split.min_examples)
    else:
        taken = _take(source.rows.count, settings.limit, seed)
        groups = source.rows.select(taken).column(GROUP) if GROUP in source.rows.names else None
        places = partition(split, rows=len(taken), groups=groups, seed=seed)
        clients = {name: ClientRows(taken[part]) for name, part in places.items()}
    if split.match and any(rows.held_out is not None and len(rows.held_out) for rows in clients.values()):
        expected = "a partition file without rows that are held out, beside data.split.match"
        raise ConfigError(Fault("data.split.file", expected, split.file or "", "leave one of them out"))
    clients = dict(_select(clients, split.only))
    shares = {name: 0.0 if split.match or name in apart else settings.held_out for name in clients}
    clients = {name: _held_out(name, rows, shares[name], seed) for name, rows in clients.items()}
    if test is not None and tests is not None:
        clients = _match_test(settings, source, test, clients, seed)
    left_out = np.setdiff1d(np.arange(own.rows), np.concatenate([all_rows(rows) for rows in clients.values()]))
    return Division(clients, left_out.astype(np.int64), own, tests)


def mix_by_client(settings: DataSettings, source: Source, division: Division) -> Mix | None:
    """Return the rows of each label by client; None where rows have no label, or each client has one alone."""
    parts = {name: all_rows(rows) for name, rows in division.clients.items()}
    if "label" in source.rows.names:
        return mix_of("label", source.rows.column("label"), parts)
    if settings.split.kind in ("dirichlet", "meta", "file") and settings.split.by and GROUP in source.rows.names:
        return mix_of(settings.split.by, source.rows.column(GROUP), parts)
    return None


def _match_test(
    settings: DataSettings, source: Source, test: Source, clients: Mapping[str, ClientRows], seed: int
) -> dict[str, ClientRows]:
    """Return the clients with their rows of the test data: as the file has them, or in the shares of training rows."""
    if any(rows.test is not None for rows in clients.values()):
        nothing: Rows = np.empty(0, np.int64)
        return {name: rows if rows.test is not None else replace(rows, test=nothing) for name, rows in clients.items()}
    if GROUP not in source.rows.names:
        expected = "the column of the label by which test rows are divided"
        hint = "name it, or list each client's rows of data.test in the partition file"
        raise ConfigError(Fault("data.split.by", expected, "none", hint))
    parts = {name: all_rows(rows) for name, rows in clients.items()}
    matched = match_rows(source.rows.column(GROUP), parts, test.rows.column(GROUP), seed=seed)
    return {name: replace(rows, test=matched[name]) for name, rows in clients.items()}


def _held_out(name: str, own: ClientRows, share: float, seed: int) -> ClientRows:
    """Return a client's rows with a share of them held out, at least one of two, in random order; or as they are."""
    if own.held_out is not None:
        return own
    count = len(own.rows)
    number = min(max(1, round(share * count)), count - 1) if share else 0
    order = generator(derive(seed, "data.held_out", client=name)).permutation(count)
    return replace(own, rows=own.rows[np.sort(order[number:])], held_out=own.rows[order[:number]])


def _select(clients: Mapping[str, ClientRows], only: Sequence[str] | None) -> Mapping[str, ClientRows]:
    if only is None:
        return clients
    if unknown := sorted(set(only) - clients.keys()):
        expected = f"names of clients ({', '.join(list(clients)[:8])})"
        raise ConfigError(Fault("data.split.only", expected, repr(unknown[0])))
    return {name: rows for name, rows in clients.items() if name in only}


def _take(count: int, limit: int | None, seed: int) -> Rows:
    """Return the rows of the source that are used, ascending."""
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.int64)
    chosen = generator(derive(seed, "data.limit")).choice(count, size=limit, replace=False)
    return np.sort(chosen).astype(np.int64)
