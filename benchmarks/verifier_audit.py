"""How often our verifiers err, and how fast they are.

Math: the cases of `reward-doctor` (PyPI; `pip install --no-deps reward-doctor==0.2.0`), false positives and false
negatives of `MathVerifier` and of plain `math_verify`. One half (by the hash of the case's name) was read while
`MathVerifier` was written, the other was sealed until its first run.
Code: HumanEval's reference solutions, model samples labelled by EvalPlus, and mutants, judged by HumanEval's own tests;
jobs a second.

    python benchmarks/verifier_audit.py --data_dir FOLDER

FOLDER has humaneval/ and code_results/.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_by_side import row, table, write_result

from negtune.metrics.verification import verifier_errors
from negtune.verifiers.code import CodeVerifier
from negtune.verifiers.math import MathVerifier

SAMPLES = ("llama3-8b", "llama3-8b-instruct", "llama3-8b-instruct-dpo", "mistral-7b-instruct-v0.2", "mutants")
ACCEPTED = {"correct": True, "wrong": False, "unscored": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with humaneval/ and code_results/")
    parser.add_argument("--workers", type=int, help="jobs at a time (default: one per core)")
    args = parser.parse_args()
    rows = math_rows() if importlib.util.find_spec("reward_doctor") else []
    rows += code_rows(Path(args.data_dir), args.workers)
    print(write_result("verifier_audit", rows))
    print(table(rows))


def math_rows() -> list[dict[str, Any]]:
    """Error rates on the half that was read and on the sealed half; contested cases are left out, as by default."""
    from math_verify import parse, verify
    from reward_doctor.corpus import load

    rows = []
    for half in ("read", "sealed"):
        cases = [
            case for case in load() if (hashlib.sha256(case.id.encode()).digest()[0] % 2 == 1) == (half == "sealed")
        ]
        truth = [case.expect for case in cases]
        with MathVerifier() as verifier:
            verdicts = verifier.verify(
                [case.prompt for case in cases],
                [case.completion for case in cases],
                answer=[case.reference for case in cases],
            )
        ours = verifier_errors([ACCEPTED[v.outcome] for v in verdicts], truth)
        peer = verifier_errors([bool(verify(parse(c.reference), parse(c.completion))) for c in cases], truth)
        for name in ("false_positive", "false_negative"):
            a, b = getattr(ours, name), getattr(peer, name)
            counts = {"ours_count": [a.count, a.of], "peer_count": [b.count, b.of], "ours_interval": [a.low, a.high]}
            rows.append(row(f"math, {half} half: {name}, against math_verify", a.value, b.value, "share", **counts))
    return rows


def code_rows(folder: Path, workers: int | None) -> list[dict[str, Any]]:
    """Agreement with known labels, and throughput."""
    tasks = {task["task_id"]: task for task in read(folder / "humaneval" / "HumanEval.jsonl")}
    rows = []
    with CodeVerifier(workers=workers, preload=["numpy"]) as verifier:
        golds = [
            {"task_id": t["task_id"], "solution": t["prompt"] + t["canonical_solution"], "base_pass": True}
            for t in tasks.values()
        ]
        for name, samples in {
            "reference solutions": golds,
            **{name: read(folder / "code_results" / f"humaneval_{name}.jsonl.gz") for name in SAMPLES},
        }.items():
            start = time.perf_counter()
            verdicts = verifier.verify(
                [""] * len(samples),
                [sample["solution"] for sample in samples],
                tests=[tasks[sample["task_id"]]["test"] for sample in samples],
                entry_point=[tasks[sample["task_id"]]["entry_point"] for sample in samples],
            )
            seconds = time.perf_counter() - start
            errors = verifier_errors([ACCEPTED[v.outcome] for v in verdicts], [s["base_pass"] for s in samples])
            other = [
                s["task_id"] for s, v in zip(samples, verdicts, strict=True) if s["base_pass"] != ACCEPTED[v.outcome]
            ]
            rows.append(
                row(
                    f"code, {name}: verdicts other than the label",
                    len(other) / len(samples),
                    None,
                    "share",
                    count=[len(other), len(samples)],
                    other=sorted(set(other)),
                    false_positives=errors.false_positive.count,
                    false_negatives=errors.false_negative.count,
                    unscored=errors.unscored.count,
                    jobs_per_second=len(samples) / seconds,
                    sandbox=verifier.level,
                )
            )
    return rows


def read(path: Path) -> Sequence[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
