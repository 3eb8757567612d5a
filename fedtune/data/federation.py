"""The whole way from a recipe's table `data` to every client's examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from fedtune.data.encode import Encoded, Example, Tokenizer, encode_causal, encode_classes, pack
from fedtune.data.partition import Rows, partition, sorted_values
from fedtune.data.settings import GROUP, DataSettings, Form, Task, faults
from fedtune.data.source import load, load_rows, load_test
from fedtune.errors import ConfigError, Fault
from fedtune.seeds import derive, generator


@dataclass(frozen=True)
class Shard:
    """One client's examples."""

    train: Sequence[Example]
    """In the order of the source; never empty."""
    held_out: Sequence[Example]
    """Never trained on, in random order (seeded): the first so many are a fair sample. May be empty."""


@dataclass(frozen=True)
class Federation:
    clients: Mapping[str, Shard]
    """By name, in sorted order."""
    test: Sequence[Example]
    """Global test data, in random order (seeded): the first so many are a fair sample."""
    labels: Sequence[str]
    """Classification: the class names, by class; otherwise empty."""
    notes: Sequence[str]
    """What a user should know: rows dropped or cut."""
    form: Form = "text"
    """What the training rows are: the way in which a user's question is written as theirs were."""


def federate(
    settings: DataSettings,
    *,
    tokenizer: Tokenizer,
    task: Task,
    seed: int,
    root: Path,
    rows: Mapping[str, Any] | None = None,
) -> Federation:
    """Return every client's training and held-out examples and the global test data.

    All draws depend on the seed and, for held-out rows, on the client's name, so a client that changes its data changes
    no other client's.

    Args:
        settings: the recipe's table `data`.
        tokenizer: the base's.
        task: what the base is trained for.
        seed: the run's.
        root: folder that relative paths start from.
        rows: by client, its rows, or a mapping with the rows to `train` on and those `held_out`; in place of the
            source that the settings name.

    Raises: ConfigError if data cannot be read, divided or encoded, or a client is left with no training example.
    """
    if wrong := faults(settings):
        raise ConfigError(wrong)
    if settings.packing and task == "classification":
        raise ConfigError(Fault("data.packing", "false for classification", "true"))
    if rows is not None and settings.split.kind != "key":
        expected = "'key', by the client that each row is given for"
        raise ConfigError(Fault("data.split.kind", expected, repr(settings.split.kind), "leave data.split out"))
    held_out = None if rows is None else _held_out(settings, rows, task)
    source = load(settings, root, task=task) if rows is None else load_rows(settings, _training(rows), task=task)
    test = load_test(settings, root, task=task)
    labels = _labels(source, test, held_out) if task == "classification" else []
    limited = _take(source, settings.limit, seed)
    groups = limited[GROUP][:] if GROUP in limited.column_names else None
    parts = _select(partition(settings.split, rows=len(limited), groups=groups, seed=seed), settings.split.only)

    encoded = {name: _encode(limited.select(part), settings, tokenizer, labels) for name, part in parts.items()}
    notes = _notes(list(encoded.values()), settings)
    if left := len(limited) - sum(map(len, parts.values())):
        notes.append(f"data.split: {left} of {len(limited)} rows go to no client")
    apart = {} if held_out is None else _by_client(_encode(held_out, settings, tokenizer, labels), held_out[GROUP][:])
    clients = {
        name: Shard(_shard(name, client, replace(settings, held_out=0.0), seed).train, apart[name])
        if name in apart
        else _shard(name, client, settings, seed)
        for name, client in encoded.items()
    }
    if test is None:
        scored = [example for shard in clients.values() for example in shard.held_out]
    else:
        scored_rows = _encode(test, settings, tokenizer, labels)
        notes += [f"test: {note}" for note in _notes([scored_rows], settings)]
        scored = [example for example in scored_rows.examples if example is not None]
        if not scored:
            expected = "at least one test example"
            raise ConfigError(Fault("data.max_tokens", expected, f"none left at {settings.max_tokens} tokens"))
    order = generator(derive(seed, "data.test")).permutation(len(scored))
    form: Form = "instruction" if "output" in source.column_names else "text"
    return Federation(clients, [scored[row] for row in order], labels, notes, form)


