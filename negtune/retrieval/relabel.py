"""New labels for mined candidates from a judge, for instance a language model: RLHN, https://arxiv.org/abs/2505.16967.

The judge says of a document that it is a positive, a negative, or neither (drop). Where it fails to say so the document
stays what it was, and is counted. What the judge says of documents that people judged is compared with them, apart.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from negtune.metrics.judgement import VERDICTS, JudgeAudit, judge_audit
from negtune.records import RecordError, append_jsonl, stream_jsonl
from negtune.retrieval.mining import CandidateList, Mined, picked

logger = logging.getLogger(__name__)

Judge = Callable[[list[str], list[str]], Sequence[str | None]]
"""Query texts and document texts to `positive`, `drop`, `negative`, or None where it could not be judged."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class Relabelled:
    """See `relabel`.

    Args:
        mined: with the new labels.
        audit: the judge against known labels; None if there are none, or no audit was asked for.
        counts: candidates judged `positive`, `drop`, `negative`, `failed` (kept as they were); `calls`, the pairs that
            the judge was asked, and `cached`, those known from before.
    """

    mined: Mined
    audit: JudgeAudit | None
    counts: dict[str, int]


def relabel(
    mined: Mined,
    judge: Judge,
    *,
    name: str,
    which: str = "unjudged",
    positives: str = "relabel",
    gain: float = 1.0,
    audit: int | None = 200,
    audit_queries: Collection[str] | None = None,
    cache: str | Path | None = None,
    part: int = 64,
    seed: int = 0,
) -> Relabelled:
    """Ask a judge about candidates, and change gains and judgements by what it says.

    A positive gets `gain` and counts among `ideal_gains`; a negative has gain 0 and is judged from here on; a dropped
    document leaves the list, and is named in `dropped`. Each changed document tells so in `relabelled`. Run it on lists
    that are not cut yet, and `choose` afterwards: there is room for new positives then. What the judge raises comes
    out; with a cache the same call goes on from there.

    Args:
        mined: see `mine`.
        judge: see `Judge`. Equal pairs of texts are asked once.
        name: of the judge with its model, prompt and settings: its verdicts are kept under it.
        which: `unjudged` candidates; or `all`, so that it overrules people too.
        positives: what becomes of candidates found positive that were none: `relabel`, or `drop`.
        gain: of new positives, above 0.
        audit: judged documents to ask about for the audit, drawn by seed; None: all, 0: none.
        audit_queries: ids of queries whose documents they are, where the judge was fitted on others; None: all.
        cache: JSONL file of verdicts, appended after every part; failures are not kept, and asked again. For one
            process at a time.
        part: pairs of a call.
        seed: of the audit's sample.

    Raises:
        ValueError: settings, or an answer that is not one verdict or None for each pair.
        RecordError: the cache has a line that is no verdict.
    """
    if which not in ("unjudged", "all"):
        raise ValueError(f"which={which!r} is neither 'unjudged' nor 'all'")
    if positives not in ("relabel", "drop"):
        raise ValueError(f"positives={positives!r} is neither 'relabel' nor 'drop'")
    if not 0 < gain < float("inf"):
        raise ValueError(f"gain must be above 0, got {gain}")
    if not name:
        raise ValueError("name the judge, its model and settings: verdicts are kept under it")
    if part < 1:
        raise ValueError(f"part must be at least 1, got {part}")
    audited = _audited(mined, audit, audit_queries, seed)
    changed = [
        (one, i)
        for one in mined.lists
        for i, known in enumerate(one.judged)
        if which == "all" or (not known and one.gains[i] <= 0)
    ]
    pairs = dict.fromkeys((one.query, one.documents[i]) for one, i in changed + audited)
    verdicts, calls = _verdicts(judge, list(pairs), name, cache, part)
    found = Counter(verdicts[one.query, one.documents[i]] or "failed" for one, i in changed)
    if changed and found["failed"] > len(changed) / 2:
        logger.warning("%s gave no verdict on %d of %d candidates; look at it", name, found["failed"], len(changed))
    counts = {verdict: found[verdict] for verdict in (*VERDICTS, "failed")}
    places: dict[str, list[int]] = {}
    for one, i in changed:
        places.setdefault(one.query_id, []).append(i)
    said = {
        one.query_id: {i: v for i in places.get(one.query_id, []) if (v := verdicts[one.query, one.documents[i]])}
        for one in mined.lists
    }
    return Relabelled(
        _changed(mined, said, name, positives, gain),
        _compared(audited, verdicts),
        {**counts, "calls": calls, "cached": len(pairs) - calls},
    )


def verdict_key(name: str, query: str, document: str) -> str:
    """Names a judge's verdict on a pair of texts; equal on every machine."""
    return hashlib.sha256(json.dumps([name, query, document]).encode()).hexdigest()[:32]


