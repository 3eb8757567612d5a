"""Where the examples come from, how a row becomes text, and how rows are divided among clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from fedtune.errors import Fault

Part = Literal["text", "instruction", "input", "output", "label", "messages", "tools", "chosen", "rejected"]
"""What a column can be for: raw text; the three parts of an instruction; the class; a conversation, and the tools that
it may call; the answer that is preferred, and the one that is not."""

Task = Literal["causal", "classification"]

PresetName = Literal["alpaca", "alpaca-cleaned", "dolly", "gsm8k", "rosetta", "code-search-net"]
"""Data sets that have a name; see `data.presets`."""

GROUP = "group"
"""The column that holds what the split divides by: the value of `split.by`, the name of the row's file, or the client's
name where rows are given by client."""

Form = Literal["text", "instruction", "messages"]
"""What the rows are: raw text; a question with its answer, around which a template is put; or a conversation, which the
tokenizer's chat template writes."""

PYTHON: Literal["<python>"] = "<python>"
"""In place of a source or of test files: rows that were given as Python objects."""

TEMPLATES = ("auto", "alpaca", "chat", "plain")


MAX_TOKENS = 512
"""The default of `data.max_tokens`; a base of fewer positions lowers it."""

OMIT_DEFAULT: Mapping[str, bool] = {"omit_default": True}
"""Marks a field that is written only where it differs: recipes that came before it keep their digests."""


NEEDS: Mapping[str, Sequence[str]] = {
    "key": ["by"],
    "iid": ["clients"],
    "dirichlet": ["by", "clients", "alpha"],
    "sizes": ["sizes"],
    "meta": ["by", "clients"],
    "file": ["file"],
}
"""Keys that each kind of split needs."""
OPTIONAL: Mapping[str, Sequence[str]] = {
    "key": ["clients", "match"],
    "files": ["clients"],
    "dirichlet": ["match"],
    "meta": ["match"],
    "file": ["by", "match"],
}
"""Keys that each kind of split may have."""


@dataclass(frozen=True)
class Split:
    """How training rows are divided among clients; the recipe's table `data.split`."""

    kind: Literal["key", "iid", "dirichlet", "sizes", "files", "meta", "file"]
    """key: one client per value of the column `by`; iid: equal random parts; dirichlet: random shares of each value of
    `by`, more unequal the smaller `alpha`; sizes: as many rows for each client as `sizes` says, shuffled; files: one
    client per source file, named by what of their paths differs; meta: whole values of `by`, dealt to `clients` clients
    from the largest to the smallest, each to the client with the fewest rows; file: as the partition file `file`
    says."""
    by: str | None = None
    """Column of the source that `key` takes as the client's name, `meta` as what is dealt, and `dirichlet` as the label
    whose rows are shared out. With `file` it may name the label that `fedtune plan` counts and `match` goes by."""
    clients: Annotated[int, Ge(1)] | None = None
    """Number of clients, for `iid`, `dirichlet` and `meta`; with `key` and `files`, only the first so many by name take
    part."""
    alpha: Annotated[float, Gt(0)] | None = None
    """Concentration of the Dirichlet distribution, for `dirichlet`: 0.1 is very uneven, 100 nearly even."""
    min_examples: Annotated[int, Ge(1)] = 1
    """Fewest rows that any client may get, held-out rows included; `dirichlet` draws again, up to 100 times, until that
    is so."""
    sizes: Sequence[Annotated[int, Ge(1)]] | None = None
    """Rows of each client, for `sizes`: the first number is that of the first client."""
    only: Sequence[str] | None = None
    """Names of the only clients that take part; the rows of all others are left out. With one name a client trains
    alone on the rows that it has in the federation."""
    file: str | None = field(default=None, metadata=OMIT_DEFAULT)
    """The partition file, for `file`: JSON lines, one for each client with its name and the numbers of its rows, such
    as the `partition.jsonl` of a run. Relative to the recipe's folder."""
    match: Literal["train"] | None = field(default=None, metadata=OMIT_DEFAULT)
    """train: the rows of `data.test` are divided as well, each value of `by` in the shares in which its training rows
    were, so that each client is scored on its own mix of values; all rows of the source are trained on, and
    `data.held_out` is not read. None: clients hold out rows of their own, and `data.test` belongs to no client."""


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from and how they become examples; the recipe's table `data`."""

    source: str | Sequence[str]
    """A file, a list of files, a glob, a folder of files of one format, the folder of a saved data set, or a name on a
    hub (`name:split` for another split than `train`). A file may be compressed (.gz, .zst, .xz, .bz2), and is read once
    however often it is named. Relative paths are relative to the recipe's folder."""
    split: Split
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "text", "saved", "hub", "plugin"] = "auto"
    """auto: by the file's ending, a folder with state.json as a saved dataset, otherwise a hub name; plugin: the source
    is the name of an entry point `fedtune.data` of an installed package, which gives rows by client."""
    subset: str | None = None
    """Name of the configuration of a hub data set, where it has several."""
    revision: str | None = field(default=None, metadata=OMIT_DEFAULT)
    """Commit, tag or branch of a hub data set; none: the newest."""
    preset: PresetName | None = field(default=None, metadata=OMIT_DEFAULT)
    """A data set of the literature: what its columns mean, the template `alpaca`, and as `source`, `subset` and
    `revision` its place on the hub. Keys that the recipe gives come first; with a `source` of its own, which may be a
    local copy under the published or the hub's column names, only columns and template are taken from it."""
    streaming: bool = field(default=False, metadata=OMIT_DEFAULT)
    """Read only the first `limit` rows of a hub data set, over the network as they are needed, and store nothing."""
    fields: Mapping[Part, str] = field(default_factory=dict)
    """Which column plays which part, e.g. { instruction = "question", output = "answer" }; a column that has the part's
    name needs no entry, nor have `prompt` and `completion`, or `conversations` for `messages`. Rows for the objective
    "dpo" have `chosen` and `rejected`: texts or conversations, behind an `instruction` or `prompt` if they lack it."""
    template: str = "auto"
    """How a row becomes a text: chat (the tokenizer's own template); alpaca; plain (prompt, newline, output); auto
    (chat where the tokenizer has a chat template, otherwise alpaca); or a text of your own with {instruction}, {input}
    and, at its end, {output}. Rows with only a `text` are used as they are."""
    date: str | None = field(default=None, metadata=OMIT_DEFAULT)
    """The day that a chat template writes which asks for it, such as "2026-11-29". None: the day on which the run
    starts, which is then written into its recipe. All sites of a federation write the day of the server's recipe."""
    max_tokens: Annotated[int, Ge(2)] = MAX_TOKENS
    """Longer examples are cut at the end; an example that would lose its whole answer is dropped, and both are counted.
    A base of fewer positions than the default lowers that to its own number, and says so."""
    loss_on: Literal["completion", "all"] = "completion"
    """completion: only the tokens of the answer count in the loss; all: those of the prompt too. Rows of plain text
    always count whole."""
    packing: bool = False
    """Join training examples end to end into rows of at most `max_tokens`; no example is cut for it, each attends to
    those before it in its row, and a row counts as one example. Causal models only."""
    held_out: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of each client's rows that is kept for evaluation and never trained on; above 0 at least one row, unless
    the client has only one."""
    test: str | Sequence[str] | None = None
    """Files with test data of their own; none: all clients' held-out rows together are the test data."""
    labels: Sequence[str] = field(default=(), metadata=OMIT_DEFAULT)
    """Classification: the names of the classes, in order. None: those that occur in the source. Sites of a federation
    name the same ones, so that a site without a row of one class takes part."""
    limit: Annotated[int, Ge(1)] | None = None
    """Use only so many rows of the source, drawn at random from the run's seed; none uses all. With `streaming` these
    are the first ones."""


