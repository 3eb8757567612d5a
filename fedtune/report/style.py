"""The frame of every page: its style sheet, without a script and without a request to anywhere."""

from __future__ import annotations

from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #1d2b33; --soft: #55656f; --line: #d9e1e5; --ground: #f6f8f9; --card: #fff;
  --accent: #0072b2; --note: #fff3dc; --note-ink: #5c3d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf0; --soft: #a3b3bc; --line: #33434c; --ground: #131b20;
  --card: #1b262c; --accent: #6cc0f0; --note: #3a2f17; --note-ink: #ffdf9e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue",
  Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
header p:first-child { margin: 0; color: var(--soft); letter-spacing: .04em; }
h1 { margin: 0 0 .75rem; font-size: 2.1rem; line-height: 1.15; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; border-bottom: 2px solid var(--line); padding-bottom: .25rem; }
h3 { margin: 0 0 .25rem; font-size: .85rem; color: var(--soft); font-weight: 600; }
dl { margin: 0; } dd { margin: 0; overflow-wrap: anywhere; } dt { color: var(--soft); font-size: .85rem; }
header dl { display: flex; flex-wrap: wrap; gap: .5rem 1.75rem; }
.note { background: var(--note); color: var(--note-ink); padding: .6rem .9rem; border-radius: .4rem; margin: 1rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.2rem, 1fr)); gap: .75rem;
  margin-top: 1.75rem; }
.tiles div, .sample div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem .9rem; }
.tiles dd:nth-of-type(1) { font-size: 1.22rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles dd:nth-of-type(2) { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1rem; }
figure { grid-column: 1 / -1; margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .9rem 1rem; min-width: 0; }
figure.loss-by-bytes, figure.loss-by-seconds { grid-column: auto; }
figcaption { margin-bottom: .6rem; color: var(--soft); } figcaption b { color: var(--ink); margin-right: .35rem; }
.plot { background: #fff; border-radius: .3rem; padding: .4rem; overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; }
details { margin-top: .75rem; } summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
.scroll { overflow: auto; max-height: 30rem; margin-top: .5rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--ground); }
figure th { background: var(--card); }
.n { text-align: right; white-space: nowrap; } td { overflow-wrap: anywhere; min-width: 3.2rem; }
td:first-child { overflow-wrap: break-word; }
.sample { display: grid; gap: .75rem; grid-template-columns: 1fr 1fr; } .sample div:first-child { grid-column: 1 / -1; }
.sample p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem; overflow-x: auto;
  font-size: .85rem; }
code { font-size: .9em; overflow-wrap: anywhere; } ul { padding-left: 1.2rem; } li { margin: .2rem 0; }
@media (max-width: 44rem) { .figures, .sample { grid-template-columns: minmax(0, 1fr); } .plot svg { min-width: 33rem; }
  figure { padding: .7rem .6rem; } .tiles { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
  .tiles dd:nth-of-type(1) { font-size: 1.05rem; } }
@media print { @page { margin: 14mm; }
  :root { --ink: #000; --soft: #444; --line: #bbb; --ground: #fff; --card: #fff; --accent: #000; --note: #fff;
    --note-ink: #000; }
  body { font-size: 10pt; } main { padding: 0; max-width: none; }
  figure, .tiles div, .sample, tr, pre { break-inside: avoid; }
  figure { padding: .3rem .5rem; } h2, figcaption { break-after: avoid; }
  .scroll { max-height: none; overflow: visible; }
  .plot { overflow: visible; padding: 0; } .plot svg { max-height: 205mm; min-width: 0; }
  details:not([open]) { display: none; }
  .note { border: 1px solid #000; } pre { white-space: pre-wrap; } th { position: static; } }
"""


def page(title: str, body: str) -> str:
    """Return a whole HTML document around `body`, which is HTML already; the policy forbids scripts and requests."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="'
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )
