"""A page as one HTML file: styles and pictures inside, nothing loaded from anywhere, no script.

The content security policy in its head makes a browser refuse any request even if a text slipped through the escaping.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from negtune.report.page import Page, Pair
from negtune.report.plots import Plot
from negtune.report.tables import ARROW_WORDS, NOT_MEASURED, Cell, Table

escape = html.escape

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1f2328; --soft: #59636e; --line: #d5d9de; --panel: #f5f6f8;
  --link: #0057a8; --forget: #b34700; --retain: #0061a3; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --ink: #e3e6ea; --soft: #9aa4af; --line: #333a42;
  --panel: #1d2127; --link: #7cc0ff; --forget: #ff9d5c; --retain: #6fc3f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
a { color: var(--link); }
.headline { font-size: 1.15rem; line-height: 1.45; margin: 0 0 1.2rem; padding: .8rem 1rem; background: var(--panel);
  border-left: .25rem solid var(--forget); border-radius: .25rem; }
.answers section { display: grid; grid-template-columns: 12rem 1fr; gap: 0 1rem; margin-bottom: .8rem; }
.answers h2 { margin: 0; font-size: 1rem; line-height: inherit; }
.answers ul { margin: 0; padding: 0; list-style: none; }
.note, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: normal; }
td { white-space: nowrap; }
.interval { display: block; font-size: .85rem; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.missing { color: var(--soft); font-style: italic; white-space: normal; }
figure { margin: 1rem 0 1.8rem; }
figure h3 { font-size: 1rem; margin: 0 0 .4rem; }
img { width: 100%; max-width: 40rem; height: auto; display: block; }
.pair { margin: 0 0 1rem; padding: .8rem 1rem; background: var(--panel); border-radius: .4rem; }
.pair h3 { margin: 0 0 .4rem; font-size: 1rem; }
.tag { display: inline-block; font-size: .75rem; font-weight: 600; padding: 0 .45rem; margin-right: .4rem;
  border: 1px solid currentColor; border-radius: 1rem; color: var(--soft); vertical-align: .1em; }
.tag.forget { color: var(--forget); } .tag.retain { color: var(--retain); }
dl { display: grid; grid-template-columns: minmax(5.5rem, max-content) 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; white-space: pre-wrap; }
summary { cursor: pointer; margin: .8rem 0; color: var(--link); }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: .4rem; white-space: pre-wrap; font-size: .85rem; }
@media (max-width: 34rem) { .answers section { grid-template-columns: 1fr; }
  body { padding: 1rem .8rem 3rem; } th, td { padding: .35rem .45rem; } }
@media print { .pair, figure { break-inside: avoid; } }
"""


def render_html(page: Page, plots: Sequence[Plot], plots_note: str | None) -> str:
    """The whole page. Every text that comes from the run is escaped."""
    body = [
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="headline">{escape(page.headline)}</p>',
        _section("answers", [_answer(question, sentences) for question, sentences in page.answers]),
        "<h2>Numbers</h2>",
        *(_numbers(page)),
        "<h2>Plots</h2>",
        *map(_figure, plots),
        *_note(plots_note),
        "<h2>Questions and answers</h2>",
        *map(_pair, page.pairs),
        *_note(page.pairs_note),
        "<h2>How it was made</h2>",
        _definitions([(name, escape(value)) for name, value in page.facts] + _paper(page)),
        *_arguments(page.arguments),
    ]
    return "\n".join([*_head(page.title), *body, "</body>", "</html>", ""])


def _head(title: str) -> list[str]:
    return [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
    ]


def _section(name: str, parts: Sequence[str]) -> str:
    return f'<div class="{name}">{"".join(parts)}</div>'


def _answer(question: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<section><h2>{escape(question)}</h2><ul>{items}</ul></section>"


def _note(text: str | None) -> list[str]:
    return [f'<p class="note">{escape(text)}</p>'] if text else []


def _numbers(page: Page) -> list[str]:
    if page.table is None:
        return _note("Nothing was measured (metrics.json is missing).")
    parts = [_table(page.table), *_note(ARROW_WORDS), *_note(page.explained)]
    if page.others is not None:
        parts.append(f"<details><summary>Further metrics</summary>{_table(page.others)}</details>")
    return parts


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(arm)}</th>' for arm in ["metric", *table.arms])
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    if cell.text == NOT_MEASURED:
        return f"<td class=missing>{NOT_MEASURED}</td>"
    value, space, interval = cell.text.partition(" ")
    text = escape(value) + (f'{space}<span class="interval">{escape(interval)}</span>' if interval else "")
    return f"<td><strong>{text}</strong></td>" if cell.best else f"<td>{text}</td>"


def _figure(plot: Plot) -> str:
    description = escape(plot.description)
    return (
        f"<figure><h3>{escape(plot.title)}</h3><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(plot.dark)}">'
        f'<img src="{_data_uri(plot.light)}" alt="{description}"></picture>'
        f"<figcaption>{description}</figcaption></figure>"
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _pair(pair: Pair) -> str:
    kind = "forget" if pair.side.startswith("forget") else "retain" if pair.side.startswith("retain") else ""
    answers = [(escape(arm), _said(text)) for arm, text in pair.said]
    tag = f'<span class="tag {kind}">{escape(pair.side)}</span>'
    return f'<article class="pair"><h3>{tag}{_said(pair.prompt)}</h3>{_definitions(answers)}</article>'


def _said(text: str | None) -> str:
    if text is None:
        return '<span class="missing">not recorded</span>'
    return escape(text) or '<span class="missing">empty answer</span>'


def _definitions(items: Sequence[tuple[str, str]]) -> str:
    """Names and values, both escaped already."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items) + "</dl>"


def _paper(page: Page) -> list[tuple[str, str]]:
    if page.paper is None:
        return []
    title, url = page.paper
    if not re.match(r"https?://", url):
        return [("Paper", escape(title))]
    return [("Paper", f'<a href="{escape(url)}" rel="noreferrer">{escape(title)}</a>')]


def _arguments(lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [f"<details><summary>Arguments</summary><pre>{escape(chr(10).join(lines))}</pre></details>"]
