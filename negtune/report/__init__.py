"""From a run folder to Markdown, one HTML file and PNG plots; nothing here needs the model or torch."""

from __future__ import annotations

from pathlib import Path

from negtune.report.folder import RunFolder, read_run_folder
from negtune.report.html import render_html
from negtune.report.markdown import render_markdown
from negtune.report.page import build_page
from negtune.report.plots import Plot, draw_plots

__all__ = ["write_report"]

WITHOUT_MATPLOTLIB = "No plots: matplotlib is not installed. pip install 'negtune[report]', then negtune report."
WITHOUT_NUMBERS = "No plots: neither history.jsonl nor metrics.json holds numbers to draw."
WITHOUT_HISTORY = "No curves over steps: history.jsonl is missing or holds no probabilities."


def write_report(run_dir: str | Path, output_dir: str | Path | None = None, *, redact: bool = False) -> list[Path]:
    """Write `report.md`, `report.html` and `plots/*.png` from the files of a run folder alone.

    Args:
        run_dir: see `negtune.report.folder`. A missing file makes a page that says so.
        output_dir: where to write; the run folder itself by default.
        redact: show no text of the data, also if the run is not marked as redacted.

    Returns:
        What was written, the HTML page last.

    Raises:
        RecordError: a file of the folder is broken; the message names the file and the line or field.
    """
    folder = read_run_folder(run_dir)
    page = build_page(folder, redact=redact)
    plots, note = _plots(folder)
    output = Path(output_dir) if output_dir is not None else folder.path
    (output / "plots").mkdir(parents=True, exist_ok=True)
    written = []
    for plot in plots:
        written.append(output / "plots" / f"{plot.name}.png")
        written[-1].write_bytes(plot.light)
    for name, render in (("report.md", render_markdown), ("report.html", render_html)):
        written.append(output / name)
        written[-1].write_text(render(page, plots, note), encoding="utf-8")
    return written


def _plots(folder: RunFolder) -> tuple[list[Plot], str | None]:
    try:
        plots = draw_plots(folder)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [], WITHOUT_MATPLOTLIB
    if not plots:
        return [], WITHOUT_NUMBERS
    return plots, None if plots[0].name in ("probability", "likelihood", "ranking") else WITHOUT_HISTORY
