"""The written report: its facts, what it says when pieces are missing, escaping and redaction."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from negtune.records import read_json, write_json, write_jsonl
from negtune.report import write_report
from negtune.report.page import choose_pairs

TEXTS = ("Capital of France?", "Paris.", "Seine.", "Rome.", "alert(1)")
VOID = {"meta", "img", "source", "br"}


class Checker(HTMLParser):
    """Collects every tag and attribute, and insists that what opens also closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def html_tags(text: str) -> list[tuple[str, dict]]:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker.tags


def report(run_dir, **options) -> tuple[str, str]:
    write_report(run_dir, **options)
    return (run_dir / "report.md").read_text(), (run_dir / "report.html").read_text()


def test_both_pages_answer_first_then_give_table_pairs_and_provenance(run_dir):
    markdown, page = report(run_dir)
    for text in (markdown, page):
        order = [
            text.index(part)
            for part in (
                "Forget France",
                "Mean probability of the forget answers .57 → 6.1e-05; of the retained ones .58 → .93.",
                "What was to be forgotten?",
                "3 facts about France",
                "Did it work?",
                "Forget probability fell from .57 to 6.1e-05 (better).",
                "What did it cost?",
                "1 min 35 s, 1,893 MiB",
                "Numbers",
                "Probability of forget and retain answers over steps",
                "Capital of Italy?",
                "How it was made",
                "adapter on the base model",
                "Some CPU, 2 cores, 15.5 GiB",
            )
        ]
        assert order == sorted(order)
    assert "| forget probability ↓ | .57 | **6.1e-05** |" in markdown.replace("\u00a0", " ")
    assert "<td>.58</td><td><strong>.93</strong></td>" in page
    assert "--beta 0.1" in markdown
    assert "--bf16 false" in page


def test_the_time_of_a_run_that_was_stopped_is_called_what_it_is(run_dir):
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "resumed_from": "checkpoint-24"}))
    for text in report(run_dir):
        assert text.count("1 min 35 s since it went on from checkpoint-24") == 2


def test_every_file_that_is_returned_exists_and_plots_are_png(run_dir):
    written = write_report(run_dir)
    assert [path.relative_to(run_dir).as_posix() for path in written] == [
        "plots/probability.png",
        "plots/before_after.png",
        "plots/weight.png",
        "report.md",
        "report.html",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[:3])


def test_the_same_folder_gives_the_same_bytes(run_dir, tmp_path):
    first, second = write_report(run_dir, tmp_path / "a"), write_report(run_dir, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert not (run_dir / "report.html").exists()


def test_html_is_one_file_that_asks_for_nothing_and_follows_the_dark_mode(run_dir):
    _, page = report(run_dir)
    tags = html_tags(page)
    sources = [attrs.get("src") or attrs.get("srcset") for tag, attrs in tags if tag in ("img", "source")]
    assert len(sources) == 6  # three plots, light and dark
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert [attrs["media"] for tag, attrs in tags if tag == "source"] == ["(prefers-color-scheme: dark)"] * 3
    assert "@media (prefers-color-scheme: dark) { :root" in page
    assert all(attrs["alt"] for tag, attrs in tags if tag == "img")


def test_a_script_in_an_answer_stays_text(run_dir):
    markdown, page = report(run_dir)
    assert "<script" not in page + markdown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; *stars* | pipe" in page
    assert r"&lt;script>alert(1)&lt;/script> &amp; \*stars\* \| pipe" in markdown


@pytest.mark.parametrize("field", ["title", "data", "model", "artefact", "objective"])
def test_a_script_in_run_json_stays_text(run_dir, field):
    write_json(run_dir / "run.json", {**read_json(run_dir / "run.json"), field: '"><script>x</script>'})
    markdown, page = report(run_dir)
    assert "<script" not in page + markdown
    html_tags(page)


def test_scripts_in_names_of_arms_metrics_sides_and_arguments_stay_text(run_dir):
    bad = "<script>x</script>"
    write_json(run_dir / "metrics.json", {"arms": {bad: {f"{bad}/p": 0.5}, "b": {f"{bad}/p": 0.1}}})
    write_jsonl(run_dir / "samples.jsonl", [{"side": bad, "prompt": bad, "gold": bad, "answers": {bad: bad}}])
    run = {**read_json(run_dir / "run.json"), "arguments": {bad: bad}, "versions": {bad: bad}}
    write_json(run_dir / "run.json", run)
    markdown, page = report(run_dir)
    html_tags(page)
    assert "<script" not in page
    outside_code_blocks = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line for line in outside_code_blocks)


