"""From what `data.source` names to files: globs and folders expanded, each file once, and a name for its client."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.files import ENDINGS, format_of, without_endings
from fedtune.data.partition import client_names
from fedtune.errors import ConfigError, Fault

SPLITS = re.compile(r"(?:^|[/._-])(train|test|validation|valid|val|dev|eval)(?=[/._-]|\d|$)", re.IGNORECASE)
"""Names of the parts that data sets are published in, in the path of a file."""

REMEDIES: Mapping[str, str] = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV"),
}
"""What can be done about files of formats that are not read."""


@dataclass(frozen=True)
class Place:
    """Where rows are: a file, the folder of a saved data set, or a name on a hub."""

    name: str
    form: str
    """A format of `ENDINGS`, saved or hub."""


def places(sources: Sequence[str], form: str, root: Path, key: str) -> tuple[Sequence[Place], str]:
    """Return every file meant, globs and folders expanded in sorted order, and a note on those that were named twice.

    Args:
        sources: paths, globs, folders or hub names.
        form: the recipe's `data.format`.
        root: folder that relative paths start from.
        key: the recipe's key, for messages.

    Raises: ConfigError if there is no such file, its format is not known, or a folder's files are of several.
    """
    named = [place for source in sources for place in _expand(source, form, root, key)]
    unique: dict[object, Place] = {}
    twice = dict[str, None]()
    for place in named:
        identity = _identity(place)
        if identity in unique:
            twice[place.name] = None
        unique.setdefault(identity, place)
    note = f"{key}: named more than once, read once: {', '.join(twice)}" if twice else ""
    return list(unique.values()), note


def group_names(names: Sequence[str]) -> Sequence[str]:
    """Return a name for each file by which its client is called: its stem, or what of the paths differs.

    >>> group_names(["data/a.jsonl", "data/b.jsonl"]), group_names(["a/train.jsonl", "b/train.jsonl"])
    (['a', 'b'], ['a', 'b'])

    Raises: ConfigError if two files would have one name.
    """
    stems = [without_endings(os.path.basename(name)) for name in names]
    if len(set(stems)) < len(stems):
        stems = _differing(names, stems)
    alike = [stem for stem, count in Counter(client_names([stem])[0].casefold() for stem in stems).items() if count > 1]
    if alike:
        got = " and ".join(
            n for n, stem in zip(names, stems, strict=True) if client_names([stem])[0].casefold() in alike
        )
        hint = "rename one, or give the rows a column for split.kind = 'key'"
        raise ConfigError(Fault("data.source", "files whose names differ, one for each client", got, hint))
    return stems


def _differing(names: Sequence[str], stems: Sequence[str]) -> list[str]:
    """Return what is left of each path without the folders that all have in common, at its start and at its end."""
    parts = [[*Path(os.path.abspath(name)).parts[:-1], stem] for name, stem in zip(names, stems, strict=True)]
    if len(set(map(tuple, parts))) < len(parts):  # one stem with several endings
        parts = [[*path[:-1], os.path.basename(name)] for path, name in zip(parts, names, strict=True)]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({path[i] for path in parts}) > 1), shortest - 1)
    rest = [path[start:] for path in parts]
    shortest = min(map(len, rest))
    end = next((i for i in range(shortest) if len({path[-1 - i] for path in rest}) > 1), shortest - 1)
    return ["-".join(path[: len(path) - end]) for path in rest]


def _identity(place: Place) -> object:
    """Return what two names of one file have in common: links and other spellings of a path lead to it."""
    if place.form == "hub":
        return place.name
    status = os.stat(place.name)
    return status.st_dev, status.st_ino


def _expand(source: str, form: str, root: Path, key: str) -> Sequence[Place]:
    if form == "hub":
        return [Place(source, form)]
    path = root / os.path.expanduser(source)
    if path.is_dir() and form not in ("saved",) and not _is_saved(path):
        return _folder(path, form, key)
    if path.exists():
        return [Place(str(path), _form(path, form, key))]
    if matches := sorted(glob.glob(str(path), recursive=True)):
        # A recursive glob also gives the folders that it goes through; one that gives nothing else means them.
        files = [match for match in matches if os.path.isfile(match) or _is_saved(Path(match))]
        if not files and form != "saved":
            return [place for match in matches for place in _folder(Path(match), form, key)]
        return [Place(name, _form(Path(name), form, key)) for name in files or matches]
    if form == "auto" and may_be_hub_name(source) and not ("/" in source and path.parent.is_dir()):
        return [Place(source, "hub")]
    expected = "an existing file, glob or folder"
    raise ConfigError(Fault(key, expected, repr(source), f"paths start from {root}"))


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _folder(path: Path, form: str, key: str) -> Sequence[Place]:
    """Return the files of a folder that hold rows, also deeper ones; others, such as notes, are passed over."""
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    files = {str(file): known for file in inside if (known := format_of(file))}
    if not files:
        expected = f"a saved dataset's folder, or one with files ending in {', '.join(ENDINGS)}"
        raise ConfigError(Fault(key, expected, str(path), "name the files, and set data.format"))
    formats = Counter(files.values())
    if form == "auto" and len(formats) > 1:
        got = f"{', '.join(f'{count} {name}' for name, count in sorted(formats.items()))} in {path}"
        raise ConfigError(Fault(key, "a folder of files of one format", got, 'name those meant, e.g. "folder/*.jsonl"'))
    splits = {match[1].lower() for name in files if (match := SPLITS.search(os.path.relpath(name, path)))}
    if len(splits) > 1:  # all of them would be trained on
        got = f"{' and '.join(sorted(splits))} in {path}"
        hint = 'name those meant, e.g. "folder/train*", and the others as data.test'
        raise ConfigError(Fault(key, "a folder of files to train on", got, hint))
    return [Place(name, known if form == "auto" else form) for name, known in files.items()]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _form(path: Path, form: str, key: str) -> str:
    if form != "auto":
        return form
    if path.is_dir() and _is_saved(path):
        return "saved"
    if path.is_file() and (known := format_of(path)):
        return known
    expected = f"a saved dataset's folder or a file ending in {', '.join(ENDINGS)}, compressed or not"
    remedy = next((remedy for ending, remedy in REMEDIES.items() if ending in path.suffixes), "set data.format")
    raise ConfigError(Fault(key, expected, str(path), remedy))


def may_be_hub_name(source: str) -> bool:
    """Return whether a text that is no path could be the name of a hub data set, with or without its split."""
    name = source.partition(":")[0]
    plain = name.replace("/", "", 1).replace("-", "").replace("_", "").replace(".", "")
    return format_of(Path(name)) is None and plain.isalnum() and not name.startswith((".", "/"))
