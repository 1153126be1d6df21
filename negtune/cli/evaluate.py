"""Measure what a model still knows of a forget set: metrics.json, records and a report.

Rows are JSONL with `prompt` and `completion` (text or chat messages), optionally `paraphrase` and `perturbed`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from negtune.records import read_jsonl

COLUMNS = ("prompt", "completion")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `negtune eval unlearning`."""
    parser.add_argument("task", metavar="TASK", choices=["unlearning"], help="unlearning")
    parser.add_argument("--model", required=True, metavar="ID", help="folder, hub id, smollm2 or tiny")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter to put on the model")
    add_set_arguments(parser, required=True)
    parser.add_argument(
        "--oracle", metavar="FILE", help="records.jsonl (or run folder) of the retain-only model, for forget quality"
    )
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights; needs negtune[quant]")
    parser.add_argument("--generate", action="store_true", help="also answer every prompt, for ROUGE and samples")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="per answer (default: %(default)s)")
    parser.add_argument("--redact", action="store_true", help="keep the text of the data out of everything written")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="run folder to write")


def add_set_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Flags that name rows and how to run the model on them; shared with `negtune export`."""
    parser.add_argument("--forget", required=required, metavar="FILE", help="rows that should be gone")
    parser.add_argument("--retain", metavar="FILE", help="rows that should be kept")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=FILE", help="further rows, e.g. world_facts=w.jsonl"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--max_length", type=int, metavar="N", help="cut completions so that a row has N tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the run folder and its report, print the metrics."""
    sets = read_sets(args)
    records = _oracle_records(args.oracle)
    from negtune.eval.run import Run
    from negtune.eval.unlearning import oracle_truth_ratios
    from negtune.report import write_report

    model, tokenizer = load(args.model, args, adapter=args.adapter, load_in_4bit=args.load_in_4bit)
    artefact = ", ".join(
        filter(None, [args.model, args.adapter and f"adapter {args.adapter}", "4-bit" if args.load_in_4bit else None])
    )
    folder = Run(
        args.output_dir,
        seed=0,
        redacted=args.redact,
        title=f"Evaluation of {args.model}",
        recipe="negtune eval unlearning",
        data=describe_sets(sets),
        model=args.model,
        artefact=artefact,
        arguments={name: value for name, value in vars(args).items() if name not in ("run", "parser", "unknown")},
    )
    outcome = folder.measure(
        "model",
        model,
        tokenizer,
        sets,
        batch_size=args.batch_size,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        generate=args.generate,
        oracle=oracle_truth_ratios(records) if records else None,
    )
    print_metrics({"model": outcome.metrics})
    for note in outcome.notes:
        print(f"note: {note}")
    print(write_report(folder.folder)[-1])
    return 0


def read_sets(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows by set name, checked before any model is loaded.

    Raises:
        ValueError: a broken or empty file, a row without a column, or a set named twice; names the file and the line.
    """
    files = {"forget": args.forget, "retain": args.retain}
    for item in args.set:
        name, equals, path = item.partition("=")
        if not equals or not name or files.get(name):
            raise ValueError(f"--set {item}: give a new name and a file, as in --set world_facts=facts.jsonl")
        files[name] = path
    return {name: read_rows(path) for name, path in files.items() if path}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of one JSONL file; at least one, each with a prompt and a completion."""
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in COLUMNS if not row.get(name)]
        if missing:
            found = ", ".join(row) or "nothing"
            raise ValueError(f"{path}, row {number}: no {' and no '.join(missing)}; the row has {found}")
    return rows


def load(name: str | Path, args: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    """`load_model`, then onto this process's GPU if there is one."""
    import torch

    from negtune.models.load import load_model

    model, tokenizer = load_model(name, dtype=args.dtype, **options)
    if torch.cuda.is_available() and not options.get("load_in_4bit"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model = model.to("cuda")
    return model, tokenizer


def describe_sets(sets: Mapping[str, list[Any]]) -> str:
    """`40 forget rows, 300 retain rows`."""
    return ", ".join(f"{len(rows)} {name} rows" for name, rows in sets.items())


def print_metrics(arms: Mapping[str, Mapping[str, float | None]]) -> None:
    """A plain table on standard output: metrics as rows, arms as columns."""
    from negtune.report.tables import number

    names = list(dict.fromkeys(name for values in arms.values() for name in values))
    width = max(map(len, names))
    print(" " * width + "".join(f"{arm:>16}" for arm in arms))
    for name in names:
        print(f"{name:<{width}}" + "".join(f"{number(values.get(name)):>16}" for values in arms.values()))


def _oracle_records(path: str | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    file = Path(path)
    return read_jsonl(file / "records.jsonl" if file.is_dir() else file)
