"""Where the examples come from, how a row becomes text, and how rows are divided among clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval


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
    """Least training rows of any client; dirichlet draws again (up to 100 times) until it holds."""
    sizes: Sequence[Annotated[int, Ge(1)]] | None = None


@dataclass(frozen=True)
class DataSettings:
    """The recipe's table `data`."""

    source: str | Sequence[str]
    """File(s), glob, folder of a saved dataset, or hub name; relative paths are relative to the recipe."""
    split: Split
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "text", "saved", "hub"] = "auto"
    """auto: by the file's ending, a folder with state.json as a saved dataset, otherwise a hub name."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    fields: Mapping[Literal["text", "instruction", "input", "output", "label"], str] = field(default_factory=dict)
    """Which column plays which part; a column that already has the part's name needs no entry."""
    template: str = "alpaca"
    """alpaca | chat (the tokenizer's own template) | plain (prompt, newline, output) | your own text with
    {instruction}, {input} and ending in {output}. Rows with only `text` are taken as they are."""
    max_tokens: Annotated[int, Ge(2)] = 512
    """Longer examples are cut at the end; an example whose whole completion is cut is dropped and counted."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count in the loss; for rows of plain text all do."""
    packing: bool = False
    """Join examples end to end into rows of max_tokens (causal only); attention is not cut between them."""
    held_out: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of each client's rows kept for evaluation and never trained on; at least one row if above 0."""
    test: str | Sequence[str] | None = None
    """Separate test file(s); without it the global test data are all clients' held-out rows."""
    limit: Annotated[int, Ge(1)] | None = None
    """Use only so many rows of the source, drawn at random (seeded); none uses all."""
