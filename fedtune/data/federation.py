"""The whole way from a recipe's table `data` to every client's examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data.division import divide, mix_by_client
from fedtune.data.encode import Encoded, Example, Tokenizer, encode_causal, encode_classes, pack
from fedtune.data.given import Given, check_given, given_notes, given_rows
from fedtune.data.labels import alike, class_names
from fedtune.data.mix import Mix
from fedtune.data.partition import Rows
from fedtune.data.partition_file import ClientRows, Division, all_rows
from fedtune.data.preference import encode_preferences, holds_preferences
from fedtune.data.repeats import fingerprints, note_on_held_out, note_on_test
from fedtune.data.settings import GROUP, PYTHON, DataSettings, Form, Task, faults
from fedtune.data.source import Source, read_rows, read_source, read_test, read_whole
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
    sits_out: Mapping[str, str] = field(default_factory=dict)
    """Clients of the split without a training example, which take no part, by name: why."""
    division: Division | None = None
    """Which rows each client of the split holds; None of data that are not here."""
    mix: Mix | None = None
    """Rows of each label by client of the split; None where rows have no label, or each client has one alone."""

    @property
    def compared(self) -> bool:
        """Whether the rows hold rejected answers, for the objective "dpo"."""
        return any(holds_preferences(shard.train[:1]) for shard in self.clients.values())


def federate(
    settings: DataSettings,
    *,
    tokenizer: Tokenizer,
    task: Task,
    seed: int,
    root: Path,
    rows: Any | None = None,
    least_classes: int = 2,
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
        rows: in place of the source that the settings name, what `data.given.given_rows` reads: by client its rows, or
            a mapping with the rows to `train` on and those `held_out`; or rows that the split divides.
        least_classes: classes that must occur where the settings name none.

    A client whose rows give no training example takes no part; the notes name it.

    Raises: ConfigError if data cannot be read, divided or encoded, or no client is left.
    """
    if wrong := faults(settings):
        raise ConfigError(wrong)
    if settings.packing and task == "classification":
        raise ConfigError(Fault("data.packing", "false for classification", "true"))
    given = None if rows is None else given_rows(rows)
    if given is not None:
        check_given(settings, given)
    held_out = None if given is None else _held_out(settings, given.by_client, task)
    source, test = _read(settings, given, root, task)
    labels = class_names(settings, source, test, held_out, least=least_classes) if task == "classification" else []
    apart = {} if held_out is None else _by_client(held_out, _encode(held_out, settings, tokenizer, labels))
    prints = fingerprints(source.rows), [] if test is None else fingerprints(test.rows)
    division = divide(settings, source, test, prints=prints, seed=seed, root=root, apart=apart)
    parts = {name: all_rows(own) for name, own in division.clients.items()}
    encoded = {name: _encode(source, settings, tokenizer, labels, part) for name, part in parts.items()}
    notes = [*source.notes, *given_notes(given), *alike(labels), *_notes(list(encoded.values()), settings)]
    used = min(source.rows.count, settings.limit or source.rows.count)
    if left := used - sum(map(len, parts.values())):
        notes.append(f"data.split: {left} of {used} rows go to no client")
    clients, sits_out = _shards(encoded, parts, division, settings)
    notes += [f"{name} takes no part: {why}" for name, why in sits_out.items()]
    sits_out = {**sits_out, **dict.fromkeys(given.empty if given else (), "its part has no row")}
    clients |= {name: replace(clients[name], held_out=own) for name, own in apart.items() if name in clients}
    notes += _repeats(division, held_out, prints)
    if test is None:
        scored = [example for shard in clients.values() for example in shard.held_out]
    else:
        encoded_test = _encode(test, settings, tokenizer, labels)
        notes += [f"test: {note}" for note in (*test.notes, *_notes([encoded_test], settings))]
        scored = [example for example in encoded_test.examples if example is not None]
        if not scored:
            expected = "at least one test example"
            raise ConfigError(Fault("data.max_tokens", expected, f"none left at {settings.max_tokens} tokens"))
        clients = _with_matched(clients, division, encoded_test)
        notes += _matched_note(division)
    mix = mix_by_client(settings, source, division)
    order = generator(derive(seed, "data.test")).permutation(len(scored))
    return Federation(clients, [scored[row] for row in order], labels, notes, form_of(source), sits_out, division, mix)


