"""Where the examples come from, how a row becomes text, and how rows are divided among clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from fedtune.errors import Fault

Part = Literal["text", "instruction", "input", "output", "label"]
"""What a column can be for: raw text; the three parts of an instruction; the class."""

Task = Literal["causal", "classification"]

GROUP = "group"
"""The column that holds what the split divides by: the value of `split.by`, the stem of the row's file, or the client's
name where rows are given by client."""

TEMPLATES = ("alpaca", "chat", "plain")


@dataclass(frozen=True)
class Split:
    """How training rows are divided among clients; the recipe's table `data.split`."""

    kind: Literal["key", "iid", "dirichlet", "sizes", "files"]
    """key: one client per value of the column `by`; iid: equal random parts; dirichlet: skewed shares of each value
    of `by`; sizes: the first sizes[0] shuffled rows to the first client, and so on; files: one client per source file.
    """
    by: str | None = None
    """Column for `key` (the client's name) and `dirichlet` (the label), by its name in the source."""
    clients: Annotated[int, Ge(1)] | None = None
    """Number of clients, for `iid` and `dirichlet`; for `key` and `files`, keep only the first so many by name."""
    alpha: Annotated[float, Gt(0)] | None = None
    """Concentration of the Dirichlet distribution: small is skewed, large is even."""
    min_examples: Annotated[int, Ge(1)] = 1
    """Least rows of any client before some are held out; dirichlet draws again (up to 100 times) until it holds."""
    sizes: Sequence[Annotated[int, Ge(1)]] | None = None
    """Rows of each client, in the order of the clients, for `sizes`."""
    only: Sequence[str] | None = None
    """Names of the clients that take part after the division; the others' rows are left out. One name trains that
    client alone, on the very rows that it has in the federation."""


@dataclass(frozen=True)
class DataSettings:
    """The recipe's table `data`."""

    source: str | Sequence[str]
    """File(s), glob, folder of a saved dataset, or hub name (`name:split` for another split than `train`); relative
    paths are relative to the recipe."""
    split: Split
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "text", "saved", "hub", "plugin"] = "auto"
    """auto: by the file's ending, a folder with state.json as a saved dataset, otherwise a hub name; plugin: the source
    is the name of an entry point `fedtune.data` of an installed package, which gives rows by client."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    fields: Mapping[Part, str] = field(default_factory=dict)
    """Which column plays which part; a column that already has the part's name needs no entry."""
    template: str = "alpaca"
    """alpaca | chat (the tokenizer's own template) | plain (prompt, newline, output) | your own text with
    {instruction}, {input} and ending in {output}. Rows with only `text` are taken as they are."""
    max_tokens: Annotated[int, Ge(2)] = 512
    """Longer examples are cut at the end; an example whose whole completion is cut is dropped and counted."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count in the loss; for rows of plain text all do."""
    packing: bool = False
    """Join training examples end to end into rows of at most max_tokens (causal only); no example is cut for it, and
    attention is not cut between them. A packed row counts as one example."""
    held_out: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of each client's rows kept for evaluation and never trained on; if above 0 at least one row, unless the
    client has only one."""
    test: str | Sequence[str] | None = None
    """Separate test file(s); without it the global test data are all clients' held-out rows."""
    limit: Annotated[int, Ge(1)] | None = None
    """Use only so many rows of the source, drawn at random (seeded); none uses all."""


def faults(settings: DataSettings) -> list[Fault]:
    """Return the faults between settings that need or exclude each other, and those of the template."""
    split, wrong = settings.split, list[Fault]()
    needs = {"key": ["by"], "iid": ["clients"], "dirichlet": ["by", "clients", "alpha"], "sizes": ["sizes"]}
    needed = needs.get(split.kind, [])
    for name in needed:
        if not getattr(split, name):
            wrong.append(Fault(f"data.split.{name}", f"a value, for {split.kind!r} needs it", "none", f"set {name}"))
    optional = {"key": ["clients"], "files": ["clients"]}.get(split.kind, [])
    for name in ("by", "clients", "alpha", "sizes"):
        value = getattr(split, name)
        if value is not None and name not in needed + optional:
            expected = f"no value, for {split.kind!r} has no use for it"
            wrong.append(Fault(f"data.split.{name}", expected, repr(value), "remove it or choose another kind"))
    if settings.template not in TEMPLATES and not settings.template.endswith("{output}"):
        expected = f"{', '.join(TEMPLATES)} or a text that ends in {{output}}"
        wrong.append(Fault("data.template", expected, repr(settings.template)))
    elif settings.template.count("{output}") > 1:
        wrong.append(Fault("data.template", "{output} once, at the end", repr(settings.template)))
    return wrong