def test_a_link_that_is_not_http_is_not_made_a_link(run_dir):
    run = {**read_json(run_dir / "run.json"), "paper": {"title": "P", "url": "javascript:alert(1)"}}
    write_json(run_dir / "run.json", run)
    markdown, page = report(run_dir)
    assert "javascript" not in page + markdown


@pytest.mark.parametrize("by_flag", [True, False])
def test_a_redacted_report_holds_no_text_of_the_data(run_dir, by_flag):
    if not by_flag:
        write_json(run_dir / "run.json", {**read_json(run_dir / "run.json"), "redacted": True})
    markdown, page = report(run_dir, redact=by_flag)
    for text in (markdown, page):
        assert not any(secret in text for secret in TEXTS)
        assert "This run is redacted" in text
        assert ".57 → 6.1e-05" in text


def test_an_empty_and_a_missing_answer_are_told_apart(run_dir):
    markdown, _ = report(run_dir)
    assert "- after: (empty answer)" in markdown
    assert "- after: not recorded" in markdown


def test_missing_pieces_give_a_page_that_says_so(run_dir):
    for name in ("metrics.json", "history.jsonl", "samples.jsonl"):
        (run_dir / name).unlink()
    for text in report(run_dir):
        assert "Nothing was measured" in text
        assert "No plots" in text
        assert "No samples were recorded" in text


def test_one_arm_gives_numbers_without_a_verdict(run_dir):
    write_json(run_dir / "metrics.json", {"arms": {"model": {"forget/probability": 0.3}}})
    (run_dir / "history.jsonl").unlink()
    for text in report(run_dir):
        assert "Mean probability of the forget answers .30." in text
        assert "only one arm (model) was measured" in text
        assert "No curves over steps" in text


def test_what_is_shipped_is_named_beside_the_arm_that_was_trained(run_dir):
    metrics = read_json(run_dir / "metrics.json")
    metrics["arms"]["merged, 4-bit"] = {"forget/probability": 0.48, "retain/probability": 0.9}
    write_json(run_dir / "metrics.json", metrics)
    for text in report(run_dir):
        assert "merged, 4-bit: mean probability of the forget answers .57 → .48" in text


def test_a_bare_run_json_is_enough(run_dir):
    for name in ("metrics.json", "history.jsonl", "samples.jsonl"):
        (run_dir / name).unlink()
    (run_dir / "run.json").write_text(json.dumps({}))
    markdown, _ = report(run_dir)
    assert "- Model: not recorded" in markdown


def sample(side, number):
    return {"side": side, "prompt": f"{side}{number}", "gold": "", "answers": {}}


@pytest.mark.parametrize(
    ("forget", "retain", "chosen"),
    [
        (9, 9, ["forget0", "forget1", "forget2", "retain0", "retain1"]),
        (1, 9, ["forget0", "retain0", "retain1", "retain2", "retain3"]),
        (9, 1, ["forget0", "forget1", "forget2", "forget3", "retain0"]),
        (9, 0, ["forget0", "forget1", "forget2", "forget3", "forget4"]),
        (1, 1, ["forget0", "retain0"]),
    ],
)
def test_five_pairs_show_both_sides(forget, retain, chosen):
    samples = [sample("retain", i) for i in range(retain)] + [sample("forget", i) for i in range(forget)]
    assert [pair.prompt for pair in choose_pairs(samples)] == chosen


def test_forget_rows_of_other_sets_come_after_the_forget_rows_and_do_not_crowd_out_the_retained():
    sides = ["forget", "forget_unseen", "forget_unseen", "forget_unseen", "forget", "retain", "retain_unseen"]
    chosen = [pair.side for pair in choose_pairs([sample(side, 0) for side in sides])]
    assert chosen == ["forget", "forget", "forget_unseen", "retain", "retain_unseen"]


def test_a_long_answer_is_cut_and_says_by_how_much():
    (pair,) = choose_pairs([{"side": "forget", "prompt": "p", "gold": "g", "answers": {"after": "x" * 1600}}])
    assert pair.answers[0][1].endswith("… (1,000 more characters)")


# --- Policies that solve problems -------------------------------------------------------------------------------------


