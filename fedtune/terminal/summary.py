"""The result of a finished run, as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedtune.rounds.record import COUNTS
from fedtune.terminal.text import duration, number, printable, size

Metrics: TypeAlias = Mapping[str, Any]

COLUMNS = 80
"""Of a final table that is piped."""
MOST_METRICS = 3
"""Metrics beside each other, each before and after, that fit into 80 columns."""
MOST_CLIENTS = 30
"""Clients that the table names; the report names all."""


def table_width(console: Console) -> int:
    """Return the columns of a final table: the terminal's, or 80 in a file, which any screen shows."""
    return console.width if console.is_terminal else min(COLUMNS, console.width)


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the content of summary.json: the scores before and after, the clients, and answers."""
    width = table_width(console)
    for part in (scores(summary), own_models(summary), clients(summary)):
        if part.row_count:
            console.print(part, width=width)
    if line := selection(summary):
        console.print(Text(line), width=width)
    if summary.get("sample"):
        console.print(sample(summary["sample"]), width=width)
    for texts in summary.get("samples", ()):
        console.print(side_by_side(texts), width=width)


def selection(summary: Mapping[str, Any]) -> str:
    """Return which round's model is the result, where that is not simply the last one; else nothing."""
    chosen = summary.get("selection", {})
    best, last = chosen.get("best"), chosen.get("last")
    if not best or not last or (chosen["keep"] == "last" and not chosen["ended"]):
        return ""
    metric = words(chosen["metric"])
    ended = f"; ended early: {chosen['ended']}" if chosen["ended"] else ""
    return (
        f"the result is round {chosen['round']} of {last['round']}: {metric} {number(best['score'])} in round "
        f"{best['round']} (best), {number(last['score'])} in round {last['round']} (last){ended}"
    )


def show_paths(console: Console, *, adapter: Path, report: Path | None) -> None:
    """Print where the result of a run is: its adapter or seeds, and its page if there is one."""
    written = {adapter.name: adapter} | ({"report": report} if report else {})
    for name, path in written.items():
        console.print(Text(f"{name:8} {printable(path)}"), soft_wrap=True)


def views(scores: Mapping[str, Any]) -> Table:
    """Return the whole model beside those that devices get: scores, size, time of a forward pass."""
    rows = {"whole": scores["whole"], **{f"pruned by {ratio}": row for ratio, row in scores["deployed"].items()}}
    metrics = [name for name in score_names(*rows.values()) if name not in COSTS]
    table = grid(
        "the same change in smaller models; forward pass of 16 rows",
        "",
        *map(words, metrics),
        "block sparsity",
        "parameters",
        "MB",
        "ms",
    )
    for title, row in rows.items():
        costs = [
            f"{100 * row['sparsity']:.1f} %",
            f"{row['parameters']:,}",
            f"{row['megabytes']:.1f}",
            f"{row['forward_ms']:.1f}",
        ]
        table.add_row(title, *(number(row[name]) for name in metrics), *costs)
    return table


COSTS = ("sparsity", "parameters", "megabytes", "forward_ms")


def client_views(scores: Mapping[str, Any]) -> Table:
    """Return each client's held-out scores in the structure that it trained last."""
    metrics = [name for name in score_names(*scores.values()) if name != "ratio"]
    table = grid("each client's rows, in the model that it trained last", "client", "ratio", *map(words, metrics))
    for name, row in list(scores.items())[:MOST_CLIENTS]:
        table.add_row(printable(name), f"{row['ratio']:g}", *(number(row[metric]) for metric in metrics))
    return table


def scores(summary: Mapping[str, Any]) -> Table:
    """Return the global model's scores: a row per scope, a column per metric, each cell `before -> after`."""
    before, after = summary["before"], summary["after"]
    worst = after.get("worst") or {}
    scopes = {
        "test data": (before.get("test"), after.get("test")),
        "mean of clients": (before.get("mean"), after.get("mean")),
        # Another client may have been the worst before, so this row shows one client's way, not two maxima.
        f"worst client: {printable(worst.get('client'))}": (
            before.get("held_out", {}).get(worst.get("client")),
            worst,
        ),
        # Here, too, other clients may have been the worst before; these are two means.
        f"worst tenth ({tenth(after).get('clients')} clients)": (metrics_of(tenth(before)), metrics_of(tenth(after))),
        "test data, as deployed": (None, summary.get("deployed")),
    }
    shown = {scope: (old or {}, new or {}) for scope, (old, new) in scopes.items() if old or new}
    rounds = "1 round" if summary["rounds"] == 1 else f"{summary['rounds']} rounds"
    title = f"{summary['name']}: {summary['method']}, {rounds}, seed {summary['seed']}"
    traffic = f"up {size(summary['bytes_up'])}, down {size(summary['bytes_down'])}, {duration(summary['seconds'])}"
    if summary.get("clock_s"):
        traffic += f" here, {duration(summary['clock_s'])} on the devices"
    metrics = score_names(*(part for pair in shown.values() for part in pair))
    if len(metrics) > MOST_METRICS:
        return long_scores(f"{title}; {traffic}", shown)
    table = grid(f"{title}; {traffic}", "", *map(words, metrics))
    for scope, (old, new) in shown.items():
        table.add_row(Text(scope), *(change(old.get(metric), new.get(metric)) for metric in metrics))
    return table


