"""The numbers under each plot, and the other tables of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedtune.report.curves import (
    Floats,
    client_names,
    evaluations,
    kinds,
    loss_curve,
    loss_unit,
    paired_losses,
    training_rounds,
)
from fedtune.report.reader import Evaluation, FailureRecord, Run, Scores, finite
from fedtune.report.rendering import Table
from fedtune.report.units import NOTHING, bytes_text, number_text, seconds_text
from fedtune.rounds.record import ClientRecord

METRICS: Mapping[str, str] = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "bits_per_character": "bits per character",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "preferred": "preferred answer more probable",
    "examples": "examples",
    "tokens": "tokens",
}


def losses(run: Run) -> Table:
    """Return the losses of every round; the deployed model's and the devices' time where there are any."""
    curve = loss_curve(run)
    columns = {
        "test": curve.test,
        **({} if np.isnan(curve.deployed).all() else {"test, as deployed": curve.deployed}),
        "mean of clients": curve.mean,
        "best client": curve.best,
        "worst client": curve.worst,
        "training": curve.training,
    }
    shares = {record.round: record.rate_share for record in run.rounds if record.round}
    if any(share != 1 for share in shares.values()):
        columns["learning rate, times the recipe's"] = np.array([shares.get(int(r), np.nan) for r in curve.rounds])
    times = {"time so far": curve.seconds, **({"time on the devices": curve.clock} if curve.clock.any() else {})}
    rows = [
        [
            str(int(curve.rounds[index])),
            *(number_text(float(column[index])) for column in columns.values()),
            bytes_text(float(curve.bytes[index])),
            *(seconds_text(float(column[index])) for column in times.values()),
        ]
        for index in range(len(curve.rounds))
    ]
    return Table(["round", *columns, "traffic so far", *times], rows)


def traffic(run: Run) -> Table:
    rounds = training_rounds(run)
    up = np.cumsum([record.bytes_up for record in rounds])
    down = np.cumsum([record.bytes_down for record in rounds])
    rows = [
        [
            str(record.round),
            *map(bytes_text, (record.bytes_up, record.bytes_down, float(up[index]), float(down[index]))),
            str(record.used),
        ]
        for index, record in enumerate(rounds)
    ]
    return Table(["round", "up", "down", "up so far", "down so far", "clients used"], rows)


def client_map(run: Run) -> Table:
    rounds = training_rounds(run)

    def cell(name: str, column: int) -> str:
        client = rounds[column].clients.get(name)
        if client is None:
            return ""
        if client.status != "ok":
            return client.status
        return number_text(finite(client.loss_before) - finite(client.loss_after), 3)

    rows = [[name, *(cell(name, column) for column in range(len(rounds)))] for name in client_names(run)]
    return Table(["client", *(str(record.round) for record in rounds)], rows)


def before_after(run: Run) -> Table:
    rows = [[name, *map(number_text, (before, after, after - before))] for name, before, after in paired_losses(run)]
    return Table(["client", "base", "tuned", "change"], rows)


def _span(values: Floats, text: Callable[[float], str]) -> str:
    known = values[~np.isnan(values)]
    if not len(known):
        return NOTHING
    low, high = text(float(known.min())), text(float(known.max()))
    return low if low == high else f"{low} to {high}"


def ranks(run: Run) -> Table:
    rounds = [record for record in run.rounds if record.modules]
    groups = kinds(name for record in rounds for name in record.modules)
    rows = []
    for record in rounds:
        row = [str(record.round)]
        for names in groups.values():
            modules = [record.modules[name] for name in names if name in record.modules]
            row.append(_span(np.array([float(module.rank) for module in modules]), lambda value: f"{value:.0f}"))
            energy = np.array([finite(module.energy_kept) for module in modules])
            row.append(_span(energy, lambda value: f"{100 * value:.3f} %"))
            share = np.array([finite(module.state_energy_kept) for module in modules])
            row.append(_span(share, lambda value: f"{100 * value:.3f} %"))
        rows.append(row)
    head = [text for kind in groups for text in (f"{kind}: rank", f"{kind}: energy sent", f"{kind}: energy kept")]
    return Table(["round", *head], rows)


def spectrum(run: Run) -> Table | None:
    record = next((record for record in reversed(run.rounds) if record.modules), None)
    if record is None:
        return None
    rows = [
        [
            name,
            str(record.modules[name].rank),
            number_text(record.modules[name].norm, 3),
            " ".join(number_text(value, 3) for value in record.modules[name].singular_values),
        ]
        for names in kinds(record.modules).values()
        for name in names
    ]
    return Table([f"module, round {record.round}", "rank", "norm", "singular values"], rows)


def scores(run: Run) -> Table | None:
    """Return every metric that was measured, of the base and of the tuned model."""
    before, after = evaluations(run)
    pairs: tuple[tuple[str, Scores | None, Scores | None], ...] = (
        ("global test", before.test, after.test),
        ("mean of clients", before.mean, after.mean),
        (_worst_name(run), before.worst, after.worst),
        (_tenth_name(after), before.worst_tenth, after.worst_tenth),
    )
    rows = []
    for where, old, new in pairs:
        for key, title in {**METRICS, "loss": f"loss ({loss_unit([run])})"}.items():
            first, last = _metric(old, key), _metric(new, key)
            if first is None and last is None:
                continue
            change = "" if key in ("examples", "tokens") else number_text(finite(last) - finite(first), 3)
            rows.append([where, title, number_text(first), number_text(last), change])
    return Table(["measured on", "metric", "base", "tuned", "change"], rows, text_columns=2)


def own_models(run: Run) -> Table | None:
    """Return clients' own models beside the global one and the base; None where there are none."""
    personal = run.summary.personal if run.summary else None
    if personal is None:
        return None
    rows = []
    for key, title in METRICS.items():
        models = (personal.base, personal.server, personal.own)
        if key in ("examples", "tokens") or _metric(personal.own.mean, key) is None:
            continue
        rows.append([title, "mean", *(number_text(_metric(model.mean, key)) for model in models)])
        if personal.own.worst_tenth.clients:
            of = f"worst tenth ({personal.own.worst_tenth.clients})"
            rows.append([title, of, *(number_text(_metric(model.worst_tenth, key)) for model in models)])
    head = f"{personal.clients} clients, {number_text(personal.examples)} rows, after round {personal.round}"
    return Table([head, "over clients", "base", "server's", f"own ({personal.kind})"], rows, text_columns=2)


