"""The table of the data sets that have a name, from the code that reads them."""

from __future__ import annotations

from fedtune.data.presets import PRESETS


def preset_table() -> str:
    """Return one row for each name of `data.preset`."""
    head = ["| Name | Rows | Published as | On the hub | Columns | Divided by |", "|---|---|---|---|---|---|"]
    rows = []
    for name, preset in PRESETS.items():
        hub = f"`{preset.hub}`" if preset.hub else "no"
        if preset.revision:
            hub += f" at `{preset.revision[:12]}`"
        columns = ", ".join(f"{part}: {' or '.join(f'`{c}`' for c in own)}" for part, own in preset.columns.items())
        by = f"`{preset.by}`" if preset.by else ""
        rows.append(f"| `{name}` | {preset.rows} | `{preset.file}` in {preset.home} | {hub} | {columns} | {by} |")
    return "\n".join([*head, *rows])