def _read(settings: DataSettings, given: Given | None, root: Path, task: Task) -> tuple[Source, Source | None]:
    """Return the training rows and the test rows: those that Python gives, or those that the settings name."""
    if given is None:
        return read_source(settings, root, task=task), read_test(settings, root, task=task)
    if given.whole is None:
        source = read_rows(settings, _training(given.by_client), task=task)
    else:
        source = read_whole(settings, given.whole, task=task, key="data.source")
    if settings.test != PYTHON:
        return source, read_test(settings, root, task=task)
    if given.test is None:
        expected = "the test rows that the run was started with"
        raise ConfigError(Fault("data", expected, "a data set without a split 'test'", "give the DatasetDict again"))
    return source, read_whole(settings, given.test, task=task, key="data.test")


def form_of(source: Source) -> Form:
    """Return what the rows of a source are."""
    names = source.rows.names
    return "messages" if "messages" in names else "instruction" if "output" in names else "text"


def _repeats(division: Division, held_out: Source | None, prints: tuple[Sequence[bytes], Sequence[bytes]]) -> list[str]:
    """Return the notes on rows that are both trained on and scored."""
    own, tests = prints
    trained = {name: rows.rows for name, rows in division.clients.items()}
    scored = {name: [own[row] for row in _held_out_rows(rows).tolist()] for name, rows in division.clients.items()}
    if held_out is not None:
        for client, row in zip(held_out.rows.column(GROUP), fingerprints(held_out.rows), strict=True):
            scored.setdefault(client, []).append(row)
    notes = note_on_held_out(own, trained, scored)
    return [*notes, *note_on_test(own, trained, tests)] if tests else notes


def _held_out_rows(own: ClientRows) -> Rows:
    assert own.held_out is not None  # `divide` draws them
    return own.held_out


def _with_matched(clients: Mapping[str, Shard], division: Division, test: Encoded) -> dict[str, Shard]:
    """Return the clients with their rows of the test data held out, where these are divided."""
    matched = {name: division.clients[name].test for name in clients}
    return {
        name: shard
        if (rows := matched[name]) is None
        else replace(shard, held_out=[example for row in rows.tolist() if (example := test.examples[row]) is not None])
        for name, shard in clients.items()
    }


def _matched_note(division: Division) -> list[str]:
    if division.test is None:
        return []
    given = sum(len(own.test) for own in division.clients.values() if own.test is not None)
    left = division.test.rows - given
    rest = f"; {left} of labels that no client trains on, or left out, belong to none" if left else ""
    return [f"data.split.match: {given} of {division.test.rows} test rows go to clients by their training rows{rest}"]