def own_models(summary: Mapping[str, Any]) -> Table:
    """Return clients' own models beside the global one and the base: a row per metric, over all and the worst tenth."""
    own = summary.get("personal")
    if not own:
        return grid("", "")
    title = f"models of {own['clients']} clients' own ({own['kind']}), on {own['examples']} held-out rows"
    table = grid(title, "", "base", "server's", "own")
    models = [own[name] for name in ("base", "server", "own")]
    for metric in score_names(models[-1]["mean"]):
        table.add_row(f"{words(metric)}, mean", *(number(model["mean"].get(metric)) for model in models))
        if count := models[-1]["worst_tenth"].get("clients"):
            of = f"{words(metric)}, worst tenth ({count})"
            table.add_row(of, *(number(model["worst_tenth"].get(metric)) for model in models))
    return table


def tenth(scores: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the scores of the tenth of clients that a model serves worst; empty where the summary has none."""
    return scores.get("worst_tenth") or {}


def metrics_of(scores: Mapping[str, Any]) -> Metrics:
    """Return mean scores without the number of clients that they are of."""
    return {name: value for name, value in scores.items() if name != "clients"}


def long_scores(title: str, shown: Mapping[str, tuple[Metrics, Metrics]]) -> Table:
    """Return a row per scope and metric: more metrics than `MOST_METRICS` do not fit beside each other."""
    table = grid(title, "", "before", "after", second="metric")
    for scope, (old, new) in shown.items():
        for place, metric in enumerate(score_names(old, new)):
            table.add_row(
                Text(scope if place == 0 else ""), words(metric), number(old.get(metric)), number(new.get(metric))
            )
    return table


def words(metric: str) -> str:
    """Return a metric's key as words, which a narrow column can break between."""
    return metric.replace("_", " ")


def clients(summary: Mapping[str, Any]) -> Table:
    """Return one row per client: size, rank, loss of the global model on its held-out data, bytes, seconds."""
    old, new = (summary[when].get("held_out") or {} for when in ("before", "after"))
    rows = sorted(summary["clients"].items())
    # Only where there are any: without this column the table fits a terminal of 80 columns.
    failures = ["failed"] if any(client["failures"] for _, client in rows) else []
    # Clients of seeds have no rank; where some descend, the column says who does what.
    does = "verb" if any("verb" in client for _, client in rows) else "rank"
    table = grid("", "client", "examples", does, "held-out loss", "up", "down", "seconds", *failures)
    table.columns[3].no_wrap = True  # names give way first, however narrow the terminal
    for name, client in rows[:MOST_CLIENTS]:
        table.add_row(
            Text(printable(name)),
            str(client["examples"]),
            client["verb"] if does == "verb" else number(client["rank"]),
            change(old.get(name, {}).get("loss"), new.get(name, {}).get("loss")),
            size(client["bytes_up"]),
            size(client["bytes_down"]),
            f"{client['seconds']:.1f}",
            *(str(client["failures"] or "") for _ in failures),
        )
    if len(rows) > MOST_CLIENTS:
        table.add_row(f"and {len(rows) - MOST_CLIENTS} more")
    return table


def sample(texts: Mapping[str, str]) -> RenderableType:
    """Return how the model went on from the prompt before and after."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("prompt", "before", "after"):
        table.add_row(name, Text(printable(texts[name], lines=True)))
    return table


def side_by_side(texts: Mapping[str, Any]) -> RenderableType:
    """Return the answers to one question before and after, beside each other, with their scores."""
    table = Table(
        title=Text(printable(texts["prompt"], lines=True)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        expand=True,
        show_footer="scores" in texts,
    )
    for name in ("before", "after"):
        table.add_column(name, ratio=1, overflow="fold", footer=Text(answer_scores(texts, name), style="dim"))
    table.add_row(*(Text(printable(texts[name].strip() or "(nothing)", lines=True)) for name in ("before", "after")))
    if "reference" not in texts:
        return table
    reference = Text.assemble(("reference  ", "dim"), printable(texts["reference"], lines=True))
    return Group(table, Padding(reference, (0, 0, 1, 1)))


def answer_scores(texts: Mapping[str, Any], name: str) -> str:
    """Return what an answer scored against the reference, in words."""
    scores = texts.get("scores", {}).get(name, {})
    titles = {"rouge_l": "Rouge-L", "loss": "reference loss"}
    return ", ".join(f"{title} {number(scores[key])}" for key, title in titles.items() if key in scores)


def comparison(before: Metrics, after: Metrics) -> Table:
    """Return one row per metric."""
    table = grid("", "metric", "before", "after")
    for metric in score_names(before, after):
        table.add_row(words(metric), number(before.get(metric)), number(after.get(metric)))
    return table


def score_names(*parts: Metrics) -> Sequence[str]:
    """Return the names of all scores, in order of their first appearance."""
    names = [name for part in parts for name, value in part.items() if isinstance(value, int | float)]
    return [name for name in dict.fromkeys(names) if name not in COUNTS]


def change(before: float | None, after: float | None) -> str:
    if before is None:
        return "" if after is None else number(after)
    return f"{number(before)} -> {number(after)}"


def grid(title: str, first: str, *others: str, second: str = "") -> Table:
    """Return an empty table: texts in its first column, and in the second if that has a name; then numbers.

    Numbers are never cut: where the terminal is narrow, texts are folded and headings broken.
    """
    table = Table(
        title=Text(printable(title)) if title else None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in (first, second) if second else (first,):
        table.add_column(name, overflow="fold")
    for name in others:
        longest = max((len(word) for word in name.split()), default=0)
        table.add_column(name, justify="right", min_width=max(longest, 1))
    return table
