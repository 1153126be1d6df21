"""What is plotted: the series, which rows feed them, and that every line and bar is named."""

from __future__ import annotations

import pytest

from negtune.records import read_json, write_json, write_jsonl
from negtune.report import plots
from negtune.report.folder import read_run_folder


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of PNG bytes, by plot name, for the light theme."""

    def draw(run_dir):
        figures = []
        monkeypatch.setattr(plots, "_png", lambda draw, theme: figures.append((theme, draw(theme))) or b"")
        names = [plot.name for plot in plots.draw_plots(read_run_folder(run_dir))]
        return dict(zip(names, [figure for theme, figure in figures if theme is plots.LIGHT], strict=True))

    return draw


def bold(axes):
    return {line.get_color(): list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 2}


def words(figure):
    figure.draw_without_rendering()
    return {text.get_text() for axes in figure.axes for text in axes.findobj(lambda a: hasattr(a, "get_text"))}


def test_series_skips_rows_without_the_name_and_sorts_by_step():
    rows = [{"step": 2, "a": 0.2}, {"step": 1, "a": None}, {"step": 0, "a": 0.1}, {"a": 5}, {"step": 3, "b": 1}]
    assert plots.series(rows, "a") == ([0, 2], [0.1, 0.2])


def test_evaluation_rows_are_drawn_bold_and_training_rows_only_faintly(run_dir, drawn):
    axes = drawn(run_dir)["probability"].axes[0]
    sides = plots.LIGHT.sides
    assert bold(axes) == {sides["forget"]: [0.571, 6.1e-5], sides["retain"]: [0.58, 0.93]}
    assert {line.get_color() for line in axes.lines if line.get_alpha() == 0.35} == set(sides.values())


def test_without_evaluation_rows_the_training_rows_are_the_curve(run_dir, drawn):
    write_jsonl(run_dir / "history.jsonl", [{"step": 1, "forget/probability": 0.4, "retain/probability": 0.6}])
    axes = drawn(run_dir)["probability"].axes[0]
    assert sorted(bold(axes).values()) == [[0.4], [0.6]]


def test_a_single_evaluation_is_no_curve_beside_training_rows(run_dir, drawn):
    rows = [{"step": step, "forget/probability": 0.4, "retain/probability": 0.6} for step in (1, 2)]
    write_jsonl(run_dir / "history.jsonl", [*rows, {"step": 2, "eval/forget/probability": 0.1}])
    assert sorted(bold(drawn(run_dir)["probability"].axes[0]).values()) == [[0.4, 0.4], [0.6, 0.6]]
    write_jsonl(run_dir / "history.jsonl", [{"step": 2, "eval/forget/probability": 0.1}])
    assert [0.1] in bold(drawn(run_dir)["probability"].axes[0]).values()


def test_both_sides_and_both_axes_are_named(run_dir, drawn):
    assert {
        "forget 6.1e-05",
        "retain .93",
        "optimiser step",
        "mean answer probability (0 to 1)",
    } <= words(drawn(run_dir)["probability"])


def test_bars_stand_at_the_values_and_missing_ones_say_so(run_dir, drawn):
    figure = drawn(run_dir)["before_after"]
    widths = {c.get_label(): [bar.get_width() for bar in c] for c in figure.axes[0].containers}
    assert widths == {"before": [0.571, 0.58, 0.8], "after": [6.1e-5, 0.93, 0]}
    assert {"not measured", "6.1e-05", ".93", "forget\nROUGE"} <= words(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]


def test_a_metric_beyond_zero_to_one_gets_a_scale_of_its_own(run_dir, drawn):
    metrics = read_json(run_dir / "metrics.json")
    metrics["primary"].append("forget_quality_log10")
    metrics["arms"]["after"]["forget_quality_log10"] = -22.7
    write_json(run_dir / "metrics.json", metrics)
    shares, own = drawn(run_dir)["before_after"].axes
    assert shares.get_xlim()[0] == 0
    assert -22.7 * 1.03 < own.get_xlim()[0] < -22.7  # the end is seen


def test_rounds_show_what_samples_earn_and_how_many_prompts_teach_nothing(run_dir, drawn):
    rows = [{"step": s, "rounds/reward": s / 4, "rounds/no_signal": 1 - s / 4} for s in (1, 2, 3)]
    write_jsonl(run_dir / "history.jsonl", rows)
    figure = drawn(run_dir)["rounds"]
    assert {"reward .75", "prompts .25", "mean reward", "without signal", "optimiser step"} <= words(figure)
    assert [list(bold(axes).values()) for axes in figure.axes] == [[[0.25, 0.5, 0.75]], [[0.75, 0.5, 0.25]]]
    write_jsonl(run_dir / "history.jsonl", [{"step": 1, "rounds/reward": -0.5}])
    assert len(drawn(run_dir)["rounds"].axes) == 1
    write_jsonl(run_dir / "history.jsonl", [{"step": 1, "loss": 0.5}])
    assert "rounds" not in drawn(run_dir)


def test_weight_quantiles_and_retain_kl_share_the_steps(run_dir, drawn):
    rows = [{"step": s, "forget/weight_p10": 0.1, "forget/weight_p90": 0.9, "retain/kl": s / 10} for s in (1, 2)]
    write_jsonl(run_dir / "history.jsonl", rows)
    figure = drawn(run_dir)["weight"]
    assert {"p10 .10", "p90 .90", "NPO weight W", "retain KL (nats per token)", "optimiser step"} <= words(figure)
    assert list(bold(figure.axes[1]).values()) == [[0.1, 0.2]]


def test_labels_of_lines_that_end_together_do_not_overlap(run_dir, drawn):
    for level in (0.5, 0.001):
        row = {"step": 1, "eval/forget/probability": level, "eval/retain/probability": level}
        write_jsonl(run_dir / "history.jsonl", [row])
        axes = drawn(run_dir)["probability"].axes[0]
        places = sorted(text.xy[1] for text in axes.texts)
        assert places[1] - places[0] >= 0.05


def test_an_empty_history_and_no_metrics_draw_nothing(run_dir, drawn):
    (run_dir / "metrics.json").unlink()
    write_jsonl(run_dir / "history.jsonl", [{"step": 1, "loss": 2.0}])
    assert drawn(run_dir) == {}
