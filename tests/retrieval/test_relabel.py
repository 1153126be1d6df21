"""New labels from a scripted judge: what changes, what does not, and what is asked again."""

from __future__ import annotations

import json

import pytest

from negtune.data.candidates import candidate_rows
from negtune.metrics.judgement import judge_audit
from negtune.records import RecordError, read_jsonl
from negtune.retrieval.choice import choose
from negtune.retrieval.mining import Mined, read_lists, to_rows, write_lists
from negtune.retrieval.negatives import MaxScore, drop_negatives
from negtune.retrieval.relabel import relabel, verdict_key
from tests.retrieval.test_negatives import a_list

SAID = {"p0": "positive", "n1": "positive", "n2": "drop", "n3": "negative", "n4": None, "n5": "positive", "n6": "drop"}
JUDGED = [True, False, False, False, False, True, True]


def pool(query_ids="1"):
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    return Mined([a_list(scores, judged=JUDGED, query_id=query_id) for query_id in query_ids])


class Script:
    """Says what the script says of the document's id, and remembers what it was asked."""

    def __init__(self, said=None):
        self.said, self.calls = {**SAID, **(said or {})}, []

    def __call__(self, queries, documents):
        self.calls.append(list(zip(queries, documents, strict=True)))
        return [self.said[document.split()[-1]] for document in documents]

    @property
    def asked(self):
        return [pair for call in self.calls for pair in call]


def column(one, name):
    return dict(zip(one.document_ids, getattr(one, name), strict=True))


def test_unjudged_candidates_get_the_judges_labels_and_the_rest_keeps_its_own():
    found = relabel(pool(), Script(), name="j", gain=2.0, audit=0)
    (one,) = found.mined.lists
    assert column(one, "gains") == {"p0": 1.0, "n1": 2.0, "n3": 0.0, "n4": 0.0, "n5": 0.0, "n6": 0.0}
    assert column(one, "judged") == {"p0": True, "n1": True, "n3": True, "n4": False, "n5": True, "n6": True}
    marks = {d: mark for d, mark in column(one, "relabelled").items() if mark is not None}
    assert marks == {"n1": "positive:j", "n3": "negative:j"}
    assert one.ideal_gains == [2.0, 1.0]
    assert found.mined.dropped == {"1": {"n2": "drop:j"}}
    assert found.counts == {"positive": 1, "drop": 1, "negative": 1, "failed": 1, "calls": 4, "cached": 0}
    counts = found.mined.counts()
    assert (counts["dropped/drop:j"], counts["relabelled/positive:j"], counts["relabelled/negative:j"]) == (1, 1, 1)
    assert found.audit is None
    assert len(candidate_rows(to_rows(found.mined.lists), k=6)) == 1  # gains and ideal gains agree


def test_what_was_there_is_not_changed():
    before, mined = pool(), pool()
    relabel(mined, Script(), name="j")
    assert mined == before


def test_a_failed_judge_changes_nothing():
    mined = pool("12")
    found = relabel(mined, Script(dict.fromkeys(SAID)), name="j")
    assert found.mined == mined
    assert found.counts["failed"] == 8
    assert found.audit.failed.count == found.audit.failed.of == 6


def test_false_negatives_can_be_dropped_instead():
    found = relabel(pool(), Script(), name="j", positives="drop", audit=0)
    (one,) = found.mined.lists
    assert one.document_ids == ["p0", "n3", "n4", "n5", "n6"]
    assert one.ideal_gains == [1.0]
    assert found.mined.dropped == {"1": {"n1": "positive:j", "n2": "drop:j"}}


def test_people_are_overruled_only_where_that_is_asked_for():
    said = {"p0": "negative", "n1": "positive", "n5": "positive", "n6": "drop"}
    kept = relabel(pool(), Script(said), name="j", audit=0).mined.lists[0]
    assert [column(kept, "gains")[d] for d in ("p0", "n5", "n6")] == [1.0, 0.0, 0.0]
    found = relabel(pool(), Script(said), name="j", which="all", gain=3.0, audit=0)
    (one,) = found.mined.lists
    assert column(one, "gains") == {"p0": 0.0, "n1": 3.0, "n3": 0.0, "n4": 0.0, "n5": 3.0}
    assert column(one, "relabelled")["p0"] == "negative:j"
    assert one.ideal_gains == [3.0, 3.0]  # without the 1 of p0
    assert found.mined.dropped["1"] == {"n2": "drop:j", "n6": "drop:j"}
    agreed = relabel(pool(), Script({"p0": "positive", "n5": "negative"}), name="j", which="all", gain=3.0).mined
    assert column(agreed.lists[0], "gains")["p0"] == 1.0
    assert [column(agreed.lists[0], "relabelled")[d] for d in ("p0", "n5")] == [None, None]


@pytest.mark.parametrize("verdict", ["drop", "negative"])
def test_an_overruled_positive_leaves_the_ideal_too(verdict):
    mined = Mined([a_list([0.9, 0.8, 0.1], [1.0, 2.0, 0.0])])
    said = {"p0": "positive", "p1": verdict, "n2": "negative"}
    (one,) = relabel(mined, Script(said), name="j", which="all").mined.lists
    assert one.ideal_gains == [1.0]
    assert len(candidate_rows([one])) == 1


@pytest.mark.parametrize("verdict", ["drop", "negative"])
def test_a_list_that_loses_its_last_positive_is_named(verdict):
    said = dict.fromkeys(SAID, "negative") | {"p0": verdict}
    found = relabel(pool("12"), Script(said), name="j", which="all")
    assert found.mined.lists == []
    assert found.mined.without_positive == ["1", "2"]


