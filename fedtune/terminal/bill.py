"""What a run will take, as plain lines of at most 80 columns: memory by part, seconds, bytes, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from fedtune.terminal.text import duration, printable, size

PARTS: Mapping[str, str] = {
    "weights": "weights",
    "frozen_change": "change",
    "adapters": "adapter",
    "optimizer": "optim.",
    "activations": "activ.",
    "logits": "logits",
    "runtime": "runtime",
}
"""Heads of columns, by part of the memory."""
KINDS, NAMES, MISFITS = 12, 10, 8
"""Kinds of clients that are listed, columns of a name, and clients that do not fit and are named."""
HERE = "this machine"
COLUMNS = f"{'rank':>6}{'ratio':>7}{'batch':>6}{'compute':>9}{'down':>8}{'up':>8}"
VERB_COLUMNS = f"{'verb':>9}{'batch':>6}{'compute':>9}{'kB down':>10}{'kB up':>9}"
"""Heads of the columns of a round, without and with clients that descend."""


def lines(bill: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a bill, as `Bill.as_json` gives it."""
    clients: Mapping[str, Mapping[str, Any]] = bill["clients"]
    kinds = list(by_kind(clients).items())
    # Where all clients do the same, a column for it says nothing.
    verbs = any(own.get("verb") == "descend" for own in clients.values())
    at_work = f"at work; {bill['buffer']} updates end each" if "buffer" in bill else "in each"
    yield f"{len(clients)} clients, {bill['cohort']} {at_work} of {bill['rounds']} rounds"
    yield ""
    yield "Memory at the peak in MB, of the client of each kind that needs most"
    yield f"{'kind':{NAMES}}" + "".join(f"{head:>8}" for head in PARTS.values()) + f"{'total':>7}{'has':>7}"
    for kind, names in kinds[:KINDS]:
        own = clients[names[0]]
        parts = own["memory_bytes"]
        numbers = "".join(f"{megabytes(parts[part]):>8}" for part in PARTS)
        has = "-" if own["has_bytes"] is None else megabytes(own["has_bytes"])
        yield f"{short(kind[0] or 'here'):{NAMES}}{numbers}{megabytes(parts['total']):>7}{has:>7}"
    yield ""
    yield "A round of that client: seconds and bytes"
    yield f"{'kind':{NAMES}}{'client':>10}{'of':>5}{VERB_COLUMNS if verbs else COLUMNS}{'fits':>6}"
    for kind, names in kinds[:KINDS]:
        own = clients[names[0]]
        fits = sum(clients[name]["fits"] for name in names)
        row = verb_columns(own) if verbs else columns(own)
        yield f"{short(kind[0] or 'here'):{NAMES}}{short(names[0]):>10}{len(names):>5}{row}{fits:>6}"
    if len(kinds) > KINDS:
        yield f"and {len(kinds) - KINDS} kinds more; --json lists every client"
    yield from misfits(clients)
    yield ""
    yield from totals(bill)
    if measured := bill.get("measured"):
        yield ""
        yield from calibration(measured)


def columns(own: Mapping[str, Any]) -> str:
    """Return what a round asks of a client: how much is trained, and seconds."""
    times = f"{duration(own['down_s']):>8}{duration(own['up_s']):>8}"
    rank = "-" if own["rank"] is None else own["rank"]
    return f"{rank:>6}{own['ratio']:>7g}{own['batch']:>6}{compute_text(own):>9}{times}"


def verb_columns(own: Mapping[str, Any]) -> str:
    """Return the same where clients probe or descend, which have neither rank nor ratio: with the bytes of each."""
    traffic = f"{own['bytes_down'] / 1e3:>10.1f}{own['bytes_up'] / 1e3:>9.1f}"
    return f"{own.get('verb', ''):>9}{own['batch']:>6}{compute_text(own):>9}{traffic}"


def compute_text(own: Mapping[str, Any]) -> str:
    return "-" if own["compute_s"] is None else duration(own["compute_s"])


def by_kind(clients: Mapping[str, Mapping[str, Any]]) -> Mapping[tuple[Any, ...], Sequence[str]]:
    """Return the clients of each kind (device, rank, ratio, batch, verb), that which needs most first."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, own in clients.items():
        kind = own["device"], own["rank"], own["ratio"], own["batch"], own.get("verb", "")
        kinds.setdefault(kind, []).append(name)
    return {
        kind: sorted(names, key=lambda name: (-clients[name]["memory_bytes"]["total"], name))
        for kind, names in sorted(kinds.items())
    }


def misfits(clients: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the clients that do not fit, what they lack, and the settings nearest to the recipe's that fit."""
    wrong = [name for name, own in clients.items() if not own["fits"]]
    if wrong:
        yield ""
        yield f"{len(wrong)} of {len(clients)} clients do not fit:"
    for name in wrong[:MISFITS]:
        own = clients[name]
        yield f"  {short(name, 20)}: needs {size(own['memory_bytes']['total'])}, has {size(own['has_bytes'])}; nearest:"
        yield from indented_lines(own["nearest"])
    if len(wrong) > MISFITS:
        yield f"  and {len(wrong) - MISFITS} more; --json lists every client"


def indented_lines(text: str) -> Iterator[str]:
    """Yield a text in lines, indented."""
    yield from wrap(text, 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def totals(bill: Mapping[str, Any]) -> Iterator[str]:
    """Yield traffic and time of the run."""
    words = {
        "exact": "counted on messages that were encoded",
        "at most": "at most, by what is learned",
        "estimated": "estimated",
    }
    rounds = bill["bytes_by_round"]
    yield f"traffic: {size(bill['bytes']['down'])} down, {size(bill['bytes']['up'])} up; {words[bill['bytes_are']]}"
    shown = ", ".join(f"{size(each['down'])} / {size(each['up'])}" for each in rounds[:3])
    more = "" if len(rounds) >= bill["rounds"] else f"; those after round {len(rounds)} are taken to be like it"
    yield from indented_lines(f"down / up of the first rounds: {shown}{more}")
    if bill["seconds"] is None:
        yield "time: not known of this machine; --measure trains some steps for ten seconds"
    else:
        of = "until its buffer is full" if "buffer" in bill else "of the slowest client"
        yield f"time: {duration(bill['round_s'])} a round, {duration(bill['seconds'])} in all, {of}"


def calibration(measured: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was measured on this machine beside what had been predicted."""
    yield f"Measured on {HERE}, of client {short(measured['client'], 20)}"
    yield f"{'rows':>6}{'s a step':>10}{'peak MB':>10}{'predicted':>11}{'ratio':>8}"
    for step in measured["steps"]:
        peak, predicted = step["peak_bytes"], step["predicted_bytes"]
        ratio = f"{predicted / peak:.2f}" if peak else "-"
        yield (f"{step['rows']:>6.0f}{step['seconds']:>10.3g}{megabytes(peak):>10}{megabytes(predicted):>11}{ratio:>8}")
    yield (
        f"{measured['s_per_tflop']:.3g} s for 1e12 operations of a step ({measured['product_s_per_tflop']:.3g} of a "
        "matrix product)"
    )


def megabytes(count: float) -> str:
    """Return bytes in MB, in six columns at most.

    >>> megabytes(1_234_000), megabytes(54_321_000_000)
    ('1.2', '54321')
    """
    return f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"


def short(name: str, columns: int = NAMES - 1) -> str:
    """Return a name that fits into some columns."""
    text = printable(name)
    return text if len(text) <= columns else text[: columns - 1] + "~"