def _training(rows: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return by client the rows to train on.

    Raises: ConfigError for a client whose mapping has other keys than `train` and `held_out`.
    """
    for client, given in rows.items():
        if isinstance(given, Mapping) and not {"train"} <= given.keys() <= {"train", "held_out"}:
            expected = f"rows for {client!r}, or a mapping with train and held_out"
            raise ConfigError(Fault("data", expected, f"a mapping with {', '.join(map(str, given))}"))
    return {client: given["train"] if isinstance(given, Mapping) else given for client, given in rows.items()}


def _held_out(settings: DataSettings, rows: Mapping[str, Any], task: Task) -> Dataset | None:
    """Return the rows that clients hold out by themselves; None if no client does."""
    apart = {client: given["held_out"] for client, given in rows.items() if _holds_out(given)}
    return load_rows(settings, apart, task=task) if apart else None


def _holds_out(given: Any) -> bool:
    return isinstance(given, Mapping) and len(given.get("held_out", ())) > 0


def _by_client(encoded: Encoded, groups: Sequence[str]) -> Mapping[str, Sequence[Example]]:
    """Return encoded rows by the client that each belongs to, without those that were dropped."""
    apart: dict[str, list[Example]] = {}
    for client, example in zip(groups, encoded.examples, strict=True):
        apart.setdefault(client, []).extend([] if example is None else [example])
    return apart


def with_class_order(federation: Federation, labels: Sequence[str]) -> Federation:
    """Return the federation with its classes numbered in this order, which holds all of them."""
    number = np.array([labels.index(label) for label in federation.labels])

    def renumber(examples: Sequence[Example]) -> Sequence[Example]:
        return [replace(example, labels=int(number[example.labels])) for example in examples]

    clients = {
        name: Shard(renumber(shard.train), renumber(shard.held_out)) for name, shard in federation.clients.items()
    }
    return replace(federation, clients=clients, test=renumber(federation.test), labels=list(labels))


def digest(federation: Federation) -> str:
    """Return the SHA-256 (hex) of every client's training examples: what a resumed run must find unchanged."""
    sha = hashlib.sha256()
    for name, shard in sorted(federation.clients.items()):
        sha.update(f"{name}\0{len(shard.train)}\0".encode())
        for example in shard.train:
            for part in (example.input_ids, np.asarray(example.labels, np.int64)):
                sha.update(f"{part.shape}\0".encode() + part.tobytes())
            if example.token_types is not None:
                sha.update(b"token types\0" + example.token_types.tobytes())
    return sha.hexdigest()


def _select(parts: Mapping[str, Rows], only: Sequence[str] | None) -> Mapping[str, Rows]:
    if only is None:
        return parts
    if unknown := sorted(set(only) - parts.keys()):
        raise ConfigError(
            Fault("data.split.only", f"names of clients ({', '.join(list(parts)[:8])})", repr(unknown[0]))
        )
    return {name: part for name, part in parts.items() if name in only}


def _take(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    chosen = generator(derive(seed, "data.limit")).choice(len(rows), size=limit, replace=False)
    return rows.select(np.sort(chosen))


def _labels(source: Dataset, *others: Dataset | None) -> list[str]:
    """Return the classes of the whole source, in order: a limit or a split must not change what a class is called."""
    if "label" not in source.column_names:
        got = ", ".join(source.column_names) or "none"
        hint = "map it with fields = { label = ... }"
        raise ConfigError(Fault("data.fields.label", "a column for label, which classification needs", got, hint))
    labels = sorted_values(source["label"][:])
    if len(labels) < 2:
        raise ConfigError(Fault("data.fields.label", "at least two classes", f"only {labels[0]!r}"))
    for other in others:
        if other is not None and "label" in other.column_names and (unseen := set(other["label"][:]) - set(labels)):
            got = f"{sorted_values(unseen)[0]!r} ({len(unseen)} such)"
            raise ConfigError(Fault("data.test", "classes that occur in the source", got, "check the labels' spelling"))
    return labels


def _encode(rows: Dataset, settings: DataSettings, tokenizer: Tokenizer, labels: Sequence[str]) -> Encoded:
    columns = {name: rows[name][:] for name in rows.column_names if name != GROUP}
    if labels:
        return encode_classes(columns, settings, tokenizer, labels=labels)
    return encode_causal(columns, settings, tokenizer)


def _shard(name: str, encoded: Encoded, settings: DataSettings, seed: int) -> Shard:
    count = len(encoded.examples)
    num_held_out = min(max(1, round(settings.held_out * count)), count - 1) if settings.held_out else 0
    order = generator(derive(seed, "data.held_out", client=name)).permutation(count)
    train = [example for row in np.sort(order[num_held_out:]) if (example := encoded.examples[row]) is not None]
    if not train:
        expected = f"at least one training example for client {name!r}"
        got = f"none of its {count} rows has an answer left at {settings.max_tokens} tokens"
        raise ConfigError(Fault("data.max_tokens", expected, got, "raise max_tokens or give the client more rows"))
    held_out = [example for row in order[:num_held_out] if (example := encoded.examples[row]) is not None]
    return Shard(pack(train, max_tokens=settings.max_tokens) if settings.packing else train, held_out)


def _notes(parts: Sequence[Encoded], settings: DataSettings) -> list[str]:
    examples = [example for part in parts for example in part.examples]
    rows, dropped, limit = len(examples), examples.count(None), settings.max_tokens
    cut = sum(int(np.count_nonzero(part.tokens > limit)) for part in parts) - dropped
    notes = []
    if dropped:
        prompt_tokens = np.concatenate([part.prompt_tokens for part in parts])
        share = 99 if dropped > 0.01 * rows else 100
        keep = int(np.quantile(prompt_tokens, share / 100, method="higher")) + 1
        notes.append(
            f"data.max_tokens: {dropped} of {rows} examples have no response left at {limit} tokens; "
            f"they were dropped; raise to {keep} to keep {share} %"
        )
    if cut > 0:
        notes.append(f"data.max_tokens: {cut} of {rows} examples are longer than {limit} tokens; their ends were cut")
    return notes
