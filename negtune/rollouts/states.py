"""Rollouts from the states of solutions: a prompt and the first steps of an answer to it.

They are drawn and scored once and kept in a store, under the key of prompt, prefix and number, so that solutions that
begin alike share them, more can be added later, and a killed search goes on where it was. From the bare prompt the
solutions themselves are the first rollouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from negtune.credit import Tally
from negtune.data.steps import Splitter, StepError, TokenSteps, token_steps
from negtune.rollouts.collect import RECENT, Progress, in_parts, rollout_record, score
from negtune.rollouts.sampler import Prompt, Request, Sampler, SamplingParams
from negtune.rollouts.store import RecordStore
from negtune.verifiers.verdict import Verdict, Verifier, stop_if_unscored


@dataclass(frozen=True)
class State:
    """Prompt, and the ids of the first steps; `columns` are what a verifier wants to know of the prompt."""

    prompt: Prompt
    prefix: tuple[int, ...]
    columns: Mapping[str, Any]

    def request(self, number: int) -> Request:
        return Request(self.prompt, list(self.prefix) if self.prefix else "", number)


@dataclass(frozen=True)
class Solution:
    """A completion of a bare prompt, cut into steps.

    Args:
        key: of its rollout.
        prompt, prompt_ids, completion_ids, logps: of the rollout.
        columns: of its row.
        outcome: whether it is correct; None if it could not be scored.
        steps: on its tokens.
        temperature, truncated: at which, and whether from a cut distribution, it was drawn.
    """

    key: str
    prompt: Prompt
    prompt_ids: list[int]
    completion_ids: list[int]
    logps: list[float]
    columns: Mapping[str, Any]
    outcome: bool | None
    steps: TokenSteps
    temperature: float = 1.0
    truncated: bool = False

    def state(self, i: int) -> State:
        """After the first `i` steps, not all of them."""
        return State(self.prompt, tuple(self.steps.prefix(self.completion_ids, i)), self.columns)


class StateRollouts:
    """Rollouts from states, drawn and scored once each, however often they are asked for.

    Args:
        sampler: of the policy whose steps are judged, or of another one (a prover).
        verifier: of the finished solution.
        rollouts: store of the solutions, read only.
        continuations, verdicts: stores that this process writes to; what they have is used.
        params: of the draw.
        name: of the verifier with its settings, see `collect.verify`.
        part: completions between two writes.
        max_unscored: share of recent completions that the verifier may fail on.
        progress: told the completions of this call.
    """

    def __init__(
        self,
        sampler: Sampler,
        verifier: Verifier,
        rollouts: RecordStore,
        continuations: RecordStore,
        verdicts: RecordStore,
        params: SamplingParams,
        *,
        name: str,
        part: int = 256,
        max_unscored: float = 0.2,
        progress: Progress | None = None,
    ) -> None:
        self._sampler, self._verifier, self._params = sampler, verifier, params
        self._stores, self._verdicts, self._name = (rollouts, continuations), verdicts, name
        self._part, self._max_unscored, self._progress = part, max_unscored, progress
        self._tokens = {r["key"]: len(r["completion_ids"]) for store in self._stores for r in store}
        self._outcomes = {
            record["rollout"]: record["outcome"]
            for record in verdicts
            if record["verifier"] == name and record.get("final", True) and record["rollout"] in self._tokens
        }
        self._keys: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        self._seen: list[Verdict] = []
        self.drawn = self.drawn_tokens = 0

    def context(self) -> dict[str, Any]:
        """Everything that decides what a rollout is and how it is scored, besides its state."""
        return {"policy": self._sampler.policy, "verifier": self._name, "draw": vars(self._params)}

    def forget(self) -> None:
        """Drop what is known of rollouts, after the sampler got other weights: none of it will be asked for again."""
        self._tokens.clear()
        self._outcomes.clear()
        self._keys.clear()

    def keys(self, state: State, n: int) -> list[str]:
        """Of the first `n` rollouts from `state`."""
        known = self._keys.setdefault((str(state.prompt), state.prefix), [])
        known += [state.request(i).key(self._params, self._sampler.policy) for i in range(len(known), n)]
        return known[:n]

    def tallies(self, wanted: Sequence[tuple[State, int]]) -> list[Tally]:
        """How the first so many rollouts from each state ended; those that are missing are drawn and scored first."""
        requests = {key: (state.request(i), state) for state, n in wanted for i, key in enumerate(self.keys(state, n))}
        missing = [key for key in requests if key not in self._outcomes]
        for done, keys in enumerate(in_parts(missing, self._part)):
            self._draw_and_score({key: requests[key] for key in keys})
            if self._progress is not None:
                self._progress(done * self._part + len(keys), len(missing), sum(self._tokens[key] for key in keys))
        return [self._tally(state, n) for state, n in wanted]

    def tokens(self, state: State, n: int) -> int:
        """Drawn for the first `n` rollouts from `state`."""
        return sum(self._tokens[key] for key in self.keys(state, n))

    def _tally(self, state: State, n: int) -> Tally:
        ends = Counter(self._outcomes.get(key, "unscored") for key in self.keys(state, n))
        return Tally(ends["correct"], ends["wrong"], ends["unscored"])

    def _draw_and_score(self, requests: Mapping[str, tuple[Request, State]]) -> None:
        """Those that were drawn before a kill are scored only."""
        new = {key: pair for key, pair in requests.items() if not any(key in store for store in self._stores)}
        there = requests.keys() - new.keys()
        records = [r for store in self._stores for r in store if r["key"] in there] if there else []
        if new:
            rollouts = self._sampler.draw([request for request, _ in new.values()], self._params)
            drawn = [rollout_record(r, state.columns) for r, (_, state) in zip(rollouts, new.values(), strict=True)]
            self._stores[1].append(drawn)
            records += drawn
            self._tokens |= {r["key"]: len(r["completion_ids"]) for r in drawn}
            self.drawn += len(drawn)
            self.drawn_tokens += sum(len(r["completion_ids"]) for r in drawn)
        verdicts, found = score(records, self._verifier, name=self._name)
        self._verdicts.append(verdicts)
        self._outcomes |= {verdict["rollout"]: verdict["outcome"] for verdict in verdicts}
        self._seen = [*self._seen, *found][-RECENT:]
        stop_if_unscored(self._seen, self._max_unscored)


def solutions(
    rollouts: RecordStore,
    verdicts: RecordStore,
    name: str,
    tokenizer: Any,
    splitter: Splitter,
    *,
    outcomes: Sequence[str] = ("wrong",),
    policy: str | None = None,
    per_prompt: int | None = 8,
) -> Iterator[Solution]:
    """Completions of bare prompts in a store that ended in one of `outcomes`, cut into steps.

    Args:
        rollouts, verdicts, name: stores, and the verifier whose verdicts count.
        tokenizer, splitter: see `token_steps`.
        outcomes: `correct`, `wrong`.
        policy: drawn from these weights only.
        per_prompt: at most so many of one prompt and outcome; the paper takes 8 wrong ones. None: all.

    Raises:
        StepError: naming the rollout.
    """
    found = {record["rollout"]: record["outcome"] for record in verdicts if record["verifier"] == name}
    taken: Counter[tuple[str, str]] = Counter()
    for record in rollouts:
        outcome = found.get(record["key"])
        if record["prefix"] or outcome not in outcomes or policy not in (None, record["policy"]):
            continue
        of_prompt = (str(record["prompt"]), outcome)
        taken[of_prompt] += 1
        if per_prompt is not None and taken[of_prompt] > per_prompt:
            continue
        try:
            steps = token_steps(record["completion_ids"], tokenizer, splitter)
        except StepError as error:
            raise StepError(f"rollout {record['key']}: {error}") from None
        yield Solution(
            record["key"],
            record["prompt"],
            record["prompt_ids"],
            record["completion_ids"],
            record["logps"],
            record.get("columns") or {},
            None if outcome == "unscored" else outcome == "correct",
            steps,
            record["temperature"],
            record.get("truncated", False),
        )