def faults(settings: DataSettings) -> list[Fault]:
    """Return the faults between settings that need or exclude each other, and those of the template."""
    split, wrong = settings.split, list[Fault]()
    needed = NEEDS.get(split.kind, [])
    for name in needed:
        if not getattr(split, name):
            wrong.append(Fault(f"data.split.{name}", f"a value, which {split.kind!r} needs", "none", f"set {name}"))
    optional = OPTIONAL.get(split.kind, [])
    for name in ("by", "clients", "alpha", "sizes", "file", "match"):
        value = getattr(split, name)
        if value is not None and name not in (*needed, *optional):
            expected = f"no value, for {split.kind!r} has no use for it"
            wrong.append(Fault(f"data.split.{name}", expected, repr(value), "remove it or choose another kind"))
    wrong += _division_faults(settings)
    if settings.date is not None and not _is_date(settings.date):
        wrong.append(Fault("data.date", 'a day, such as "2026-11-29"', repr(settings.date)))
    if settings.labels and len(set(settings.labels)) < max(2, len(settings.labels)):
        wrong.append(Fault("data.labels", "at least two classes, each once", f"{list(settings.labels)}"))
    if settings.streaming and settings.limit is None:
        expected = "a number of rows, with data.streaming"
        wrong.append(Fault("data.limit", expected, "none", "set limit, or leave streaming out"))
    if settings.streaming and settings.format not in ("auto", "hub"):
        expected = f"false with data.format = {settings.format!r}"
        wrong.append(Fault("data.streaming", expected, "true", "only hub data sets are streamed"))
    if settings.template not in TEMPLATES and not settings.template.endswith("{output}"):
        expected = f"{', '.join(TEMPLATES)} or a text that ends in {{output}}"
        wrong.append(Fault("data.template", expected, repr(settings.template)))
    elif settings.template.count("{output}") > 1:
        wrong.append(Fault("data.template", "{output} once, at the end", repr(settings.template)))
    return wrong


def _division_faults(settings: DataSettings) -> list[Fault]:
    """Return what is wrong between a split and the rows that it divides."""
    split, wrong = settings.split, list[Fault]()
    if split.match is not None and settings.test is None:
        expected = "test files, which data.split.match divides among the clients"
        wrong.append(Fault("data.test", expected, "none", "name them, or leave match out"))
    if split.kind == "file" and settings.limit is not None:
        expected = "none with data.split.kind = 'file', which numbers the rows of the whole source"
        hint = "leave out rows in the file, by a line with left_out"
        wrong.append(Fault("data.limit", expected, str(settings.limit), hint))
    return wrong


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
