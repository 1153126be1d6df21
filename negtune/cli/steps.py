"""Find the step where solutions went wrong, and write what trainers read: pairs that part there, or step advantages.

Works on the store of `negtune rollouts generate` and `verify`. Give the same model and draw (--max_tokens,
--temperature, --seed) as there: the solutions then are the rollouts from the bare prompt.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from negtune.cli.rollouts import (
    Progress,
    add_action,
    add_sampling_arguments,
    add_unscored_argument,
    add_verifier_arguments,
    check_engine,
    count,
    make_sampler,
    make_verifier,
    sampling_params,
    verifier_name,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `negtune steps locate`, `pairs`, `advantages` and `stats`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    action = add_action(actions, "locate", "search solutions for their first pit by rollouts from their steps", locate)
    _locate_arguments(action)
    action = add_action(actions, "pairs", "per-step preference pairs of what was located", pairs)
    _rows_arguments(action)
    action.add_argument("--model", required=True, metavar="ID", help="whose tokenizer it is")
    _split_argument(action)
    action.add_argument("--chosen", default="shortest", choices=["shortest", "all"], help="correct continuations")
    action.add_argument(
        "--min_distance",
        type=float,
        default=0.0,
        metavar="D",
        help="edit distance of a pair's two steps, 0 to 1; nearer ones are left out (default: %(default)s)",
    )
    add_verifier_arguments(action)
    action = add_action(actions, "advantages", "rows with step advantages of what was located", advantages)
    _rows_arguments(action)
    action = add_action(actions, "stats", "pits found, and what they cost", stats)
    _name_argument(action)


def _locate_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser)
    add_verifier_arguments(parser)
    add_unscored_argument(parser)
    _split_argument(parser)
    _name_argument(parser)
    parser.add_argument(
        "--strategy",
        default="all",
        choices=["all", "adaptive", "scan", "binary"],
        help="all and adaptive give values of all steps, scan and binary look for the pit alone (default: %(default)s)",
    )
    parser.add_argument(
        "--num_rollouts", type=int, default=8, metavar="N", help="from one state, at most (default: %(default)s)"
    )
    parser.add_argument("--add", type=int, default=4, metavar="N", help="rollouts at a time (default: %(default)s)")
    parser.add_argument(
        "--width", type=float, default=0.5, metavar="W", help="adaptive: of the interval of a value (%(default)s)"
    )
    parser.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of intervals (%(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.0, metavar="Q", help="a state of at most this value is dead (%(default)s)"
    )
    parser.add_argument(
        "--rule",
        default="all_fail",
        choices=["all_fail", "two_consecutive", "argmin", "largest_drop"],
        help="all and adaptive: which step is the pit (default: %(default)s)",
    )
    parser.add_argument("--best_of", type=int, default=1, metavar="K", help="values under best-of-K (%(default)s)")
    parser.add_argument(
        "--live_only",
        action="store_true",
        help="all and adaptive: nothing from the steps of prompts that are always or never solved, which give no rows",
    )
    parser.add_argument(
        "--solutions", default="wrong", choices=["wrong", "all"], help="which to search (default: %(default)s)"
    )
    parser.add_argument(
        "--per_prompt", type=count, default=8, metavar="N", help="solutions of one outcome (%(default)s)"
    )


def _split_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="lines", choices=["lines", "sentences"], help="steps (default: %(default)s)")


def _name_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="steps", metavar="NAME", help="of the files in the store (%(default)s)")


def _rows_arguments(parser: argparse.ArgumentParser) -> None:
    _name_argument(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL to write")


def locate(args: argparse.Namespace) -> int:
    """Search what the store has not searched yet."""
    check_engine(args)
    from negtune.data.steps import SPLITTERS
    from negtune.rollouts import collect, steps
    from negtune.rollouts.states import StateRollouts, solutions
    from negtune.rollouts.store import RecordStore

    search = steps.Search(
        strategy=args.strategy,
        num_rollouts=args.num_rollouts,
        batch=args.add,
        width=args.width,
        confidence=args.confidence,
        threshold=args.threshold,
        rule=args.rule,
        best_of=args.best_of,
        live_only=args.live_only,
    )
    index, processes = collect.launched_processes()
    rollouts, name = RecordStore(args.store), verifier_name(args)
    if not len(rollouts):
        raise ValueError(f"{args.store} has no rollouts; draw some with negtune rollouts generate")
    sampler = make_sampler(args)
    try:
        with (
            make_verifier(args) as verifier,
            RecordStore(args.store, "continuations", process_index=index) as continuations,
            RecordStore(args.store, "verdicts", process_index=index) as verdicts,
            RecordStore(args.store, args.name, process_index=index) as judged,
            Progress("solutions", shown=index == 0) as progress,
        ):
            found = list(
                solutions(
                    rollouts,
                    verdicts,
                    name,
                    sampler.tokenizer,
                    SPLITTERS[args.split],
                    outcomes=("wrong", "correct") if args.solutions == "all" else ("wrong",),
                    per_prompt=args.per_prompt,
                )
            )
            if not found:
                raise ValueError(
                    f"{args.store} has no {args.solutions} solution with a verdict of {name}; score them with negtune "
                    "rollouts verify and the same verifier flags"
                )
            states = StateRollouts(
                sampler,
                verifier,
                rollouts,
                continuations,
                verdicts,
                sampling_params(args),
                name=name,
                part=args.batch_size,
                max_unscored=args.max_unscored,
            )
            steps.locate(judged, found, states, search, process_index=index, processes=processes, progress=progress)
    finally:
        sampler.close()
    if processes > 1:
        print(f"process {index}: {states.drawn} rollouts drawn; all: negtune steps stats --store {args.store}")
        return 0
    print(f"{states.drawn} rollouts drawn, {states.drawn_tokens} tokens")
    return stats(args)


def pairs(args: argparse.Namespace) -> int:
    """Write pairs."""
    from negtune.data.steps import SPLITTERS
    from negtune.models.load import load_tokenizer
    from negtune.rollouts.step_rows import pit_pairs
    from negtune.rollouts.store import RecordStore

    dropped: Counter[str] = Counter()
    rows = pit_pairs(
        _judged(args),
        [RecordStore(args.store), RecordStore(args.store, "continuations")],
        RecordStore(args.store, "verdicts"),
        verifier_name(args),
        load_tokenizer(args.model),
        SPLITTERS[args.split],
        chosen=args.chosen,
        min_distance=args.min_distance,
        dropped=dropped,
    )
    return _write(args, list(rows), dropped, "pairs")


def advantages(args: argparse.Namespace) -> int:
    """Write rows with step advantages."""
    from negtune.rollouts.step_rows import advantage_rows

    dropped: Counter[str] = Counter()
    return _write(args, list(advantage_rows(_judged(args), dropped=dropped)), dropped, "rows")


def stats(args: argparse.Namespace) -> int:
    """Print what was found, and what it cost."""
    found = _judged(args)
    reasons = Counter(record["reason"] for record in found)
    rollouts, tokens = (sum(record[name] for record in found) for name in ("num_rollouts", "tokens"))
    print(f"{len(found)} solutions: " + ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()))
    pits = reasons["found"]
    if pits:
        places = Counter(record["pit"] for record in found if record["pit"])
        print("pit at step: " + ", ".join(f"{step}: {places[step]}" for step in sorted(places)))
        print(f"{rollouts / pits:.1f} rollouts and {tokens / pits:.0f} tokens per located pit ({rollouts} rollouts)")
    return 0


def _judged(args: argparse.Namespace) -> list[dict[str, Any]]:
    from negtune.rollouts.store import RecordStore

    found = list(RecordStore(args.store, args.name))
    if not found:
        raise ValueError(f"{args.store} has no searched solutions named {args.name}; run negtune steps locate")
    return found


def _write(args: argparse.Namespace, rows: list[dict[str, Any]], dropped: Counter[str], what: str) -> int:
    from negtune.records import write_jsonl

    left_out = ", ".join(f"{reason} {n}" for reason, n in dropped.most_common()) or "none"
    if not rows:
        raise ValueError(f"no {what} could be made; solutions left out: {left_out}")
    write_jsonl(args.output, rows)
    print(f"{len(rows)} {what} in {args.output}; solutions left out: {left_out}")
    return 0
