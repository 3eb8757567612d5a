"""What a device would use of its owner's data and what it would send, before anything is agreed to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.config.site import SiteSettings, own_shard
from fedtune.data.encode import IGNORED, Example
from fedtune.data.settings import GROUP
from fedtune.data.source import read_source
from fedtune.edge import disclosure
from fedtune.edge.base import open_base, own_roster
from fedtune.edge.disclosure import Disclosed
from fedtune.edge.site import EdgeSite, check_local, read_data
from fedtune.edge.tokenizer import EdgeTokenizer


@dataclass(frozen=True)
class Shown:
    """An example as the model reads it."""

    pieces: Sequence[tuple[str, bool]]
    """Text, and whether the model learns to write it."""
    tokens: int


@dataclass(frozen=True)
class Inspection:
    """What a device would use and send."""

    base: str
    """Name of the base model."""
    files: Sequence[tuple[str, int]]
    """Each file with its rows."""
    parts: Sequence[str]
    """What of the rows is read."""
    rows: int
    training: int
    """Examples that are trained on."""
    held_out: int
    """Examples that are only scored."""
    tokens: int
    """Of all examples that are trained on."""
    longest: int
    """Tokens of the longest one."""
    notes: Sequence[str]
    """Columns that are not used, examples that are cut or dropped, repeated rows."""
    first: Sequence[Shown]
    sent: Sequence[Disclosed]
    """Messages that would leave the device; the numbers of an answer are an example."""
    sizes: Sequence[tuple[int, int]]
    """Directions of a round, and bytes of its answer."""
    least_examples: int
    """Examples that the policy asks for before it takes part."""


def inspect_site(settings: SiteSettings, *, source: str, examples: int = 3) -> Inspection:
    """Return what a device would use and send; neither a network nor an identity is needed.

    Args:
        settings: of the device's own file.
        source: the file's path, for messages.
        examples: how many are shown.

    Raises:
        ConfigError: if the file, the bundle or the data are wrong.
        StoreError: if the bundle is damaged.
    """
    check_local(settings.data, settings.root)
    read = read_source(settings.data, settings.root, task="causal")
    opened = open_base(settings, source=source)
    federation = read_data(settings, settings.data, opened)
    shard = own_shard(settings, federation, source=source)
    site = EdgeSite(settings.name, opened, shard.train, shard.held_out, settings.state, settings.policy)
    profile = site.profile()
    roster = own_roster(settings)
    answers = [disclosure.update_sent(profile, steps=steps, policy=settings.policy) for steps in disclosure.STEPS]
    federation_name = "federation" if roster is None else roster.federation
    sent = [disclosure.profile_sent(profile), answers[0]]
    sent += [disclosure.scores_sent(profile)] if settings.policy.scores == "send" else []
    sent += [disclosure.statement_sent(settings.name, answers[0].data, federation=federation_name)]
    lengths = [len(example.input_ids) for example in shard.train]
    return Inspection(
        base=opened.bundle.base_name,
        files=read.files,
        parts=[name for name in read.rows.names if name != GROUP],
        rows=read.rows.count,
        training=len(shard.train),
        held_out=len(shard.held_out),
        tokens=sum(lengths),
        longest=max(lengths),
        notes=[*opened.bundle.warnings, *federation.notes],
        first=[show(example, opened.tokenizer) for example in shard.train[:examples]],
        sent=sent,
        sizes=[(steps, len(answer.data)) for steps, answer in zip(disclosure.STEPS, answers, strict=True)],
        least_examples=settings.policy.min_examples,
    )


def show(example: Example, tokenizer: EdgeTokenizer) -> Shown:
    """Return an example as text, what is learned apart from what is only read."""
    return Shown(list(_pieces(example, tokenizer)), len(example.input_ids))


def _pieces(example: Example, tokenizer: EdgeTokenizer) -> Iterator[tuple[str, bool]]:
    ids, written = example.input_ids.tolist(), 0
    learned = np.asarray(example.labels) != IGNORED
    ends = [int(end) + 1 for end in np.flatnonzero(learned[1:] != learned[:-1])] + [len(ids)]
    for end in ends:
        # Of the whole up to here: a run of tokens decoded by itself would lose its first space.
        text = tokenizer.decode(ids[:end])
        yield text[written:], bool(learned[end - 1])
        written = len(text)


def site_of(data: str, bundle: Path, root: Path) -> SiteSettings:
    """Return the settings of a device that has no file yet, with data and bundle alone."""
    from fedtune.data.settings import DataSettings, Split
    from fedtune.link.settings import Policy
    from fedtune.model.settings import ModelSettings

    return SiteSettings(
        name="device",
        model=ModelSettings(base=str(bundle)),
        adapter=None,
        data=DataSettings(data, Split("iid", clients=1)),
        seed=0,
        split=False,
        root=root,
        policy=Policy(unsigned_base=True),
    )