@pytest.fixture
def solving_dir(run_dir):
    run = {**read_json(run_dir / "run.json"), "task": "solving", "data": "chains"}
    start = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "pass@4": 0.75, "truncated": 0.0, "length": 30}
    names = ["accuracy", "accuracy_low", "accuracy_high", "minus start", "minus more", "pass@4", "truncated"]
    more = {**start, "minus start": 0.01, "minus start_low": -0.02, "minus start_high": 0.04}
    dpo = {**start, "accuracy": 0.7, "minus start": 0.2, "minus start_low": 0.1, "minus start_high": 0.3}
    dpo |= {"pass@4": 0.7, "minus more": -0.2, "minus more_low": -0.3, "minus more_high": -0.1}
    better = {"accuracy": "higher", "minus start": "higher", "pass@4": "higher", "truncated": "lower"}
    write_json(run_dir / "run.json", run)
    write_json(
        run_dir / "metrics.json",
        {"primary": names, "better": better, "arms": {"start": start, "more": more, "dpo": dpo}},
    )
    write_jsonl(run_dir / "history.jsonl", [{"step": i, "chosen/logp": -1.0, "rejected/logp": -2.0} for i in (1, 2)])
    return run_dir


def test_a_policy_is_asked_what_it_learnt_and_whether_that_is_more_than_chance(solving_dir):
    markdown, page = report(solving_dir)
    for text in (markdown, page):
        assert "Accuracy on held-out problems: start .50 (.40 to .60); more .50 (.40 to .60); dpo .70" in text
        assert "What was it to learn?" in text
        assert "more is not told apart from start: accuracy differs by .010, 95 % interval (-.020 to .040)." in text
        assert "dpo solves more than start: accuracy differs by .20, 95 % interval (.10 to .30)." in text
        assert "dpo solves less than more: accuracy differs by -.20" in text
        assert "dpo: pass@4 fell from .75 to .70 (worse)." in text
        assert "forgotten" not in text
    assert "| accuracy ↑ | .50 (.40 to .60) | .50 (.40 to .60) | **.70 (.40 to .60)** |" in markdown.replace(
        "\u00a0", " "
    )
    assert "accuracy low" not in markdown


def test_curves_of_a_policy_are_those_of_what_is_pushed_up_and_down(solving_dir):
    names = [path.stem for path in write_report(solving_dir)]
    assert names == ["likelihood", "before_after", "report", "report"]
    assert "chosen -1 to -1, rejected -2 to -2" in (solving_dir / "report.md").read_text()


def ranking_folder(run_dir, arms):
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm))
    write_json(run_dir / "run.json", {**read_json(run_dir / "run.json"), "task": "ranking", "data": "topics"})
    better = {name: "higher" for name in names if not name.endswith(("_low", "_high"))}
    write_json(run_dir / "metrics.json", {"primary": names, "better": better, "arms": arms})
    write_jsonl(run_dir / "history.jsonl", [])
    return run_dir


def compared(other, value, low, high):
    return {f"minus {other}": value, f"minus {other}_low": low, f"minus {other}_high": high}


def test_each_arm_of_rankers_is_judged_against_what_it_was_compared_with(run_dir):
    arms = {
        "start": {"ndcg@10": 0.3, "ndcg@10_low": 0.2, "ndcg@10_high": 0.4, "recall@100": 0.9, "rerank/ndcg@10": 0.5},
        "labels": {"ndcg@10": 0.4, "recall@100": 0.9, "rerank/ndcg@10": 0.5, **compared("start", 0.1, 0.05, 0.15)},
        "CET": {"ndcg@10": 0.35, "recall@100": 0.8, "rerank/ndcg@10": 0.6, **compared("labels", -0.05, -0.08, -0.02)},
    }
    for text in report(ranking_folder(run_dir, arms)):
        assert "labels finds more than start: ndcg@10 differs by .10, 95 % interval (.050 to .15)." in text
        assert "CET finds less than labels: ndcg@10 differs by -.05" in text
        assert "CET: recall@100 fell from .90 to .80 (worse)." in text
        assert "rerank: the first hundred of BM25" in text
        assert "guaranteed" not in text
        assert "micro AP" not in text
        assert "Lines are 95 % intervals." in text


def test_many_arms_of_rankers_leave_the_headline_short_and_only_losses_as_costs(run_dir):
    arms = {
        f"arm {i}": {"micro_ap": v, "inside/recall@p90": v, "around/recall@p90": v}
        for i, v in enumerate((0.5, 0.6, 0.9, 0.4, 0.7))
    }
    for text in report(ranking_folder(run_dir, arms)):
        assert "micro ap on held-out queries: arm 0 .50; best of 5, arm 2 .90; arm 4 .70." in text
        assert "arm 3: inside recall@p90 fell from .50 to .40 (worse)." in text
        assert "rose" not in text
        assert "inside: is the query inside the document" in text
        assert "intervals." not in text
