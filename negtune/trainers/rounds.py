"""On-policy rounds: draw from the policy of this moment, score, give credit, train for some steps, and again.

A round is decided by its number, the seed, where the stream of prompts stands, the running baseline and the weights:
`RoundState` holds what of these a checkpoint does not. Completions are on the disk before they are trained on, and are
taken from there by a run that was killed, if the weights are the same; a checkpoint carries the round it is in the
middle of. Every process draws and scores its share, then all know the whole round.

Shapes: G prompts (groups), N completions of each.
"""

from __future__ import annotations

import math
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from accelerate.utils import gather_object

from negtune.credit import step_advantages
from negtune.data.completions import Message
from negtune.data.prompts import PromptSource
from negtune.data.steps import Splitter, TokenSteps, token_steps
from negtune.records import strict
from negtune.rollouts.collect import RECENT, in_parts, rollout_columns, rollout_record
from negtune.rollouts.sampler import Prompt, Request, Sampler, SamplingParams, requests_for, share_of
from negtune.rollouts.store import RecordStore
from negtune.verifiers.verdict import Verdict, Verifier, stop_if_unscored, verdicts_of

PART = 512
"""Completions between two writes."""
RESERVED = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
RESERVED_BY_STEPS = {*RESERVED, "steps", "rewards", "prompt_ids", "step_ends"}
"""Names that scorers and step credit get from us: no columns of prompts."""
OF_SCORES = ("rounds/reward", "rounds/all_right", "rounds/all_wrong")
_SESSION = uuid.uuid4().hex[:8]

StepCredit = Callable[..., Sequence[Sequence[float | None]]]
"""`(prompts, completions, steps, **columns)`: for each completion one number per step, None where not judged; with
`step_scores="values"` one more may come first, the value of the bare prompt. `steps` are lists of texts; the columns
are those of the prompts, and `completion_ids`, `prompt_ids`, `step_ends`, `rewards` (None: not scored)."""


class NoSignalError(RuntimeError):
    """Round after round no completion carries an advantage; the message says what the rewards looked like."""


@dataclass(frozen=True)
class RoundState:
    """Where the stream of rounds stands: everything that the next round depends on, besides the weights.

    Args:
        number: of the next round.
        cursor: prompts taken so far.
        running: moving average of the rewards, if that is the baseline.
        empty: rounds without any advantage just before.
        completions, tokens: drawn so far.
    """

    number: int = 0
    cursor: int = 0
    running: float | None = None
    empty: int = 0
    completions: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Round:
    """Rows to train on, and what was seen on the way.

    Args:
        rows: as the trainer's collator takes them, groups together.
        metrics: of the round, for the log.
        state: after it.
    """

    rows: list[dict[str, Any]]
    metrics: dict[str, float]
    state: RoundState


@dataclass(frozen=True)
class RoundSettings:
    """See `OnPolicyConfig`, whose fields these are."""

    prompts_per_round: int
    num_generations: int
    dynamic_sampling: bool
    max_refills: int
    max_empty_rounds: int
    step_scores: str
    mask_truncated_completions: bool
    max_unscored: float
    seed: int