def _worst_name(run: Run) -> str:
    before, after = evaluations(run)
    names = [worst.client for worst in (before.worst, after.worst) if worst]
    return "worst client: " + " (base), ".join(dict.fromkeys(names)) + (" (tuned)" if len(set(names)) > 1 else "")


def _tenth_name(after: Evaluation) -> str:
    return f"worst tenth of clients ({after.worst_tenth.clients})" if after.worst_tenth else ""


def _metric(scores: Scores | None, key: str) -> float | int | None:
    value: float | int | None = getattr(scores, key, None)
    return value if value is None or math.isfinite(value) else None


def clients(run: Run) -> Table | None:
    """Return what each client had, sent and received over the whole run."""
    if run.summary is None or not run.summary.clients:
        return None
    verbs = any(total.verb for total in run.summary.clients.values())
    rows = [
        [
            name,
            number_text(total.examples),
            total.verb if verbs else number_text(total.rank),
            bytes_text(total.bytes_up),
            bytes_text(total.bytes_down),
            seconds_text(total.seconds),
            str(total.failures),
        ]
        for name, total in (
            (name, run.summary.clients[name]) for name in client_names(run) if name in run.summary.clients
        )
    ]
    does = "verb" if verbs else "rank"
    return Table(["client", "examples", does, "sent up", "received", "time", "failures"], rows)


