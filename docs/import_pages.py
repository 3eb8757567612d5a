"""The table of FederatedScope's keys, from the table that `fedtune import-fs` converts by."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.config.fs_keys import ALIGN, ARGUMENTS, DATA, GROUPS, MODEL, PARTS, RUN, TRAINING, FsKey

SECTIONS: Mapping[str, Mapping[str, FsKey]] = {
    "The run": RUN,
    "Data": DATA,
    "Model and adapter": MODEL,
    "Distilling an emulator": ALIGN,
    "Training, server and scores": TRAINING,
    "Personal models, asynchronous rounds, search": PARTS,
    "Empty lists": ARGUMENTS,
}


def import_table() -> str:
    """Return one row for each key of FederatedScope, by section, and for each group of keys without a counterpart."""
    parts = []
    for title, keys in SECTIONS.items():
        rows = [
            f"| `{key}` | {', '.join(f'`{ours}`' for ours in entry.ours) or 'none'} | {entry.note} |"
            for key, entry in keys.items()
        ]
        parts.append("\n".join([f"### {title}", "", "| FederatedScope | Here | How |", "|---|---|---|", *rows]))
    groups = [f"| `{start}{'*' if start.endswith('.') else ''}` | {why} |" for start, why in GROUPS.items()]
    parts.append("\n".join(["### All others that begin so", "", "| FederatedScope | Why not |", "|---|---|", *groups]))
    return "\n\n".join(parts)
