"""A page as `report.md`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from negtune.report.page import Page, Pair
from negtune.report.plots import Plot
from negtune.report.tables import ARROW_WORDS, Cell, Table


def render_markdown(page: Page, plots: Sequence[Plot], plots_note: str | None) -> str:
    """The whole page; plots are linked as `plots/<name>.png`."""
    blocks = [f"# {escape(page.title)}", f"**{escape(page.headline)}**"]
    for question, sentences in page.answers:
        blocks += [f"## {question}", "\n".join(f"- {escape(sentence)}" for sentence in sentences)]
    blocks.append("## Numbers")
    blocks += (
        [markdown_table(page.table), ARROW_WORDS] if page.table else ["Nothing was measured (metrics.json is missing)."]
    )
    blocks += [escape(page.explained)] if page.explained else []
    if page.others:
        blocks += ["### Further metrics", markdown_table(page.others)]
    blocks.append("## Plots")
    for plot in plots:
        blocks += [f"![{escape(plot.title)}](plots/{plot.name}.png)", escape(plot.description)]
    blocks += [escape(plots_note)] if plots_note else []
    blocks.append("## Questions and answers")
    blocks += [_pair(pair) for pair in page.pairs]
    blocks += [escape(page.pairs_note)] if page.pairs_note else []
    blocks += ["## How it was made", "\n".join(f"- {name}: {escape(value)}" for name, value in page.facts)]
    if page.paper:
        title, url = page.paper
        blocks.append(f"Paper: {escape(title)}{f' <{url}>' if _is_link(url) else ''}")
    if page.arguments:
        blocks.append("Arguments:\n\n" + "\n".join(f"    {_one_line(line)}" for line in page.arguments))
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Text that Markdown and the HTML inside it show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", _one_line(text)).replace("&", "&amp;").replace("<", "&lt;")


def markdown_table(table: Table) -> str:
    """The table in GitHub's format."""
    lines = [
        "| metric | " + " | ".join(map(escape, table.arms)) + " |",
        "|---" * (len(table.arms) + 1) + "|",
        *(f"| {escape(name)} | " + " | ".join(map(_cell, cells)) + " |" for name, cells in table.rows),
    ]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_link(url: str) -> bool:
    return re.fullmatch(r"https?://[^\s<>]+", url) is not None


def _cell(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.best else cell.text


def _pair(pair: Pair) -> str:
    lines = [f"**{escape(pair.prompt or 'not recorded')}** ({escape(pair.side)})", ""]
    for arm, answer in pair.said:
        shown = "not recorded" if answer is None else escape(answer) or "(empty answer)"
        lines.append(f"- {escape(arm)}: {shown}")
    return "\n".join(lines)