def _training(rows: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return by client the rows to train on.

    Raises: ConfigError for a client whose mapping has other keys than `train` and `held_out`.
    """
    for client, given in rows.items():
        if isinstance(given, Mapping) and not {"train"} <= given.keys() <= {"train", "held_out"}:
            expected = f"rows for {client!r}, or a mapping with train and held_out"
            raise ConfigError(Fault("data", expected, f"a mapping with {', '.join(map(str, given))}"))
    return {client: given["train"] if isinstance(given, Mapping) else given for client, given in rows.items()}


def _held_out(settings: DataSettings, rows: Mapping[str, Any], task: Task) -> Source | None:
    """Return the rows that clients hold out by themselves; None if no client does."""
    apart = {client: given["held_out"] for client, given in rows.items() if _holds_out(given)}
    return read_rows(settings, apart, task=task) if apart else None


def _holds_out(given: Any) -> bool:
    return isinstance(given, Mapping) and len(given.get("held_out", ())) > 0


def _by_client(source: Source, encoded: Encoded) -> Mapping[str, Sequence[Example]]:
    """Return encoded rows by the client that each belongs to, without those that were dropped."""
    apart: dict[str, list[Example]] = {}
    for client, example in zip(source.rows.column(GROUP), encoded.examples, strict=True):
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
            if (other := example.rejected) is not None:
                for part in (other.input_ids, np.asarray(other.labels, np.int64)):
                    sha.update(f"rejected\0{part.shape}\0".encode() + part.tobytes())
    return sha.hexdigest()


def _encode(
    source: Source, settings: DataSettings, tokenizer: Tokenizer, labels: Sequence[str], part: Rows | None = None
) -> Encoded:
    """Return the examples of some rows of a source, in the order of `part`; without it of all."""
    rows = source.rows if part is None else source.rows.select(part)
    columns = {name: rows.column(name) for name in rows.names if name != GROUP}
    if labels:
        return encode_classes(columns, settings, tokenizer, labels=labels)
    at = range(rows.count) if part is None else part.tolist()
    encode = encode_preferences if "rejected" in columns else encode_causal
    return encode(columns, settings, tokenizer, place=lambda row: source.place(at[row]))


def _shards(
    encoded: Mapping[str, Encoded], parts: Mapping[str, Rows], division: Division, settings: DataSettings
) -> tuple[dict[str, Shard], Mapping[str, str]]:
    """Return the examples of the clients that have any to train on, and by name why the others take no part.

    Raises: ConfigError if no client has any.
    """
    clients, without = {}, {}
    for name, own in encoded.items():
        rows = division.clients[name]
        train, held_out = (
            [example for row in np.searchsorted(parts[name], part) if (example := own.examples[row]) is not None]
            for part in (rows.rows, _held_out_rows(rows))
        )
        if train:
            clients[name] = Shard(pack(train, max_tokens=settings.max_tokens) if settings.packing else train, held_out)
        else:
            without[name] = _no_example(name, own, settings)
    if not clients:
        raise ConfigError(list(without.values())[:8])
    return clients, {name: str(fault) for name, fault in without.items()}


def _no_example(name: str, encoded: Encoded, settings: DataSettings) -> Fault:
    """Return what is wrong with a client without a training example."""
    expected = f"at least one training example for client {name!r}"
    if encoded.equal and len(encoded.equal) == len(encoded.examples):
        return Fault("data.source", expected, f"{len(encoded.equal)} rows, each with equal answers")
    if encoded.unanswered == len(encoded.examples):
        got = f"{encoded.unanswered} conversations, none with a turn of the assistant that answers"
        return Fault("data.source", expected, got)
    got = f"none of its {len(encoded.examples)} rows has an answer left at {settings.max_tokens} tokens"
    return Fault("data.max_tokens", expected, got, "raise max_tokens or give the client more rows")


def _notes(parts: Sequence[Encoded], settings: DataSettings) -> list[str]:
    examples = [example for part in parts for example in part.examples]
    unanswered, equal = sum(part.unanswered for part in parts), [place for part in parts for place in part.equal]
    rows, limit = len(examples), settings.max_tokens
    dropped = examples.count(None) - unanswered - len(equal)
    cut = sum(int(np.count_nonzero(part.tokens > limit)) for part in parts) - dropped
    notes = []
    if unanswered:
        notes.append(
            f"data: {unanswered} of {rows} conversations have no turn of the assistant that answers; they were dropped"
        )
    if equal:
        notes.append(
            f"data: {len(equal)} of {rows} rows have equal answers as chosen and rejected ({', '.join(equal[:3])}"
            f"{', ...' * (len(equal) > 3)}); they were dropped"
        )
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