class RowMaker(Protocol):
    """Makes rows to train on of the scored completions of a round: what one trainer has that another has not.

    Args:
        filler: a row of which nothing counts, where a process has none.
        nothing, way_out: for the error when round after round there is nothing to learn from.
    """

    filler: Mapping[str, Any]
    nothing: str
    way_out: str

    def credited(self, drawn: Sequence[Mapping[str, Any]], running: float | None) -> list[dict[str, Any]]:
        """The completions, group by group, each with `signal`: whether its group has something to learn from."""
        ...

    def rows(self, credited: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows with `group`, groups together."""
        ...

    def moved(self, running: float | None, seen: Sequence[Mapping[str, Any]]) -> float | None:
        """The running baseline after a round."""
        ...

    def metrics(self, seen: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Of a round: all of its completions, and the rows that became of them."""
        ...

    def followed(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Rows of the first round that are watched from then on."""
        ...


@dataclass
class Rounds:
    """Makes rounds.

    Args:
        sampler: draws; its weights are the caller's business.
        verifier: scores.
        prompts: where prompts come from.
        settings, params: how.
        maker: makes rows of what was scored.
        rollouts, scores: stores; every process has its own files in them.
        splitter, tokenizer: of steps, if `step_credit` is given.
        step_credit: gives numbers to steps; see `StepCredit`.
        process_index, processes: of this process.
    """

    sampler: Sampler
    verifier: Verifier
    prompts: PromptSource
    settings: RoundSettings
    params: SamplingParams
    maker: RowMaker
    rollouts: RecordStore
    scores: RecordStore
    splitter: Splitter
    tokenizer: Any
    step_credit: StepCredit | None = None
    process_index: int = 0
    processes: int = 1
    _seen: list[Verdict] = field(default_factory=list)
    _extra: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._compares = getattr(self.verifier, "compares", False)  # then it has to see a prompt's completions at once
        self._part = max(1, PART // self.settings.num_generations) * self.settings.num_generations
        self._reserved = RESERVED if self.step_credit is None else RESERVED_BY_STEPS

    def make(self, state: RoundState) -> Round:
        """The round that follows `state`, equal on all processes. Every process must call it."""
        s, cursor, refills = self.settings, state.cursor, 0
        kept: list[dict[str, Any]] = []
        seen: list[dict[str, Any]] = []
        while True:
            wanted = s.prompts_per_round - len({row["group"] for row in kept})
            groups = self._groups(cursor, wanted, state.number, refills)
            cursor += wanted
            rows = self.maker.credited(groups, state.running)
            seen += rows
            fit = [row for row in rows if row["signal"]] if s.dynamic_sampling else rows
            kept += fit
            missing = s.prompts_per_round - len({row["group"] for row in kept})
            if not s.dynamic_sampling or missing == 0 or refills == s.max_refills:
                break
            refills += 1
        running = self.maker.moved(state.running, seen)
        empty = 0 if any(row["signal"] for row in kept) else state.empty + 1
        if empty >= s.max_empty_rounds:
            raise NoSignalError(_no_signal(seen, empty, self.maker))
        tokens = state.tokens + sum(len(row["completion_ids"]) for row in seen)
        after = RoundState(state.number + 1, cursor, running, empty, state.completions + len(seen), tokens)
        made, metrics = self.maker.rows(kept), _metrics(seen)
        if self._compares:  # shares of wins are half on average, whatever the policy
            metrics = {name: value for name, value in metrics.items() if name not in OF_SCORES}
        return Round(made, {**metrics, "rounds/refills": refills, **self.maker.metrics(seen, made)}, after)

    # --- drawing and scoring ------------------------------------------------------------------------------------------

    def _groups(self, cursor: int, n: int, number: int, refill: int) -> list[dict[str, Any]]:
        """The scored rollouts of `n` prompts, in order, `num_generations` each, gathered from all processes."""
        rows = self.prompts.take(cursor, n)
        for i, row in enumerate(rows):
            if not row.get("prompt"):
                raise ValueError(f"prompt {cursor + i} of the stream: the row has no prompt; it has {sorted(row)}")
            refuse_reserved(row, self._reserved)
        params = replace(self.params, seed=(self.settings.seed * 1_000_003 + number) * 1_009 + refill)
        requests = requests_for([row["prompt"] for row in rows], self.settings.num_generations)
        owners = [cursor + i for i in range(n) for _ in range(self.settings.num_generations)]
        places = self._places(n)
        mine = [(requests[i], owners[i]) for i in places[self.process_index]]
        drawn = self._drawn(mine, {cursor + i: row for i, row in enumerate(rows)}, params)
        scored = self._scored(drawn)
        found = [{**record, **scores} for record, scores in zip(drawn, scored, strict=True)]
        by_place = {
            i: record
            for part, of_process in zip(gather_object([found]), places, strict=True)
            for i, record in zip(of_process, part, strict=True)
        }
        return [by_place[i] for i in range(len(requests))]

    def _places(self, n: int) -> list[Sequence[int]]:
        """Which completions of `n` groups each process draws: whole groups, whose prompt one engine then reads once and
        whose first steps it goes on from once, if that leaves nobody with less to do."""
        size = self.settings.num_generations
        groups = [range(i * size, (i + 1) * size) for i in range(n)]
        if n % self.processes and not self._compares:
            return [share_of(range(n * size), i, self.processes) for i in range(self.processes)]
        return [
            [place for group in share_of(groups, i, self.processes) for place in group] for i in range(self.processes)
        ]

    def _drawn(
        self, mine: Sequence[tuple[Request, int]], rows: Mapping[int, Mapping[str, Any]], params: SamplingParams
    ) -> list[dict[str, Any]]:
        """Records of these requests; those on the disk are not drawn again."""
        keys = [request.key(params, self.sampler.policy) for request, _ in mine]
        records = _look_up(self.rollouts, keys)
        missing = [pair for pair, key in zip(mine, keys, strict=True) if key not in records]
        for some in in_parts(missing, self._part):
            drawn = self.sampler.draw([request for request, _ in some], params)
            new = [rollout_record(r, rows[owner]) for r, (_, owner) in zip(drawn, some, strict=True)]
            self.rollouts.append(new)
            records |= {record["key"]: record for record in new}
        now = {owner: rollout_columns(row) for owner, row in rows.items()}  # what a scorer is told is not what was
        return [
            {**records[key], "columns": now[owner], "group": owner} for key, (_, owner) in zip(keys, mine, strict=True)
        ]

    def _scored(self, drawn: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`score`, `outcome`, `step_ends`, `step_scores` of each; no scores for what failed, or was cut and is masked.

        Scored anew by a run that finds its rollouts on the disk: the scorer may be another one.
        """
        there: dict[str, dict[str, Any]] = {}
        whole = ("stop",) if self.settings.mask_truncated_completions else ("stop", "length")
        for some in in_parts(drawn, self._part):
            fit = [record for record in some if record["finish_reason"] in whole]
            self._extra.clear()
            verdicts = dict(zip((record["key"] for record in fit), self._verify(fit), strict=True))
            self._seen = [*self._seen, *verdicts.values()][-RECENT:]
            stop_if_unscored(self._seen, self.settings.max_unscored)
            steps = self._step_scores(fit, [verdicts[record["key"]].score for record in fit])
            extra = self._extra_of(fit)
            new = [
                {**_score_record(record, verdicts.get(record["key"]), steps.get(record["key"])), **extra[record["key"]]}
                for record in some
            ]
            self.scores.append(new)
            there |= {record["rollout"]: record for record in new}
        names = ("score", "outcome", "step_ends", "step_scores")
        return [{name: there[r["key"]][name] for name in names} for r in drawn]

    def _verify(self, records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        if not records:
            return []
        ids, columns = [record["completion_ids"] for record in records], _columns(records)
        if self._compares:
            columns["group_numbers"] = [record["group"] for record in records]
        return verdicts_of(self.verifier, *_texts(records), ids, columns)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """For reward functions: keep one value per completion of this call beside its score."""
        self._extra[column] = list(values)

    def _extra_of(self, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """By key of the rollout, what reward functions wanted kept; as `extra` in the score's record."""
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        for column, values in self._extra.items():
            if len(values) != len(records):
                raise ValueError(
                    f"log_extra({column!r}) got {len(values)} values for {len(records)} completions; give one for each"
                )
            for record, value in zip(records, strict(values), strict=True):
                found[record["key"]].setdefault("extra", {})[column] = value
        return found

    def _step_scores(
        self, records: Sequence[Mapping[str, Any]], rewards: Sequence[float | None]
    ) -> dict[str, tuple[list[int], list[float | None]]]:
        """Where the steps of each completion end, and what each is worth."""
        if self.step_credit is None or not records:
            return {}
        cut = [token_steps(record["completion_ids"], self.tokenizer, self.splitter) for record in records]
        found = self.step_credit(
            *_texts(records),
            [steps.texts for steps in cut],
            **_columns(records),
            prompt_ids=[record["prompt_ids"] for record in records],
            completion_ids=[record["completion_ids"] for record in records],
            step_ends=[steps.ends for steps in cut],
            rewards=list(rewards),
        )
        scores = checked_step_scores(found, cut, self.settings.step_scores)
        return {
            record["key"]: (steps.ends, of_steps) for record, steps, of_steps in zip(records, cut, scores, strict=True)
        }


def checked_step_scores(found: Any, cut: Sequence[TokenSteps], kind: str) -> list[list[float | None]]:
    """What step credit gave, as one list of numbers per completion.

    Args:
        found: by the callable.
        cut: the steps of each completion.
        kind: `rewards`, one per step, or `values`, which may have that of the bare prompt first.

    Raises:
        ValueError: for anything else, saying for which completion.
    """
    if not _is_list(found) or len(found) != len(cut):
        given = f"{len(found)} lists" if _is_list(found) else repr(found)
        raise ValueError(f"step credit gave {given} for {len(cut)} completions; give one list for each")
    extra = (0, 1) if kind == "values" else (0,)
    for steps, scores in zip(cut, found, strict=True):
        if not _is_list(scores):
            raise ValueError(
                f"step credit gave {scores!r} for a completion; give a list with one number for each of its "
                f"{len(steps)} steps, None where one was not judged (a number per completion is a reward: reward_funcs)"
            )
        if len(scores) - len(steps) not in extra:
            raise ValueError(
                f"step credit gave {len(scores)} numbers for the {len(steps)} steps of "
                f"{''.join(steps.texts)[:80]!r}; give one per step, None where it was not judged; values of states, "
                "that of the bare prompt first, need step_scores=values"
            )
        wrong = [score for score in scores if score is not None and not math.isfinite(score)]
        if wrong:
            raise ValueError(
                f"step credit gave {wrong[0]} for a step of {''.join(steps.texts)[:80]!r}; give None for a step that "
                "was not judged"
            )
    return [[None if score is None else float(score) for score in scores] for scores in found]


def advantages_of_steps(scores: Sequence[float | None], steps: int, kind: str) -> Sequence[float | None]:
    """Step scores as advantages: `rewards` as they are, of `values` (behind each step) the differences."""
    if kind != "values":
        return scores
    return step_advantages(scores if len(scores) > steps else [None, *scores])  # that of the bare prompt may come first


def behaviour_of(record: Mapping[str, Any]) -> list[float] | None:
    """Log-probabilities of the policy that drew a completion. Those of a cut distribution are no policy's: None."""
    return None if record["truncated"] else record["logps"]


def _is_list(thing: Any) -> bool:
    return hasattr(thing, "__len__") and hasattr(thing, "__getitem__") and not isinstance(thing, str | Mapping)


def refuse_reserved(columns: Iterable[str], reserved: set[str]) -> None:
    """Raise ValueError for a column with the name of something else that a scorer is given."""
    taken = sorted(reserved & set(columns))
    if taken:
        raise ValueError(
            f"the prompts have the column {', '.join(taken)}, a name under which scorers get what was drawn; rename it"
        )


def completion_of(prompt: Prompt, text: str) -> str | list[Message]:
    """A completion as TRL hands it to reward functions: text, or the assistant's message where the prompt is a chat."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _texts(records: Sequence[Mapping[str, Any]]) -> tuple[list[Prompt], list[Any]]:
    prompts = [record["prompt"] for record in records]
    return prompts, [completion_of(record["prompt"], record["text"]) for record in records]


def _look_up(store: RecordStore, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The final records of `keys` in a store; the files are read only if one of them is there."""
    wanted = {key for key in keys if key in store}
    return {record["key"]: record for record in store if record["key"] in wanted} if wanted else {}


def _score_record(
    record: Mapping[str, Any], verdict: Verdict | None, steps: tuple[list[int], list[float | None]] | None
) -> dict[str, Any]:
    ends, scores = steps if steps is not None else ([len(record["completion_ids"])], None)
    score, reason = (None, record["finish_reason"]) if verdict is None else (verdict.score, verdict.reason)
    outcome = "unscored" if verdict is None else verdict.outcome
    final = record["final"] and (verdict is None or score is not None)
    return {
        **{"key": f"{record['key']}:{_SESSION}", "rollout": record["key"]},
        **{"score": score, "outcome": outcome, "reason": reason, "final": final},
        **{"step_ends": ends, "step_scores": scores},
    }


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for record in records for name in record["columns"])
    return {name: [record["columns"].get(name) for record in records] for name in names}


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the round looked like before anything was left out."""
    scores = [row["score"] for row in rows if row["score"] is not None]
    groups: dict[int, set[str]] = {}
    for row in rows:
        groups.setdefault(row["group"], set()).update({row["outcome"]} - {"unscored"})
    outcomes = [found for found in groups.values() if found]
    ends = Counter(row["finish_reason"] for row in rows)
    tokens = [logp for row in rows for logp in row["logps"]]
    lengths = [len(row["completion_ids"]) for row in rows]
    found = {
        "rounds/reward": sum(scores) / len(scores) if scores else float("nan"),
        "rounds/unscored": 1 - len(scores) / len(rows),
        "rounds/truncated": ends["length"] / len(rows),
        "rounds/no_signal": sum(not row["signal"] for row in rows) / len(rows),
        "rounds/entropy": -sum(tokens) / max(1, len(tokens)),
        "rounds/length": sum(lengths) / len(lengths),
        "rounds/tokens": float(sum(lengths)),
        "rounds/completions": float(len(rows)),
    }
    if outcomes:
        found["rounds/all_right"] = sum(kinds == {"correct"} for kinds in outcomes) / len(outcomes)
        found["rounds/all_wrong"] = sum(kinds == {"wrong"} for kinds in outcomes) / len(outcomes)
    return found


def _no_signal(rows: Sequence[Mapping[str, Any]], empty: int, maker: RowMaker) -> str:
    counts = Counter("unscored" if row["score"] is None else f"{row['score']:g}" for row in rows)
    seen = ", ".join(f"{count} x {score}" for score, count in counts.most_common(5))
    ends = ", ".join(f"{count} x {reason}" for reason, count in Counter(r["finish_reason"] for r in rows).most_common())
    return (
        f"{empty} rounds in a row {maker.nothing}. The last one's rewards: {seen}; completions ended with: {ends}. "
        f"{maker.way_out}, a larger max_completion_length or mask_truncated_completions=False if they were cut, or "
        "raise max_empty_rounds"
    )