def verbs(run: Run) -> Table | None:
    """Return what descending and probing took, each: means over the updates that were used; None where all probe."""
    by_verb: dict[str, list[ClientRecord]] = {}
    for record in run.rounds:
        for client in record.clients.values():
            if client.status == "ok":
                by_verb.setdefault(client.verb or "probe", []).append(client)
    if "descend" not in by_verb and not any(client.verb for each in by_verb.values() for client in each):
        return None
    head = ["verb", "updates", "steps", "sent up", "received", "peak memory", "time", "fall of the loss"]
    return Table(head, [[verb, *verb_row(done)] for verb, done in sorted(by_verb.items())])


def verb_row(done: Sequence[ClientRecord]) -> Sequence[str]:
    """Return the means of updates of one verb: as text, their number first."""

    def mean(numbers: Sequence[float | None]) -> float:
        known = [number for number in numbers if number is not None and math.isfinite(number)]
        return sum(known) / len(known) if known else math.nan

    falls = [finite(client.loss_before) - finite(client.loss_after) for client in done]
    return [
        str(len(done)),
        number_text(mean([client.steps for client in done]), 3),
        bytes_text(mean([client.bytes_up for client in done])),
        bytes_text(mean([client.bytes_down for client in done])),
        bytes_text(mean([client.peak_bytes for client in done])),
        seconds_text(mean([client.seconds for client in done])),
        number_text(mean(falls), 3),
    ]


def failures(run: Run) -> Sequence[FailureRecord]:
    """Return the summary's failures or, without one, those of the rounds."""
    if run.summary:
        return run.summary.failures
    return [
        FailureRecord(round=record.round, client=name, kind=client.status, reason=client.reason)
        for record in run.rounds
        for name, client in record.clients.items()
        if client.status != "ok"
    ] + [
        FailureRecord(round=record.round, client=reply.client, kind=reply.kind, reason=reply.reason)
        for record in run.rounds
        for reply in record.unsolicited
    ]


def failures_table(run: Run) -> Table | None:
    rows = [[str(failure.round), failure.client, failure.kind, failure.reason] for failure in failures(run)]
    rows += [
        [str(record.round), name, "ok", f"steps left out, as loss or gradient was not finite: {client.skipped_steps}"]
        for record in run.rounds
        for name, client in record.clients.items()
        if client.skipped_steps
    ]
    return Table(["round", "client", "what", "reason"], rows, text_columns=4) if rows else None


def seeds(run: Run) -> Table | None:
    """Return how the integers that a run of seeds consists of grew; None for a run of adapters."""
    rows = [
        [
            str(record.round),
            f"{record.figures['seeds_moved']:.0f}",
            f"{record.figures['sum_abs']:.0f}",
            f"{record.figures['displacement_rms']:.3g}",
            f"{record.figures['scalar_step']:.3g}",
            f"{record.figures['rounds_left']:.0f}" if "rounds_left" in record.figures else NOTHING,
        ]
        for record in run.rounds
        if "seeds_moved" in record.figures
    ]
    head = ["round", "seeds moved", "sum of |A|", "rms change of a weight", "step of a scalar", "rounds left at worst"]
    return Table(head, rows, text_columns=0) if rows else None


def provenance(run: Run) -> Table | None:
    """Return versions, machine and digests, by which a result can be traced; None without a summary."""
    if run.summary is None:
        return None
    base = run.summary.base
    rows = [["base", base.name], ["base digest", base.digest], ["digest of the result", run.summary.adapter_digest]]
    rows.append(["state digest", run.summary.state_digest])
    rows += [[f"version of {name}", version] for name, version in run.summary.versions.items()]
    rows += [[f"machine: {name}", str(value)] for name, value in run.summary.machine.items()]
    return Table(["what", "value"], [row for row in rows if row[1]], text_columns=2)