def test_the_audit_is_of_peoples_labels_and_apart_from_what_changes():
    judge = Script()
    found = relabel(pool("12"), judge, name="j", audit=None)
    expected = judge_audit([True, False, False] * 2, ["positive", "positive", "drop"] * 2)
    assert found.audit == expected
    assert found.audit.precision["positive"].count == 2
    assert found.audit.precision["positive"].of == 4
    assert found.counts["positive"] == 2  # of the unjudged ones, n1 of each
    assert found.mined.lists[0] == relabel(pool("1"), Script(), name="j", audit=0).mined.lists[0]
    assert len(judge.asked) == len(set(judge.asked)) == 14
    # labels of a judge are no truth for the next one
    again = relabel(found.mined, Script(), name="k", audit=None)
    assert sum(sum(row.values()) for row in again.audit.table.values()) == 6


def test_the_audits_sample_is_drawn_by_seed_whatever_the_order_of_lists():
    first, second = Script(), Script()
    mined = pool("12345")
    relabel(mined, first, name="j", audit=4, seed=7)
    relabel(Mined(mined.lists[::-1]), second, name="j", audit=4, seed=7)
    assert set(first.asked) == set(second.asked)
    assert len(first.asked) == 5 * 4 + 4
    other = Script()
    relabel(mined, other, name="j", audit=4, seed=8)
    assert set(other.asked) != set(first.asked)


def test_equal_pairs_are_asked_once_and_in_parts():
    judge = Script()
    relabel(pool("1" * 3), judge, name="j", audit=0, part=3)
    assert [len(call) for call in judge.calls] == [3, 1]


def test_an_interrupted_run_goes_on_and_gives_what_a_whole_one_gives(tmp_path):
    class Broken(Script):
        def __call__(self, queries, documents):
            if len(self.calls) == 2:
                raise ConnectionError("gone")
            return super().__call__(queries, documents)

    cache, broken, judge = tmp_path / "verdicts.jsonl", Broken(), Script()
    settings = {"name": "j", "cache": cache, "part": 3}
    with pytest.raises(ConnectionError):
        relabel(pool("123"), broken, **settings)
    kept = [pair for pair in broken.asked if SAID[pair[1].split()[-1]] is not None]
    assert [row["key"] for row in read_jsonl(cache)] == [verdict_key("j", *pair) for pair in kept]
    with cache.open("a") as file:
        file.write('{"key": "torn')
    with pytest.warns(UserWarning, match="torn"):
        found = relabel(pool("123"), judge, **settings)
    whole = relabel(pool("123"), Script(), name="j")
    assert (found.mined, found.audit) == (whole.mined, whole.audit)
    assert not {*judge.asked} & {*kept}
    assert found.counts["cached"] == len(kept)
    third = Script()
    assert relabel(pool("123"), third, **settings).mined == whole.mined
    assert {pair[1].split()[-1] for pair in third.asked} == {"n4"}  # failures are asked again


def test_verdicts_are_those_of_one_judge_and_one_pair(tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    relabel(pool(), Script(), name="j", cache=cache)
    other = Script(dict.fromkeys(SAID, "negative"))
    found = relabel(pool(), other, name="k", cache=cache)
    assert found.counts["cached"] == 0
    assert found.counts["negative"] == 4
    keys = {verdict_key(*parts) for parts in (("j", "a", "b"), ("j", "ab", ""), ("ja", "", "b"), ("j", "b", "a"))}
    assert len(keys) == 4
    cache.write_text(json.dumps({"key": "x", "verdict": "yes"}) + "\n")
    with pytest.raises(RecordError, match=r"verdicts\.jsonl, record 1 is no verdict; delete it"):
        relabel(pool(), Script(), name="j", cache=cache)


def test_new_labels_come_back_from_their_file_and_steer_what_follows(tmp_path):
    mined = relabel(pool(), Script(), name="j").mined
    write_lists(tmp_path / "lists.jsonl", mined.lists)
    assert read_lists(tmp_path / "lists.jsonl") == mined.lists
    # n3 is judged now, and n4 is not
    dropped = drop_negatives(mined, [MaxScore("x", 0.1)]).dropped["1"]
    assert dropped == {"n2": "drop:j", "n4": "max_score:x"}
    (cut,) = choose(mined, 4, max_positives=2).lists
    assert {"p0", "n1"} < set(cut.document_ids)


@pytest.mark.parametrize(
    ("judge", "settings", "message"),
    [
        (Script(), {"which": "some"}, "which='some' is neither 'unjudged' nor 'all'"),
        (Script(), {"positives": "keep"}, "positives='keep' is neither 'relabel' nor 'drop'"),
        (Script(), {"gain": 0.0}, "gain must be above 0, got 0.0"),
        (Script(), {"name": ""}, "name the judge, its model and settings"),
        (Script(), {"part": 0}, "part must be at least 1, got 0"),
        (lambda queries, documents: ["positive"], {}, "the judge gave 1 verdicts on 7 pairs; give one for each"),
        (lambda queries, documents: None, {}, "the judge gave None verdicts on 7 pairs"),
        (lambda queries, documents: ["yes"] * 7, {}, "the judge said 'yes' of query 'query 1' and document 'text 1"),
    ],
)
def test_settings_and_answers_are_checked(judge, settings, message):
    with pytest.raises(ValueError, match=message):
        relabel(pool(), judge, **{"name": "j", **settings})