def _verdicts(
    judge: Judge, pairs: Sequence[Pair], name: str, cache: str | Path | None, part: int
) -> tuple[dict[Pair, str | None], int]:
    """Of each pair, and how many were asked about now."""
    keys = {pair: verdict_key(name, *pair) for pair in pairs}
    known = {} if cache is None else _read(Path(cache), set(keys.values()))
    verdicts: dict[Pair, str | None] = {pair: known[key] for pair, key in keys.items() if key in known}
    missing = [pair for pair in pairs if pair not in verdicts]
    for start in range(0, len(missing), part):
        some = missing[start : start + part]
        answers = judge([query for query, _ in some], [document for _, document in some])
        if not hasattr(answers, "__len__") or len(answers) != len(some):
            given = len(answers) if hasattr(answers, "__len__") else repr(answers)
            raise ValueError(f"the judge gave {given} verdicts on {len(some)} pairs; give one for each, None if unsure")
        for (query, document), answer in zip(some, answers, strict=True):
            if answer is not None and answer not in VERDICTS:
                raise ValueError(
                    f"the judge said {answer!r} of query {query[:60]!r} and document {document[:60]!r}; a verdict is "
                    f"one of {', '.join(VERDICTS)}, or None"
                )
            verdicts[query, document] = answer
        final = [pair for pair in some if verdicts[pair] is not None]
        if cache is not None and final:
            lines = [{"key": keys[pair], "judge": name, "verdict": verdicts[pair]} for pair in final]
            append_jsonl(cache, lines, sync=True)
    return verdicts, len(missing)


def _read(path: Path, wanted: set[str]) -> dict[str, str]:
    if not path.exists():
        return {}
    known = {}
    for number, record in enumerate(stream_jsonl(path), 1):
        if record.get("verdict") not in VERDICTS or not isinstance(record.get("key"), str):
            raise RecordError(f"{path}, record {number} is no verdict; delete it, or give another file")
        if record["key"] in wanted:
            known[record["key"]] = record["verdict"]
    return known


def _changed(mined: Mined, said: dict[str, dict[int, str]], name: str, positives: str, gain: float) -> Mined:
    """The lists with their verdicts, by query and place."""
    lists, dropped, without = [], dict(mined.dropped), list(mined.without_positive)
    for one in mined.lists:
        verdicts = said[one.query_id]
        gone = {
            i: f"{verdict}:{name}"
            for i, verdict in verdicts.items()
            if verdict == "drop" or (verdict == "positive" and positives == "drop" and one.gains[i] <= 0)
        }
        relabelled = _relabelled(one, {i: v for i, v in verdicts.items() if i not in gone}, name, gain)
        if gone:
            reasons = {one.document_ids[i]: reason for i, reason in gone.items()}
            dropped[one.query_id] = dropped.get(one.query_id, {}) | reasons
        left = picked(relabelled, [i for i in range(len(one.gains)) if i not in gone])
        lost = [one.gains[i] for i in gone if one.gains[i] > 0]
        left = replace(left, ideal_gains=_without(left.ideal_gains, lost))
        if any(value > 0 for value in left.gains):
            lists.append(left)
        else:
            without.append(one.query_id)
    return replace(mined, lists=lists, dropped=dropped, without_positive=without)


def _relabelled(one: CandidateList, verdicts: dict[int, str], name: str, gain: float) -> CandidateList:
    """With new labels where the verdict is not what was known; a known positive keeps its own gain."""
    gains, judged, marks = list(one.gains), list(one.judged), list(one.relabelled)
    lost, won = [], []
    for i, verdict in verdicts.items():
        relevant = verdict == "positive"
        if judged[i] and (gains[i] > 0) == relevant:
            continue
        if relevant:
            gains[i] = gain
            won.append(gain)
        elif gains[i] > 0:
            lost.append(gains[i])
            gains[i] = 0.0
        judged[i], marks[i] = True, f"{verdict}:{name}"
    ideal = sorted([*_without(one.ideal_gains, lost), *won], reverse=True)
    return replace(one, gains=gains, judged=judged, relabelled=marks, ideal_gains=ideal)


def _without(gains: Iterable[float], lost: Iterable[float]) -> list[float]:
    left = list(gains)
    for gain in lost:
        left.remove(gain)
    return left


def _audited(
    mined: Mined, most: int | None, queries: Collection[str] | None, seed: int
) -> list[tuple[CandidateList, int]]:
    """Documents whose labels are people's, a sample of them that does not depend on the order of lists."""
    known = [
        (one, i)
        for one in sorted(mined.lists, key=lambda one: one.query_id)
        if queries is None or one.query_id in queries
        for i in sorted(range(len(one.judged)), key=one.document_ids.__getitem__)
        if one.judged[i] and one.relabelled[i] is None
    ]
    return known if most is None or most >= len(known) else random.Random(seed).sample(known, most)


def _compared(audited: Sequence[tuple[CandidateList, int]], verdicts: dict[Pair, str | None]) -> JudgeAudit | None:
    if not audited:
        return None
    truth = [one.gains[i] > 0 for one, i in audited]
    return judge_audit(truth, [verdicts[one.query, one.documents[i]] for one, i in audited])
