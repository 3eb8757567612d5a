"""The command `fedtune-edge inspect`: what would be used of the data, and what would be sent, byte for byte."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.cli.edge_options import DONE, add_site, expect_site

if TYPE_CHECKING:
    from fedtune.edge.disclosure import Disclosed
    from fedtune.edge.inspection import Inspection

LONGEST = 400
"""Characters of a piece of an example that are shown: its start and its end."""
MOST_FILES = 20
"""Of which each is named."""


def add_arguments(own: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_site(own)
    own.add_argument("--data", metavar="PATH", help="a file or folder, in place of a device's own file; with --bundle")
    own.add_argument("--bundle", metavar="DIR", type=Path, help="the base model, in place of a device's own file")
    own.add_argument("--examples", metavar="N", type=int, default=3, help="examples to show (3)")
    own.add_argument("--hex", action="store_true", help="show the bytes of each message")
    own.add_argument("--json", action="store_true", help="everything as JSON")


def run(options: argparse.Namespace) -> int:
    """Print what a device would use and send; nothing is connected to or written."""
    from fedtune.config.site import bind_site
    from fedtune.edge.inspection import inspect_site, site_of
    from fedtune.errors import ConfigError, Fault

    if (options.data is None) != (options.bundle is None):
        missing = "--bundle" if options.bundle is None else "--data"
        raise ConfigError(Fault(missing, "both --data PATH and --bundle DIR, or a device's own file", "one of them"))
    if options.data is not None:
        settings, source = site_of(options.data, options.bundle, Path.cwd()), options.data
    else:
        expect_site(options.site)
        settings, source = bind_site(options.site), str(options.site)
    shown = inspect_site(settings, source=source, examples=max(0, options.examples))
    if options.json:
        import json

        print(json.dumps(as_json(shown), ensure_ascii=False, indent=1))
        return DONE
    from fedtune.terminal.text import printable

    for line in lines(shown, with_hex=options.hex):
        print(printable(line))
    return DONE


def lines(shown: Inspection, *, with_hex: bool) -> Iterator[str]:
    """Yield what is shown, line by line."""
    from fedtune.edge.disclosure import NEVER, SIGNS_OF_LIFE

    yield "WOULD BE USED"
    for name, count in shown.files[:MOST_FILES]:
        yield f"  {name}: {count} rows"
    if more := shown.files[MOST_FILES:]:
        yield f"  and {len(more)} more files with {sum(count for _, count in more)} rows; --json names all"
    yield f"  of each row: {', '.join(shown.parts)}"
    left = shown.rows - shown.training - shown.held_out
    yield f"  examples: {shown.training} to train on, {shown.held_out} held out, {left} of {shown.rows} rows left out"
    yield f"  tokens: {shown.tokens} in all, {shown.longest} in the longest example"
    yield from (f"  ! {note}" for note in shown.notes)
    if shown.training < shown.least_examples:
        yield (
            f"  ! the policy of this device (policy.min_examples) takes part with at least {shown.least_examples} "
            f"examples; it has {shown.training}"
        )
    for number, example in enumerate(shown.first, start=1):
        yield f"  example {number}, {example.tokens} tokens; what stands in [ ] is learned:"
        pieces = [(shorten(piece), learned) for piece, learned in example.pieces]
        text = "".join(f"[{piece}]" if learned else piece for piece, learned in pieces)
        yield from (f"    | {line}" for line in text.split("\n"))
    yield ""
    yield "WOULD BE SENT"
    for message in shown.sent:
        yield from _message(message, with_hex)
    sizes = ", ".join(f"{count} B for {steps} directions" for steps, count in shown.sizes)
    yield f"  an answer's size: {sizes}; its numbers above are an example"
    yield f"  {SIGNS_OF_LIFE}"
    yield ""
    yield "NEVER LEAVES THIS DEVICE"
    yield from (f"  {what}" for what in NEVER)


def shorten(text: str) -> str:
    """Return start and end of a long text."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def _message(message: Disclosed, with_hex: bool) -> Iterator[str]:
    yield f"  {message.what}: {len(message.data)} B"
    for part in message.fields:
        yield f"    {part.num_bytes:>7} B  {part.name:13} {part.words}: {part.value}"
    if with_hex:
        data = message.data.hex(" ")
        yield from (f"    {data[at : at + 96].rstrip()}" for at in range(0, len(data), 96))


def as_json(shown: Inspection) -> dict[str, Any]:
    """Return everything as JSON, bytes in hex."""
    from fedtune.edge.disclosure import NEVER, SIGNS_OF_LIFE

    used = {
        "base": shown.base,
        "files": [{"name": name, "rows": count} for name, count in shown.files],
        "parts": list(shown.parts),
        "rows": shown.rows,
        "training": shown.training,
        "held_out": shown.held_out,
        "tokens": shown.tokens,
        "longest": shown.longest,
        "notes": list(shown.notes),
        "examples": [
            {"tokens": one.tokens, "pieces": [{"text": text, "learned": learned} for text, learned in one.pieces]}
            for one in shown.first
        ],
    }
    sent = [
        {
            "what": message.what,
            "bytes": len(message.data),
            "hex": message.data.hex(),
            "fields": [vars(part) for part in message.fields],
        }
        for message in shown.sent
    ]
    sizes = [{"directions": steps, "bytes": count} for steps, count in shown.sizes]
    return {"used": used, "sent": sent, "answer_sizes": sizes, "signs_of_life": SIGNS_OF_LIFE, "never": list(NEVER)}
